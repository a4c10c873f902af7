"""Two programs that may round the same weights: what noise that explains, and which inputs both take."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from normfuse.graph.interpreter import user_inputs
from normfuse.graph.parts import Part, Weights
from normfuse.graph.program import Program
from normfuse.graph.views import dtype, is_tensor
from normfuse.proof.noise import NUDGE, kick, nudged, rounding_of


def nudges(a: Program, b: Program) -> Callable[[float | None, int], Weights]:
    """Changes of the weights of ``a`` by the roundings that ``b`` may have made of them.

    Where ``b`` reads no tensor but those of ``a``, those that are the same bit for bit have no part in it: one row that is off
    shows against the rounding of that row, not of the whole model.

    Returns:
        What takes the size of a rounding (None for that of the coarser of the two programs) and the number of a draw.
    """
    unit = max(rounding_of(a), rounding_of(b))
    theirs = _read(b)
    alike = not a.formulas and not b.formulas and all(_holds(a, b, name) for name in theirs)

    def towards(size: float, draw: int) -> Weights:
        def nudge(name: str, value: Tensor, part: Part) -> Tensor:
            other = part.of(b.tensor(name)).to(torch.float64) if name in theirs else None
            reach = (size if other is None else NUDGE) * value.abs()
            if other is not None and not torch.equal(other, value):
                least = max(torch.finfo(each.tensor(name).dtype).smallest_normal * size for each in (a, b))
                rounded = size * torch.maximum(value.abs(), other.abs()) + least
                reach = torch.where(other == value, reach, rounded)
            return value + reach * kick(f"nudge {draw or ''}{name}", value, part)

        return nudge

    def made(size: float | None, draw: int) -> Weights:
        return towards(unit, draw) if alike and size is None else nudged(size or unit, draw=draw)

    return made


def _read(program: Program) -> set[str]:
    """The floating tensors that a program reads."""
    read = {name for node, name in program.stored.items() if program.nodes[node].users}
    return {name for name in read if program.tensor(name).is_floating_point()}


def _holds(a: Program, b: Program, name: str) -> bool:
    return name in set(a.stored.values()) and a.tensor(name).shape == b.tensor(name).shape


def coarser_inputs(a: Program, b: Program) -> torch.dtype | None:
    """The coarsest floating dtype of the inputs where the two take other ones, so that both get the same numbers; else None."""
    one, other = ([dtype(node) for node in user_inputs(each) if node is not None and is_tensor(node)] for each in (a, b))
    if one == other:
        return None
    floats = [each for each in (*one, *other) if each is not None and each.is_floating_point]
    return max(floats, key=lambda each: torch.finfo(each).eps, default=None)
