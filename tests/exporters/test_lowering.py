"""What a runtime gets: weights that were computed are stored, norms are operators, and nothing is exported as it trains."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import normfuse
from normfuse.errors import ExportError
from normfuse.exporters.lowering import evaluated, in_float32, with_operators
from normfuse.graph.interpreter import run
from normfuse.graph.program import Program
from normfuse.planning.planner import plan
from tests.exporters.agreement import excess
from tests.models import TRAPS
from tests.zoo.spread import spread


def ops(program: Program) -> Counter[str]:
    return Counter(str(node.target).split(".")[1] for node in program.graph.nodes if node.op == "call_function")


class Gemma(nn.Module):
    """The (1 + w) norm, computed in float32 whatever the dtype of the value."""

    def __init__(self, size: int = 16, cast_first: bool = False) -> None:
        super().__init__()
        self.weight, self.cast_first = nn.Parameter(0.5 * torch.randn(size)), cast_first

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return y.type_as(x) * (1.0 + self.weight) if self.cast_first else (y * (1.0 + self.weight.float())).type_as(x)


class Block(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(16, 16), norm, nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.norm(self.first(x)))
        return y


class ByHand(nn.Module):
    """LayerNorm in arithmetic with a gain of shape (1, 1, d), and a shift or none."""

    def __init__(self, shifted: bool) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(1, 1, 16))
        self.shift = nn.Parameter(torch.randn(16)) if shifted else None

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-3) * self.gain
        return y if self.shift is None else y + self.shift


class SecondReader(nn.Module):
    """The normalized value is read before its gain too: the gain must not go inside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gain = nn.RMSNorm(16, elementwise_affine=False), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return y * self.gain + y


class Along(nn.Module):
    """RMSNorm by hand over the axis before the last one, of the same size."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-2, keepdim=True) + 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gain_of_one_plus_w_goes_into_the_operator(dtype: torch.dtype) -> None:
    model = Block(Gemma()).to(dtype)
    x = torch.randn(2, 3, 16).to(dtype)
    program = Program.trace(model, (x,))
    found = with_operators(evaluated(program))
    assert ops(found)["rms_norm"] == 1
    assert not {"pow", "mean", "rsqrt", "mul", "add"} & set(ops(found))
    (norm,) = (node for node in found.graph.nodes if "rms_norm" in str(node.target))
    assert norm.args[0].meta["val"].dtype == torch.float32  # half precisions are widened before, as the model says
    assert excess(program, (x,), run(found, (x,))) < 1


@pytest.mark.parametrize("shifted", [True, False])
def test_layer_norm_by_hand_is_one_operator(shifted: bool) -> None:
    x = torch.randn(2, 3, 16)
    program = Program.trace(Block(ByHand(shifted)), (x,))
    found = with_operators(evaluated(program))
    assert {key: count for key, count in ops(found).items() if key != "view"} == {"linear": 2, "layer_norm": 1}
    for each in (x, 1e-3 * x, x + 100):
        assert excess(program, (each,), run(found, (each,))) < 1


@pytest.mark.parametrize(("module", "kept"), [(SecondReader(), "mul"), (Along(), "mean")])
def test_what_is_no_such_norm_stays(module: nn.Module, kept: str) -> None:
    x = torch.randn(2, 16, 16)
    program = Program.trace(Block(module), (x,))
    found = with_operators(evaluated(program))
    assert ops(found)[kept] == 1
    assert excess(program, (x,), run(found, (x,))) < 1


def test_float64_stays_in_arithmetic() -> None:
    x = torch.randn(2, 3, 16).double()
    program = Program.trace(Block(ByHand(True)).double(), (x,))
    assert "layer_norm" not in ops(with_operators(evaluated(program)))


@pytest.mark.parametrize("kind", [nn.GroupNorm(4, 16), nn.InstanceNorm1d(16, affine=True)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_norms_accumulate_in_float32(kind: nn.Module, dtype: torch.dtype) -> None:
    x = (torch.randn(2, 16, 300) + 30).to(dtype)
    program = Program.trace(spread(kind).to(dtype), (x,))
    found = in_float32(program, {"group_norm", "instance_norm"})
    norm = next(node for node in found.graph.nodes if "_norm" in str(node.target))
    assert {each.meta["val"].dtype for each in norm.all_input_nodes} == {torch.float32}
    assert excess(program, (x,), run(found, (x,))) < 1


class Scaled(nn.Module):
    """A weight that is a product of three."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(sizes)) for sizes in ((8, 16), (8, 1), (1, 16)))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.a * self.b * self.c)


