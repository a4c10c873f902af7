"""Commands that write, killed at moments of their runs: the old or the new file is there, and nothing else after the next."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.dom import minidom

import torch

from tests.fuzz.files import good_model
from tests.kills import killed_at_moments

SPEC = ("--input", "float32[2,4]")


@dataclass(frozen=True)
class Writing:
    """A command that writes.

    Attributes:
        words: the command, in a folder that has ``model.pt`` and ``data.pt``.
        outputs: the files that it writes.
    """

    words: tuple[str, ...]
    outputs: tuple[str, ...]


WRITING = {
    "rewrite": Writing(("rewrite", "model.pt", "--pass", "all", "-o", "out.pt2", "--report", "out.json", *SPEC),
                       ("out.pt2", "out.json")),
    "export": Writing(("export", "model.pt", "-o", "out.onnx", *SPEC), ("out.onnx",)),
    "verify": Writing(("verify", "model.pt", "model.pt", "--html", "out.html", "--junit", "out.xml", *SPEC),
                      ("out.html", "out.xml")),
    "calibrate": Writing(("calibrate", "model.pt", "--data", "data.pt", "-o", "out.json"), ("out.json",)),
    "strip": Writing(("strip", "model.pt", "--data", "data.pt", "--max-loss-increase", "9", "-o", "out.pt2"), ("out.pt2",)),
}  # fmt: skip


def whole(path: Path) -> bool:
    """Whether a file is one that its reader takes."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".xml":
            minidom.parse(str(path))
        elif path.suffix == ".html":
            return path.read_text().rstrip().endswith("</html>")
        elif path.suffix == ".pt2":
            return zipfile.ZipFile(path).testzip() is None
        elif path.suffix == ".onnx":
            import onnx

            onnx.checker.check_model(str(path))
    except Exception:
        return False
    return True


@dataclass
class Kills:
    """What kills of one command left.

    Attributes:
        moments: how often it was killed.
        killed: how often before it was done.
        half: files that no reader takes.
        strays: files that are left after the next whole run.
    """

    moments: int = 0
    killed: int = 0
    half: int = 0
    strays: int = 0


def kills(name: str, moments: int, folder: Path, *, chdir: Callable[[Path], None]) -> Kills:
    """Kill a command at moments spread over its run, then let it run once.

    Args:
        name: of `WRITING`.
        moments: how many kills.
        folder: an empty one to work in.
        chdir: goes to the folder.
    """
    writing, found = WRITING[name], Kills(moments)
    torch.save(good_model(), folder / "model.pt")
    torch.save({"arg0": torch.randn(8, 4), "targets": torch.randint(3, (8,))}, folder / "data.pt")
    chdir(folder)

    def check() -> None:
        found.half += sum(not whole(folder / each) for each in writing.outputs if (folder / each).exists())

    found.killed, _ = killed_at_moments(writing.words, moments, prepare=lambda: None, check=check)
    killed_at_moments(writing.words, 0, prepare=lambda: None, check=check)
    expected = {"model.pt", "data.pt", *writing.outputs}
    found.strays = sum(each.name not in expected for each in folder.iterdir())
    shutil.rmtree(folder)
    return found
