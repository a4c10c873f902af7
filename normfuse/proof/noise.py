"""A model's own noise: its outputs after changes of the size of a rounding, the same changes in every run."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from normfuse.graph.interpreter import run, user_inputs
from normfuse.graph.parts import Part, Weights
from normfuse.graph.program import Program
from normfuse.graph.views import dtype, is_tensor
from normfuse.proof.steps import Steps

NUDGE = 1e-15
DRAWS = 2

Samples = Sequence[Sequence[Tensor]]
"""The outputs of a model under noise, once for each draw."""


def rounding_of(program: Program) -> float:
    """One rounding of the coarsest dtype in which a program stores tensors; of its inputs where it stores none."""
    stored = [program.tensor(name).dtype for name in program.stored.values()]
    read = [dtype(node) for node in user_inputs(program) if node is not None and is_tensor(node)]
    kinds = [[each for each in some if each is not None and each.is_floating_point] for some in (stored, read)]
    return max((torch.finfo(each).eps for each in kinds[0] or kinds[1]), default=2.0**-52)


def nudged(size: float, weights: Weights | None = None, draw: int = 0) -> Weights:
    """A change of all weights by a relative ``size``, on top of another; for one ``draw`` the same one in every run."""

    def nudge(name: str, value: Tensor, part: Part) -> Tensor:
        value = value if weights is None else weights(name, value, part)
        return torch.addcmul(value, value, kick(f"nudge {draw or ''}{name}", value, part), value=size)

    return nudge


def samples_of_rounding(
    program: Program,
    flat: Sequence[Any],
    *,
    size: float | None = None,
    weights: Weights | None = None,
    steps: Steps | None = None,
) -> Samples:
    """The outputs in float64 after each weight and each value on the way was rounded once at random, several times.

    The error of one run is one sample, which can be small by luck. In Whisper's encoder one entry in half a million decides it,
    and programs that are one function were seen to differ in it by a factor of 24. Whole numbers are left alone: every
    arithmetic has them exactly, and masks are compared with them.

    Args:
        program: what is run.
        flat: its inputs, as `normfuse.graph.interpreter.flat_inputs` orders them.
        size: of a rounding, relative; None for that of the dtype in which a weight or a value is stored.
        weights: changes the weights first.
        steps: of the run that is the truth.
    """

    def through(node: Node, value: Any, draw: int) -> Any:
        return _rounded(value, dtype(node), f"{draw} {node.name}", size) if is_tensor(node) else value

    unit = rounding_of(program) if size is None else size
    return [
        run(program, nudged_inputs(flat, draw, unit), wide=True, weights=nudged(unit, weights, draw),
            through=partial(through, draw=draw), beside=steps.measured() if steps else None)
        for draw in range(DRAWS, 2 * DRAWS + 1)
    ]  # fmt: skip


def _rounded(value: Tensor, stored: torch.dtype | None, name: str, size: float | None) -> Tensor:
    """A float64 value after one rounding, by default to the dtype that it is stored in."""
    if stored is None or not stored.is_floating_point or not value.is_floating_point():
        return value
    rounded = value * (1.0 + (torch.finfo(stored).eps if size is None else size) * kick(name, value))
    return torch.where(value == value.round(), value, rounded)


def nudged_inputs(flat: Sequence[Any], draw: int, size: float = NUDGE) -> list[Any]:
    """A large mean in an input costs digits that no change of weights shows."""
    return [
        _rounded(value.double(), value.dtype, f"input {draw or ''}{place}", size)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for place, value in enumerate(flat)
    ]


def kick(name: str, like: Tensor, part: Part | None = None) -> Tensor:
    """Numbers between ½ and 1½ of either sign, so that none is small by luck; the same ones for the same name.

    Args:
        name: what they are for.
        like: has their shape.
        part: which entries of a stored tensor these are, where they are not all of it.
    """
    return _stretch(_kicks, name, like, part)


def normal(name: str, like: Tensor, part: Part | None = None) -> Tensor:
    """Standard normal numbers, the same ones for the same name in every run; arguments as for `kick`."""
    return _stretch(_normals, name, like, part)


PERIOD = 1_048_573
"""Numbers that are drawn once: drawing as many as a model has weights, for every run, took most of a proof's time. A prime, so
that no two rows of a weight begin at the same one."""


def _stretch(drawn: Callable[[torch.device], Tensor], name: str, like: Tensor, part: Part | None) -> Tensor:
    """As many numbers as a tensor has entries, from a place that its name tells, again from the start where they end."""
    numbers, size = drawn(like.device), like.numel()
    begin = zlib.crc32(name.encode()) % PERIOD
    if part is not None and part.size is not None:
        return _of_part(numbers, begin, part).view(like.shape)
    if size <= PERIOD:
        return numbers[begin : begin + size].view(like.shape)
    return numbers[:PERIOD].roll(-begin).repeat(-(-size // PERIOD))[:size].view(like.shape)


def _of_part(numbers: Tensor, begin: int, part: Part) -> Tensor:
    """Those of the entries between two places of an axis: a run of them for each place in front of the axis."""
    assert part.size is not None
    inner = math.prod(part.whole.shape[part.axis + 1 :])
    outer, length = math.prod(part.whole.shape[: part.axis]), part.size * inner
    starts = begin + part.start * inner + torch.arange(outer, device=numbers.device) * part.whole.shape[part.axis] * inner
    if length <= PERIOD:
        return numbers.unfold(0, length, 1)[starts % PERIOD]
    return numbers[(starts[:, None] + torch.arange(length, device=numbers.device)) % PERIOD]


@cache
@torch.inference_mode(False)  # they outlast the mode in which they are first asked for
def _kicks(device: torch.device) -> Tensor:
    drawn = torch.rand(PERIOD, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu") * 2.0 - 1.0
    return _twice(drawn + torch.where(drawn < 0.0, -0.5, 0.5)).to(device)


@cache
@torch.inference_mode(False)
def _normals(device: torch.device) -> Tensor:
    drawn = torch.randn(PERIOD, generator=torch.Generator().manual_seed(1), dtype=torch.float64, device="cpu")
    return _twice(drawn).to(device)


def _twice(drawn: Tensor) -> Tensor:
    """So that what begins at any of them has as many behind it."""
    return drawn.repeat(2)
