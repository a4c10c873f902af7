"""A newcomer's pipeline, as docs/ci.md tells it: train, rewrite, lock, export, verify, and a test of their own."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import normfuse
from normfuse.api.verification import assert_equivalent
from normfuse.cli import main

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
PAGE = Path(__file__).parents[2] / "docs" / "ci.md"


def trained(seed: int = 0, *, gated: bool = False) -> nn.Module:
    """A small Pre-LN model after a few steps of training."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x + self.down(torch.relu(self.up(self.norm(x))))
            return y * torch.sigmoid(x.mean()) if gated else y

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), Block(), Block(), nn.LayerNorm(16), nn.Linear(16, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        x = torch.randn(32, 8)
        loss = (model(x) - x[:, :5].exp()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def save(model: nn.Module, path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.export.save(torch.export.export(model, (torch.randn(4, 8),), dynamic_shapes=({0: batch},)), path)


def commands() -> Iterator[list[str]]:
    """The commands of the page."""
    block = re.search(r"```sh\n(.*?)```", PAGE.read_text(), re.S)
    assert block is not None
    for line in block[1].splitlines():
        yield shlex.split(line.partition("#")[0])[1:]


def test_the_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(trained(), Path("model.pt2"))
    for words in commands():
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, (words, result.output)
    assert "<testsuite" in Path("equivalence.xml").read_text()
    page = Path("equivalence.html").read_text()
    assert "equivalent" in page
    assert str(tmp_path) not in page


def test_a_new_version_of_the_model_is_told_by_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, *_ = commands()
    save(trained(), Path("model.pt2"))
    assert CliRunner().invoke(main, first).exit_code == 0
    locked = [*first[: first.index("--plan")], "--locked", "plan.json", "--json"]
    save(trained(seed=1), Path("model.pt2"))  # retrained: the same plan
    assert CliRunner().invoke(main, locked).exit_code == 0
    Path("model.fast.pt2").unlink()
    save(trained(gated=True), Path("model.pt2"))  # another model
    result = CliRunner().invoke(main, locked)
    assert result.exit_code == 1
    assert json.loads(result.stdout)["drift"]
    assert not Path("model.fast.pt2").exists()
    Path("plan.json").write_text("{}")
    assert CliRunner().invoke(main, locked).exit_code == 2


def test_a_file_of_other_weights_is_not_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(trained(), Path("model.pt2"))
    save(trained(seed=1), Path("other.pt2"))
    normfuse.export("other.pt2", "other.onnx")
    result = CliRunner().invoke(main, ["verify", "model.pt2", "other.onnx", "--json"])
    assert result.exit_code == 1
    with pytest.raises(AssertionError, match=r"other.onnx is not model.pt2: outputs differ by"):
        assert_equivalent("model.pt2", "other.onnx")
    result = CliRunner().invoke(main, ["verify", "model.pt2", "other.pt2", "--bisect", "--json"])
    assert json.loads(result.stdout)["parts_at"]["node"].startswith("linear")
    result = CliRunner().invoke(main, ["verify", "model.pt2", "other.onnx", "--bisect"])
    assert result.exit_code == 1
    assert "linear" in result.stdout


def test_two_files_without_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        save(trained(seed), Path(f"{name}.pt2"))
        normfuse.export(f"{name}.pt2", f"{name}.onnx", opset=20 if name == "a" else 23)
    assert normfuse.verify("a.onnx", "b.onnx").ok
    assert not normfuse.verify("a.onnx", "c.onnx").ok
    assert normfuse.verify("a.onnx", "b.pt2").ok  # the program is the reference wherever it stands


def test_the_fixture(normfuse_equivalent, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = trained()
    fast = normfuse.rewrite(model, "all", (torch.randn(4, 8),))
    assert normfuse_equivalent(model, fast, (torch.randn(4, 8),)).ok
    with pytest.raises(AssertionError, match="is not"):
        normfuse_equivalent(model, trained(seed=1), (torch.randn(4, 8),))
