"""Calls of operators that sum over axes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normfuse.graph.views import aten
from tests.graph.ops.calls import Draw, case


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
    kernel = [d.of((1, 2)) for _ in range(dims)]
    padding = [size // 2 * d.of((0, 0, 1)) for size in kernel]
    divisor = {"divisor_override": d.of((None, None, 3))} if dims > 1 else {}
    return {
        "self": _picture(d, dims),
        "kernel_size": kernel,
        "stride": [d.of((1, 2))] * dims if d.flag() else [],
        "padding": padding,
        "ceil_mode": d.flag() and not any(padding),
        "count_include_pad": d.flag(),
        **divisor,
    }


@case(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default,
      aten.adaptive_avg_pool3d.default, aten._adaptive_avg_pool3d.default)  # fmt: skip
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


@case(aten.tril.default, aten.triu.default)
def _triangle(d: Draw, op: Any) -> Any:
    return {"self": d.normal(*d.shape(2, 4)), "diagonal": d.of((0, 1, -1))}


@case(aten.im2col.default)
def _im2col(d: Draw, op: Any) -> Any:
    kernel = [d.of((1, 2)), d.of((1, 2))]
    more = {"dilation": [1, 1], "padding": [d.of((0, 1))] * 2, "stride": [d.of((1, 2))] * 2}
    return {"self": d.normal(*((2, 2) if d.flag() else (2, 3)), 2, 2), "kernel_size": kernel, **more}


@case(aten.pixel_shuffle.default, aten.pixel_unshuffle.default)
def _pixels(d: Draw, op: Any) -> Any:
    pixels = (4, 4, 4) if d.flag() else (8, 2, 4)
    factor = {"upscale_factor" if op is aten.pixel_shuffle.default else "downscale_factor": d.of((1, 2))}
    return {"self": d.normal(*d.shape(0, 2), *pixels), **factor}


@case(aten.channel_shuffle.default)
def _channels(d: Draw, op: Any) -> Any:
    sizes = (4, 4, 4, 4) if d.flag() else (d.of((1, 2)), 6, *d.shape(1, 2))
    return {"self": d.normal(*sizes), "groups": d.of((1, 2))}


@case(aten.grid_sampler.default, aten.grid_sampler_2d.default, aten.grid_sampler_3d.default)
def _sampled(d: Draw, op: Any) -> Any:
    dims = 3 if op is aten.grid_sampler_3d.default else 2
    size = d.of((2, 3))
    batch, channels = (size, size) if d.flag() else (d.of((1, 2)), d.of((1, 2, 3)))
    grid = d.normal(batch, *[d.of((2, size)) for _ in range(dims)], dims)
    more = {"interpolation_mode": d.of((0, 1)), "padding_mode": d.of((0, 1, 2)), "align_corners": d.flag()}
    return {"input": d.normal(batch, channels, *[size] * dims), "grid": grid, **more}


@case(aten.col2im.default)
def _col2im(d: Draw, op: Any) -> Any:
    batch, channels = (2, 2) if d.flag() else (d.of((1, 3)), d.of((1, 2)))
    kernel, padding = d.of((1, 2)), d.of((0, 1))
    places = (2 + 2 * padding - kernel + 1) ** 2
    columns = d.normal(*d.of(((), (batch,), (batch,))), channels * kernel**2, places)
    more = {"dilation": [1, 1], "padding": [padding] * 2, "stride": [1, 1]}
    return {"self": columns, "output_size": [2, 2], "kernel_size": [kernel] * 2, **more}


@case(aten.linalg_vector_norm.default, aten.var_mean.correction, aten.var_mean.dim)
def _statistic(d: Draw, op: Any) -> Any:
    shape = d.shape()
    more: dict[str, Any] = {"unbiased": d.flag()} if op is aten.var_mean.dim else {}
    more = {"correction": d.of((0, 1))} if op is aten.var_mean.correction else more
    more = {"ord": d.of((1, 2, 3.0))} if op is aten.linalg_vector_norm.default else more
    return {"self": d.normal(*shape), "dim": d.dims(shape), "keepdim": d.flag(), **more}
