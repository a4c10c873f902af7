"""Operators that pick entries, write into a copy, and join tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from normfuse.graph.ops.lookup import axis_of, is_zero, rank, repeated, same, spans, terms
from normfuse.graph.ops.row import (
    INDEXED,
    JOINS,
    NO_MAP,
    NO_WEIGHT,
    NOT_CARRIED,
    ONCE,
    PLAIN,
    SEEN,
    Carried,
    Keeps,
    No,
    operators,
)
from normfuse.graph.views import aten, dtype, is_tensor, shape

_ANY: dict[str, Any] = {"hides": SEEN, "computes": PLAIN, "role": NO_WEIGHT}
_PICKED: dict[str, Any] = {**_ANY, "keeps": Keeps.PICK, "shift": True}
_LOOKED_UP: dict[str, Any] = {**_ANY, "keeps": Keeps.LOOKUP, "shift": True}
_JOINED: dict[str, Any] = {**_ANY, "keeps": JOINS}
_ZEROS = No("the numbers between its entries get no shift")

# -- joining -----------------------------------------------------------------------------------------------------------


@operators(aten.cat.default, **_JOINED, shift=True, width=True)
def _cat(node: Node, a: dict[str, Any], axis: int) -> Carried:
    if axis == axis_of(node, a["dim"]):
        return None
    # torch allows legacy empty 1-D tensors in cat: they add nothing
    return tuple((x, axis) for x in a["tensors"] if rank(x) == rank(node)) or None


@operators(aten.stack.default, **_JOINED, shift=True, width=True)
def _stack(node: Node, a: dict[str, Any], axis: int) -> Carried:
    new = axis_of(node, a["dim"])
    return None if axis == new else tuple((x, axis - (axis > new)) for x in a["tensors"])


# -- picking along an axis ---------------------------------------------------------------------------------------------


@operators(aten.split.Tensor, aten.split_with_sizes.default, **_PICKED, width=True)
@operators(aten.index_select.default, **_LOOKED_UP, width=True)
def _along(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """Whatever happens, happens along one axis."""
    return ((a["self"], axis),) if axis != axis_of(a["self"], a["dim"]) else None


@operators(aten.unbind.int, aten.select.int, **_PICKED, width=True)
def _select(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x = a["self"]
    return ((x, axis + (axis >= axis_of(x, a["dim"]))),)


@operators(aten.slice.Tensor, **_PICKED, width=True)
def _slice(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x = a["self"]
    whole = axis != axis_of(x, a["dim"]) or (same(shape(x)[axis], shape(node)[axis]) and a["step"] == 1)
    return ((x, axis),) if whole else None


@operators(aten.narrow_copy.default, **_PICKED, width=No("it says the length of one axis, which may be this one"))
def _narrow(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x = a["self"]
    return ((x, axis),) if axis != axis_of(x, a["dim"]) or same(shape(x)[axis], shape(node)[axis]) else None


@operators(aten.unfold.default, **_PICKED, width=True)
def _unfold(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """Windows along one axis, whose entries are a new last axis."""
    x = a["self"]
    return ((x, axis),) if axis < rank(x) and axis != axis_of(x, a["dimension"]) else None


@operators(aten.diagonal.default, **_PICKED, width=True)
def _diagonal(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """Two axes become one, which is the last."""
    x = a["self"]
    kept = [own for own in range(rank(x)) if own not in (axis_of(x, a["dim1"]), axis_of(x, a["dim2"]))]
    return ((x, kept[axis]),) if axis < len(kept) else None


@operators(aten.rot90.default, aten.flip.default, **_PICKED, width=True)
@operators(aten.roll.default, **_PICKED, width=True)
def _turn(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """Entries change places along some axes; a roll that names none, along all of them in a row."""
    x = a["self"]
    dims = [axis_of(x, d) for d in a["dims"] or []]
    return ((x, axis),) if axis not in dims and (dims or node.target is not aten.roll.default) else None


# -- looking up --------------------------------------------------------------------------------------------------------

operators(aten.take.default, **{**_LOOKED_UP, "shift": NOT_CARRIED}, width=NOT_CARRIED)(NO_MAP)


@operators(aten.embedding.default, **_LOOKED_UP, width=True)
def _embedding(node: Node, a: dict[str, Any], axis: int) -> Carried:
    return ((a["weight"], 1),) if axis == rank(node) - 1 else None


@operators(aten.gather.default, **_LOOKED_UP, width=INDEXED)
def _gather(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x, index = a["self"], a["index"]
    if axis == axis_of(x, a["dim"]) or not repeated(index, axis) or not same(shape(index)[axis], shape(x)[axis]):
        return None
    return ((x, axis),)


@operators(aten.index.Tensor, aten._unsafe_index.Tensor, **_LOOKED_UP, width=True)
def _index(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """Indexing with integer tensors on neighbouring axes: they are replaced by the axes of the indices' broadcast."""
    x, indices = a["self"], a["indices"]
    used = _indexed(indices)
    if not used or used != list(range(used[0], used[-1] + 1)):
        return None
    first, inserted = used[0], max(rank(indices[own]) for own in used)
    if axis < first:
        return ((x, axis),)
    return ((x, axis - inserted + len(used)),) if axis >= first + inserted else None


