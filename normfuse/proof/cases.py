"""The inputs that a proof is made on: the user's own, hostile ones made from them, and the extremes of dynamic dims."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from normfuse.graph.interpreter import flat_inputs, user_inputs
from normfuse.graph.ops.lookup import keeps
from normfuse.graph.ops.row import SAME
from normfuse.graph.program import Program
from normfuse.graph.views import arguments, aten, is_tensor, shape
from normfuse.sources.inputs import Inputs


@dataclass(frozen=True)
class Case:
    """One set of flat inputs.

    Attributes:
        name: what is special about it, for the report.
        flat: inputs in the order of `normfuse.graph.interpreter.flat_inputs`.
        given: they are the user's own.
    """

    name: str
    flat: tuple[Any, ...]
    given: bool = False


def cases_for(program: Program, given: Inputs) -> Iterator[Case]:
    """`cases` for inputs that are not flat yet, and all further examples that a loader gave."""
    yield from cases(program, flat_inputs(program, given.args, given.kwargs))
    yield from further(given, lambda each: flat_inputs(program, each.args, each.kwargs))


def further(given: Inputs, flat: Callable[[Inputs], Sequence[Any]]) -> Iterator[Case]:
    """The examples of a loader behind the first, which hostile cases are made of."""
    for place, each in enumerate(given.more, 2):
        yield Case(f"example {place}", tuple(flat(each)), given=True)


def cases(program: Program, flat: Sequence[Any]) -> Iterator[Case]:
    """The user's inputs first, then every hostile variant that differs from them.

    Floating inputs get a large mean, a tiny variance, zeros and an outlier channel: what norms are most sensitive to.
    Integer inputs take values that the user's inputs hold, or are drawn inside the embedding table that they index.
    Dynamic dims are taken to both ends of their ranges.

    Args:
        program: the program that will run them.
        flat: the user's inputs.
    """
    limits = [_rows_indexed(node) if _is_index(value) else None for value, node in zip(flat, user_inputs(program), strict=True)]
    yield from cases_of(flat, limits)
    yield from _at_sizes(program, flat, _EXTREMES)


def cases_of(flat: Sequence[Any], limits: Sequence[int | None]) -> Iterator[Case]:
    """The cases that need no program.

    Args:
        flat: the user's inputs.
        limits: for each: the rows of the table that it indexes; None where it indexes none, or none is known.
    """
    yield Case("as given", tuple(flat), given=True)
    for name, change in HOSTILE.items():
        changed = tuple(change(value) if _is_float(value) else value for value in flat)
        if any(_is_float(value) for value in flat):
            yield Case(name, changed)
    for name, change in _INDICES.items():
        if any(_is_index(value) for value in flat):
            yield Case(name, tuple(change(value) if _is_index(value) else value for value in flat))
    if any(limits):
        generator = torch.Generator().manual_seed(0)
        drawn = (
            torch.randint(limit, value.shape, generator=generator, dtype=value.dtype).to(value.device) if limit else value
            for value, limit in zip(flat, limits, strict=True)
        )
        yield Case("drawn indices", tuple(drawn))


def _rows_indexed(node: Node | None) -> int | None:
    """The rows of the smallest embedding table that an input indexes, through casts and views."""
    sizes = []
    for reader in node.users if node is not None else ():
        if reader.target is aten.embedding.default and reader.args[1] is node:
            rows = shape(arguments(reader)["weight"])[0]
            sizes += [rows] if isinstance(rows, int) else []
        elif keeps(reader) in SAME:
            below = _rows_indexed(reader)
            sizes += [below] if below else []
    return min(sizes, default=None)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def _is_index(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64) and value.dim() > 0


def _outlier(value: Tensor) -> Tensor:
    changed = value.clone()
    changed[..., :1] *= 100.0
    return changed


HOSTILE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "large mean": lambda value: value + 100.0,
    "tiny variance": lambda value: value * 1e-3,
    "zeros": torch.zeros_like,
    "outlier channel": _outlier,
}
_INDICES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "reversed indices": lambda value: value.flip(-1),
    "one index": lambda value: value.flatten()[:1].expand(value.shape).clone() if value.numel() else value,
}


def other_values(program: Program, flat: Sequence[Any]) -> Iterator[Case]:
    """The user's inputs with another sign, order and size of every number; the shapes stay."""
    if any(isinstance(value, Tensor) and value.dim() > 0 for value in flat):
        yield Case("other values", tuple(_opposite(value) for value in flat))


