"""The spelling of norms for operator-by-operator use on a CPU: the same function, chosen only where zero means are proven."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.exporters.eager_cpu import SLOWER, for_cpu
from normfuse.graph.interpreter import flat_inputs
from normfuse.graph.program import Program
from normfuse.proof.cases import cases
from normfuse.proof.equivalence import compare
from normfuse.proof.sides import program_side
from tests.models import TRAPS
from tests.zoo.spread import spread


def norms(program: Program) -> Counter[str]:
    return Counter(str(node.target) for node in program.graph.nodes if "_norm.default" in str(node.target))


def spelled(model: nn.Module, passes: Any, inputs: tuple[Any, ...]) -> tuple[Program, Program]:
    result = normfuse.rewrite(model, passes, inputs, verify="none")
    return result.program, for_cpu(result.planned, result.program)


@pytest.mark.parametrize("passes", ["pre_rmsnorm", "fold_affine", "all"])
@pytest.mark.parametrize("name", list(TRAPS))
def test_it_is_the_same_function(name: str, passes: str) -> None:
    trap = TRAPS[name]
    before, after = spelled(trap.module(), passes, trap.inputs)
    tried = cases(before, flat_inputs(before, trap.inputs))
    evidence = compare(program_side("program", before), program_side("spelled", after), tried)
    assert evidence.ok, evidence.complaint()


class Block(nn.Module):
    """A writer, a norm and a reader."""

    norm: Any

    def __init__(self, *, affine: bool = True, rms: bool = False, sees: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.sees = nn.Linear(6, 8), nn.Linear(8, 4), sees
        self.norm = nn.RMSNorm(8) if rms else nn.LayerNorm(8, elementwise_affine=affine)

    def forward(self, x: Tensor) -> Any:
        y = self.up(x)
        z = self.norm(y)
        return (self.down(z), z) if self.sees else self.down(z)


X = torch.randn(3, 6)


def test_a_converted_norm_is_a_layer_norm_again_with_its_shift() -> None:
    before, after = spelled(spread(Block()).eval(), "pre_rmsnorm", (X,))
    assert norms(before) == {"aten.rms_norm.default": 1}
    assert norms(after) == {"aten.layer_norm.default": 1}
    assert not [node for node in after.graph.nodes if node.target is torch.ops.aten.add.Tensor]


def test_a_norm_without_a_gain_gets_ones_of_its_width_once() -> None:
    model = nn.Sequential(Block(), nn.Linear(4, 6), Block())
    before, after = spelled(spread(model).eval(), "all", (X,))
    assert norms(after) == {"aten.layer_norm.default": 2}
    assert set(after.tensor_names()) - set(before.tensor_names()) == {"normfuse.ones_8"}
    assert torch.equal(after.tensor("normfuse.ones_8"), torch.ones(8))


def test_a_norm_that_was_always_an_rms_norm_stays_one() -> None:
    before, after = spelled(spread(Block(rms=True)).eval(), "fold_affine", (X,))
    assert after is before


def test_half_precision_stays() -> None:
    before, after = spelled(spread(Block()).eval().bfloat16(), "pre_rmsnorm", (X.bfloat16(),))
    assert after is before


def test_a_saved_program_stays() -> None:
    result = normfuse.rewrite(spread(Block()).eval(), "pre_rmsnorm", (X,), verify="none")
    assert for_cpu(result.program, result.program) is result.program


def test_a_norm_that_is_read_before_its_shift_keeps_the_addition() -> None:
    class Reads(Block):
        def forward(self, x: Tensor) -> Any:
            z = nn.functional.rms_norm(self.up(x), (8,), self.norm.weight, 1e-5)
            return self.down(z + self.norm.bias) * z.sum()

    model = spread(Reads()).eval()
    model.up.weight.data -= model.up.weight.data.mean(0)
    before, after = spelled(model, "pre_rmsnorm", (X,))
    assert after is before


def test_the_module_of_a_result_is_spelled_so() -> None:
    model = spread(Block(sees=True)).eval()
    result = normfuse.rewrite(model, "pre_rmsnorm", (X,))
    module: Any = result.module()
    assert [node for node in module.graph.nodes if node.target is torch.ops.aten.layer_norm.default]
    for ours, theirs in zip(module(X), model(X), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("rms", "dtype", "told"), [(False, torch.float32, 1), (True, torch.float32, 0), (False, torch.float64, 0)]
)
def test_the_report_says_where_the_new_norm_is_slower(rms: bool, dtype: torch.dtype, told: int) -> None:
    model = Block(rms=rms).to(dtype).eval()
    report = normfuse.rewrite(model, "pre_rmsnorm", (torch.randn(2, 6, dtype=dtype),), verify="none").report
    assert report.to_dict()["notes"] == [SLOWER] * told