def _indexed(indices: Any) -> list[int]:
    """The axes that integer tensors pick from; none if there is a mask (bool, uint8), which may take several axes."""
    used = [own for own, index in enumerate(indices) if index is not None]
    return used if all(is_tensor(indices[own]) and dtype(indices[own]) in (torch.int32, torch.int64) for own in used) else []


# -- writing into a copy -----------------------------------------------------------------------------------------------


@operators(aten.index_put.default, **_JOINED, shift=lambda a: not a["accumulate"], width=True)
def _index_put(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """Behind the last index the axes of the values are those of the result."""
    used = _indexed(a["indices"])
    return terms(node, axis, a["self"], a["values"]) if used and axis > used[-1] else None


@operators(aten.slice_scatter.default, aten.index_copy.default, **_JOINED, shift=True, width=True)
@operators(aten.index_add.default, **_JOINED, shift=ONCE, width=True)
def _scatter(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x, source = a["self"], a["source"] if "source" in a else a["src"]
    return ((x, axis), (source, axis)) if axis != axis_of(x, a["dim"]) else None


@operators(aten.select_scatter.default, **_JOINED, shift=True, width=True)
def _select_scatter(node: Node, a: dict[str, Any], axis: int) -> Carried:
    dim = axis_of(node, a["dim"])
    return None if axis == dim else ((a["self"], axis), (a["src"], axis - (axis > dim)))


@operators(aten.scatter.src, **_JOINED, shift=True, width=INDEXED)
@operators(aten.scatter.value, **_JOINED, shift=_ZEROS, width=INDEXED)
@operators(aten.scatter_add.default, **_JOINED, shift=ONCE, width=INDEXED)
def _scatter_by_index(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """Whole rows are written where the index is the same all along the axis; a number only if it is zero."""
    x, index, source = a["self"], a["index"], a.get("src")
    whole = repeated(index, axis) and same(shape(index)[axis], shape(x)[axis]) if rank(index) == rank(x) else False
    if axis == axis_of(x, a["dim"]) or not whole:
        return None
    if source is None:
        return ((x, axis),) if is_zero(a["value"]) else None
    return ((x, axis), (source, axis)) if same(shape(source)[axis], shape(x)[axis]) else None


@operators(aten.masked_scatter.default, **_JOINED, shift=True, width=INDEXED)
def _masked_scatter(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """The source is read in rows: a mask that is the same along the last axis writes whole ones."""
    x, source = a["self"], a["source"]
    last = axis == rank(node) - 1 and rank(source) > 0 and not spans(a["mask"], node, axis)
    whole = last and spans(x, node, axis) and same(shape(source)[-1], shape(node)[axis])
    return ((x, axis - rank(node) + rank(x)), (source, rank(source) - 1)) if whole else None


@operators(aten.index_fill.int_Scalar, **_JOINED, shift=_ZEROS, width=True)
def _index_fill(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x = a["self"]
    return ((x, axis),) if axis != axis_of(x, a["dim"]) and is_zero(a["value"]) else None


@operators(aten.pad.default, **_JOINED, shift=lambda a: a["mode"] != "constant", width=True)
@operators(aten.constant_pad_nd.default, **_JOINED, shift=_ZEROS, width=True)
def _pad(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x, padding = a["self"], a["pad"]
    if a.get("mode", "constant") == "constant" and not (a["value"] is None or is_zero(a["value"])):
        return None  # the other modes repeat entries
    behind = rank(x) - 1 - axis  # pads are listed from the last axis forward, two per axis
    touched = list(padding[2 * behind : 2 * behind + 2])
    return ((x, axis),) if all(is_zero(each) for each in touched) else None


@operators(aten.diag_embed.default, **_JOINED, shift=_ZEROS, width=True)
def _diag_embed(node: Node, a: dict[str, Any], axis: int) -> Carried:
    kept = [own for own in range(rank(node)) if own not in (axis_of(node, a["dim1"]), axis_of(node, a["dim2"]))]
    return ((a["self"], kept.index(axis)),) if axis in kept else None
