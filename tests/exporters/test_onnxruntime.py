"""ONNX files in ONNX Runtime: what its optimizer breaks, what cannot be opened, and what an artifact tells of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from normfuse.errors import ExportError, InputError
from normfuse.exporters import onnx as exporter
from normfuse.exporters import onnxruntime as runtime
from normfuse.program import Program
from tests.exporters.agreement import excess

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

PLAIN = "without graph optimizations"


class Mixed(nn.Module):
    """A BatchNorm over another axis than a product writes; ONNX Runtime folds it into the product all the same."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.weight, self.norm = nn.Parameter(torch.randn(6, 6)), nn.BatchNorm1d(6)
        for each in (self.norm.weight, self.norm.bias, self.norm.running_mean):
            nn.init.normal_(each)  # type: ignore[arg-type]
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        z: Tensor = self.norm(y.T if self.transposed else y.reshape(-1, 6, 3))
        return z


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("opset", [18, 20, 23])
def test_a_miscompile_of_the_optimizer_shows(tmp_path: Path, transposed: bool, opset: int) -> None:
    x = torch.randn(6 if transposed else 3, 6)
    program = Program.trace(Mixed(transposed).eval(), (x,))
    exporter.export(program, tmp_path / "m.onnx", opset=opset)
    artifact = runtime.open_artifact(tmp_path / "m.onnx")
    far = {how: excess(program, (x,), run((x,))) for how, run in artifact.runs.items()}
    assert far[PLAIN] < 1
    assert far[""] > 1000, "this ONNX Runtime is repaired: say so in docs/exporters.md"
    assert artifact.widened is not None
    assert excess(program, (x,), artifact.widened((x,))) < 1


def test_what_an_artifact_tells(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8)
    program = Program.trace(nn.Sequential(nn.RMSNorm(8)), (x,), dynamic_shapes=({0: Dim("batch")},))
    exporter.export(program, tmp_path / "m.onnx")
    artifact = runtime.open_artifact(tmp_path / "m.onnx")
    assert artifact.name == "m.onnx"
    assert artifact.runtime.startswith("ONNX Runtime 1.")
    assert artifact.runtime.endswith("(CPU)")
    assert artifact.notes == ("ONNX Runtime runs 1 SimplifiedLayerNormalization",)
    assert artifact.inputs is not None
    assert artifact.inputs[0].shape == ("batch", 3, 8)
    for wrong in ([], [x, x], [x.double()], [x[0]]):
        with pytest.raises(InputError):
            artifact.runs[""](wrong)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_no_provider_is_taken_for_another(tmp_path: Path) -> None:
    exporter.export(Program.trace(nn.ReLU(), (torch.randn(2),)), tmp_path / "m.onnx")
    with pytest.raises(ExportError) as raised:
        runtime.open_artifact(tmp_path / "m.onnx", provider="Nonexistent")
    assert raised.value.hint or "Nonexistent" in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x0a\x12\x00"])
def test_a_broken_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ExportError, match=r"m\.onnx") as raised:
        runtime.open_artifact(tmp_path / "m.onnx")
    assert "\n" not in str(raised.value)
    with pytest.raises(ExportError, match="missing"):
        runtime.open_artifact(tmp_path / "missing.onnx")


def test_weights_beside_the_file_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "LARGEST_FILE", 100)
    x = torch.randn(2, 8)
    program = Program.trace(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), (x,))
    info = exporter.export(program, tmp_path / "m.onnx")
    assert info.data is not None
    artifact = runtime.open_artifact(tmp_path / "m.onnx")
    others: dict[str, Any] = {"wide": artifact.widened, "nudged": artifact.nudged}
    for run in (*artifact.runs.values(), *others.values()):
        assert excess(program, (x,), run((x,))) < 2
