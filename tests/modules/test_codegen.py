"""The code that a layer's formulas are written down as: its values and gradients are those of autograd, in fewer operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from normfuse.graph.expressions import Call, Formula, Number, Read, formed
from normfuse.modules.codegen import NoTapeError, Tape

WEIGHT, GAIN, SHIFT, MEAN, VARIANCE = (Read(name) for name in ("weight", "gain", "shift", "mean", "variance"))
SCALE = Call("mul.Tensor", (GAIN, Call("rsqrt.default", (Call("add.Tensor", (VARIANCE, 1e-5)),))))
MOVED = Call("neg.default", (Call("mul.Tensor", (MEAN, SCALE)),))
SCALED, VIEWED = WEIGHT.scaled(GAIN, 0), Call("view.default", (GAIN, (4, 1, 1, 1)))
FORMULAS: dict[str, tuple[Formula, ...]] = {
    "batch norm": (WEIGHT.scaled(SCALE, 0), Call("add.Tensor", (SHIFT, MOVED))),
    "a bias of its own": (WEIGHT.scaled(SCALE, 0), MEAN.scaled(SCALE, 0).shifted(SHIFT, -1)),
    "no bias": (WEIGHT.scaled(SCALE, -4),),
    "another axis": (WEIGHT.scaled(SCALE, 1).scaled(GAIN, 0), SHIFT),
    "centred": (WEIGHT.scaled(GAIN, 1).centered(0), SHIFT.centered(0)),
    "read twice": (WEIGHT.scaled(GAIN, 0).scaled(GAIN, 1), Call("mul.Tensor", (GAIN, GAIN))),
    "the weight in the bias": (SCALED, Call("sub.Tensor", (SCALED, WEIGHT.scaled(SHIFT, 1)))),
    "a number for all": (WEIGHT.scaled(Number(3.0), 0), GAIN.scaled(Call("mul.Tensor", (Number(0.5), Number(-2.0))), 0)),
    "subtracted from a number": (WEIGHT.scaled(Call("mul.Tensor", (Call("neg.default", (GAIN,)), SHIFT)), 0),),
    "repeated": (Call("mul.Tensor", (WEIGHT, VIEWED)), Call("expand.default", (GAIN, (2, 4)))),
    "unchanged": (WEIGHT, SHIFT),
}  # fmt: skip
NAMES = ("weight", "gain", "variance", "shift", "mean")


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, 4, 3, 1), (4,), (4,), (4,), (4,))
    made = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    found = dict(zip(NAMES, made, strict=True))
    found["variance"] = found["variance"].abs()
    return found


@pytest.mark.parametrize("asking", [("weight", "gain", "shift"), ("weight", "gain", "shift", "mean"), ("gain",), ("shift",)])
@pytest.mark.parametrize("name", FORMULAS)
def test_values_and_gradients_are_autograds(name: str, asking: tuple[str, ...]) -> None:
    leaves = tensors()
    for each in asking:
        leaves[each].requires_grad_()
    expected = [formed(each, leaves.__getitem__, torch.float64) for each in FORMULAS[name]]
    given = [torch.randn_like(each) for each in expected]
    reached = [(value, gradient) for value, gradient in zip(expected, given, strict=True) if value.requires_grad]
    truth: dict[str, Tensor | None] = dict.fromkeys(NAMES)
    if reached:
        ends, gradients = zip(*reached, strict=True)
        truth |= dict(
            zip(asking, torch.autograd.grad(ends, [leaves[x] for x in asking], gradients, allow_unused=True), strict=True)
        )

    plain = {key: value.detach() for key, value in leaves.items()}
    dtypes = [torch.float64] * len(expected)
    values: Any = Tape(FORMULAS[name], plain, dtypes, torch.float64).forward()(*plain.values())
    code = Tape(FORMULAS[name], plain, dtypes, torch.float64).backward(True, False, [each in asking for each in NAMES])

    def layer(weight: Tensor | None, scale: Tensor | None, mask: tuple[bool, bool, bool]) -> list[Tensor | None]:
        assert weight is not None
        assert scale is None
        assert torch.allclose(weight, expected[0])
        assert mask == (True, *(value.requires_grad for value in expected), False)[:3]
        return [weight, *(each.clone() if asked else None for each, asked in zip(given, mask[1:], strict=False)), None][:3]

    of_input, of_bias, *found = code(*plain.values(), layer)
    assert of_input is not None
    assert of_bias is None
    assert all(torch.allclose(a, b, rtol=1e-13) for a, b in zip(values, expected, strict=True))
    for key, mine in zip(NAMES, found, strict=True):
        wanted = truth[key]
        assert (mine is None) == (wanted is None), key
        if mine is not None and wanted is not None:
            assert torch.allclose(mine, wanted, rtol=1e-12, atol=1e-14), key
    assert all(torch.equal(plain[key], leaves[key]) for key in NAMES)


def test_what_is_not_written_down_is_refused() -> None:
    leaves = tensors()
    wide = torch.float64
    with pytest.raises(NoTapeError):
        Tape([Call("tanh.default", (WEIGHT,))], leaves, [wide], wide)
    through_a_root = Tape([WEIGHT.scaled(Call("rsqrt.default", (VARIANCE,)), 0)], leaves, [wide], wide)
    with pytest.raises(NoTapeError):
        through_a_root.backward(True, False, [False, False, True, False, False])


def test_a_batch_norm_is_six_operations_and_its_gradients_five_more() -> None:
    leaves = tensors()
    formulas, dtypes = FORMULAS["batch norm"], [torch.float64] * 2
    forward = Tape(formulas, leaves, dtypes, torch.float64).forward()
    backward = Tape(formulas, leaves, dtypes, torch.float64).backward(True, False, [True, True, False, True, False])
    counts = [sum(node.op == "call_function" for node in run.__self__.graph.nodes) for run in (forward, backward)]  # type: ignore[attr-defined]
    assert counts == [6, 5 + 4 + 5]  # again all but the bias; the layer and its three results
