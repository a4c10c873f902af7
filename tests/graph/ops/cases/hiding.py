"""Calls of readers that cannot see a shift."""

from __future__ import annotations

from typing import Any

import torch

from normfuse.graph.views import aten
from tests.graph.ops.calls import HIDING, Draw, case
from tests.graph.ops.cases.elementwise import zeros_like


@case(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default, table=HIDING)
def _softmax(d: Draw, op: Any) -> Any:
    shape = d.shape(0)
    more = {"half_to_float": False} if str(op).startswith("aten._") else {}
    return {"self": d.normal(*shape), "dim": d.dim(max(len(shape), 1)), **more}


@case(aten.var.correction, aten.std.correction, aten.var.dim, aten.std.dim, table=HIDING)
def _spread(d: Draw, op: Any) -> Any:
    shape = d.shape()
    dims = d.of(([d.dim(len(shape))], [d.dim(len(shape))], d.dims(shape), None))
    correction = {"correction": d.of((0, 1, None))} if op._overloadname == "correction" else {"unbiased": d.flag()}
    return {"self": d.normal(*shape), "dim": dims, "keepdim": d.flag(), **correction}


@case(aten.sym_size.int, table=HIDING)
def _sym_size(d: Draw, op: Any) -> Any:
    shape = d.shape()
    return {"self": d.normal(*shape), "dim": d.dim(len(shape))}


@case(aten._assert_tensor_metadata.default, table=HIDING)
def _assert_metadata(d: Draw, op: Any) -> Any:
    return {"a": d.normal(*d.shape(0)), "dtype": torch.float64}


case(
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default,
    aten.rand_like.default, aten.randn_like.default,
    aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default, table=HIDING,
)(zeros_like)  # fmt: skip
