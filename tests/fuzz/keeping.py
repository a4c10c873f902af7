"""What once failed, in ``kept/``: seeds of models, and files with their kind. The tests replay all of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "kept"


def keep_seed(seed: int, verdict: str, told: str) -> None:
    """Keep the seed of a model."""
    (FOLDER / f"graph-{seed}.seed").write_text(json.dumps({"seed": seed, "was": verdict, "told": told}) + "\n")


def keep_file(kind: str, seed: int, verdict: str, words: Sequence[str], path: Path | None) -> None:
    """Keep a file, or the word behind ``--input`` where there is none."""
    stem = f"{kind.replace(' ', '-').replace('.', '')}-{seed}"
    if path is not None:
        shutil.copyfile(path, FOLDER / f"{stem}{path.suffix}")
    held = {"kind": kind, "was": verdict, "file": path and f"{stem}{path.suffix}", "spec": None if path else words[-1]}
    (FOLDER / f"{stem}.case").write_text(json.dumps(held) + "\n")


def kept_seeds() -> list[int]:
    """Seeds of models that once failed."""
    return sorted(json.loads(each.read_text())["seed"] for each in FOLDER.glob("*.seed"))


def kept_files() -> list[dict[str, Any]]:
    """Files that once failed: their kind, and the file or the word behind ``--input``."""
    return [json.loads(each.read_text()) for each in sorted(FOLDER.glob("*.case"))]
