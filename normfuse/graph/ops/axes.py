"""Operators that move, add, drop and repeat axes: every entry of the operand is one of the result."""

from __future__ import annotations

from math import prod
from typing import Any

from torch.fx import Node

from normfuse.graph.ops.lookup import axis_of, own_axis, rank, repeated, same
from normfuse.graph.ops.row import NO_WEIGHT, PLAIN, SEEN, Carried, Keeps, No, Sized, operators
from normfuse.graph.views import aten, shape

_MOVED: dict[str, Any] = {"hides": SEEN, "shift": True, "computes": PLAIN, "role": NO_WEIGHT}


@operators(aten.view.default, aten._unsafe_view.default, **_MOVED, keeps=Keeps.RESHAPE, width=Sized("size"))
@operators(aten.reshape.default, **_MOVED, keeps=Keeps.RESHAPE, width=Sized("shape"))
def _reshape(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """Row-major order: an axis survives a reshape iff its size and the number of entries behind it stay the same."""
    x = a["self"]
    size, behind = shape(node)[axis], prod(shape(node)[axis + 1 :])
    for own in reversed(range(rank(x))):
        if same(prod(shape(x)[own + 1 :]), behind) and same(shape(x)[own], size):
            return ((x, own),)
    return None


@operators(aten.permute.default, **_MOVED, keeps=Keeps.PERMUTE, width=True)
def _permute(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x = a["self"]
    return ((x, axis_of(x, a["dims"][axis])),)


@operators(aten.transpose.int, **_MOVED, keeps=Keeps.PERMUTE, width=True)
def _transpose(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x = a["self"]
    first, second = axis_of(x, a["dim0"]), axis_of(x, a["dim1"])
    return ((x, {first: second, second: first}.get(axis, axis)),)


@operators(aten.t.default, **_MOVED, keeps=Keeps.PERMUTE, width=True)
def _t(node: Node, a: dict[str, Any], axis: int) -> Carried:
    return ((a["self"], axis if rank(node) < 2 else 1 - axis),)


@operators(aten.unsqueeze.default, **_MOVED, keeps=Keeps.RESHAPE, width=True)
def _unsqueeze(node: Node, a: dict[str, Any], axis: int) -> Carried:
    new = axis_of(node, a["dim"])
    return None if axis == new else ((a["self"], axis - (axis > new)),)


def _stays(node: Node, a: dict[str, Any], axis: int) -> bool:
    """Whether an axis is none that would go once it had a single entry."""
    carried = _squeeze(node, a, axis)
    return bool(carried) and carried[0][1] not in _named(a)  # type: ignore[index]


def _named(a: dict[str, Any]) -> list[int]:
    dims = a.get("dim", range(rank(a["self"])))
    return [axis_of(a["self"], dim) for dim in ([dims] if isinstance(dims, int) else dims)]


@operators(aten.squeeze.dim, aten.squeeze.dims, **_MOVED, keeps=Keeps.RESHAPE, width=_stays)
@operators(aten.squeeze.default, **_MOVED, keeps=Keeps.RESHAPE, width=No("an axis that is left with a single entry would go"))
def _squeeze(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x = a["self"]
    gone = {own for own in _named(a) if same(shape(x)[own], 1)}
    kept = [own for own in range(rank(x)) if own not in gone]
    return ((x, kept[axis]),) if len(kept) == rank(node) else None


@operators(aten.expand.default, **_MOVED, keeps=Keeps.EXPAND, width=Sized("size"))
def _expand(node: Node, a: dict[str, Any], axis: int) -> Carried:
    return (own_axis(a["self"], node, axis),) if not repeated(node, axis) else None


@operators(aten.repeat.default, aten.tile.default, **_MOVED, keeps=Keeps.REPEAT, width=True)
def _repeat(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x, times = a["self"], a["repeats"] if "repeats" in a else a["dims"]
    own, place = axis - (rank(node) - rank(x)), axis - (rank(node) - len(times))  # tile may name only the last axes
    return ((x, own),) if own >= 0 and (place < 0 or same(times[place], 1)) else None


@operators(aten.repeat_interleave.self_int, **_MOVED, keeps=Keeps.REPEAT, width=True)
def _repeat_interleave(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """Without an axis all entries are repeated in a row."""
    x, dim = a["self"], a["dim"]
    return None if dim is None or axis == axis_of(x, dim) else ((x, axis),)
