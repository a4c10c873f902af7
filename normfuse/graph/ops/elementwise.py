"""Operators that work entry by entry, and those that make tensors of one number."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from normfuse.graph.ops.lookup import axis_of, is_mean_of, is_zero, own_axis, row, spans, terms
from normfuse.graph.ops.row import (
    COMPUTED,
    NO_MAP,
    NO_WEIGHT,
    NOT_CARRIED,
    ONCE,
    PLAIN,
    SCALES,
    SEEN,
    Carried,
    Carrying,
    Computes,
    Keeps,
    No,
    Sized,
    everything,
    operators,
)
from normfuse.graph.views import aten, dtype

# -- of one value ------------------------------------------------------------------------------------------------------

_ONE: dict[str, Any] = {"role": NO_WEIGHT, "width": True}


@operators(
    aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default,
    **_ONE, hides=SEEN, shift=True, keeps=Keeps.COPY, computes=PLAIN,
)  # fmt: skip
@operators(aten._to_copy.default, **_ONE, hides=SEEN, shift=True, keeps=Keeps.CAST, computes=PLAIN)
@operators(aten.neg.default, **_ONE, hides=SEEN, shift=SCALES, keeps=COMPUTED, computes=Computes.ALGEBRAIC)
def _unary(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x = a["self"]
    return ((x, axis),) if (dtype(x) or torch.int64).is_floating_point else None


def _but(name: str) -> Any:
    """Only the operand of this name gives entries, the others their dtype or shape."""

    def rule(node: Node, a: dict[str, Any], operand: Node) -> frozenset[int]:
        return everything(node, a, operand) if operand is not a[name] else frozenset()

    return rule


operators(aten.type_as.default, **_ONE, hides=_but("self"), shift=True, keeps=Keeps.CAST, computes=PLAIN)(_unary)


@operators(
    aten.copy.default, hides=_but("src"), shift=True, keeps=No("its entries are its second operand's"), computes=PLAIN,
    role=NO_WEIGHT, width=No("it takes its shape from an operand that stays as wide"),
)  # fmt: skip
def _copy(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """``src`` in the shape and dtype of ``self``."""
    return terms(node, axis, a["src"])


_NO_MAP: dict[str, Any] = {"shift": NOT_CARRIED, "keeps": COMPUTED, "role": NO_WEIGHT, "width": NOT_CARRIED}

operators(
    aten.sqrt.default, aten.rsqrt.default, aten.pow.Tensor_Scalar, **_NO_MAP, hides=SEEN, computes=Computes.ROOT,
)(NO_MAP)  # fmt: skip
operators(aten.square.default, aten.reciprocal.default, **_NO_MAP, hides=SEEN, computes=Computes.ALGEBRAIC)(NO_MAP)

# -- arithmetic --------------------------------------------------------------------------------------------------------

_BROADCAST: dict[str, Any] = {"hides": SEEN, "keeps": COMPUTED, "role": NO_WEIGHT, "width": True}


@operators(aten.add.Tensor, **_BROADCAST, shift=ONCE, computes=Computes.SUM)
@operators(aten.sub.Tensor, **_BROADCAST, shift=ONCE, computes=Computes.DIFFERENCE)
@operators(aten.add.Scalar, **_BROADCAST, shift=True, computes=Computes.SUM)
@operators(aten.sub.Scalar, **_BROADCAST, shift=True, computes=Computes.DIFFERENCE)
@operators(aten.rsub.Tensor, aten.rsub.Scalar, **_BROADCAST, shift=ONCE, computes=Computes.ALGEBRAIC)
def _add(node: Node, a: dict[str, Any], axis: int) -> Carried:
    x, y = a["self"], a["other"]
    if node.target is aten.sub.Tensor and a["alpha"] == 1 and is_mean_of(y, x, axis):
        return ()  # x - mean(x): centred by construction
    return terms(node, axis, x, y)


@operators(aten.mul.Tensor, aten.mul.Scalar, **_BROADCAST, shift=SCALES, computes=Computes.PRODUCT)
def _mul(node: Node, a: dict[str, Any], axis: int) -> Carried:
    return _product(node, axis, a["self"], a["other"])


@operators(aten.addcmul.default, **_BROADCAST, shift=ONCE, computes=Computes.ALGEBRAIC)
def _addcmul(node: Node, a: dict[str, Any], axis: int) -> Carried:
    term, product = terms(node, axis, a["self"]), _product(node, axis, a["tensor1"], a["tensor2"])
    return (*term, *product) if term and product else None


def _product(node: Node, axis: int, *factors: Any) -> Carried:
    spanning = [factor for factor in factors if spans(factor, node, axis)]
    return (own_axis(spanning[0], node, axis),) if len(spanning) == 1 else None


@operators(
    aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor, aten.true_divide.Scalar,
    **_BROADCAST, shift=SCALES, computes=Computes.QUOTIENT,
)  # fmt: skip
def _div(node: Node, a: dict[str, Any], axis: int) -> Carried:
    return _quotient(node, axis, a["self"], a["other"])


@operators(aten.addcdiv.default, **_BROADCAST, shift=ONCE, computes=Computes.ALGEBRAIC)
def _addcdiv(node: Node, a: dict[str, Any], axis: int) -> Carried:
    term, quotient = terms(node, axis, a["self"]), _quotient(node, axis, a["tensor1"], a["tensor2"])
    return (*term, *quotient) if term and quotient else None


def _quotient(node: Node, axis: int, x: Any, y: Any) -> Carried:
    return (own_axis(x, node, axis),) if spans(x, node, axis) and not spans(y, node, axis) else None


# -- one of two --------------------------------------------------------------------------------------------------------


def _gated(gate: str, *names: str) -> Carrying:
    """Between terms, by a gate (a mask or a weight) that must not differ along the axis."""

    def rule(node: Node, a: dict[str, Any], axis: int) -> Carried:
        return None if spans(a[gate], node, axis) else terms(node, axis, *(a[name] for name in names))

    return rule


_ZEROS = No("the zeros between its entries get no shift")
_where = _gated("condition", "self", "other")
operators(aten.where.self, **_BROADCAST, shift=True, computes=Computes.CHOICE)(_where)
operators(aten.where.ScalarOther, aten.where.ScalarSelf, **_BROADCAST, shift=_ZEROS, computes=Computes.CHOICE)(_where)
operators(aten.masked_fill.Scalar, **_BROADCAST, shift=_ZEROS, computes=Computes.CHOICE)(_gated("mask", "self", "value"))
operators(
    aten.lerp.Scalar, aten.lerp.Tensor, **_BROADCAST, shift=True, computes=Computes.ALGEBRAIC,
)(_gated("weight", "self", "end"))  # fmt: skip


@operators(
    aten.native_dropout.default, hides=SEEN, shift=True, keeps=No("its second result is a mask"), computes=PLAIN,
    role=NO_WEIGHT, width=True,
)  # fmt: skip
def _dropout(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """Of both results; nobody asks for the mask's, as it is no float."""
    return ((a["input"], axis),) if a["train"] is False else None


