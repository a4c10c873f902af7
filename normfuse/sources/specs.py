"""Example inputs as the command line writes them: `[name:]dtype[dim,…]`, one for each.

    float32[2,3,224,224]          a positional input
    float32[batch,3,224,224]      a name in place of a size is a dynamic dim; the same name is the same dim everywhere
    ids:int64[batch=4,seq=16]     a keyword input; the sizes that the example has (2 where none is given)
    int64[batch,seq=16:1-512]     and the range that the dim may have
    float32[]                     a scalar tensor

Floats are drawn from N(0, 1) and integers below a limit, with a generator of our own: nobody else's random state moves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normfuse import limits
from normfuse.errors import InputError
from normfuse.limits import OverLimit
from normfuse.sources.inputs import INTEGERS, InputKey, Inputs

DEFAULT_SIZE = 2
DRAWN_BYTES = 8  # of an entry while it is drawn, whatever it becomes
DEFAULT_LIMIT = 2  # integers are 0 or 1 where nothing is known of the table that they index
GRAMMAR = "write [name:]dtype[dim,...], such as float32[batch,3,224,224] or ids:int64[batch,seq=16:1-512]"

_HEAD = re.compile(r"\s*(?:(?P<name>[A-Za-z_]\w*)\s*:\s*)?(?P<dtype>\w+)\s*\[\s*", re.ASCII)
_DIM = re.compile(
    r"(?P<fixed>\d{1,18})|(?P<name>[A-Za-z_]\w*)(?:=(?P<size>\d{1,18}))?(?::(?P<min>\d{1,18})-(?P<max>\d{1,18})?)?",
    re.ASCII,
)
_COMMA = re.compile(r"\s*,\s*")
_END = re.compile(r"\s*\]\s*$")


@dataclass(frozen=True)
class DynamicDim:
    """A dim whose size may change: its name, and what is said of its size in the example and of its range."""

    name: str
    size: int | None = None
    min: int | None = None
    max: int | None = None


@dataclass(frozen=True)
class Spec:
    """One input; positional where ``name`` is None."""

    name: str | None
    dtype: torch.dtype
    dims: tuple[int | DynamicDim, ...]


def parse_spec(text: str) -> Spec:
    """Read one spec.

    Raises:
        InputError: with the position of what cannot be read.
    """
    head = _HEAD.match(text)
    if head is None:
        start = re.compile(r"[\w\s:]*").match(text)
        raise _unreadable(text, start.end() if start else 0, "a dtype followed by '['")
    dims: list[int | DynamicDim] = []
    at = head.end()
    done = _END.match(text, at)
    while not done:
        dim = _DIM.match(text, at)
        if dim is None:
            raise _unreadable(text, at, "a size or a name")
        dims.append(_dim(dim))
        done = _END.match(text, dim.end())
        comma = _COMMA.match(text, dim.end())
        if not done and comma is None:
            raise _unreadable(text, dim.end(), "',' or a final ']'")
        at = comma.end() if comma else at
    return Spec(head["name"], _dtype(text, head), tuple(dims))


def from_specs(specs: Iterable[str | Spec], *, seed: int = 0, index_limits: Mapping[InputKey, int] | None = None) -> Inputs:
    """Draw one input per spec.

    Args:
        specs: texts as in the module's docstring, or parsed ones.
        seed: the same seed draws the same inputs.
        index_limits: for integer inputs, by position or keyword: draw from [0, limit), default [0, 2).
    """
    parsed = [spec if isinstance(spec, Spec) else parse_spec(spec) for spec in specs]
    args = [spec for spec in parsed if spec.name is None]
    keyed: dict[InputKey, Spec] = dict(enumerate(args))
    keyed |= {spec.name: spec for spec in parsed if spec.name is not None}
    if len(keyed) != len(parsed):
        raise InputError("two input specs have the same name", hint="each keyword input takes one spec")
    tables = dict(index_limits or {})
    if unknown := [key for key in tables if key not in keyed]:
        raise InputError(f"a limit is given for {unknown[0]!r}, which is no input", hint=f"inputs: {list(keyed)}")
    dims = _sized(dim for spec in parsed for dim in spec.dims if isinstance(dim, DynamicDim))
    _check_memory(sum(math.prod(_sizes(spec, dims)) * DRAWN_BYTES for spec in parsed))
    generator = torch.Generator().manual_seed(seed)
    try:
        drawn = {key: _draw(spec, dims, tables.get(key, DEFAULT_LIMIT), generator) for key, spec in keyed.items()}
    except (RuntimeError, MemoryError) as error:
        raise InputError("the inputs of these specs do not fit into memory", hint="give smaller sizes") from error
    return Inputs(
        tuple(drawn[position] for position in range(len(args))),
        {name: tensor for name, tensor in drawn.items() if isinstance(name, str)},
        _dynamic_shapes(keyed, drawn, dims),
    )


def _check_memory(size: int) -> None:
    if size > limits.INPUT_BYTES:
        over = OverLimit(f"these inputs would take {size:,} bytes", "INPUT_BYTES")
        raise InputError(str(over), hint=f"give smaller sizes, or raise the limit: {over.setting}")


def _unreadable(text: str, at: int, expected: str) -> InputError:
    found = repr(text[at]) if at < len(text) else "the end"
    return InputError(f"input spec '{text}': {expected} is expected at position {at + 1}, found {found}", hint=GRAMMAR)


def _dtype(text: str, head: re.Match[str]) -> torch.dtype:
    dtype = getattr(torch, head["dtype"], None)
    if isinstance(dtype, torch.dtype) and (
        dtype.is_floating_point or dtype.is_complex or dtype == torch.bool or dtype in INTEGERS
    ):
        return dtype
    at = head.start("dtype") + 1
    raise InputError(f"input spec '{text}': unknown dtype '{head['dtype']}' at position {at}", hint=GRAMMAR)


def _dim(match: re.Match[str]) -> int | DynamicDim:
    if match["fixed"]:
        return int(match["fixed"])
    size, low, high = (int(match[part]) if match[part] else None for part in ("size", "min", "max"))
    return DynamicDim(match["name"], size, low, high)


def _sized(dims: Iterable[DynamicDim]) -> dict[str, DynamicDim]:
    """Each dim once, with all that is said of it anywhere, and a size."""
    said: dict[str, dict[str, int]] = {}
    for dim in dims:
        known = said.setdefault(dim.name, {})
        for part in ("size", "min", "max"):
            value = getattr(dim, part)
            if value is not None and known.setdefault(part, value) != value:
                raise InputError(f"dim '{dim.name}' has two values for its {part}: {known[part]} and {value}")
    for name, known in said.items():
        low, high = known.get("min", 0), known.get("max", float("inf"))
        size = known.setdefault("size", int(min(max(DEFAULT_SIZE, low), high)))
        if not low <= size <= high:
            raise InputError(f"dim '{name}' of size {size} is outside its range {low} to {high}", hint=GRAMMAR)
    return {name: DynamicDim(name, **known) for name, known in said.items()}


def _sizes(spec: Spec, dims: Mapping[str, DynamicDim]) -> list[int]:
    return [dims[dim.name].size or 0 if isinstance(dim, DynamicDim) else dim for dim in spec.dims]


def _draw(spec: Spec, dims: Mapping[str, DynamicDim], limit: int, generator: torch.Generator) -> Tensor:
    sizes = _sizes(spec, dims)
    if spec.dtype == torch.bool:
        return torch.randint(0, 2, sizes, generator=generator).bool()
    if spec.dtype in INTEGERS:
        high = min(max(limit, 1), torch.iinfo(spec.dtype).max)
        return torch.randint(0, high, sizes, generator=generator).to(spec.dtype)
    # Low precisions and float32 inputs of one seed are the same values; float64 and complex ones have all their own bits.
    drawn = spec.dtype if spec.dtype == torch.float64 or spec.dtype.is_complex else torch.float32
    return torch.randn(sizes, generator=generator, dtype=drawn).to(spec.dtype)


def _dynamic_shapes(keyed: Mapping[InputKey, Spec], drawn: Mapping[InputKey, Tensor], dims: Mapping[str, DynamicDim]) -> Any:
    if not dims:
        return None
    made = {name: torch.export.Dim(name, min=dim.min, max=dim.max) for name, dim in dims.items()}
    shapes = {
        key: {axis: made[dim.name] for axis, dim in enumerate(spec.dims) if isinstance(dim, DynamicDim)} or None
        for key, spec in keyed.items()
    }
    if all(isinstance(key, int) for key in shapes):
        return tuple(shapes.values())
    if all(isinstance(key, str) for key in shapes):
        return shapes
    collection = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for key, shape in shapes.items():
        if shape:
            collection[drawn[key]] = shape
    return collection
