"""One row per aten op: how a linear map along one axis passes through it.

A row answers one question. Let M be any linear map applied along ``axis`` of the op's result (centring C₀ = I - 11ᵀ/d,
or a diagonal scale). Which operands, each along which of its own axes, must M be applied to instead?

    carries[op](node, axis) -> ((operand, its axis), ...)     M(op(x, …)) = op(Mx, …)
                            -> ()                             M(result) = result whatever M = C₀ is: its mean is zero
                            -> None                           M does not pass

Everything else follows from this table. Forward: a result has zero mean if all its carried operands have.
Backward: a shift of an operand along its axis is invisible if it is invisible in the result. Establishing: to centre a
value, centre its carried operands, until stored tensors are reached: "the writer of a Linear" is no special case, because
a Linear carries its output axis to dim 0 of its weight and bias.

Torch's other names (`concat`, `multiply`, `vstack`, …) never get here: `normfuse.graph.composites` writes them as the operators
that they are.

An op without a row passes nothing. Axes are carried, never guessed from sizes. Each row has a property test against
numbers (tests/graph/ops/cases), so a new row is a function here and a case there.

`hides` is the other, shorter table: readers whose result does not change when an operand is shifted along an axis.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from normfuse.graph.views import NORMS, arguments, aten, dtype, is_tensor, shape, tensors_in

Carried: TypeAlias = tuple[tuple[Node, int], ...] | None
Row: TypeAlias = Callable[[Node, dict[str, Any], int], Carried]

_ROWS: dict[Any, Row] = {}
_HIDES: dict[Any, Callable[[Node, dict[str, Any], Node], frozenset[int]]] = {}


def _row(*targets: Any) -> Callable[[Row], Row]:
    def add(rule: Row) -> Row:
        for target in targets:
            _ROWS[target] = rule
        return rule

    return add


def carries(node: Node, axis: int) -> Carried:
    """Which operands carry a linear map applied along ``axis`` of ``node``; None when it does not pass.

    Args:
        node: any node of a functional aten graph.
        axis: a non-negative axis of its value; for a node that yields several tensors, of each of them.
    """
    rule = _ROWS.get(node.target)
    if rule is None or node.op != "call_function" or axis >= rank(node):
        return None  # a scalar has no axis
    if node.target is operator.getitem:
        return rule(node, {}, axis)
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and not value.is_floating_point():
        return None  # a cast to integers rounds: not linear
    return rule(node, arguments(node), axis)


def known_ops() -> frozenset[Any]:
    """The operators that have a carrying row."""
    return frozenset(_ROWS)


def knows(op: Any) -> bool:
    """Whether an operator is known by its name: it has a row, hides something, or is a norm."""
    return op in _ROWS or op in _HIDES or op in METADATA or op in NORMS


# -- shapes ------------------------------------------------------------------------------------------------------------


def rank(node: Node) -> int:
    """Number of axes of a value."""
    return len(shape(node))


def _axis(node: Node, dim: int) -> int:
    return dim % max(rank(node), 1)


def same(a: Any, b: Any) -> bool:
    """Whether two (possibly symbolic) sizes are proven equal."""
    return statically_known_true(a == b)


def same_sizes(*nodes: Node) -> bool:
    """Whether values are proven to have one shape; dynamic sizes are told apart by what they are, not by the example's."""
    return len({str(shape(node)) for node in nodes}) == 1


def spans(operand: Any, out: Node, axis: int) -> bool:
    """Whether an operand has the broadcast axis ``axis`` of ``out`` (and is not repeated along it)."""
    if not is_tensor(operand):
        return False
    own = axis - (rank(out) - rank(operand))
    return own >= 0 and (not same(shape(operand)[own], 1) or same(shape(out)[axis], 1)) and not repeated(operand, own)


def varies_along(operand: Node, out: Node) -> list[int]:
    """The axes of ``out`` along which a broadcast operand has more than one entry, be they equal."""
    before = rank(out) - rank(operand)
    return [before + own for own, size in enumerate(shape(operand)) if not same(size, 1)]


