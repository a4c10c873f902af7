"""OpenVINO's files: norms fused, numbers in float32 whatever the CPU prefers, and files that cannot be opened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

from normfuse.errors import ExportError, InputError
from normfuse.exporters import openvino
from normfuse.graph.program import Program
from normfuse.planning.planner import plan
from tests.exporters.agreement import excess
from tests.models import TRAPS
from tests.zoo.spread import spread

pytest.importorskip("openvino")
pytest.importorskip("onnxscript")


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize(("name", "norms"), [("", {"MVN": 3}), ("pre_rmsnorm", {"RMS": 3}), ("pre_crmsnorm", {"RMS": 3})])
def test_norms_are_fused(tmp_path: Path, opset: int, name: str, norms: dict[str, int]) -> None:
    trap = TRAPS["plain"]
    original = Program.trace(trap.module(), trap.inputs)
    program = plan(original, [name]).apply(original) if name else original
    info = openvino.export(program, tmp_path / "m.xml", opset=opset)
    assert info.norms == norms
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.bin", "m.xml"]
    artifact = openvino.open_artifact(info.path)
    assert excess(original, trap.inputs, artifact.runs[""](trap.inputs)) < 1
    assert artifact.notes[0] == f"OpenVINO runs 3 {next(iter(norms))}"


class Norms(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.rms, self.ln = nn.Linear(16, 16), nn.RMSNorm(16, 1e-12), nn.LayerNorm(16, 1e-3)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rms(self.first(x)), self.ln(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_are_those_of_the_stored_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 16).to(dtype)
    program = Program.trace(spread(Norms(dtype)).to(dtype), (x,), dynamic_shapes=({0: Dim("batch")},))
    openvino.export(program, tmp_path / "m.xml")
    artifact = openvino.open_artifact(tmp_path / "m.xml")
    assert artifact.inputs is not None
    assert (artifact.inputs[0].dtype, artifact.inputs[0].shape) == (dtype, (None, 5, 16))
    for each in (x, 1e-3 * x, x + 10, x[:1]):
        assert excess(program, (each,), artifact.runs[""]((each,))) < 1


def test_float64_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="float64 in float32") as raised:
        openvino.export(Program.trace(nn.Linear(4, 4).double(), (torch.randn(1, 4).double(),)), tmp_path / "m.xml")
    assert raised.value.hint


def test_what_cannot_be_opened_or_run(tmp_path: Path) -> None:
    program = Program.trace(nn.Linear(4, 4), (torch.randn(1, 4),))
    with pytest.raises(InputError, match=r"\.xml"):
        openvino.export(program, tmp_path / "m.onnx")
    openvino.export(program, tmp_path / "m.xml")
    run = openvino.open_artifact(tmp_path / "m.xml").runs[""]
    for wrong in ([torch.randn(2, 5)], [torch.randn(1, 4).double()]):
        with pytest.raises(InputError, match=r"m\.xml does not run"):
            run(wrong)
    (tmp_path / "m.bin").unlink()
    with pytest.raises(ExportError, match=r"m\.xml") as raised:
        openvino.open_artifact(tmp_path / "m.xml")
    assert ".bin" in (raised.value.hint or "")
    (tmp_path / "broken.xml").write_text("<net/>")
    with pytest.raises(ExportError, match=r"cannot open broken\.xml"):
        openvino.open_artifact(tmp_path / "broken.xml")
