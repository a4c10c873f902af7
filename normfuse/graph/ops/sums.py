"""Operators that sum over axes, and those that treat every channel of a picture alike."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from normfuse.graph.ops.lookup import axis_of, rank, unpadded
from normfuse.graph.ops.row import (
    COMPUTED,
    NO_MAP,
    NO_WEIGHT,
    NOT_CARRIED,
    ONCE,
    PLAIN,
    SEEN,
    Carried,
    Carrying,
    Computes,
    Keeps,
    No,
    operators,
)
from normfuse.graph.views import aten

# -- along axes --------------------------------------------------------------------------------------------------------

_SUMS: dict[str, Any] = {"keeps": COMPUTED, "role": NO_WEIGHT}


@operators(aten.mean.dim, **_SUMS, hides=SEEN, shift=True, computes=Computes.STATISTIC, width=True)
@operators(aten.sum.dim_IntList, **_SUMS, hides=SEEN, shift=ONCE, computes=Computes.STATISTIC, width=True)
def _reduce(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x = a["self"]
    dims = sorted(axis_of(x, d) for d in a["dim"] or [])
    if not dims:
        return None
    if a["keepdim"]:
        return ((x, axis),) if axis not in dims else None
    kept = [own for own in range(rank(x)) if own not in dims]
    return ((x, kept[axis]),)


@operators(aten.cumsum.default, **_SUMS, hides=SEEN, shift=ONCE, computes=PLAIN, width=True)
def _cumsum(node: Node, a: dict[str, Any], axis: int) -> Carried:
    return ((a["self"], axis),) if axis != axis_of(a["self"], a["dim"]) else None


def _spread_hides(node: Node, a: dict[str, Any], operand: Node) -> frozenset[int]:
    dims = a["dim"] or []
    return frozenset({axis_of(operand, dims[0])}) if len(dims) == 1 else frozenset()


_STATISTIC: dict[str, Any] = {**_SUMS, "shift": NOT_CARRIED, "width": NOT_CARRIED}
operators(aten.var.correction, aten.var.dim, **_STATISTIC, hides=_spread_hides, computes=Computes.STATISTIC)(NO_MAP)
operators(aten.std.correction, aten.std.dim, **_STATISTIC, hides=_spread_hides, computes=Computes.DEVIATION)(NO_MAP)
operators(
    aten.linalg_vector_norm.default, aten.var_mean.correction, aten.var_mean.dim,
    **_STATISTIC, hides=SEEN, computes=Computes.STATISTIC,
)(NO_MAP)  # fmt: skip


# -- over places -------------------------------------------------------------------------------------------------------


def _spatial(dims: int) -> Carrying:
    """Ops that treat every channel alike and mix only the last ``dims`` axes."""

    def rule(node: Node, a: dict[str, Any], axis: int) -> Carried:
        return ((a["self"] if "self" in a else a["input"], axis),) if axis < rank(node) - dims else None

    return rule


def _averages(a: dict[str, Any]) -> bool:
    """Whether a pool's weights sum to one everywhere."""
    return a.get("divisor_override") is None and (not a["count_include_pad"] or unpadded(a["padding"]))


_PLACES: dict[str, Any] = {"hides": SEEN, "computes": PLAIN, "role": NO_WEIGHT, "width": True}
_MEANS: dict[str, Any] = {**_PLACES, "keeps": COMPUTED}
operators(aten.avg_pool1d.default, **_MEANS, shift=_averages)(_spatial(1))
operators(aten.avg_pool2d.default, **_MEANS, shift=_averages)(_spatial(2))
operators(aten.avg_pool3d.default, **_MEANS, shift=_averages)(_spatial(3))
operators(
    aten.adaptive_avg_pool1d.default, aten.upsample_nearest1d.vec, aten._upsample_nearest_exact1d.vec,
    aten.upsample_linear1d.vec, **_MEANS, shift=True,
)(_spatial(1))  # fmt: skip
operators(
    aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default, aten.upsample_nearest2d.vec,
    aten._upsample_nearest_exact2d.vec, aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec,
    aten._upsample_bilinear2d_aa.vec, aten._upsample_bicubic2d_aa.vec, **_MEANS, shift=True,
)(_spatial(2))  # fmt: skip
operators(
    aten.adaptive_avg_pool3d.default, aten._adaptive_avg_pool3d.default, aten.upsample_nearest3d.vec,
    aten._upsample_nearest_exact3d.vec, aten.upsample_trilinear3d.vec, **_MEANS, shift=True,
)(_spatial(3))  # fmt: skip

_PADS = No("the zeros beside its entries get no shift")
operators(aten.tril.default, aten.triu.default, **_PLACES, keeps=COMPUTED, shift=_PADS)(_spatial(2))
operators(
    aten.im2col.default, **_PLACES, keeps=No("it pads"), shift=lambda a: unpadded(a["padding"]),
)(_spatial(2))  # fmt: skip  # in its columns channels are mixed
operators(aten.col2im.default, **_MEANS, shift=ONCE)(_spatial(3))
operators(
    aten.pixel_shuffle.default, aten.pixel_unshuffle.default, **_PLACES, keeps=Keeps.PICK, shift=True,
)(_spatial(3))  # fmt: skip  # channels become pixels


@operators(aten.channel_shuffle.default, **_PLACES, keeps=Keeps.PICK, shift=True)
def _channel_shuffle(node: Node, a: dict[str, Any], axis: int) -> Carried:
    return ((a["self"], axis),) if axis != 1 else None


@operators(
    aten.grid_sampler.default, aten.grid_sampler_2d.default, aten.grid_sampler_3d.default,
    **_MEANS, shift=lambda a: a["padding_mode"] != 0,
)  # fmt: skip
def _grid_sampler(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """Means of neighbours, which the grid says for all channels alike."""
    return ((a["input"], 1),) if axis == 1 else None
