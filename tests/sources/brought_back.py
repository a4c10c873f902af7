"""One command for what is brought, and what came back: for the tests, and as a table.

python -m tests.sources.brought_back [NAME ...]     prints a row for each
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from click.testing import CliRunner

from normfuse.cli import main
from tests.sources.brought import ALL, Brought


class StockProcess:
    """A process without normfuse that opens what was brought and what came back; it goes on until it is closed."""

    def __init__(self, cache: Path) -> None:
        script = Path(__file__).with_name("brought_process.py")
        env = {**os.environ, "HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        command = [sys.executable, "-W", "ignore", str(script)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=env, cwd=cache, **pipes)

    def __enter__(self) -> StockProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.communicate(timeout=30)

    def told(self, **pair: Any) -> dict[str, Any]:
        """What it has to tell of a pair."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(pair) + "\n")
        self.process.stdin.flush()
        told: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert "error" not in told, told["error"]
        return told


@dataclass(frozen=True)
class Returned:
    """What a command made of something brought."""

    original: Path
    path: Path
    report: dict[str, Any]
    flags: tuple[str, ...]

    @property
    def norms(self) -> int:
        """How many norms were rewritten."""
        return len({each["node"] for each in self.report["rewrites"] if each["was"] in self.report["norms"]["before"]})

    @property
    def stay(self) -> str:
        """Why the others were not."""
        done = {each["node"] for each in self.report["rewrites"]}
        return " ".join(sorted({each["code"] for each in self.report["refusals"] if each["node"] not in done}))

    @cached_property
    def differing(self) -> set[str]:
        """Names of stored tensors whose bytes are others; everything else of the files is the same to the last byte."""
        before, after = _contents(self.original), _contents(self.path)
        assert list(before) == list(after)
        differing = set()
        for name, content in before.items():
            assert list(content) == list(after[name]), name
            differing |= {key for key in content if content[key] != after[name][key]}
        return differing

    @property
    def count(self) -> int:
        """How many tensors are stored."""
        files = (each for name, each in _contents(self.original).items() if name.endswith(_TENSORS))
        return sum(isinstance(value, tuple) for each in files for value in each.values())


_TENSORS = (".safetensors", ".pth", ".ckpt", ".pt", ".bin")


def _contents(path: Path) -> dict[str, dict[str, Any]]:
    """Every file, with what it holds by names; where each tensor lies is a part of it."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name if path.is_dir() else file.suffix: _content(file) for file in files}


def _content(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        data = file.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
        return {
            key: (each, body[slice(*each["data_offsets"])]) if key != "__metadata__" else each for key, each in header.items()
        }
    if file.suffix in _TENSORS:
        content = torch.load(file, weights_only=True)
        state = content.get("state_dict", content.get("model_state_dict", content))
        others = {key: value for key, value in content.items() if content is not state and value is not state}
        return others | {key: (each.dtype, each.shape, each.numpy().tobytes()) for key, each in state.items()}
    return {"": file.read_bytes()}


def bring(brought: Brought, folder: Path) -> tuple[Returned, Any]:
    """Save a model and give it to the command; what came back, and what to compare it on."""
    model, original = brought.build(), folder / ("m" if brought.is_folder else brought.form)
    brought.save(model, original)
    out = folder / f"out{original.suffix}"
    return rewritten(original, out, brought.passes, *brought.flags), brought.inputs(model)


def rewritten(original: Path, out: Path, passes: str, *flags: str) -> Returned:
    """The command."""
    words = ["rewrite", str(original), *flags, "--pass", passes, "-o", str(out), "--json"]
    answer = CliRunner().invoke(main, words)
    assert answer.exit_code == 0, answer.output
    return Returned(original, out, json.loads(answer.stdout), flags)


def _row(name: str, brought: Brought, stock: StockProcess, folder: Path) -> list[Any]:
    back, inputs = bring(brought, folder)
    before, after = (
        ", ".join(f"{count} {kind}" for kind, count in back.report["norms"][when].items()) or "none"
        for when in ("before", "after")
    )
    row = [name, brought.model, brought.form, brought.passes, f"{before} → {after}", back.norms]
    if not back.path.exists():
        return [*row, "nothing written", "", "", "", back.stay]
    torch.save(inputs, folder / "inputs.pt")
    pair = {"original": str(back.original), "rewritten": str(back.path), "inputs": str(folder / "inputs.pt")}
    told = stock.told(**brought.opened, **pair)
    tensors = back.report["tensors"]
    same = set(tensors["changed"]) == back.differing
    first, second = told["tokens"]
    tokens = "" if first is None else "same" if first == second else "OTHER"
    return [*row, len(tensors["changed"]), tensors["kept"], f"{told['apart']:.0e}", tokens, back.stay, "" if same else "BYTES"]


HEAD = (
    "",
    "class",
    "form",
    "pass",
    "norms",
    "rewritten",
    "tensors changed",
    "kept",
    "greatest error",
    "tokens",
    "others stay: why",
)


def print_table(names: list[str]) -> None:
    """A row for each model."""
    print("|" + "|".join(HEAD) + "|\n" + "|---" * len(HEAD) + "|")
    with tempfile.TemporaryDirectory() as cache, StockProcess(Path(cache)) as stock:
        for name in names or ALL:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    row = _row(name, ALL[name], stock, Path(folder))
                except Exception as error:
                    row = [name, f"{type(error).__name__}: {error}"]
            print("|" + "|".join(map(str, row)) + "|", flush=True)


if __name__ == "__main__":
    print_table(sys.argv[1:])
