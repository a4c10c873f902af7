"""Numbers of code that float32 cannot hold: `export` and `verify` give one answer, for every operator that has some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse
from normfuse.api.exporting import compared
from normfuse.exporters import onnx as exporter
from normfuse.graph.program import Program
from normfuse.proof.cases import Case
from normfuse.proof.sides import program_side

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

SIZE = 8
VALUES = (0.01, 0.1, 0.7, 1 / 3)
OPERATORS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "celu": F.celu,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "threshold": lambda x, v: F.threshold(x, v, 2 * v),
    "hardtanh": lambda x, v: F.hardtanh(x, -v, 3 * v),
    "softplus": lambda x, v: F.softplus(x, v, 10 * v),
    "clamp": lambda x, v: x.clamp(-v, v),
    "mul": lambda x, v: x * v,
    "add": lambda x, v: x + v,
    "sub": lambda x, v: v - x,
    "div": lambda x, v: x / v,
    "pow": lambda x, v: x.abs().pow(v),
    "power of a number": lambda x, v: v**x,
    "add with alpha": lambda x, v: torch.add(x, x * x, alpha=v),
    "addmm": lambda x, v: torch.addmm(x, x, x.new_ones(SIZE, SIZE).cumsum(0) / SIZE, beta=v, alpha=3 * v),
    "addcmul": lambda x, v: torch.addcmul(x, x, x, value=v),
    "lerp": lambda x, v: torch.lerp(x, x * x, v),
    "where": lambda x, v: torch.where(x > 0, x, v),
    "masked_fill": lambda x, v: x.masked_fill(x > 0, v),
    "pad": lambda x, v: F.pad(x, (1, 1), value=v),
    "full": lambda x, v: x + torch.full((SIZE,), v),
    "logit": lambda x, v: torch.logit(x.sigmoid(), v / 2),
    "norm of a degree": lambda x, v: x.norm(p=2 + v, dim=-1),
    "layer_norm": lambda x, v: F.layer_norm(x, (SIZE,), eps=v),
    "rms_norm": lambda x, v: F.rms_norm(x, (SIZE,), eps=v),
    "group_norm": lambda x, v: F.group_norm(x, 2, eps=v),
    "instance_norm": lambda x, v: F.instance_norm(x[None], eps=v),
    "batch_norm": lambda x, v: F.batch_norm(x, torch.ones(SIZE), torch.ones(SIZE), eps=v),
    "attention": lambda x, v: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], scale=v),
}
WITHOUT_A_NUMBER: dict[str, Callable[[Tensor], Tensor]] = {
    "leaky_relu": F.leaky_relu,  # 0.01 by default
    "selu": F.selu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
    "gelu": F.gelu,
    "mish": F.mish,
    "relu6": F.relu6,
    "attention": lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
}


class Numbers(nn.Module):
    """Operators on a linear map's result, an output of each."""

    def __init__(self, operators: Sequence[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.linear, self.operators = nn.Linear(SIZE, SIZE), operators

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.linear(x)
        return [operator(y) for operator in self.operators]


def numbers(value: float | None) -> Numbers:
    if value is None:
        return Numbers(list(WITHOUT_A_NUMBER.values())).eval()
    return Numbers([lambda x, of=each: of(x, value) for each in OPERATORS.values()]).eval()  # type: ignore[misc]


@pytest.mark.parametrize("opset", [18, 20, 23])
@pytest.mark.parametrize("value", [None, *VALUES])
def test_export_and_verify_take_the_numbers_that_a_file_holds(tmp_path: Path, value: float | None, opset: int) -> None:
    model, x = numbers(value), torch.randn(3, SIZE)
    evidence = normfuse.export(model, tmp_path / "m.onnx", inputs=(x,), opset=opset)
    assert evidence.ok
    assert max(row.allowed for row in evidence.algebra) < 1e-9, "it must be compared in float64"
    assert normfuse.verify(model, tmp_path / "m.onnx", inputs=(x,)).ok


@pytest.mark.xfail(
    reason="far below zero the runtime rounds to 0 what torch has as 1e-18, and entries are judged at their own size"
)
@pytest.mark.parametrize("tail", [F.silu, lambda x: F.gelu(x, approximate="tanh")])
def test_the_tail_of_an_activation_that_is_an_output(tmp_path: Path, tail: Callable[[Tensor], Tensor]) -> None:
    assert normfuse.export(Numbers([tail]).eval(), tmp_path / "m.onnx", inputs=(torch.randn(3, SIZE),), opset=18).ok


@pytest.mark.parametrize(("attribute", "change"), [("alpha", 1 + 1e-6), ("epsilon", 1 + 1e-5)])
def test_another_number_is_another_function(tmp_path: Path, attribute: str, change: float) -> None:
    x, path = torch.randn(3, SIZE), tmp_path / "m.onnx"
    leaky, layer = OPERATORS["leaky_relu"], OPERATORS["layer_norm"]
    program = Program.trace(Numbers([lambda x: leaky(x, 0.1), lambda x: layer(x, 0.1)]).eval(), (x,))
    exporter.export(program, path)

    def verdict() -> bool:
        return compared(program, path, "onnx", [Case("as given", (x,))], opset=20, progress=None).ok

    assert verdict()
    model = onnx.load(path)
    changed = [each for node in model.graph.node for each in node.attribute if each.name == attribute and each.f != 1.0]
    for each in changed:
        each.f *= change
    assert changed
    onnx.save(model, path)
    assert not verdict()


def test_float64_is_compared_with_what_a_file_can_hold_and_says_so(tmp_path: Path) -> None:
    names = ("mul", "pow", "clamp", "layer_norm", "addmm", "celu", "logit")
    model: Any = Numbers([lambda x, of=OPERATORS[name]: of(x, 0.1) for name in names]).double().eval()  # type: ignore[misc]
    x = torch.randn(3, SIZE, dtype=torch.float64)
    told = "files hold the numbers of a model's code as float32"
    evidence = normfuse.export(model, tmp_path / "m.onnx", inputs=(x,))
    assert any(told in note and "0.1 of mul" in note for note in evidence.notes)
    again = normfuse.verify(model, tmp_path / "m.onnx", inputs=(x,))
    assert again.ok
    assert any(told in note for note in again.notes)


def test_numbers_count_in_full_between_programs() -> None:
    x = torch.randn(3, SIZE)
    program = Program.trace(Numbers([lambda x: x * 0.1]), (x,))
    sides = [program_side("a", program, short=short) for short in (False, True)]
    exact, held = (side.wide(Case("as given", (x,)))[0] for side in sides if side.wide)
    assert not torch.equal(exact, held)
    assert torch.allclose(exact, held, rtol=1e-7, atol=0)
