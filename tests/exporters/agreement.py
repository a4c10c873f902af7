"""How far a runtime may be from a program: as far as that is from itself after its weights are nudged by one rounding."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normfuse.graph.interpreter import run
from normfuse.graph.parts import Part
from normfuse.graph.program import Program

MARGIN = 32.0
"""Nudges are a sample of a random quantity, and other orders of the same sums are as many roundings again."""


def distance(truth: Tensor, other: Tensor) -> float:
    """The largest difference relative to the largest finite entry; masks of -inf or finfo.min must be in the same places."""
    assert other.shape == truth.shape
    if not truth.is_floating_point():
        return 0.0 if torch.equal(truth, other.to(truth.dtype)) else float("inf")
    truth, other = truth.double(), other.double()
    plain, same = (torch.isfinite(each) & (each.abs() < 1e30) & (each.abs() != 65504.0) for each in (truth, other))
    if not torch.equal(plain, same):
        return float("inf")
    scale = float(truth[plain].abs().max()) if plain.any() else 0.0
    worst = float((truth - other)[plain].abs().max()) if plain.any() else 0.0
    return worst / scale if scale else (float("inf") if worst else 0.0)


def outputs_of(program: Program, flat: Sequence[Any], **how: Any) -> list[Tensor]:
    """What the caller gets, without the state that the program updates."""
    count = sum(spec.kind.name == "USER_OUTPUT" for spec in program.exported.graph_signature.output_specs)
    return run(program, flat, **how)[:count]


def excess(program: Program, flat: Sequence[Any], got: Sequence[Tensor]) -> float:
    """How many times farther than rounding explains a runtime's outputs are from the program in float64; 1 is the limit."""
    dtypes = {program.tensor(name).dtype for name in program.stored.values()}
    epsilon = max((torch.finfo(each).eps for each in dtypes if each.is_floating_point), default=2.0**-23)

    def nudge(name: str, value: Tensor, part: Part) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return value * (1.0 + epsilon * part.of(torch.randn(part.whole.shape, generator=generator, dtype=torch.float64)))

    truth = outputs_of(program, flat, wide=True)
    own, nudged = outputs_of(program, flat), outputs_of(program, flat, wide=True, weights=nudge)
    assert len(got) == len(truth)
    explained = [max(distance(t, o), distance(t, n), 2.0**-50) for t, o, n in zip(truth, own, nudged, strict=True)]
    return max((distance(t, g) / (MARGIN * e) for t, g, e in zip(truth, got, explained, strict=True)), default=0.0)
