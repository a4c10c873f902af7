"""Calls of operators that sum over axes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normfuse.views import aten
from tests.rules.calls import Draw, case


@case(aten.mean.dim, aten.sum.dim_IntList)
def _reduce(d: Draw, op: Any) -> Any:
    shape = d.shape(0)
    dims = None if d.of(range(8)) == 0 else d.dims(shape)
    more = {"dtype": d.of((None, torch.float64, torch.float32))} if d.flag() else {}
    return {"self": d.normal(*shape), "dim": dims, "keepdim": d.flag(), **more}


@case(aten.cumsum.default)
def _cumsum(d: Draw, op: Any) -> Any:
    shape = d.shape()
    return {"self": d.normal(*shape), "dim": d.dim(len(shape))}


def _picture(d: Draw, dims: int) -> Tensor:
    """Batched or not, with as many channels as pixels now and then."""
    square = d.flag()
    lead = [4 if square else d.of((1, 2, 3)) for _ in range(d.of((1, 2)))]
    return d.normal(*lead, *(4 if square else d.of((2, 3, 4)) for _ in range(dims)))


@case(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def _avg_pool(d: Draw, op: Any) -> Any:
    dims = int(str(op)[len("aten.avg_pool")])
    return {
        "self": _picture(d, dims),
        "kernel_size": [d.of((1, 2)) for _ in range(dims)],
        "stride": [d.of((1, 2))] * dims if d.flag() else [],
        "padding": [0] * dims,
        "ceil_mode": d.flag(),
    }


@case(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default,
      aten.adaptive_avg_pool3d.default)  # fmt: skip
def _adaptive(d: Draw, op: Any) -> Any:
    dims = int(str(op).split("pool")[1][0])
    return {"self": _picture(d, dims), "output_size": [d.of((1, 2, 3, 4)) for _ in range(dims)]}


@case(aten.upsample_nearest1d.vec, aten._upsample_nearest_exact1d.vec, aten.upsample_linear1d.vec,
      aten.upsample_nearest2d.vec, aten._upsample_nearest_exact2d.vec, aten.upsample_bilinear2d.vec,
      aten.upsample_bicubic2d.vec, aten._upsample_bilinear2d_aa.vec, aten._upsample_bicubic2d_aa.vec,
      aten.upsample_nearest3d.vec, aten._upsample_nearest_exact3d.vec, aten.upsample_trilinear3d.vec)  # fmt: skip
def _upsample(d: Draw, op: Any) -> Any:
    dims = int(str(op).split("d")[0][-1])
    align = {} if "nearest" in str(op) else {"align_corners": d.flag()}
    size = {"output_size": [d.of((2, 4, 5)) for _ in range(dims)], "scale_factors": None}
    scale = {"output_size": None, "scale_factors": [d.of((2.0, 1.5)) for _ in range(dims)]}
    return {"input": d.normal(d.of((1, 2, 4)), d.of((1, 2, 4)), *[4] * dims), **align, **(size if d.flag() else scale)}
