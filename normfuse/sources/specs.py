"""Example inputs as the command line writes them: `[name:]dtype[dim,…]` or `name=value`, one for each.

    float32[2,3,224,224]          a positional input
    float32[batch,3,224,224]      a name in place of a size is a dynamic dim; the same name is the same dim everywhere
    ids:int64[batch=4,seq=16]     a keyword input; the sizes that the example has (2 where none is given)
    int64[batch,seq=16:1-512]     and the range that the dim may have
    float32[2,3,h=32*k,w=32*m]    dims that are multiples: k and m are dynamic (h=32*k=7:1-16 gives k its size and range)
    float32[]                     a scalar tensor
    batch.ids:int64[2,16]         an entry of a dict: forward(batch={"ids": ...})
    use_cache=false               a keyword input that is no tensor: true, false, none, a number or a word

Floats are drawn from N(0, 1) and integers below a limit, with a generator of our own: nobody else's random state moves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
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
GRAMMAR = (
    "write [name:]dtype[dim,...], such as float32[batch,3,224,224] or ids:int64[batch,seq=16:1-512]; or name=value, such as "
    "use_cache=false"
)

_NAME = r"(?P<name>[A-Za-z_]\w*(?:\.\w+)*)"
_HEAD = re.compile(rf"\s*(?:{_NAME}\s*:\s*)?(?P<dtype>\w+)\s*\[\s*", re.ASCII)
_PLAIN = re.compile(rf"\s*{_NAME}\s*=\s*(?P<value>[\w.+-]{{1,100}})\s*", re.ASCII)
_DIM = re.compile(
    r"(?:(?P<label>[A-Za-z_]\w*)=(?=\d{1,18}\*))?(?P<factor>\d{1,18}\*(?=[A-Za-z_]))?"
    r"(?:(?P<name>[A-Za-z_]\w*)(?:=(?P<size>\d{1,18}))?(?::(?P<min>\d{1,18})-(?P<max>\d{1,18})?)?)|(?P<fixed>\d{1,18})",
    re.ASCII,
)
_COMMA = re.compile(r"\s*,\s*")
_END = re.compile(r"\s*\]\s*$")


@dataclass(frozen=True)
class DynamicDim:
    """A dim whose size may change: its name, and what is said of its size in the example and of its range.

    A dim of which ``factor`` is not 1 is that many times as long as the dim ``name``; ``label`` is a name of its own.
    """

    name: str
    size: int | None = None
    min: int | None = None
    max: int | None = None
    factor: int = 1
    label: str | None = None


@dataclass(frozen=True)
class Plain:
    """A keyword input that is no tensor."""

    name: str
    value: bool | int | float | str | None


@dataclass(frozen=True)
class Spec:
    """One tensor; positional where ``name`` is None, and of a dict where it has dots."""

    name: str | None
    dtype: torch.dtype
    dims: tuple[int | DynamicDim, ...]


def parse_spec(text: str) -> Spec | Plain:
    """Read one spec.

    Raises:
        InputError: with the position of what cannot be read.
    """
    if plain := _PLAIN.fullmatch(text):
        return Plain(plain["name"], _value(plain["value"]))
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


_WORDS: Mapping[str, bool | None] = {"true": True, "false": False, "none": None}


def _value(text: str) -> bool | int | float | str | None:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def from_specs(
    specs: Iterable[str | Spec | Plain], *, seed: int = 0, index_limits: Mapping[InputKey, int] | None = None
) -> Inputs:
    """Draw one input per spec.

    Args:
        specs: texts as in the module's docstring, or parsed ones.
        seed: the same seed draws the same inputs.
        index_limits: for integer inputs, by position or name (with its dots): draw from [0, limit), default [0, 2).
    """
    given = [parse_spec(spec) if isinstance(spec, str) else spec for spec in specs]
    parsed = _labels_resolved([spec for spec in given if isinstance(spec, Spec)])
    args = [spec for spec in parsed if spec.name is None]
    keyed: dict[InputKey, Spec] = dict(enumerate(args))
    keyed |= {spec.name: spec for spec in parsed if spec.name is not None}
    plain = {spec.name: spec.value for spec in given if isinstance(spec, Plain)}
    if len(keyed) + len(plain) != len(given) or not keyed.keys().isdisjoint(plain):
        raise InputError("two input specs have the same name", hint="each keyword input takes one spec")
    tables = dict(index_limits or {})
    if unknown := [key for key in tables if key not in keyed]:
        raise InputError(f"a limit is given for {unknown[0]!r}, which is no input", hint=f"inputs: {list(keyed)}")
    dims = _sized(dim for spec in parsed for dim in spec.dims if isinstance(dim, DynamicDim))
    check_memory(sum(math.prod(_sizes(spec, dims)) * DRAWN_BYTES for spec in parsed))
    generator = torch.Generator().manual_seed(seed)
    try:
        drawn = {key: _draw(spec, dims, tables.get(key, DEFAULT_LIMIT), generator) for key, spec in keyed.items()}
    except (RuntimeError, MemoryError) as error:
        raise InputError("the inputs of these specs do not fit into memory", hint="give smaller sizes") from error
    return Inputs(
        tuple(drawn[position] for position in range(len(args))),
        _nested({name: value for name, value in (drawn | plain).items() if isinstance(name, str)}),
        _dynamic_shapes(keyed, drawn, dims, plain),
    )


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dicts of what has dots in its name."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *outer, last = name.split(".")
        held = tree
        for part in outer:
            held = held.setdefault(part, {})
            if not isinstance(held, dict):
                break
        if not isinstance(held, dict) or last in held:
            raise InputError(f"an input spec for '{name}' and one for a part of it were given", hint="give the parts alone")
        held[last] = value
    return tree


def check_memory(size: int) -> None:
    """Refuse inputs of so many bytes before they are drawn, where that is too much.

    Raises:
        InputError: it is.
    """
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
    factor = int(match["factor"][:-1]) if match["factor"] else 1
    if not factor:
        raise InputError(f"dim '0*{match['name']}' has no size", hint=GRAMMAR)
    return DynamicDim(match["name"], size, low, high, factor, match["label"])


def _labels_resolved(specs: list[Spec]) -> list[Spec]:
    """The specs with every dim that is named like a multiple elsewhere as that multiple."""
    labelled: dict[str, DynamicDim] = {}
    for dim in (dim for spec in specs for dim in spec.dims if isinstance(dim, DynamicDim) and dim.label):
        multiple = labelled.setdefault(str(dim.label), DynamicDim(dim.name, factor=dim.factor))
        if (multiple.name, multiple.factor) != (dim.name, dim.factor):
            raise InputError(
                f"dim '{dim.label}' is {multiple.factor}*{multiple.name} and {dim.factor}*{dim.name}", hint=GRAMMAR
            )
    for dim in (dim for spec in specs for dim in spec.dims if isinstance(dim, DynamicDim) and dim.name in labelled):
        if dim.factor != 1 or (dim.size, dim.min, dim.max) != (None, None, None):
            said = labelled[dim.name]
            raise InputError(
                f"dim '{dim.name}' is {said.factor}*{said.name}: give '{said.name}' its size and range", hint=GRAMMAR
            )
    return [
        replace(spec, dims=tuple(labelled.get(dim.name, dim) if isinstance(dim, DynamicDim) else dim for dim in spec.dims))
        for spec in specs
    ]


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
    return {name: DynamicDim(name, known["size"], known.get("min"), known.get("max")) for name, known in said.items()}


def _sizes(spec: Spec, dims: Mapping[str, DynamicDim]) -> list[int]:
    return [dim.factor * (dims[dim.name].size or 0) if isinstance(dim, DynamicDim) else dim for dim in spec.dims]


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


def _dynamic_shapes(
    keyed: Mapping[InputKey, Spec],
    drawn: Mapping[InputKey, Tensor],
    dims: Mapping[str, DynamicDim],
    plain: Mapping[str, Any],
) -> Any:
    if not dims:
        return None
    made = {name: torch.export.Dim(name, min=dim.min, max=dim.max) for name, dim in dims.items()}

    def sized(dim: DynamicDim) -> Any:
        return made[dim.name] if dim.factor == 1 else dim.factor * made[dim.name]

    shapes: dict[InputKey, Any] = {
        key: {axis: sized(dim) for axis, dim in enumerate(spec.dims) if isinstance(dim, DynamicDim)} or None
        for key, spec in keyed.items()
    }
    named: dict[str, Any] = {key: shape for key, shape in shapes.items() if isinstance(key, str)} | dict.fromkeys(plain)
    if not named:
        return tuple(shapes.values())
    if len(named) == len(shapes) + len(plain):
        return _nested(named)
    collection = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for key, shape in shapes.items():
        if shape:
            collection[drawn[key]] = shape
    return collection