@pytest.mark.parametrize("model", [Scaled(), weight_norm(nn.Linear(16, 8, bias=False))])
def test_computed_weights_are_evaluated_in_float64_and_rounded_once(model: nn.Module) -> None:
    x = torch.randn(2, 16).half()
    found = evaluated(Program.trace(model.half(), (x,)))
    assert ops(found) == {"linear": 1}
    stored = found.tensor(next(name for name in found.stored.values() if name.startswith("computed.")))
    (exact,) = model.double()(torch.eye(16).double()).T[None]
    assert torch.equal(stored, exact.half())
    twice = model.half()(torch.eye(16).half()).T
    assert isinstance(model, nn.Linear) or not torch.equal(stored, twice)  # torch's weight norm is wide itself


def test_a_live_model_is_deployed_first() -> None:
    trap = TRAPS["plain"]
    model = trap.module()
    before = Program.trace(trap.module(), trap.inputs)
    normfuse.tune(model, "pre_rmsnorm", inputs=trap.inputs)
    program = Program.trace(model, trap.inputs)
    found = evaluated(program)
    assert ops(found)["linear"] == ops(before)["linear"]
    assert ops(found)["rms_norm"] == 3
    assert set(ops(found)) == {"embedding", "add", "rms_norm", "linear", "gelu"}
    assert excess(before, trap.inputs, run(found, trap.inputs)) < 1


def test_formulas_are_evaluated() -> None:
    trap = TRAPS["plain"]
    program = Program.trace(trap.module(), trap.inputs)
    promised = plan(program, ["pre_rmsnorm"]).apply(program)
    assert promised.formulas
    assert not evaluated(promised).formulas


def test_views_and_large_results_are_not_stored() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.bias = nn.Parameter(torch.randn(4, 1)), nn.Parameter(torch.randn(1, 4))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.table.T.reshape(2, 2)).repeat(2, 2) + (self.table + self.bias)

    program = Program.trace(Views(), (torch.randn(2, 2),))
    assert ops(evaluated(program)) == ops(program)  # table + bias would be twice what it is made of


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop(x)
        return y


@pytest.mark.parametrize("module", [Dropping(), nn.BatchNorm1d(3)])
def test_a_program_that_trains_is_refused(module: nn.Module) -> None:
    x = torch.randn(4, 3)
    training = Program.trace(module, (x,), trains=lambda module: True)
    with pytest.raises(ExportError, match="training mode") as raised:
        evaluated(training)
    assert raised.value.hint
    evaluated(Program.trace(module, (x,)))


def test_statistics_of_the_batch_are_no_training_where_none_are_stored() -> None:
    evaluated(Program.trace(nn.BatchNorm1d(3, track_running_stats=False), (torch.randn(4, 3),)))


def test_which_pass_made_a_norm_is_kept(tmp_path: Path) -> None:
    onnx: Any = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from normfuse.exporters import onnx as exporter

    trap = TRAPS["by hand"]
    program = Program.trace(trap.module(), trap.inputs)
    exporter.export(plan(program, ["pre_rmsnorm"]).apply(program), tmp_path / "m.onnx", opset=23)
    norms = [node for node in onnx.load(tmp_path / "m.onnx").graph.node if node.op_type == "RMSNormalization"]
    assert len(norms) == 3
    assert all("pre_rmsnorm" in {note.key: note.value for note in node.metadata_props}["normfuse"] for node in norms)
