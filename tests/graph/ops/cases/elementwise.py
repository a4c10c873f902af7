"""Calls of operators that work entry by entry."""

from __future__ import annotations

from typing import Any

import torch

from normfuse.graph.views import aten
from tests.graph.ops.calls import HIDING, Call, Draw, case


@case(aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.neg.default)
def _unary(d: Draw, op: Any) -> Any:
    return {"self": d.partner(d.shape(0, 4))}


@case(aten._to_copy.default)
def _to_copy(d: Draw, op: Any) -> Any:
    x = d.normal(*d.shape(0, 4))
    if d.of(range(4)) == 0:
        x = (4 * x).long()
    return {"self": x, "dtype": d.of((None, torch.float64, torch.float32, torch.float16, torch.int64, torch.bool))}


@case(aten.type_as.default, table=HIDING)
@case(aten.type_as.default)
def _type_as(d: Draw, op: Any) -> Any:
    x = d.normal(*d.shape())
    other = x if d.of(range(4)) == 0 else d.normal(2).to(d.of((torch.float64, torch.float32, torch.int64)))
    return {"self": x, "other": other}


@case(aten.copy.default, table=HIDING)
@case(aten.copy.default)
def _copy(d: Draw, op: Any) -> Any:
    shape = d.shape(0)
    x = d.normal(*shape).to(d.of((torch.float64, torch.float32, torch.int64)))
    return {"self": x, "src": x if d.of(range(4)) == 0 else d.partner(shape)}


@case(aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor)
def _add(d: Draw, op: Any) -> Any:
    shape = d.shape()
    x = d.normal(*shape)
    kind = d.of(("own mean", "own mean", "own mean", "partner", "partner", "number", "another mean", "itself"))
    other: Any = x
    if kind == "partner":
        other = d.partner(shape)
    if kind == "number":
        other = d.normal() if op is aten.rsub.Tensor else d.of((0, 0.0, 1.5))
    if kind.endswith("mean"):
        keepdim = len(set(shape)) > 1 or d.of(range(4)) > 0  # in a square, a mean without its axis still broadcasts
        dims = [d.dim(len(shape))] if d.of(range(4)) else d.shuffled(range(len(shape)))[:2]
        source = x if kind == "own mean" else d.normal(*shape)
        other = Call(aten.mean.dim, {"self": source, "dim": dims, "keepdim": keepdim})
    alpha = {"alpha": d.of((1, 2, -0.5))} if d.flag() else {}
    swap = kind != "number" and d.of(range(4)) == 0
    return {"self": other, "other": x, **alpha} if swap else {"self": x, "other": other, **alpha}


@case(aten.mul.Tensor, aten.div.Tensor, aten.true_divide.Tensor)
def _mul(d: Draw, op: Any) -> Any:
    shape = d.shape()
    x = d.normal(*shape)
    kind = d.of(("partner", "partner", "partner", "number", "itself", "mask"))
    other = {"number": 1.5, "itself": x, "mask": x > 0}.get(kind)
    if other is None or (kind == "mask" and op is not aten.mul.Tensor):
        other = d.partner(shape)
    return {"self": other, "other": x} if kind == "partner" and d.flag() else {"self": x, "other": other}


@case(aten.mul.Scalar, aten.div.Scalar, aten.true_divide.Scalar)
def _mul_scalar(d: Draw, op: Any) -> Any:
    return {"self": d.partner(d.shape()), "other": d.of((2, 0.5))}


@case(aten.rsub.Scalar, aten.add.Scalar, aten.sub.Scalar)
def _rsub_scalar(d: Draw, op: Any) -> Any:
    return {"self": d.partner(d.shape()), "other": d.of((0, 0.0, 1.5)), "alpha": d.of((1, -0.5))}


@case(aten.addcmul.default)
def _addcmul(d: Draw, op: Any) -> Any:
    shape = d.shape()
    x, left, right = d.shuffled((d.normal(*shape), d.partner(shape), d.partner(shape)))
    return {"self": x, "tensor1": left, "tensor2": right, "value": d.of((1, -0.5))}


@case(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
def _where(d: Draw, op: Any) -> Any:
    shape = d.shape()
    condition = d.partner(shape, d.mask)
    left, right = d.normal(*shape), d.partner(shape)
    if op is aten.where.self and d.flag():
        left, right = right, left
    number = d.of((0, 0.0, 1.5))
    if op is aten.where.ScalarOther:
        left, right = (left if d.flag() else right), number
    if op is aten.where.ScalarSelf:
        left, right = number, (left if d.flag() else right)
    return {"condition": condition, "self": left, "other": right}


@case(aten.masked_fill.Scalar)
def _masked_fill(d: Draw, op: Any) -> Any:
    shape = d.shape()
    x, mask = (d.normal(*shape), d.partner(shape, d.mask)) if d.flag() else (d.partner(shape), d.mask(*shape))
    return {"self": x, "mask": mask, "value": d.of((0, 0.0, 1.5))}


@case(aten.lerp.Scalar, aten.lerp.Tensor)
def _lerp(d: Draw, op: Any) -> Any:
    shape = d.shape()
    x, end = d.shuffled((d.normal(*shape), d.partner(shape)))
    return {"self": x, "end": end, "weight": 0.3 if op is aten.lerp.Scalar else d.partner(shape)}


@case(aten.zeros.default, aten.ones.default, aten.full.default)
def _zeros(d: Draw, op: Any) -> Any:
    value = {"fill_value": d.of((0, 0.0, 1, 1.5))} if op is aten.full.default else {}
    return {"size": list(d.shape(0, 3)), **value}


@case(aten.zeros_like.default, aten.new_zeros.default, aten.full_like.default, aten.new_full.default)
def zeros_like(d: Draw, op: Any) -> Any:
    size = {"size": list(d.shape(0, 3))} if ".new_" in str(op) else {}
    value = {"fill_value": d.of((0, 0.0, 1, 1.5))} if "full" in str(op) else {}
    return {"self": d.normal(*d.shape(0, 3)), **size, **value}


@case(aten.addcdiv.default)
def _addcdiv(d: Draw, op: Any) -> Any:
    shape = d.shape()
    return {"self": d.partner(shape), "tensor1": d.partner(shape), "tensor2": d.partner(shape), "value": d.of((1, -0.5))}


@case(aten.sqrt.default, aten.rsqrt.default, aten.square.default, aten.reciprocal.default, aten.pow.Tensor_Scalar)
def _power(d: Draw, op: Any) -> Any:
    exponent = {"exponent": d.of((0.5, -0.5))} if op is aten.pow.Tensor_Scalar else {}
    return {"self": d.normal(*d.shape(0)).abs() + 0.1, **exponent}


@case(aten.native_dropout.default)
def _dropout(d: Draw, op: Any) -> Any:
    return {"input": d.normal(*d.shape()), "p": d.of((0.0, 0.5)), "train": d.of((False, False, True, None))}