@operators(
    operator.getitem, hides=SEEN, shift=True, keeps=Keeps.PICK, computes=PLAIN, role=NO_WEIGHT, width=True,
)  # fmt: skip
def _getitem(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """One of several results, which carry alike."""
    source = node.args[0]
    assert isinstance(source, Node)
    return ((source, axis),) if (known := row(source)) is not None and known.carries else None


# -- numbers -----------------------------------------------------------------------------------------------------------

_NUMBERS: dict[str, Any] = {"keeps": COMPUTED, "role": NO_WEIGHT, "shift": No("it is made of no operand")}
_SAYS: dict[str, Any] = {**_NUMBERS, "computes": Computes.FILL, "width": Sized("size")}
_LIKE: dict[str, Any] = {
    **_NUMBERS, "computes": Computes.FILL, "hides": everything, "width": No("it is as wide as what it is like"),
}  # fmt: skip
_NO_OPERAND = No("it has no operand")


@operators(aten.zeros.default, **_SAYS, hides=_NO_OPERAND)
@operators(aten.new_zeros.default, **_SAYS, hides=everything)
@operators(aten.zeros_like.default, **_LIKE)
def _zeros(node: Node, a: dict[str, Any], axis: int) -> Carried:
    return ()


@operators(aten.full.default, **_SAYS, hides=_NO_OPERAND)
@operators(aten.new_full.default, **_SAYS, hides=everything)
@operators(aten.full_like.default, **_LIKE)
def _full(node: Node, a: dict[str, Any], axis: int) -> Carried:
    return () if is_zero(a["fill_value"]) else None


_ONES = No("ones have a mean")
operators(aten.ones.default, **_SAYS, hides=_NO_OPERAND)(_ONES)
operators(aten.new_ones.default, **_SAYS, hides=everything)(_ONES)
operators(aten.ones_like.default, **_LIKE)(_ONES)
operators(
    aten.empty_like.default, aten.rand_like.default, aten.randn_like.default, aten.new_empty.default,
    **_NUMBERS, hides=everything, computes=PLAIN, width=NOT_CARRIED,
)(No("its numbers are nobody's"))  # fmt: skip
operators(
    aten.sym_size.int, aten._assert_tensor_metadata.default,
    **_NUMBERS, hides=everything, computes=PLAIN, width=NOT_CARRIED,
)(No("it yields no tensor"))  # fmt: skip


# -- weights that sum to one -------------------------------------------------------------------------------------------


def _along_dim(node: Node, a: dict[str, Any], operand: Node) -> frozenset[int]:
    return frozenset({axis_of(operand, a["dim"])})


operators(aten.softmax.int, aten._softmax.default, **_NO_MAP, hides=_along_dim, computes=Computes.SOFTMAX)(NO_MAP)
operators(aten.log_softmax.int, aten._log_softmax.default, **_NO_MAP, hides=_along_dim, computes=PLAIN)(NO_MAP)