_SHAPE_KEEPING = {aten._to_copy.default, aten.clone.default, aten.alias.default, aten.detach.default}


def repeated(node: Node, axis: int) -> bool:
    """Whether a value is proven constant along an axis because it was expanded along it."""
    while node.target in _SHAPE_KEEPING:
        node = arguments(node)["self"]
    if _picks(node):
        operands = [each for each in node.all_input_nodes if is_tensor(each)]
        return bool(operands) and not any(spans(each, node, axis) or same(shape(node)[axis], 1) for each in operands)
    if node.target in _FILLS:
        return dtype(node) in (torch.int32, torch.int64) and not same(shape(node)[axis], 1)
    if node.target is not aten.expand.default:
        return False
    source = arguments(node)["self"]
    own = axis - (rank(node) - rank(source))
    if own >= 0 and same(shape(source)[own], shape(node)[axis]):
        return repeated(source, own)
    return own < 0 or same(shape(source)[own], 1)


_FILLS = {aten.zeros.default, aten.ones.default, aten.full.default, aten.zeros_like.default, aten.new_zeros.default}


def _picks(node: Node) -> bool:
    """Whether a value is a mask or an index that is computed entry by entry."""
    exact = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    kind = dtype(node)
    return exact and kind is not None and not kind.is_floating_point and not kind.is_complex


def _own(operand: Node, out: Node, axis: int) -> tuple[Node, int]:
    return operand, axis - (rank(out) - rank(operand))


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 0


# -- elementwise -------------------------------------------------------------------------------------------------------


