"""How far two outputs are apart, in every measure that people ask for; as data.

`difference` tells a reader what a difference means for them; what decides is `normfuse.proof.judging`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOP = 5


def identical(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether outputs are the same, bit for bit but for the bits of NaN."""
    return len(ours) == len(theirs) and all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are of one form and have the same entries; NaN is NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


@dataclass(frozen=True)
class Difference:
    """One output of one run against the truth, over the entries that are finite in both.

    Attributes:
        case: the inputs' name.
        run: how the model was run; empty for the way a user would.
        output: place of the output.
        max_abs: largest absolute difference.
        mean_abs: mean absolute difference.
        max_rel: largest difference relative to the largest entry of the truth.
        mean_rel: mean difference relative to the truth's mean size.
        ulps: largest difference in spacings of the output's dtype at the truth's entry.
        cosine: cosine of the angle between the two, as vectors.
        top1: share of rows whose largest entry is in the same place; None for outputs without rows.
        top5: mean share of the five largest entries of a row that are in both.
        ratio: ``max_rel`` over that of the reference in its own dtype; None where that has no error.
    """

    case: str
    run: str
    output: int
    max_abs: float
    mean_abs: float
    max_rel: float
    mean_rel: float
    ulps: float
    cosine: float
    top1: float | None
    top5: float | None
    ratio: float | None


def difference(case: str, run: str, output: int, truth: Tensor, got: Tensor, own: float) -> Difference | None:
    """The figures for one output; None where they mean nothing: other shapes, integers, nothing finite.

    Args:
        case: the inputs' name.
        run: how the model was run.
        output: place of the output.
        truth: the output in float64, any shape.
        got: the output as it was computed, in its own dtype.
        own: the reference's own error (relative to its largest entry) in its stored dtype.
    """
    if truth.shape != got.shape or not got.is_floating_point() or not truth.is_floating_point():
        return None
    t, g = truth.double(), got.double()
    both = torch.isfinite(t) & torch.isfinite(g)
    if not both.any():
        return None
    a, b = t[both], g[both]
    gap, size = (a - b).abs(), a.abs()
    largest, norms = float(size.max()), float(a.norm() * b.norm())
    relative = float(gap.max()) / largest if largest else (0.0 if not gap.any() else float("inf"))
    top1, top5 = _ranks(t, g) if both.all() else (None, None)
    return Difference(
        case,
        run,
        output,
        max_abs=float(gap.max()),
        mean_abs=float(gap.mean()),
        max_rel=relative,
        mean_rel=float(gap.mean()) / float(size.mean()) if largest else relative,
        ulps=float((gap / _spacing(a, got.dtype)).max()),
        cosine=min(1.0, float(a @ b) / norms) if norms else float(not gap.any()),
        top1=top1,
        top5=top5,
        ratio=relative / own if own else None,
    )


def _spacing(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of a dtype around each entry."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(value.abs().clamp_min(info.tiny)))
    return torch.exp2(exponent) * info.eps


def _ranks(truth: Tensor, got: Tensor) -> tuple[float | None, float | None]:
    if truth.dim() < 2 or truth.shape[-1] <= TOP or not truth.numel():
        return None, None
    a, b = (each.reshape(-1, each.shape[-1]).topk(TOP, dim=-1).indices for each in (truth, got))
    shared = (a.unsqueeze(-1) == b.unsqueeze(-2)).any(-1).double()
    return float((a[:, 0] == b[:, 0]).double().mean()), float(shared.mean())


def distances(truth: Sequence[Tensor], other: Sequence[Tensor]) -> list[float]:
    """`distance` of each output; one inf where there are more or fewer."""
    if len(truth) != len(other):
        return [math.inf]
    return [distance(a, b) for a, b in zip(truth, other, strict=True)]


def distance(truth: Tensor, other: Tensor) -> float:
    """The largest difference of two outputs relative to the largest finite entry of the first.

    NaN and infinity agree only with themselves in the same places; integer outputs must be equal. Returns inf where the
    outputs cannot be compared at all.
    """
    if truth.shape != other.shape:
        return math.inf
    if not truth.is_floating_point() and not truth.is_complex():
        return 0.0 if torch.equal(truth, other.to(truth.dtype)) else math.inf
    wide = torch.complex128 if truth.is_complex() else torch.float64
    truth, other = truth.to(wide), other.to(wide)
    finite = torch.isfinite(truth)
    if not torch.equal(finite, torch.isfinite(other)) or not _same_where(~finite, truth, other):
        return math.inf
    # a mask's finfo.min is no size of this output: beside 1e38 every other difference would vanish
    masked = finite & ((truth.abs() >= 1e30) | (truth.abs() == torch.finfo(torch.float16).max))
    plain = finite & ~masked
    scale = truth[plain].abs().max().item() if plain.any() else 0.0
    difference = (truth - other)[plain].abs().max().item() if plain.any() else 0.0
    behind_mask = ((truth - other)[masked].abs() / truth[masked].abs()).max().item() if masked.any() else 0.0
    return max(behind_mask, difference / scale if scale > 0.0 else (0.0 if difference == 0.0 else math.inf))


def _same_where(where: Tensor, a: Tensor, b: Tensor) -> bool:
    return torch.equal(a[where].nan_to_num(nan=7.0), b[where].nan_to_num(nan=7.0))
