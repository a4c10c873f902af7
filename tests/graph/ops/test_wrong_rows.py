"""Rows that are wrong on purpose: the cases find every one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch.fx import Node

from normfuse.graph.ops import lookup, products
from normfuse.graph.ops.lookup import rank
from normfuse.graph.ops.row import TABLE
from normfuse.graph.views import aten, shape
from tests.graph.ops.cases import CASES, HIDING
from tests.graph.ops.properties import answered, by_name, check, check_carries, check_hides, unshrunk

Wrong = Callable[[Node, dict[str, Any], int], Any]


def _named(name: str, move: Callable[[Node, dict[str, Any], int], int] = lambda node, a, axis: axis) -> Wrong:
    """Always that operand, along the axis that ``move`` says."""
    return lambda node, a, axis: ((a[name], own),) if 0 <= (own := move(node, a, axis)) < rank(a[name]) else None


def _also(op: Any, more: Wrong) -> Wrong:
    """The row as it is, and more where it says nothing."""
    right: Any = TABLE[op].carries
    return lambda node, a, axis: more(node, a, axis) if (said := right(node, a, axis)) is None else said


def _spanning(*names: str) -> Wrong:
    """All of these operands that have the axis, whatever the others do."""

    def row(node: Node, a: dict[str, Any], axis: int) -> Any:
        terms = [a[name] for name in names]
        return tuple((term, axis - rank(node) + rank(term)) for term in terms if lookup.spans(term, node, axis)) or None

    return row


def _always(node: Node, a: dict[str, Any], axis: int) -> Any:
    return ()


def _of_equal_size(node: Node, a: dict[str, Any], axis: int) -> Any:
    sizes = list(shape(a["self"]))
    return ((a["self"], sizes.index(size)),) if (size := shape(node)[axis]) in sizes else None


def _weight_and_bias(dim: int, channel: Callable[[Node, dict[str, Any]], int]) -> Wrong:
    def row(node: Node, a: dict[str, Any], axis: int) -> Any:
        return products._with_bias((a["weight"], dim), a["bias"]) if axis == channel(node, a) else None

    return row


def _channel(node: Node, a: dict[str, Any]) -> int:
    return rank(node) - rank(a["weight"]) + 1


def _first_with_letter(node: Node, a: dict[str, Any], axis: int) -> Any:
    left, _, right = a["equation"].replace(" ", "").partition("->")
    if not right or "." in a["equation"]:
        return None
    places = ((x, term.find(right[axis])) for x, term in zip(a["tensors"], left.split(","), strict=True))
    return (next((x, own) for x, own in places if own >= 0),)


WRONG: dict[str, tuple[Any, Wrong]] = {
    "add: a term that is constant along the axis": (aten.add.Tensor, _spanning("self", "other")),
    "add: one of two terms": (aten.add.Tensor, _named("self")),
    "sub: less a multiple of the mean": (
        aten.sub.Tensor, lambda node, a, axis: () if lookup.is_mean_of(a["other"], a["self"], axis) else None,
    ),
    "sub: less the mean along any axis": (
        aten.sub.Tensor,
        lambda node, a, axis: () if any(lookup.is_mean_of(a["other"], a["self"], own) for own in range(rank(node))) else None,
    ),
    "mul: the first of two spanning factors": (aten.mul.Tensor, _named("self")),
    "mul: both factors": (aten.mul.Tensor, _spanning("self", "other")),
    "div: the divisor": (aten.div.Tensor, _spanning("other")),
    "where: a condition that differs along the axis": (aten.where.self, _spanning("self", "other")),
    "masked_fill: a mask that differs along the axis": (aten.masked_fill.Scalar, _named("self")),
    "full: any number": (aten.full.default, _always),
    "view: the first axis of that size": (aten.view.default, _of_equal_size),
    "permute: the inverse": (
        aten.permute.default,
        _named("self", lambda node, a, axis: [dim % rank(node) for dim in a["dims"]].index(axis)),
    ),
    "transpose: not at all": (aten.transpose.int, _named("self")),
    "t: not at all": (aten.t.default, _named("self")),
    "unsqueeze: the axes stay": (aten.unsqueeze.default, _named("self")),
    "squeeze: the axes stay": (aten.squeeze.dim, _named("self")),
    "expand: axes counted from the front": (aten.expand.default, _named("self")),
    "repeat: a repeated axis": (aten.repeat.default, _named("self", lambda node, a, axis: axis - rank(node) + rank(a["self"]))),
    "cat: its own axis": (aten.cat.default, lambda node, a, axis: tuple((x, axis) for x in a["tensors"] if rank(x) > axis)),
    "stack: the axes stay": (
        aten.stack.default, lambda node, a, axis: tuple((x, axis) for x in a["tensors"] if rank(x) > axis),
    ),
    "split: its own axis": (aten.split.Tensor, _named("self")),
    "select: the axes stay": (aten.select.int, _named("self")),
    "slice: its own axis": (aten.slice.Tensor, _named("self")),
    "index_select: its own axis": (aten.index_select.default, _named("self")),
    "gather: an index that differs along the axis": (
        aten.gather.default,
        lambda node, a, axis: ((a["self"], axis),) if axis != a["dim"] % rank(node) else None,
    ),
    "index: the axes stay": (aten.index.Tensor, _named("self")),
    "index: as many axes as before": (aten.index.Tensor, _also(aten.index.Tensor, _named("self"))),
    "pad: along the padded axis": (aten.constant_pad_nd.default, _named("self")),
    "pad: with a number": (
        aten.pad.default,
        lambda node, a, axis: ((a["self"], axis),) if shape(node)[axis] == shape(a["self"])[axis] else None,
    ),
    "roll: its own axis": (aten.roll.default, _named("self")),
    "flip: its own axis": (aten.flip.default, _named("self")),
    "mean: the axes stay": (aten.mean.dim, _named("self")),
    "sum: its own axis": (aten.sum.dim_IntList, _also(aten.sum.dim_IntList, _named("self"))),
    "cumsum: its own axis": (aten.cumsum.default, _named("self")),
    "pool: pixels": (aten.avg_pool2d.default, _named("self")),
    "resize: pixels": (aten.upsample_bilinear2d.vec, _named("input")),
    "linear: tokens, beside a bias": (aten.linear.default, _also(aten.linear.default, _named("input"))),
    "linear: the input's features": (aten.linear.default, _weight_and_bias(1, lambda node, a: rank(node) - 1)),
    "linear: a bias of one entry": (aten.linear.default, _weight_and_bias(0, lambda node, a: rank(node) - 1)),
    "linear: without its bias": (
        aten.linear.default, lambda node, a, axis: ((a["weight"], 0),) if axis == rank(node) - 1 else None,
    ),
    "addmm: without its bias": (aten.addmm.default, lambda node, a, axis: ((a["mat2"], 1),) if axis == 1 else None),
    "addmm: a bias of one entry": (
        aten.addmm.default, lambda node, a, axis: ((a["mat2"], 1), (a["self"], rank(a["self"]) - 1)) if axis == 1 else None,
    ),
    "matmul: the inner axis": (aten.matmul.default, _named("other", lambda node, a, axis: rank(a["other"]) - 2)),
    "matmul: the batch": (aten.matmul.default, _also(aten.matmul.default, _named("self"))),
    "conv: with groups": (aten.conv2d.default, _weight_and_bias(0, _channel)),
    "conv: always batched": (aten.conv1d.default, _weight_and_bias(0, lambda node, a: 1 if a["groups"] == 1 else -1)),
    "conv: channels that come in": (aten.conv1d.default, _weight_and_bias(1, _channel)),
    "conv_transpose: with groups": (aten.conv_transpose2d.input, _weight_and_bias(1, _channel)),
    "conv_transpose: like conv": (aten.conv_transpose2d.input, _weight_and_bias(0, _channel)),
    "convolution: never transposed": (aten.convolution.default, products._conv),
    "embedding: its rows": (aten.embedding.default, _named("weight", lambda node, a, axis: 0)),
    "copy: into what is overwritten": (aten.copy.default, _named("self")),
    "copy: a source that is constant along the axis": (
        aten.copy.default, _named("src", lambda node, a, axis: axis - rank(node) + rank(a["src"])),
    ),
    "rsub: from a number": (aten.rsub.Scalar, _named("self")),
    "addcmul: without its product": (aten.addcmul.default, _named("self")),
    "addcmul: both factors": (aten.addcmul.default, _spanning("self", "tensor1", "tensor2")),
    "lerp: one end": (aten.lerp.Scalar, _named("self")),
    "lerp: a weight that differs along the axis": (aten.lerp.Tensor, _spanning("self", "end")),
    "tile: axes counted from the front": (
        aten.tile.default,
        lambda node, a, axis: ((a["self"], axis),) if axis >= len(a["dims"]) or a["dims"][axis] == 1 else None,
    ),
    "repeat_interleave: its own axis": (aten.repeat_interleave.self_int, _named("self")),
    "repeat_interleave: no axis": (
        aten.repeat_interleave.self_int, lambda node, a, axis: ((a["self"], 0),) if a["dim"] is None else None,
    ),
    "slice_scatter: its own axis": (aten.slice_scatter.default, _spanning("self", "src")),
    "slice_scatter: without its source": (aten.slice_scatter.default, _also(aten.slice_scatter.default, _named("self"))),
    "select_scatter: the axes stay": (
        aten.select_scatter.default,
        lambda node, a, axis: ((a["self"], axis), (a["src"], axis)) if axis < rank(a["src"]) else None,
    ),
    "index_put: values that are constant along the axis": (
        aten.index_put.default,
        lambda node, a, axis: ((a["self"], axis),) if axis >= len(a["indices"]) else None,
    ),
    "index_put: an indexed axis": (aten.index_put.default, _spanning("self", "values")),
    "index_put: a mask is one axis": (
        aten.index_put.default,
        lambda node, a, axis: _spanning("self", "values")(node, a, axis) if axis >= len(a["indices"]) else None,
    ),
    "index_add: its own axis": (aten.index_add.default, _spanning("self", "source")),
    "scatter: an index that differs along the axis": (
        aten.scatter.src,
        lambda node, a, axis: ((a["self"], axis), (a["src"], axis)) if axis != a["dim"] % rank(node) else None,
    ),
    "scatter: a number": (
        aten.scatter.value, lambda node, a, axis: ((a["self"], axis),) if axis != a["dim"] % rank(node) else None,
    ),
    "scatter_add: without its source": (aten.scatter_add.default, _also(aten.scatter_add.default, _named("self"))),
    "masked_scatter: a mask that differs along the axis": (aten.masked_scatter.default, _spanning("self", "source")),
    "masked_scatter: the source's own axes": (aten.masked_scatter.default, _named("self")),
    "index_fill: with a number": (
        aten.index_fill.int_Scalar, lambda node, a, axis: ((a["self"], axis),) if axis != a["dim"] % rank(node) else None,
    ),
    "unfold: its own axis": (aten.unfold.default, _named("self")),
    "diagonal: the axes stay": (aten.diagonal.default, _named("self")),
    "diag_embed: the axes stay": (aten.diag_embed.default, _named("self")),
    "rot90: its own axes": (aten.rot90.default, _named("self")),
    "addcdiv: without its quotient": (aten.addcdiv.default, _named("self")),
    "addr: one vector": (aten.addr.default, lambda node, a, axis: ((a["self"], axis), (a["vec1"], 0))),
    "triangle: its own axes": (aten.tril.default, _named("self")),
    "pixel_shuffle: the channels": (aten.pixel_shuffle.default, _named("self")),
    "channel_shuffle: the channels": (aten.channel_shuffle.default, _named("self")),
    "grid_sampler: the batch": (aten.grid_sampler.default, _also(aten.grid_sampler.default, _named("input"))),
    "einsum: a letter of several factors": (aten.einsum.default, _first_with_letter),
    "attention: of the queries": (aten.scaled_dot_product_attention.default, _named("query")),
    "attention: positions": (aten.scaled_dot_product_attention.default, _named("value")),
    "baddbmm: the batch": (aten.baddbmm.default, _also(aten.baddbmm.default, _named("batch1"))),
    "baddbmm: without its first term": (aten.baddbmm.default, lambda node, a, axis: ((a["batch2"], 2),) if axis == 2 else None),
    "layer_norm: with a gain": (aten.layer_norm.default, _always),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_row_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, wrong = WRONG[name]
    monkeypatch.setitem(TABLE, op, answered(op, carries=wrong))
    with pytest.raises(AssertionError):
        check(op, CASES, check_carries, unshrunk)


CARRYING = {op for op, row in TABLE.items() if row.carries}
ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}
WITHOUT_OPERANDS = ZEROS | {aten.full.default, aten.full_like.default, aten.new_full.default, aten.layer_norm.default}


@pytest.mark.parametrize("op", by_name(CARRYING - ZEROS), ids=str)
def test_zero_mean_for_no_reason_is_found(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLE, op, answered(op, carries=_always))
    with pytest.raises(AssertionError):
        check(op, CASES, check_carries, unshrunk)


@pytest.mark.parametrize("op", by_name(CARRYING - WITHOUT_OPERANDS), ids=str)
def test_an_axis_off_by_one_is_found(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right: Any = TABLE[op].carries

    def off(node: Node, a: dict[str, Any], axis: int) -> Any:
        return tuple((x, (own + 1) % rank(x)) for x, own in carried) if (carried := right(node, a, axis)) else None

    monkeypatch.setitem(TABLE, op, answered(op, carries=off))
    with pytest.raises(AssertionError):
        check(op, CASES, check_carries, unshrunk)


HIDDEN_WRONG: dict[str, tuple[Any, Any]] = {
    "type_as: what is cast": (aten.type_as.default, lambda node, a, x: frozenset(range(rank(x)))),
    "copy: the source": (aten.copy.default, lambda node, a, x: frozenset(range(rank(x)))),
    "norm over several axes": (aten.layer_norm.default, lambda node, a, x: frozenset({rank(x) - 1})),
    "norm whose gain is its input": (
        aten.layer_norm.default,
        lambda node, a, x: frozenset({rank(x) - 1}) if a["input"] is x and len(a["normalized_shape"]) == 1 else frozenset(),
    ),
    "norm that tells the mean": (aten.native_layer_norm.default, TABLE[aten.layer_norm.default].hides),
    "softmax along another axis": (aten.softmax.int, lambda node, a, x: frozenset({0} if rank(x) else ())),
    "spread over several axes": (aten.var.correction, lambda node, a, x: frozenset(d % rank(x) for d in a["dim"] or ())),
}


@pytest.mark.parametrize("name", HIDDEN_WRONG)
def test_a_reader_that_sees_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, wrong = HIDDEN_WRONG[name]
    if name == "norm that tells the mean":
        right = wrong
        wrong = lambda node, a, x: right(_unread(node), a, x)  # noqa: E731
    monkeypatch.setitem(TABLE, op, answered(op, hides=wrong))
    with pytest.raises(AssertionError):
        check(op, HIDING, check_hides, unshrunk)


def _unread(node: Node) -> Node:
    """The same call, before anybody reads it."""
    twin = node.graph.call_function(aten.layer_norm.default, node.args, node.kwargs)
    twin.meta.update(node.meta)
    return twin
