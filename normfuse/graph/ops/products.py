"""Products with weights, and attention."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.fx import Node

from normfuse.graph.ops.lookup import own_axis, rank, spans, terms
from normfuse.graph.ops.row import (
    COMPUTED,
    PLAIN,
    SCALES,
    SEEN,
    Carried,
    Layer,
    Mean,
    No,
    Product,
    operators,
)
from normfuse.graph.views import aten, is_tensor

_PRODUCT: dict[str, Any] = {"hides": SEEN, "shift": SCALES, "keeps": COMPUTED, "computes": PLAIN, "width": True}

# -- layers ------------------------------------------------------------------------------------------------------------


def _with_bias(weight: tuple[Node, int], bias: Any) -> Carried:
    return (weight, (bias, rank(bias) - 1)) if is_tensor(bias) else (weight,)


@operators(aten.linear.default, **_PRODUCT, role=Layer(transposed=False))
def _linear(node: Node, a: dict[str, Any], axis: int) -> Carried:
    if rank(a["weight"]) != 2:
        return None  # a weight vector takes the last axis away
    bias = a["bias"]
    if axis != rank(node) - 1:
        return ((a["input"], axis),) if bias is None else None
    if bias is None:
        return ((a["weight"], 0),)
    # linear takes any bias that broadcasts: one of a single entry has a mean of its own
    return ((a["weight"], 0), own_axis(bias, node, axis)) if spans(bias, node, axis) else None


@operators(
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding, **_PRODUCT, role=Layer(transposed=False),
)  # fmt: skip
def _conv(node: Node, a: dict[str, Any], axis: int) -> Carried:
    weight = a["weight"]
    channel = rank(node) - (rank(weight) - 1)
    return _with_bias((weight, 0), a["bias"]) if axis == channel and a["groups"] == 1 else None


@operators(
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
    **_PRODUCT, role=Layer(transposed=True),
)  # fmt: skip
def _conv_transpose(node: Node, a: dict[str, Any], axis: int) -> Carried:
    weight = a["weight"]
    channel = rank(node) - (rank(weight) - 1)
    return _with_bias((weight, 1), a["bias"]) if axis == channel and a["groups"] == 1 else None


@operators(aten.convolution.default, **_PRODUCT, role=Layer(transposed="transposed"))
def _convolution(node: Node, a: dict[str, Any], axis: int) -> Carried:
    return _conv_transpose(node, a, axis) if a["transposed"] else _conv(node, a, axis)


_LAYOUT = No("its channels are where no pass looks for them")


@operators(aten.conv_tbc.default, **_PRODUCT, role=_LAYOUT)
def _conv_tbc(node: Node, a: dict[str, Any], axis: int) -> Carried:
    return ((a["weight"], 2), (a["bias"], 0)) if axis == 2 else None


@operators(aten.bilinear.default, **_PRODUCT, role=_LAYOUT)
def _bilinear(node: Node, a: dict[str, Any], axis: int) -> Carried:
    return _with_bias((a["weight"], 0), a["bias"]) if axis == rank(node) - 1 else None


# -- matrix products ---------------------------------------------------------------------------------------------------


@operators(aten.addmm.default, **_PRODUCT, role=Product("mat1", "mat2", "self"))
@operators(aten.baddbmm.default, **_PRODUCT, role=No("its term may be another one for each member of the batch"))
def _addmm(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """``bias + x @ W``: GPT-2's Conv1D stores W as [in, out], so either factor may be the weight."""
    left, right = (a["mat1"], a["mat2"]) if "mat1" in a else (a["batch1"], a["batch2"])
    bias, last = a["self"], rank(node) - 1
    if axis < last - 1 or not spans(bias, node, axis):
        return None
    return ((right if axis == last else left, axis), own_axis(bias, node, axis))


_VECTORS = No("one of its factors is a vector")


@operators(aten.addr.default, **_PRODUCT, role=_VECTORS)
def _addr(node: Node, a: dict[str, Any], axis: int) -> Carried:
    term = terms(node, axis, a["self"])
    return (*term, (a["vec2" if axis else "vec1"], 0)) if term else None


@operators(aten.mv.default, **_PRODUCT, role=_VECTORS)
def _mv(node: Node, a: dict[str, Any], axis: int) -> Carried:
    return ((a["self"], 0),)


@operators(aten.mm.default, aten.bmm.default, **_PRODUCT, role=Product("self", "mat2"))
@operators(aten.matmul.default, **_PRODUCT, role=Product("self", "other"))
def _matmul(node: Node, a: dict[str, Any], axis: int) -> Carried:
    left, right = a["self"], a["mat2"] if "mat2" in a else a["other"]
    if rank(left) < 2 or rank(right) < 2:
        return None
    if axis == rank(node) - 1:
        return ((right, rank(right) - 1),)
    return ((left, rank(left) - 2),) if axis == rank(node) - 2 else None


@operators(aten.einsum.default, **_PRODUCT, role=No("its equation says which of its factors meet where"))
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


# -- attention -----------------------------------------------------------------------------------------------


@operators(
    aten.scaled_dot_product_attention.default,
    **{**_PRODUCT, "shift": No("a query that a mask keeps from every key gets zeros, and no shift")}, role=Mean("value"),
)  # fmt: skip
def _attention(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """Sums of values: their features pass, whatever the weights of the sums are."""
    return ((a["value"], rank(a["value"]) - 1),) if axis == rank(node) - 1 and a["dropout_p"] == 0 else None
