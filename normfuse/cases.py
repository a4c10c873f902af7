"""The inputs that a proof is made on: the user's own, hostile ones made from them, and the extremes of dynamic dims."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from normfuse.program import Program


@dataclass(frozen=True)
class Case:
    """One set of flat inputs.

    Attributes:
        name: what is special about it, for the report.
        flat: inputs in the order of `normfuse.interpret.flat_inputs`.
    """

    name: str
    flat: tuple[Any, ...]


def cases(program: Program, flat: Sequence[Any]) -> Iterator[Case]:
    """The user's inputs first, then every hostile variant that differs from them.

    Floating inputs get a large mean, a tiny variance, zeros and an outlier channel: what norms are most sensitive to.
    Integer inputs (indices) only ever take values that the user's inputs hold, so that they stay inside their tables.
    Dynamic dims are taken to both ends of their ranges.

    Args:
        program: the program that will run them.
        flat: the user's inputs.
    """
    yield Case("as given", tuple(flat))
    for name, change in _HOSTILE.items():
        changed = tuple(change(value) if _is_float(value) else value for value in flat)
        if any(_is_float(value) for value in flat):
            yield Case(name, changed)
    for name, change in _INDICES.items():
        if any(_is_index(value) for value in flat):
            yield Case(name, tuple(change(value) if _is_index(value) else value for value in flat))
    yield from _extremes(program, flat)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def _is_index(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64) and value.dim() > 0


def _outlier(value: Tensor) -> Tensor:
    changed = value.clone()
    changed[..., :1] *= 100.0
    return changed


_HOSTILE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "large mean": lambda value: value + 100.0,
    "tiny variance": lambda value: value * 1e-3,
    "zeros": torch.zeros_like,
    "outlier channel": _outlier,
}
_INDICES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "reversed indices": lambda value: value.flip(-1),
    "one index": lambda value: value.flatten()[:1].expand(value.shape).clone(),
}


def _extremes(program: Program, flat: Sequence[Any]) -> Iterator[Case]:
    nodes = [
        program.nodes[spec.arg.name]
        for spec in program.exported.graph_signature.input_specs
        if spec.kind.name == "USER_INPUT" and hasattr(spec.arg, "name") and spec.arg.name in program.nodes
    ]
    ranges = dict(_ranges(program, nodes, flat))
    if not ranges:
        return
    for name, end in (("smallest dynamic dims", 0), ("largest dynamic dims", 1)):
        sizes = {symbol: bounds[end] for symbol, bounds in ranges.items()}
        yield Case(name, tuple(_resized(value, node, sizes) for value, node in zip(flat, nodes, strict=True)))


def _ranges(program: Program, nodes: Sequence[Node], flat: Sequence[Any]) -> Iterator[tuple[Any, tuple[int, int]]]:
    """For every dynamic dim that is a plain symbol: the smallest and the largest size to try."""
    constraints = program.exported.range_constraints
    for node, value in zip(nodes, flat, strict=True):
        if not isinstance(value, Tensor):
            continue
        for dim, given in zip(node.meta["val"].shape, value.shape, strict=True):
            symbol = dim.node.expr if isinstance(dim, torch.SymInt) else None
            if symbol is not None and symbol.is_symbol and symbol in constraints:
                lower, upper = constraints[symbol].lower, constraints[symbol].upper
                largest = int(upper) if upper.is_Integer and int(upper) <= 8 * given else 2 * given + 1
                yield symbol, (max(int(lower), 1), largest)


def _resized(value: Any, node: Node, sizes: Mapping[Any, int]) -> Any:
    """The value cropped or repeated along its dynamic dims."""
    if not isinstance(value, Tensor):
        return value
    for axis, dim in enumerate(node.meta["val"].shape):
        if isinstance(dim, torch.SymInt):
            size = int(dim.node.expr.subs(sizes))
            value = value.index_select(axis, torch.arange(size, device=value.device) % value.shape[axis])
    return value
