"""ExecuTorch programs: numbers in its own runtime, and what it would take and get wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

from normfuse.errors import ExportError, InputError
from normfuse.exporters import executorch
from normfuse.graph.program import Program
from normfuse.planning.planner import plan
from tests.exporters.agreement import excess
from tests.models import TRAPS
from tests.zoo.spread import spread

pytest.importorskip("executorch.exir", exc_type=ImportError)
pytest.importorskip("executorch.runtime", exc_type=ImportError)


@pytest.mark.parametrize("name", ["", "pre_rmsnorm", "pre_crmsnorm", "pre_crmsnorm_compressed", "fold_affine"])
def test_it_computes_what_the_program_does(tmp_path: Path, name: str) -> None:
    trap = TRAPS["plain"]
    original = Program.trace(trap.module(), trap.inputs)
    program = plan(original, [name]).apply(original) if name else original
    info = executorch.export(program, tmp_path / "m.pte")
    assert info.bytes == info.path.stat().st_size
    assert (info.kernels.get("native_layer_norm", 0) == 3) == (name in ("", "fold_affine"))
    artifact = executorch.open_artifact(info.path)
    assert artifact.runtime.startswith("ExecuTorch 1.")
    for _ in range(2):
        assert excess(original, trap.inputs, artifact.runs[""](trap.inputs)) < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dynamic_dims_and_half_precisions(tmp_path: Path, dtype: torch.dtype) -> None:
    module, x = spread(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.RMSNorm(8))).to(dtype), torch.randn(2, 3, 8).to(dtype)
    program = Program.trace(module, (x,), dynamic_shapes=({0: Dim("batch", max=16)},))
    executorch.export(program, tmp_path / "m.pte")
    run = executorch.open_artifact(tmp_path / "m.pte").runs[""]
    for batch in (2, 7, 16):
        x = torch.randn(batch, 3, 8).to(dtype)
        assert excess(program, (x,), run((x,))) < 1
    with pytest.raises(InputError):
        run((torch.randn(17, 3, 8).to(dtype),))


def test_what_it_would_get_wrong_is_refused(tmp_path: Path) -> None:
    x = torch.randn(2, 8)
    with pytest.raises(ExportError, match="no upper end") as raised:  # it would take the example's size for the largest
        executorch.export(Program.trace(nn.LayerNorm(8), (x,), dynamic_shapes=({0: Dim("batch")},)), tmp_path / "m.pte")
    assert "max=" in (raised.value.hint or "")
    with pytest.raises(ExportError, match="float64 in float32"):
        executorch.export(Program.trace(nn.LayerNorm(8).double(), (x.double(),)), tmp_path / "m.pte")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_opened_or_run(tmp_path: Path) -> None:
    executorch.export(Program.trace(TRAPS["plain"].module(), TRAPS["plain"].inputs), tmp_path / "m.pte")
    run = executorch.open_artifact(tmp_path / "m.pte").runs[""]
    for wrong in ([], [torch.zeros(3, 9, dtype=torch.long)], [torch.zeros(2, 5)], [torch.full((2, 5), 99)]):
        with pytest.raises(InputError, match=r"m\.pte"):
            run(wrong)
    (tmp_path / "broken.pte").write_bytes(b"broken")
    with pytest.raises(ExportError, match=r"broken\.pte"):
        executorch.open_artifact(tmp_path / "broken.pte")
