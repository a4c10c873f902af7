"""Calls of operators that move axes."""

from __future__ import annotations

from typing import Any

from normfuse.graph.views import aten
from tests.graph.ops.calls import Draw, case


def grouped(d: Draw, factors: list[int]) -> list[int]:
    """Sizes that are products of neighbouring factors, with some axes of size 1 between them."""
    sizes, current = [], 1
    for factor in factors:
        current *= factor
        if d.flag():
            sizes.append(current)
            current = 1
        if d.of(range(8)) == 0:
            sizes.append(1)
    return sizes if current == 1 else [*sizes, current]


@case(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _reshape(d: Draw, op: Any) -> Any:
    factors = [2] * d.of(range(1, 5)) if d.flag() else [d.of((1, 2, 3)) for _ in range(d.of(range(5)))]
    own, size = grouped(d, factors), grouped(d, factors)
    if size and d.flag():
        size[d.of(range(len(size)))] = -1
    return {"self": d.normal(*own), "shape" if op is aten.reshape.default else "size": size}


@case(aten.permute.default)
def _permute(d: Draw, op: Any) -> Any:
    shape = d.shape(0)
    return {"self": d.normal(*shape), "dims": [dim - len(shape) * d.flag() for dim in d.shuffled(range(len(shape)))]}


@case(aten.transpose.int)
def _transpose(d: Draw, op: Any) -> Any:
    shape = d.shape()
    return {"self": d.normal(*shape), "dim0": d.dim(len(shape)), "dim1": d.dim(len(shape))}


@case(aten.t.default)
def _t(d: Draw, op: Any) -> Any:
    return {"self": d.normal(*d.shape(0, 2))}


@case(aten.unsqueeze.default)
def _unsqueeze(d: Draw, op: Any) -> Any:
    shape = d.shape(0, 3)
    return {"self": d.normal(*shape), "dim": d.dim(len(shape) + 1)}


@case(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def _squeeze(d: Draw, op: Any) -> Any:
    shape = tuple(1 if d.of(range(3)) == 0 else size for size in d.shape())
    dim: dict[str, Any] = {} if op is aten.squeeze.default else {"dim": d.dim(len(shape))}
    return {"self": d.normal(*shape), **({"dim": d.dims(shape)} if op is aten.squeeze.dims else dim)}


@case(aten.expand.default)
def _expand(d: Draw, op: Any) -> Any:
    shape = d.shape()
    own = tuple(1 if d.of(range(3)) == 0 else size for size in shape[d.of((0, 0, 1)) :])
    kept = [-1 if d.flag() and size == mine else size for mine, size in zip(own[::-1], shape[::-1], strict=False)]
    return {"self": d.normal(*own), "size": [*shape[: len(shape) - len(own)], *kept[::-1]]}


@case(aten.repeat.default)
def _repeat(d: Draw, op: Any) -> Any:
    shape = d.shape(0, 3)
    return {"self": d.normal(*shape), "repeats": [d.of((1, 1, 2)) for _ in range(len(shape) + d.of((0, 0, 1)))]}


@case(aten.tile.default)
def _tile(d: Draw, op: Any) -> Any:
    shape = d.shape(0, 3)
    return {"self": d.normal(*shape), "dims": [d.of((1, 1, 2)) for _ in range(d.of(range(len(shape) + 2)))]}


@case(aten.repeat_interleave.self_int)
def _repeat_interleave(d: Draw, op: Any) -> Any:
    shape = d.shape()
    return {"self": d.normal(*shape), "repeats": d.of((1, 2)), "dim": d.of((None, d.dim(len(shape)), d.dim(len(shape))))}