def _opposite(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0 or value.is_complex():
        return value
    if value.dtype == torch.bool:
        return ~value
    return value.flip(-1) if not value.is_floating_point() else -3.0 * value.flip(-1)


Size = Callable[[int, int, int], int]
"""The size to try of a dynamic dim: of the given one, the smallest and the largest."""

_EXTREMES: Mapping[str, Size] = {
    "smallest dynamic dims": lambda given, least, most: least,
    "largest dynamic dims": lambda given, least, most: most,
}
_BETWEEN: Mapping[str, Size] = {"dynamic dims between": lambda given, least, most: (least + most) // 2}
_OTHERS: Mapping[str, Size] = {
    "other sizes": lambda given, least, most: given + 1 if given < most else given - 1,
    "smallest sizes": lambda given, least, most: least,
}


def other_sizes(program: Program, flat: Sequence[Any]) -> Iterator[Case]:
    """The user's inputs with every dynamic dim one longer, or shorter where it can be no longer; and as short as it may be."""
    return _at_sizes(program, flat, _OTHERS)


def sizes_of_ranges(program: Program, flat: Sequence[Any]) -> Iterator[Case]:
    """The user's inputs with dynamic dims at both ends of their ranges, and between."""
    return _at_sizes(program, flat, {**_EXTREMES, **_BETWEEN})


def _at_sizes(program: Program, flat: Sequence[Any], chosen: Mapping[str, Size]) -> Iterator[Case]:
    nodes = user_inputs(program)
    ranges = dict(_ranges(program, nodes, flat))
    dims = (dim for node in nodes if is_tensor(node) for dim in shape(node) if isinstance(dim, torch.SymInt))  # type: ignore[arg-type]
    if not ranges or any(not dim.node.expr.free_symbols <= ranges.keys() for dim in dims):
        return  # nothing is dynamic, or a dim is 2*batch where no input is as long as the batch
    for name, size in chosen.items():
        sizes = {symbol: size(*each) for symbol, each in ranges.items()}
        if all(sizes[symbol] >= least for symbol, (_, least, _) in ranges.items()):
            yield Case(name, tuple(_resized(value, node, sizes) for value, node in zip(flat, nodes, strict=True)))


def _ranges(program: Program, nodes: Sequence[Node | None], flat: Sequence[Any]) -> Iterator[tuple[Any, tuple[int, int, int]]]:
    """For the symbol of every dynamic dim, be it a multiple of it: its size, the smallest and the largest to try."""
    constraints = program.exported.range_constraints
    for node, value in zip(nodes, flat, strict=True):
        dims = zip(node.meta["val"].shape, value.shape, strict=True) if node is not None and isinstance(value, Tensor) else ()
        for dim, size in ((dim, size) for dim, size in dims if isinstance(dim, torch.SymInt)):
            factor, symbol = dim.node.expr.as_coeff_Mul()
            if factor.is_Integer and factor > 0 and symbol.is_symbol and symbol in constraints:
                given, limits = size // int(factor), constraints[symbol]
                fits = limits.upper.is_Integer and int(limits.upper) <= 8 * given
                yield symbol, (given, max(int(limits.lower), 1), int(limits.upper) if fits else 2 * given + 1)


def _resized(value: Any, node: Node | None, sizes: Mapping[Any, int]) -> Any:
    """The value cropped or repeated along its dynamic dims."""
    if not isinstance(value, Tensor) or node is None:
        return value
    for axis, dim in enumerate(node.meta["val"].shape):
        if isinstance(dim, torch.SymInt):
            size = int(dim.node.expr.subs(sizes))
            value = value.index_select(axis, torch.arange(size, device=value.device) % value.shape[axis])
    return value
