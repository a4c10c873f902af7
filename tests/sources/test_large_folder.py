"""A plan for a folder keeps no more of it in memory than a tensor or two, whatever its size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from normfuse.sources import mapped

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not mapped._kernel_tells(), reason="this system does not tell of pages")
def test_a_plan_reads_what_it_needs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.sources.large_folder", str(tmp_path), "8", "1024", "16384"]
    told = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout)
    largest = 4 * 1024 * 16384
    assert told["size"] > 7 * largest
    assert told["growth"] < 2 * largest
