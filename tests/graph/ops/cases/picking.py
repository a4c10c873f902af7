"""Calls of operators that pick entries and join tensors."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from normfuse.graph.views import aten
from tests.graph.ops.calls import Call, Draw, case
from tests.graph.ops.cases.norms import norm


@case(aten.cat.default)
def _cat(d: Draw, op: Any) -> Any:
    shape = d.shape()
    dim = d.of(range(len(shape)))
    tensors = [d.normal(*shape[:dim], d.of((1, 2, shape[dim])), *shape[dim + 1 :]) for _ in range(d.of((1, 2, 3)))]
    legacy = [d.normal(0)] if d.of(range(4)) == 0 else []
    return {"tensors": [*legacy, *tensors], "dim": dim - len(shape) if d.flag() and len(shape) > 1 else dim}


@case(aten.stack.default)
def _stack(d: Draw, op: Any) -> Any:
    shape = d.shape(0, 3)
    return {"tensors": [d.normal(*shape) for _ in range(d.of((1, 2, 3)))], "dim": d.dim(len(shape) + 1)}


@case(aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.select.int)
def _split(d: Draw, op: Any) -> Any:
    shape = d.shape()
    dim = d.dim(len(shape))
    more: dict[str, Any] = {}
    if op is aten.split.Tensor:
        more = {"split_size": d.of((1, 2))}
    if op is aten.split_with_sizes.default:
        first = d.of(range(1, shape[dim] + 1))
        more = {"split_sizes": [first, shape[dim] - first]}
    if op is aten.select.int:
        more = {"index": d.of((0, -1))}
    return {"self": d.normal(*shape), "dim": dim, **more}


@case(operator.getitem)
def _getitem(d: Draw, op: Any) -> Any:
    source = d.of((aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.native_layer_norm.default))
    if source is aten.native_layer_norm.default:
        return {"source": Call(source, norm(d, source)), "index": d.of((0, 1, 2))}
    return {"source": Call(source, _split(d, source)), "index": 0}


@case(aten.slice.Tensor)
def _slice(d: Draw, op: Any) -> Any:
    shape = d.shape()
    end = d.of((None, 1, 2, -1, 2**63 - 1))
    return {
        "self": d.normal(*shape),
        "dim": d.dim(len(shape)),
        "start": d.of((None, 0, 1, -3)),
        "end": end,
        "step": d.of((1, 2)),
    }


@case(aten.index_select.default)
def _index_select(d: Draw, op: Any) -> Any:
    shape = d.shape()
    dim = d.dim(len(shape))
    index = torch.arange(shape[dim]) if d.flag() else d.below(shape[dim], d.of((1, 2, 3)))
    return {"self": d.normal(*shape), "dim": dim, "index": index}


@case(aten.gather.default)
def _gather(d: Draw, op: Any) -> Any:
    shape = d.shape()
    dim = d.of(range(len(shape)))
    full = tuple(size if own == dim or d.of(range(4)) else d.of(range(1, size + 1)) for own, size in enumerate(shape))
    index: Any = d.below(shape[dim], *(1 if d.flag() else size for size in full))
    if d.flag():
        index = Call(aten.expand.default, {"self": index, "size": list(full)})
    return {"self": d.normal(*shape), "dim": dim - len(shape) * d.flag(), "index": index}


@case(aten.index.Tensor, aten._unsafe_index.Tensor)
def _index(d: Draw, op: Any) -> Any:
    shape = d.shape(2, 4)
    joint = tuple(d.of((1, 2, 3)) for _ in range(d.of(range(3))))
    indices: list[Any] = []
    kind = d.of(("integers", "integers", "integers", "mask", "bytes", "square mask"))
    if kind == "integers" or op is aten._unsafe_index.Tensor:
        for own in range(d.of(range(1, len(shape) + 1))):
            if d.flag():
                sizes = joint[d.of(range(len(joint) + 1)) :]
                indices.append(d.below(shape[own], *sizes).to(d.of((torch.int64, torch.int32))))
            else:
                indices.append(None)
        if not any(isinstance(each, Tensor) for each in indices):
            indices[-1] = d.below(shape[len(indices) - 1], *joint)
    else:
        first = d.of(range(len(shape) - 1))
        sizes = shape[first : first + (2 if kind == "square mask" else 1 + d.of((0, 1)))]
        mask = d.mask(*sizes)
        indices = [*[None] * first, mask.to(torch.uint8) if kind == "bytes" and op is aten.index.Tensor else mask]
    return {"self": d.normal(*shape), "indices": indices}


@case(aten.index_put.default)
def _index_put(d: Draw, op: Any) -> Any:
    named = _index(d, op)
    picked = tuple(named["self"][tuple(slice(None) if each is None else each for each in named["indices"])].shape)
    values = d.partner(picked)
    return {**named, "values": values, "accumulate": d.flag()}


@case(aten.slice_scatter.default)
def _slice_scatter(d: Draw, op: Any) -> Any:
    named = _slice(d, op)
    part = aten.slice.Tensor(*named.values())
    return {**named, "src": d.normal(*part.shape)}


@case(aten.select_scatter.default)
def _select_scatter(d: Draw, op: Any) -> Any:
    shape = d.shape()
    dim = d.of(range(len(shape)))
    part = d.normal(*shape[:dim], *shape[dim + 1 :])
    return {"self": d.normal(*shape), "src": part, "dim": dim - len(shape) * d.flag(), "index": d.of((0, -1))}


@case(aten.index_add.default, aten.index_copy.default)
def _index_add(d: Draw, op: Any) -> Any:
    shape = d.shape()
    dim = d.of(range(len(shape)))
    index = torch.tensor(d.shuffled(range(shape[dim]))[: d.of((1, 2, 3, 4))])
    if op is aten.index_add.default and d.flag():
        index = d.below(shape[dim], d.of((1, 2, 3)))
    source = d.normal(*shape[:dim], len(index), *shape[dim + 1 :])
    scale = {"alpha": d.of((1, 2, -0.5))} if op is aten.index_add.default else {}
    return {"self": d.normal(*shape), "dim": dim - len(shape) * d.flag(), "index": index, "source": source, **scale}


@case(aten.pad.default, aten.constant_pad_nd.default)
def _pad(d: Draw, op: Any) -> Any:
    shape = d.shape()
    constant = {"value": d.of((0, 0.0, 1.5))} if d.flag() else {}
    if op is aten.pad.default and len(shape) in (2, 3) and d.of(range(4)) == 0:
        return {"self": d.normal(*shape), "pad": [d.of((0, 1)) for _ in range(2)], "mode": d.of(("replicate", "circular"))}
    pads = [d.of((0, 0, 1, 2)) for _ in range(2 * d.of(range(1, len(shape) + 1)))]
    for place in range(0, len(pads), 2):
        if shape[-1 - place // 2] > 2 and d.of(range(4)) == 0:
            pads[place] = -1
    return {"self": d.normal(*shape), "pad": pads, **constant}


@case(aten.roll.default)
def _roll(d: Draw, op: Any) -> Any:
    shape = d.shape()
    dims = d.dims(shape)
    return {"self": d.normal(*shape), "shifts": [d.of((1, -1, 2)) for _ in dims or (0,)], "dims": dims}


@case(aten.flip.default)
def _flip(d: Draw, op: Any) -> Any:
    shape = d.shape()
    return {"self": d.normal(*shape), "dims": d.dims(shape)}


@case(aten.scatter.src, aten.scatter.value, aten.scatter_add.default)
def _scatter(d: Draw, op: Any) -> Any:
    shape = d.shape(2, 4)
    dim = d.of(range(len(shape)))
    short = d.of(range(4)) == 0
    full = tuple(d.of(range(1, size + 1)) if short and own != dim else size for own, size in enumerate(shape))
    places = torch.tensor(d.shuffled(range(shape[dim]))).view(*(-1 if own == dim else 1 for own in range(len(shape))))
    index: Any = places if d.flag() else places.expand(full).contiguous()
    if op is aten.scatter_add.default and d.flag():
        index = d.below(shape[dim], *(size if own == dim or d.flag() else 1 for own, size in enumerate(full)))
    index = Call(aten.expand.default, {"self": index, "size": list(full)})
    index = Call(aten.remainder.Scalar, {"self": index, "other": shape[dim]}) if d.flag() else index
    index = Call(aten.clone.default, {"self": index}) if d.of(range(4)) == 0 else index
    longer = d.of(range(4)) == 0
    more = {"value": d.of((0, 0.0, 1.5))} if op is aten.scatter.value else {}
    source = {} if more else {"src": d.normal(*(size + (longer and d.of((0, 1))) for size in shape))}
    return {"self": d.normal(*shape), "dim": dim - len(shape) * d.flag(), "index": index, **more, **source}


@case(aten.masked_scatter.default)
def _masked_scatter(d: Draw, op: Any) -> Any:
    shape = d.shape()
    count = 1
    for size in shape:
        count *= size
    rows = d.normal(count, shape[-1]) if d.flag() else d.normal(*shape[: d.of(range(len(shape)))], count)
    mask = d.partner(shape, d.mask)
    if d.flag():  # a whole row is one decision, taken elsewhere
        thin = d.mask(*shape[:-1], 1)
        mask = Call(aten.logical_not.default, {"self": Call(aten.expand.default, {"self": thin, "size": list(shape)})})
    return {"self": d.normal(*shape), "mask": mask, "source": rows}


@case(aten.index_fill.int_Scalar)
def _index_fill(d: Draw, op: Any) -> Any:
    shape = d.shape()
    dim = d.of(range(len(shape)))
    index = d.below(shape[dim], d.of((1, 2)))
    return {"self": d.normal(*shape), "dim": dim - len(shape) * d.flag(), "index": index, "value": d.of((0, 0.0, 1.5))}


@case(aten.unfold.default)
def _unfold(d: Draw, op: Any) -> Any:
    shape = d.shape()
    dim = d.of(range(len(shape)))
    size = d.of(range(1, shape[dim] + 1))
    return {"self": d.normal(*shape), "dimension": dim - len(shape) * d.flag(), "size": size, "step": d.of((1, 2))}


@case(aten.narrow_copy.default)
def _narrow(d: Draw, op: Any) -> Any:
    shape = d.shape()
    dim = d.of(range(len(shape)))
    length = d.of(range(1, shape[dim] + 1))
    start = d.of(range(shape[dim] - length + 1))
    return {"self": d.normal(*shape), "dim": dim - len(shape) * d.flag(), "start": start, "length": length}


@case(aten.diagonal.default, aten.diag_embed.default, aten.rot90.default)
def _diagonal(d: Draw, op: Any) -> Any:
    shape = d.shape(1 if op is aten.diag_embed.default else 2, 4)
    axes = len(shape) + (op is aten.diag_embed.default)
    first, second = ([dim - axes * d.flag() for dim in d.shuffled(range(axes))[:2]])[:2]
    if op is aten.rot90.default:
        return {"self": d.normal(*shape), "k": d.of(range(-1, 5)), "dims": [first, second]}
    return {"self": d.normal(*shape), "offset": d.of((0, 0, 1, -1)), "dim1": first, "dim2": second}


@case(aten.take.default)
def _take(d: Draw, op: Any) -> Any:
    x = d.normal(*d.shape())
    return {"self": x, "index": d.below(x.numel(), *d.shape(0, 2))}
