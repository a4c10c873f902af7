"""Every class and function that the rules allow, tried in a process that watches what it does (`canaries`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def watched(*arguments: str) -> Any:
    command = [sys.executable, "-W", "ignore", "-m", "tests.sources.canaries", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("packages", "least"),
    [(["torch"], 300), pytest.param(["torch", "timm", "transformers"], 8000, marks=pytest.mark.slow)],
    ids=["torch", "all"],
)
def test_no_code_of_a_class_runs_when_a_file_makes_one(packages: list[str], least: int) -> None:
    for package in packages:
        pytest.importorskip(package)
    result = watched("classes", *packages)
    assert result["tried"] >= least
    assert result["built"] >= 0.85 * result["tried"]  # the others are abstract, or have a state of their own
    assert result["acted"] == {}


def test_no_function_that_a_file_may_name_acts(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    result = watched("functions", str(tmp_path / "canary"))
    assert result["tried"] >= 250
    assert result["kinds"] >= 20
    assert result["acted"] == {}
    assert any("open" in event for event in result["control"]), "the watch sees nothing"
    assert [path.name for path in tmp_path.iterdir()] == ["canary.control"]
