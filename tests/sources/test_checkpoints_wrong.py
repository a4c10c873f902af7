"""Checkpoints with an architecture that are not what they should be: one line, exit code 2, nothing written, nothing run."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.sources.test_brought_back import asked
from tests.sources.test_folders_wrong import everything, gpt2, refused, shard
from tests.zoo.spread import spread

timm: Any = pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore")
__all__ = ["gpt2"]

ARCHITECTURE, SPEC = "timm:resnet10t,num_classes=7", "float32[2,3,32,32]"
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    held: State = spread(timm.create_model("resnet10t", num_classes=7)).eval().state_dict()
    return held


class Acts:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def saved_bytes(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def first_as(state: State, dtype: torch.dtype) -> State:
    return {key: each.to(dtype) if key.endswith(".conv1.weight") else each for key, each in state.items()}


CONTENT: dict[str, tuple[Callable[[State], Any], str]] = {
    "tensors missing": (lambda s: dict([*s.items()][3:]), "do not fit its architecture: missing conv1.0.weight, conv1.1.bias"),
    "tensors left over": (lambda s: {**s, "zzz.weight": torch.ones(3)}, "do not fit its architecture: unexpected zzz.weight"),
    "another shape": (lambda s: {**s, "fc.bias": torch.ones(9)}, "of another shape fc.bias (9, where the model has 7)"),
    "int8": (lambda s: first_as(s, torch.int8), "is stored as int8"),
    "float8": (lambda s: first_as(s, torch.float8_e4m3fn), "is stored as float8_e4m3fn"),
    "packed": (lambda s: {**s, "fc.qweight": s["fc.bias"].int()}, "is quantized (as gptq and awq do it)"),
    "two models": (
        lambda s: {f"{who}.{key}": each for who in ("student", "other") for key, each in s.items()},
        "are there 2 times, as student.*, other.*",
    ),
    "nothing": (lambda s: {}, "holds no weights"),
    "a list": (lambda s: [1, 2], "holds no weights, but a list"),
    "a tensor": (lambda s: torch.ones(3), "holds no weights"),
    "cut at its end": (lambda s: saved_bytes(s)[:-100], "is damaged or cut short"),
    "cut in two": (lambda s: saved_bytes(s)[: len(saved_bytes(s)) // 2], "is damaged or cut short"),
    "empty": (lambda s: b"", "is empty"),
    "a text": (lambda s: b"hello\n", "is a text file"),
    "a web page": (lambda s: b"<!doctype html>", "is a web page"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", CONTENT)
def test_a_checkpoint_that_is_wrong_is_one_line(wrong: str, state: State, tmp_path: Path) -> None:
    made, said = CONTENT[wrong]
    content = made(state)
    (tmp_path / "c.pth").write_bytes(content if isinstance(content, bytes) else saved_bytes(content))
    before = everything(tmp_path)
    words = ("--model", ARCHITECTURE, "--pass", "conv_bn", "--input", SPEC, "-o", tmp_path / "out.pth")
    refused(asked("rewrite", tmp_path / "c.pth", *words), said)
    assert everything(tmp_path) == before


def test_a_checkpoint_that_acts_does_not(state: State, tmp_path: Path) -> None:
    """Neither as weights nor beside them; what stands beside them is written as it stood, and said."""
    canary = tmp_path / "acted"
    words = ("--model", ARCHITECTURE, "--pass", "conv_bn", "--input", SPEC, "--verify", "structure", "-o", tmp_path / "out.pth")
    torch.save({"state_dict": Acts(canary)}, tmp_path / "c.pth")
    refused(asked("rewrite", tmp_path / "c.pth", *words), "holds no weights")
    torch.save({"state_dict": {**state, "fc.bias": Acts(canary)}}, tmp_path / "c.pth")
    refused(asked("rewrite", tmp_path / "c.pth", *words), "missing fc.bias")
    torch.save({"state_dict": state, "args": Acts(canary)}, tmp_path / "c.pth")
    answer = asked("rewrite", tmp_path / "c.pth", *words)
    assert answer.exit_code == 0, answer.output
    assert "none of it was read or run" in answer.output
    assert not canary.exists()


ARCHITECTURES = {
    "resnet10t": "names no architecture",
    "timm:": "names no architecture",
    "timm:nope": "timm has no model 'nope'",
    "torchvision:nope": "torchvision has no model 'nope'",
    "timm:resnet10t,num_classes": "is no setting of a model",
    "timm:resnet10t,nope=1": "cannot be built",
    "torchvision:resnet18": "do not fit its architecture",
    "transformers:nowhere": "cannot read nowhere/config.json",
    "missing.py:build": "there is no file",
    "missing.py": "is no Python file",
    "mine.py:number": "makes a int, not a model",
    "mine.py:leaves": "SystemExit",
    "mine.py:fails": "ZeroDivisionError",
    "mine.py:nothing": "has no function 'nothing'",
    "stops.py:build": "SystemExit",
    "wants.py:build": "No module named 'a_strange_package'",
}
MINE = """
def number(): return 3
def leaves(): raise SystemExit(0)
def fails(): 1 / 0
"""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_architecture_that_is_none_is_one_line(
    architecture: str, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(state, "c.pth")
    for name, text in {"mine": MINE, "stops": "raise SystemExit(0)", "wants": "import a_strange_package"}.items():
        Path(f"{name}.py").write_text(text)
    before = everything(tmp_path)
    answer = asked("rewrite", "c.pth", "--model", architecture, "--pass", "conv_bn", "--input", SPEC, "-o", "out.pth")
    refused(answer, ARCHITECTURES[architecture])
    assert "pip install" not in answer.output
    assert everything(tmp_path) == before


def test_one_of_several_files_is_not_all_of_them(gpt2: Path, tmp_path: Path) -> None:
    for words in ([], ["--model", f"transformers:{gpt2}"]):
        answer = asked("rewrite", shard(gpt2), *words, "--pass", "pre_rmsnorm", "-o", tmp_path / "out.safetensors")
        refused(answer, "is one of 4 files that belong together")
    for name in ("model.safetensors.index.json", "config.json"):
        answer = asked("rewrite", gpt2 / name, "--pass", "pre_rmsnorm", "-o", tmp_path / "out")
        refused(answer, "is a JSON text, not a model")
        assert "name the folder that it is in" in answer.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["os.posix_fallocate", "os.pwrite", "os.truncate"])
def test_a_full_disk_leaves_no_checkpoint(call: str, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(state, tmp_path / "c.safetensors")
    before = everything(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(call, full)
    words = ("--model", ARCHITECTURE, "--pass", "conv_bn", "--input", SPEC, "--verify", "structure")
    answer = asked("rewrite", tmp_path / "c.safetensors", *words)
    refused(answer, "No space left on device")
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("brought", "named"), [("c.safetensors", "out.pth"), ("c.pth", "out.safetensors"), ("c.pth", "out.pt2")]
)
def test_a_checkpoint_is_named_as_what_it_is(brought: str, named: str, state: State, tmp_path: Path) -> None:
    (save_file if brought.endswith("safetensors") else torch.save)(state, tmp_path / brought)
    words = ("--model", ARCHITECTURE, "--pass", "conv_bn", "--input", SPEC, "--dry-run", "-o", tmp_path / named)
    answer = asked("rewrite", tmp_path / brought, *words)
    if named.endswith(".pt2"):
        assert answer.exit_code == 0, answer.output
    else:
        refused(answer, "is named otherwise")


# -- a module of a class of one's own ----------------------------------------------------------------------------------

NET = """
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 3)
    def forward(self, x):
        return self.last(self.norm(x))
"""


def test_a_class_of_a_file_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--model my_net.py` reads a pickle of its class; without it the hint names the file, and no package."""
    import importlib
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("my_net_of_cli.py").write_text(NET)
    sys.path.append(str(tmp_path))
    module: nn.Module = spread(importlib.import_module("my_net_of_cli").Net()).eval()
    torch.save(module, "net.pt")
    del sys.modules["my_net_of_cli"]
    sys.path.pop()
    words = ("--pass", "fold_affine", "--input", "float32[2,5,8]")
    answer = asked("rewrite", "net.pt", *words)
    refused(answer, "my_net_of_cli.Net")
    assert "--model my_net_of_cli.py" in answer.output
    assert "install" not in answer.output
    answer = asked("rewrite", "net.pt", "--model", "my_net_of_cli.py", *words)
    assert answer.exit_code == 0, answer.output
    x = torch.randn(2, 5, 8)
    assert torch.allclose(torch.export.load("net.rewritten.pt2").module()(x), module(x), atol=1e-5)
    sys.modules.pop("my_net_of_cli", None)