@_row(
    aten._to_copy.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.type_as.default, aten.neg.default,
)  # fmt: skip
def _unary(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x = a["self"]
    return ((x, axis),) if (dtype(x) or torch.int64).is_floating_point else None


@_row(aten.copy.default)
def _copy(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """``src`` in the shape and dtype of ``self``."""
    return _terms(node, axis, a["src"])


@_row(aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor, aten.rsub.Scalar)
def _add(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x, y = a["self"], a["other"]
    if node.target is aten.sub.Tensor and a["alpha"] == 1 and is_mean_of(y, x, axis):
        return ()  # x - mean(x): centred by construction
    return _terms(node, axis, x, y)


def _terms(node: Node, axis: int, *terms: Any) -> Carried:
    carried = []
    for term in terms:
        if spans(term, node, axis):
            carried.append(_own(term, node, axis))
        elif not _is_zero(term):
            return None  # a term that is constant along the axis has a mean of its own
    return tuple(carried)


def is_mean_of(node: Any, x: Node, axis: int) -> bool:
    """Whether ``node`` is the mean of ``x`` along exactly ``axis``, kept as a size-1 axis."""
    if not is_tensor(node) or node.target is not aten.mean.dim:
        return False
    a = arguments(node)
    return a["self"] is x and a["keepdim"] is True and [_axis(x, d) for d in a["dim"] or []] == [axis]


@_row(aten.mul.Tensor, aten.mul.Scalar)
def _mul(node: Node, a: dict[str, Any], axis: int) -> Carried:
    return _product(node, axis, a["self"], a["other"])


@_row(aten.addcmul.default)
def _addcmul(node: Node, a: dict[str, Any], axis: int) -> Carried:
    term, product = _terms(node, axis, a["self"]), _product(node, axis, a["tensor1"], a["tensor2"])
    return (*term, *product) if term and product else None


def _product(node: Node, axis: int, *factors: Any) -> Carried:
    spanning = [factor for factor in factors if spans(factor, node, axis)]
    return (_own(spanning[0], node, axis),) if len(spanning) == 1 else None


@_row(aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor, aten.true_divide.Scalar)
def _div(node: Node, a: dict[str, Any], axis: int) -> Carried:
    return _quotient(node, axis, a["self"], a["other"])


@_row(aten.addcdiv.default)
def _addcdiv(node: Node, a: dict[str, Any], axis: int) -> Carried:
    term, quotient = _terms(node, axis, a["self"]), _quotient(node, axis, a["tensor1"], a["tensor2"])
    return (*term, *quotient) if term and quotient else None


def _quotient(node: Node, axis: int, x: Any, y: Any) -> Carried:
    return (_own(x, node, axis),) if spans(x, node, axis) and not spans(y, node, axis) else None


def _gated(gate: str, *terms: str) -> Row:
    """Between terms, by a gate (a mask or a weight) that must not differ along the axis."""

    def rule(node: Node, a: dict[str, Any], axis: int) -> Carried:
        return None if spans(a[gate], node, axis) else _terms(node, axis, *(a[term] for term in terms))

    return rule


_row(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)(_gated("condition", "self", "other"))
_row(aten.masked_fill.Scalar)(_gated("mask", "self", "value"))
_row(aten.lerp.Scalar, aten.lerp.Tensor)(_gated("weight", "self", "end"))


@_row(aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
def _zeros(node: Node, a: dict[str, Any], axis: int) -> Carried:
    return ()


@_row(aten.full.default, aten.new_full.default, aten.full_like.default)
def _full(node: Node, a: dict[str, Any], axis: int) -> Carried:
    return () if _is_zero(a["fill_value"]) else None


# -- moving axes -------------------------------------------------------------------------------------------------------


@_row(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _reshape(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """Row-major order: an axis survives a reshape iff its size and the number of entries behind it stay the same."""
    x = a["self"]
    size, behind = shape(node)[axis], _numel(shape(node)[axis + 1 :])
    for own in reversed(range(rank(x))):
        if same(_numel(shape(x)[own + 1 :]), behind) and same(shape(x)[own], size):
            return ((x, own),)
    return None


def _numel(sizes: tuple[Any, ...]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


@_row(aten.permute.default)
def _permute(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x = a["self"]
    return ((x, _axis(x, a["dims"][axis])),)


@_row(aten.transpose.int)
def _transpose(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x = a["self"]
    swap = {_axis(x, a["dim0"]): _axis(x, a["dim1"]), _axis(x, a["dim1"]): _axis(x, a["dim0"])}
    return ((x, swap.get(axis, axis)),)


@_row(aten.t.default)
def _t(node: Node, a: dict[str, Any], axis: int) -> Carried:
    return ((a["self"], axis if rank(node) < 2 else 1 - axis),)


@_row(aten.unsqueeze.default)
def _unsqueeze(node: Node, a: dict[str, Any], axis: int) -> Carried:
    new = _axis(node, a["dim"])
    return None if axis == new else ((a["self"], axis - (axis > new)),)


@_row(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def _squeeze(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x = a["self"]
    dims = a.get("dim", range(rank(x)))
    dims = [dims] if isinstance(dims, int) else dims
    gone = {_axis(x, d) for d in dims if same(shape(x)[_axis(x, d)], 1)}
    kept = [own for own in range(rank(x)) if own not in gone]
    return ((x, kept[axis]),) if len(kept) == rank(node) else None


@_row(aten.expand.default)
def _expand(node: Node, a: dict[str, Any], axis: int) -> Carried:
    return (_own(a["self"], node, axis),) if not repeated(node, axis) else None


@_row(aten.repeat.default, aten.tile.default)
def _repeat(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x, times = a["self"], a["repeats"] if "repeats" in a else a["dims"]
    own, place = axis - (rank(node) - rank(x)), axis - (rank(node) - len(times))  # tile may name only the last axes
    return ((x, own),) if own >= 0 and (place < 0 or same(times[place], 1)) else None


# -- picking and joining along other axes ------------------------------------------------------------------------------


@_row(aten.cat.default)
def _cat(node: Node, a: dict[str, Any], axis: int) -> Carried:
    if axis == _axis(node, a["dim"]):
        return None
    # torch allows legacy empty 1-D tensors in cat: they add nothing
    return tuple((x, axis) for x in a["tensors"] if rank(x) == rank(node)) or None


@_row(aten.stack.default)
def _stack(node: Node, a: dict[str, Any], axis: int) -> Carried:
    new = _axis(node, a["dim"])
    return None if axis == new else tuple((x, axis - (axis > new)) for x in a["tensors"])


@_row(
    aten.split.Tensor, aten.split_with_sizes.default, aten.index_select.default, aten.cumsum.default,
    aten.repeat_interleave.self_int,
)  # fmt: skip
def _along(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """Whatever happens, happens along one axis; without an axis (repeat_interleave), along all of them in a row."""
    x, dim = a["self"], a["dim"]
    return None if dim is None or axis == _axis(x, dim) else ((x, axis),)


@_row(aten.unbind.int, aten.select.int)
def _select(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x = a["self"]
    return ((x, axis + (axis >= _axis(x, a["dim"]))),)


@_row(operator.getitem)
def _getitem(node: Node, a: dict[str, Any], axis: int) -> Carried:
    source = node.args[0]
    assert isinstance(source, Node)
    return ((source, axis),) if source.target in _LISTS else None


_LISTS = {aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int}


@_row(aten.slice.Tensor)
def _slice(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x = a["self"]
    whole = axis != _axis(x, a["dim"]) or (same(shape(x)[axis], shape(node)[axis]) and a["step"] == 1)
    return ((x, axis),) if whole else None


@_row(aten.gather.default)
def _gather(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x, index = a["self"], a["index"]
    if axis == _axis(x, a["dim"]) or not repeated(index, axis) or not same(shape(index)[axis], shape(x)[axis]):
        return None
    return ((x, axis),)


@_row(aten.index.Tensor, aten._unsafe_index.Tensor)
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


@_row(aten.index_put.default)
def _index_put(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """Behind the last index the axes of the values are those of the result."""
    used = _indexed(a["indices"])
    return _terms(node, axis, a["self"], a["values"]) if used and axis > used[-1] else None


@_row(aten.slice_scatter.default, aten.index_add.default, aten.index_copy.default)
def _scatter(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x, source = a["self"], a["source"] if "source" in a else a["src"]
    return ((x, axis), (source, axis)) if axis != _axis(x, a["dim"]) else None


@_row(aten.select_scatter.default)
def _select_scatter(node: Node, a: dict[str, Any], axis: int) -> Carried:
    dim = _axis(node, a["dim"])
    return None if axis == dim else ((a["self"], axis), (a["src"], axis - (axis > dim)))


@_row(aten.constant_pad_nd.default, aten.pad.default)
def _pad(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x, padding = a["self"], a["pad"]
    if a.get("mode", "constant") == "constant" and not (a["value"] is None or _is_zero(a["value"])):
        return None  # the other modes repeat entries
    behind = rank(x) - 1 - axis  # pads are listed from the last axis forward, two per axis
    touched = list(padding[2 * behind : 2 * behind + 2])
    return ((x, axis),) if all(_is_zero(each) for each in touched) else None


@_row(aten.scatter.src, aten.scatter.value, aten.scatter_add.default)
def _scatter_by_index(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """Whole rows are written where the index is the same all along the axis; a number only if it is zero."""
    x, index, source = a["self"], a["index"], a.get("src")
    whole = repeated(index, axis) and same(shape(index)[axis], shape(x)[axis]) if rank(index) == rank(x) else False
    if axis == _axis(x, a["dim"]) or not whole:
        return None
    if source is None:
        return ((x, axis),) if _is_zero(a["value"]) else None
    return ((x, axis), (source, axis)) if same(shape(source)[axis], shape(x)[axis]) else None


@_row(aten.masked_scatter.default)
def _masked_scatter(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """The source is read in rows: a mask that is the same along the last axis writes whole ones."""
    x, source = a["self"], a["source"]
    last = axis == rank(node) - 1 and rank(source) > 0 and not spans(a["mask"], node, axis)
    whole = last and spans(x, node, axis) and same(shape(source)[-1], shape(node)[axis])
    return (_own(x, node, axis), (source, rank(source) - 1)) if whole else None


@_row(aten.index_fill.int_Scalar)
def _index_fill(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x = a["self"]
    return ((x, axis),) if axis != _axis(x, a["dim"]) and _is_zero(a["value"]) else None


@_row(aten.unfold.default)
def _unfold(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """Windows along one axis, whose entries are a new last axis."""
    x = a["self"]
    return ((x, axis),) if axis < rank(x) and axis != _axis(x, a["dimension"]) else None


@_row(aten.narrow_copy.default)
def _narrow(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x = a["self"]
    return ((x, axis),) if axis != _axis(x, a["dim"]) or same(shape(x)[axis], shape(node)[axis]) else None


@_row(aten.diagonal.default)
def _diagonal(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """Two axes become one, which is the last."""
    x = a["self"]
    kept = [own for own in range(rank(x)) if own not in (_axis(x, a["dim1"]), _axis(x, a["dim2"]))]
    return ((x, kept[axis]),) if axis < len(kept) else None


@_row(aten.diag_embed.default)
def _diag_embed(node: Node, a: dict[str, Any], axis: int) -> Carried:
    kept = [own for own in range(rank(node)) if own not in (_axis(node, a["dim1"]), _axis(node, a["dim2"]))]
    return ((a["self"], kept.index(axis)),) if axis in kept else None


@_row(aten.rot90.default)
def _rot90(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x = a["self"]
    return ((x, axis),) if axis not in [_axis(x, d) for d in a["dims"]] else None


@_row(aten.roll.default)
def _roll(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x = a["self"]
    dims = [_axis(x, d) for d in a["dims"] or []]
    return ((x, axis),) if dims and axis not in dims else None


@_row(aten.flip.default)
def _flip(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x = a["self"]
    return ((x, axis),) if axis not in [_axis(x, d) for d in a["dims"]] else None


# -- sums over other axes ----------------------------------------------------------------------------------------------


@_row(aten.mean.dim, aten.sum.dim_IntList)
def _reduce(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x = a["self"]
    dims = sorted(_axis(x, d) for d in a["dim"] or [])
    if not dims:
        return None
    if a["keepdim"]:
        return ((x, axis),) if axis not in dims else None
    kept = [own for own in range(rank(x)) if own not in dims]
    return ((x, kept[axis]),)


def _spatial(dims: int) -> Row:
    """Ops that treat every channel alike and mix only the last ``dims`` axes."""

    def rule(node: Node, a: dict[str, Any], axis: int) -> Carried:
        return ((a["self"] if "self" in a else a["input"], axis),) if axis < rank(node) - dims else None

    return rule


_row(aten.avg_pool1d.default, aten.adaptive_avg_pool1d.default)(_spatial(1))
_row(aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default)(_spatial(2))
_row(aten.avg_pool3d.default, aten.adaptive_avg_pool3d.default)(_spatial(3))
_row(aten.upsample_nearest1d.vec, aten._upsample_nearest_exact1d.vec, aten.upsample_linear1d.vec)(_spatial(1))
_row(
    aten.upsample_nearest2d.vec, aten._upsample_nearest_exact2d.vec, aten.upsample_bilinear2d.vec,
    aten.upsample_bicubic2d.vec, aten._upsample_bilinear2d_aa.vec, aten._upsample_bicubic2d_aa.vec,
)(_spatial(2))  # fmt: skip
_row(aten.upsample_nearest3d.vec, aten._upsample_nearest_exact3d.vec, aten.upsample_trilinear3d.vec)(_spatial(3))
_row(aten.tril.default, aten.triu.default, aten.im2col.default)(_spatial(2))  # in im2col's columns channels are mixed
_row(aten.pixel_shuffle.default, aten.pixel_unshuffle.default)(_spatial(3))  # channels become pixels


@_row(aten.channel_shuffle.default)
def _channel_shuffle(node: Node, a: dict[str, Any], axis: int) -> Carried:
    return ((a["self"], axis),) if axis != 1 else None


@_row(aten.grid_sampler.default, aten.grid_sampler_2d.default, aten.grid_sampler_3d.default)
def _grid_sampler(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """Means of neighbours, which the grid says for all channels alike."""
    return ((a["input"], 1),) if axis == 1 else None


# -- products with weights ---------------------------------------------------------------------------------------------


def _with_bias(weight: tuple[Node, int], bias: Any) -> Carried:
    return (weight, (bias, rank(bias) - 1)) if is_tensor(bias) else (weight,)


@_row(aten.linear.default)
def _linear(node: Node, a: dict[str, Any], axis: int) -> Carried:
    if rank(a["weight"]) != 2:
        return None  # a weight vector takes the last axis away
    bias = a["bias"]
    if axis != rank(node) - 1:
        return ((a["input"], axis),) if bias is None else None
    if bias is None:
        return ((a["weight"], 0),)
    # linear takes any bias that broadcasts: one of a single entry has a mean of its own
    return ((a["weight"], 0), _own(bias, node, axis)) if spans(bias, node, axis) else None


@_row(aten.addmm.default, aten.baddbmm.default)
def _addmm(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """``bias + x @ W``: GPT-2's Conv1D stores W as [in, out], so either factor may be the weight."""
    left, right = (a["mat1"], a["mat2"]) if "mat1" in a else (a["batch1"], a["batch2"])
    bias, last = a["self"], rank(node) - 1
    if axis < last - 1 or not spans(bias, node, axis):
        return None
    return ((right if axis == last else left, axis), _own(bias, node, axis))


@_row(aten.addr.default)
def _addr(node: Node, a: dict[str, Any], axis: int) -> Carried:
    term = _terms(node, axis, a["self"])
    return (*term, (a["vec2" if axis else "vec1"], 0)) if term else None


@_row(aten.mv.default)
def _mv(node: Node, a: dict[str, Any], axis: int) -> Carried:
    return ((a["self"], 0),)


@_row(aten.mm.default, aten.bmm.default, aten.matmul.default)
def _matmul(node: Node, a: dict[str, Any], axis: int) -> Carried:
    left, right = a["self"], a["mat2"] if "mat2" in a else a["other"]
    if rank(left) < 2 or rank(right) < 2:
        return None
    if axis == rank(node) - 1:
        return ((right, rank(right) - 1),)
    return ((left, rank(left) - 2),) if axis == rank(node) - 2 else None


@_row(aten.einsum.default)
def _einsum(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """A product is linear in each factor: an axis of one factor alone is carried to it."""
    left, arrow, right = a["equation"].replace(" ", "").partition("->")
    if "." in left and not arrow:
        return None
    factors = [(x, _labels(term, x)) for x, term in zip(a["tensors"], left.split(","), strict=True)]
    having = Counter(label for _, labels in factors for label in labels)
    out = _labels(right, node) if arrow else sorted(label for label in having if having[label] == 1)
    if having[out[axis]] != 1:
        return None
    return tuple((x, labels.index(out[axis])) for x, labels in factors if out[axis] in labels)


def _labels(term: str, value: Node) -> list[str]:
    """The letter of each axis; an ellipsis broadcasts, so its axes are numbered from the right."""
    left, _, right = term.partition("...")
    return [*left, *map(str, range(len(left) + len(right) - rank(value), 0)), *right]


@_row(aten.scaled_dot_product_attention.default)
def _attention(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """Sums of values: their features pass, whatever the weights of the sums are."""
    return ((a["value"], rank(a["value"]) - 1),) if axis == rank(node) - 1 and a["dropout_p"] == 0 else None


@_row(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
      aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)  # fmt: skip
def _conv(node: Node, a: dict[str, Any], axis: int) -> Carried:
    weight = a["weight"]
    channel = rank(node) - (rank(weight) - 1)
    return _with_bias((weight, 0), a["bias"]) if axis == channel and a["groups"] == 1 else None


@_row(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def _conv_transpose(node: Node, a: dict[str, Any], axis: int) -> Carried:
    weight = a["weight"]
    channel = rank(node) - (rank(weight) - 1)
    return _with_bias((weight, 1), a["bias"]) if axis == channel and a["groups"] == 1 else None


@_row(aten.convolution.default)
def _convolution(node: Node, a: dict[str, Any], axis: int) -> Carried:
    return (_conv_transpose if a["transposed"] else _conv)(node, a, axis)


@_row(aten.embedding.default)
def _embedding(node: Node, a: dict[str, Any], axis: int) -> Carried:
    return ((a["weight"], 1),) if axis == rank(node) - 1 else None


@_row(aten.layer_norm.default)
def _plain_layer_norm(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """Without gain and shift the result is centred by construction; with them its mean depends on the data."""
    last = axis == rank(node) - 1 and len(a["normalized_shape"]) == 1
    return () if last and a["weight"] is None and a["bias"] is None else None


# -- readers that cannot see a shift -----------------------------------------------------------------------------------


def hides(node: Node, operand: Node) -> frozenset[int]:
    """The axes of ``operand`` along which a per-position shift leaves ``node`` unchanged."""
    if node.target in METADATA:
        return _every_axis(operand)
    rule = _HIDES.get(node.target)
    return rule(node, arguments(node), operand) if rule else frozenset()


METADATA = {
    aten.sym_size.int, aten._assert_tensor_metadata.default,
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default,
    aten.rand_like.default, aten.randn_like.default,
    aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default,
}  # fmt: skip


def times_read(value: Node) -> int:
    """How often a value is read; a reader that takes it twice counts twice, readers of its metadata do not count."""
    readers = (reader for reader in value.users if reader.target not in METADATA)
    return sum(operand is value for reader in readers for operand in tensors_in((reader.args, reader.kwargs)))


def _every_axis(value: Node) -> frozenset[int]:
    return frozenset(range(max(rank(value), 1)))


def _hide(*targets: Any) -> Callable[[Any], Any]:
    def add(rule: Any) -> Any:
        _HIDES.update(dict.fromkeys(targets, rule))
        return rule

    return add


@_hide(aten.type_as.default, aten.copy.default)
def _like_hides(node: Node, a: dict[str, Any], operand: Node) -> frozenset[int]:
    """One operand gives the values, the other only their dtype and shape."""
    return _every_axis(operand) if operand is not a["src" if "src" in a else "self"] else frozenset()


@_hide(aten.layer_norm.default, aten.native_layer_norm.default)
def _norm_hides(node: Node, a: dict[str, Any], operand: Node) -> frozenset[int]:
    alone = a["input"] is operand and a["weight"] is not operand and a["bias"] is not operand
    tells = any(user.target is operator.getitem and user.args[1] == 1 for user in node.users)  # native: the mean itself
    # over several axes the norm sees how the means along one of them differ
    return frozenset({rank(operand) - 1}) if alone and not tells and len(a["normalized_shape"]) == 1 else frozenset()


@_hide(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)
def _softmax_hides(node: Node, a: dict[str, Any], operand: Node) -> frozenset[int]:
    return frozenset({_axis(operand, a["dim"])})


@_hide(aten.var.correction, aten.var.dim, aten.std.correction, aten.std.dim)
def _spread_hides(node: Node, a: dict[str, Any], operand: Node) -> frozenset[int]:
    dims = a["dim"] or []
    return frozenset({_axis(operand, dims[0])}) if len(dims) == 1 else frozenset()


WITHOUT_ROW = {
    "nan_to_num": "a bound on single entries: a shift of one that is infinite is lost",
    "nansum": "skips entries by their value",
    "clamp": "a bound on single entries",
    "relu": "a bound on single entries",
    "amax": "picks entries by their value",
    "sort": "moves entries by their value",
    "median": "picks entries by their value",
    "cumprod": "multiplies the entries of one operand",
    "index_reduce": "multiplies or bounds entries",
    "scatter_reduce": "multiplies or bounds entries",
    "as_strided": "its axes are memory, not the operand's",
    "cross": "mixes the three entries of its axis, and is a product of both operands",
    "fft_fft": "its results are complex, which no stored tensor is made of",
    "fft_rfft": "its results are complex, which no stored tensor is made of",
    "fft_irfft": "its operands are complex, which no stored tensor is made of",
    "kron": "an axis of the result is two of the operands'",
    "cdist": "distances: no axis of the result is a feature",
}
"""Operators that were thought of and have no row, each with the reason."""
