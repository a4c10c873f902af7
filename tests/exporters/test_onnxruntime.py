"""ONNX files in ONNX Runtime: what its optimizer breaks, what cannot be opened, and what an artifact tells of itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from normfuse.errors import ExportError, InputError
from normfuse.exporters import onnx as exporter
from normfuse.exporters import onnxruntime as runtime
from normfuse.graph.program import Program
from normfuse.proof.cases import Case
from normfuse.proof.equivalence import compare
from normfuse.proof.sides import artifact_side, ports_of, program_side
from tests.exporters.agreement import excess

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

PLAIN = "without graph optimizations"


class Mixed(nn.Module):
    """A BatchNorm over another axis than a product writes; ONNX Runtime up to 1.31 folds it into the product all the same."""

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


class Folded(nn.Module):
    """What the miscompile makes of `Mixed`: the BatchNorm's scale on the columns of the product, its shift behind it."""

    def __init__(self, original: Mixed) -> None:
        super().__init__()
        norm, self.transposed = original.norm, original.transposed
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        self.weight, self.shift = nn.Parameter(original.weight * scale), nn.Parameter(norm.bias - norm.running_mean * scale)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight + self.shift
        return y.T if self.transposed else y.reshape(-1, 6, 3)


@dataclass(frozen=True)
class Mix:
    """A `Mixed`, its inputs, its file, and the file of its miscompiled form."""

    program: Program
    inputs: tuple[Tensor, ...]
    honest: Path
    broken: Path

    def verdicts(self, path: Path) -> dict[str, bool]:
        """What the comparison says of each way to run a file."""
        artifact = runtime.open_artifact(path)
        cases = [Case("as given", self.inputs)]
        evidence = compare(program_side("mixed", self.program), artifact_side(artifact, ports_of(self.program)), cases)
        said = dict(zip(artifact.runs, (row.ok for row in evidence.rounding), strict=True))
        assert evidence.ok == (all(said.values()) and all(row.ok for row in evidence.algebra))
        return said


@pytest.fixture(params=[(opset, transposed) for opset in (18, 20, 23) for transposed in (True, False)], ids=str)
def mix(request: pytest.FixtureRequest, tmp_path: Path) -> Mix:
    opset, transposed = request.param
    module, x = Mixed(transposed).eval(), torch.randn(6 if transposed else 3, 6)
    made = Mix(Program.trace(module, (x,)), (x,), tmp_path / "m.onnx", tmp_path / "broken.onnx")
    exporter.export(made.program, made.honest, opset=opset)
    exporter.export(Program.trace(Folded(module), (x,)), made.broken, opset=opset)
    return made


def test_the_verdict_is_what_the_runtime_does(mix: Mix) -> None:
    """ONNX Runtime may have its miscompile or not: whether it shows is computed from its sessions alone."""
    (optimized,), (plain,) = (
        runtime.run(mix.honest, [x.numpy() for x in mix.inputs], optimized=each) for each in (True, False)
    )
    miscompiled = bool(np.abs(optimized - plain).max() > 1e-2 * np.abs(plain).max())
    assert mix.verdicts(mix.honest) == {"": not miscompiled, PLAIN: True}
    widened = runtime.open_artifact(mix.honest).widened
    assert widened is not None
    assert excess(mix.program, mix.inputs, widened(mix.inputs)) < 1


def test_a_miscompile_of_an_optimizer_shows(mix: Mix, monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer that has the fault for certain: what it is given, it opens as the miscompiled file."""
    opened = runtime._session

    def miscompiling(path: Path, optimized: bool, **more: Any) -> Any:
        return opened(mix.broken if optimized else path, optimized, **more)

    monkeypatch.setattr(runtime, "_session", miscompiling)
    assert mix.verdicts(mix.honest) == {"": False, PLAIN: True}


def test_a_file_that_is_miscompiled_shows(mix: Mix) -> None:
    assert mix.verdicts(mix.broken) == {"": False, PLAIN: False}


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
