"""What a stored tensor becomes, as data: an expression over stored tensors.

A formula prints, survives JSON, tells which tensors it reads, and is evaluated in float64 in one go, so that several
rewrites of one tensor still round once. It never computes by itself: `evaluate` is given a function that reads tensors.

    Read("fc.weight")                            fc.weight
    Centered(Read("fc.weight"), 0)               center(fc.weight, dim=0)
    Scaled(Read("fc.weight"), Read("ls"), 0)     scale(fc.weight, ls, dim=0)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from normfuse import strict_json
from normfuse.graph.arithmetic import operator_named


@dataclass(frozen=True)
class Read:
    """The stored tensor of this name."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Centered:
    """``of`` less its mean along ``dim``: C₀ applied to one axis (Pre-RMSNorm paper, eq. for recentring)."""

    of: Formula
    dim: int

    def __str__(self) -> str:
        return f"center({self.of}, dim={self.dim})"


@dataclass(frozen=True)
class Scaled:
    """``of`` times the entries of ``by`` (flattened) along ``dim``: diag(by) applied to one axis."""

    of: Formula
    by: Formula
    dim: int

    def __str__(self) -> str:
        return f"scale({self.of}, {self.by}, dim={self.dim})"


@dataclass(frozen=True)
class Added:
    """``of`` plus the entries of ``by`` (flattened) along ``dim``."""

    of: Formula
    by: Formula
    dim: int

    def __str__(self) -> str:
        return f"shift({self.of}, {self.by}, dim={self.dim})"


@dataclass(frozen=True)
class Apply:
    """An aten operator on formulas and literals, such as ``rsqrt.default``: arithmetic of the model's own on its weights.

    Attributes:
        op: name of the operator.
        args: its positional arguments, formulas among them.
        kwargs: its keyword arguments, literals only.
        output: which of its results is meant, where it yields several.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()
    output: int = 0

    def __str__(self) -> str:
        given = (*map(str, self.args), *(f"{name}={value}" for name, value in self.kwargs))
        return f"{self.op.partition('.')[0]}({', '.join(given)}){f'[{self.output}]' if self.output else ''}"


@dataclass(frozen=True)
class Number:
    """A literal."""

    value: float

    def __str__(self) -> str:
        return f"{self.value:g}"


Formula: TypeAlias = Read | Number | Centered | Scaled | Added | Apply


def evaluate(formula: Formula, read: Callable[[str], Tensor]) -> Tensor:
    """The value of a formula, always in float64; the caller casts once.

    Args:
        formula: what to compute.
        read: gives the stored tensor of a name, in any floating dtype.

    Returns:
        A float64 tensor of the shape of the innermost `Read`.
    """
    return formed(formula, lambda name: read(name).detach(), torch.float64)


def rounded(formula: Formula, read: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
    """The value of a formula, evaluated in float64 and rounded once: what a stored tensor becomes."""
    return evaluate(formula, read).to(dtype).contiguous()


def formed(formula: Formula, read: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
    """The value of a formula in a dtype of the caller's; gradients flow to the tensors that are read (live mode).

    Args:
        formula: what to compute.
        read: gives the stored tensor of a name.
        dtype: the floating dtype to compute in.
    """
    match formula:
        case Read(name):
            return read(name).to(dtype)
        case Number(number):
            return torch.full((), number, dtype=dtype)  # a literal of the graph that this is traced into, not a stored tensor
        case Centered(of, dim):
            value = formed(of, read, dtype)
            return value - value.mean(dim, keepdim=True)
        case Scaled(of, by, dim):
            value = formed(of, read, dtype)
            return value * _along(formed(by, read, dtype), value, dim)
        case Added(of, by, dim):
            value = formed(of, read, dtype)
            return value + _along(formed(by, read, dtype), value, dim)
        case Apply(op, args, kwargs, output):
            values = (_within(each, lambda inner: formed(inner, read, dtype)) for each in args)
            result = _operator(op)(*values, **dict(kwargs))
            chosen: Tensor = (result if isinstance(result, (tuple, list)) else (result,))[output]
            return chosen


def _operator(name: str) -> Any:
    """The operator of a name; a compiler cannot follow the look at its schema, which the plan has had."""
    if torch.compiler.is_compiling():
        packet, _, overload = name.partition(".")
        return getattr(getattr(torch.ops.aten, packet), overload)
    return operator_named(name)


def _along(entries: Tensor, value: Tensor, dim: int) -> Tensor:
    sizes = [1] * value.dim()
    sizes[dim] = -1
    return entries.to(value.device).reshape(sizes)


def _within(argument: Any, to: Callable[[Formula], Any]) -> Any:
    """An argument of `Apply` with every formula in it, also those in a tuple, replaced."""
    if isinstance(argument, tuple):
        return tuple(_within(each, to) for each in argument)
    return to(argument) if is_formula(argument) else argument


def substitute(formula: Formula, pending: Mapping[str, Formula]) -> Formula:
    """The formula with every read of a rewritten tensor replaced by what that tensor had already become."""
    match formula:
        case Read(name):
            return pending.get(name, formula)
        case Number():
            return formula
        case Centered(of, dim):
            return Centered(substitute(of, pending), dim)
        case Scaled(of, by, dim):
            return Scaled(substitute(of, pending), substitute(by, pending), dim)
        case Added(of, by, dim):
            return Added(substitute(of, pending), substitute(by, pending), dim)
        case Apply(args=args):
            return replace(formula, args=tuple(_within(each, lambda inner: substitute(inner, pending)) for each in args))


def is_formula(value: Any) -> bool:
    """Whether an argument of `Apply` is a formula and not a literal."""
    return isinstance(value, Read | Number | Centered | Scaled | Added | Apply)


def reads(formula: Formula) -> Iterator[str]:
    """The names of the stored tensors that a formula reads; the tensor that is changed comes first."""
    match formula:
        case Read(name):
            yield name
        case Number():
            return
        case Centered(of, _):
            yield from reads(of)
        case Scaled(of, by, _) | Added(of, by, _):
            yield from reads(of)
            yield from reads(by)
        case Apply(args=args):
            found: list[str] = []
            for each in args:
                _within(each, lambda inner: found.extend(reads(inner)))
            yield from found


def size(formula: Formula, known: dict[int, int] | None = None) -> int:
    """How many parts a formula has, one that occurs twice counted twice."""
    known = {} if known is None else known
    if id(formula) not in known:
        inner: list[Formula] = []
        match formula:
            case Centered(of, _):
                inner = [of]
            case Scaled(of, by, _) | Added(of, by, _):
                inner = [of, by]
            case Apply(args=args):
                for each in args:
                    _within(each, inner.append)
        known[id(formula)] = 1 + sum(size(each, known) for each in inner)
    return known[id(formula)]


def to_json(formula: Formula) -> dict[str, Any]:
    """The formula as JSON types."""
    match formula:
        case Read(name):
            return {"read": name}
        case Number(value):
            return {"number": strict_json.number_to_json(value)}
        case Centered(of, dim):
            return {"center": to_json(of), "dim": dim}
        case Scaled(of, by, dim):
            return {"scale": to_json(of), "by": to_json(by), "dim": dim}
        case Added(of, by, dim):
            return {"shift": to_json(of), "by": to_json(by), "dim": dim}
        case Apply(op, args, kwargs, output):
            keywords = {name: _to_json(value) for name, value in kwargs}
            return {"apply": op, "args": list(map(_to_json, args)), "kwargs": keywords, "output": output}


def from_json(data: Any) -> Formula:
    """The formula that `to_json` wrote.

    Raises:
        ValueError: it is none, or has operators that do more than compute.
        KeyError: a part of it is missing.
    """
    match strict_json.record(data):
        case {"read": name}:
            return Read(strict_json.text(name))
        case {"number": value}:
            return Number(strict_json.number(value))
        case {"center": of, "dim": dim}:
            return Centered(from_json(of), strict_json.whole(dim))
        case {"apply": op, "args": args}:
            operator_named(strict_json.text(op))
            keywords = strict_json.record(data.get("kwargs", {})).items()
            given = tuple((strict_json.name(key), _argument_from_json(value)) for key, value in keywords)
            operands = tuple(map(_argument_from_json, strict_json.items(args)))
            return Apply(op, operands, given, strict_json.whole(data.get("output", 0)))
        case {"scale": of, "by": by, "dim": dim}:
            return Scaled(from_json(of), from_json(by), strict_json.whole(dim))
        case {"shift": of, "by": by, "dim": dim}:
            return Added(from_json(of), from_json(by), strict_json.whole(dim))
    raise ValueError(f"a formula of {', '.join(data) or 'nothing'} is not known")


def _to_json(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return [_to_json(each) for each in argument]
    return to_json(argument) if is_formula(argument) else strict_json.literal_to_json(argument)


def _argument_from_json(data: Any) -> Any:
    if isinstance(data, list):
        return tuple(map(_argument_from_json, data))
    is_literal = not isinstance(data, dict) or set(data) == {"float"}
    return strict_json.literal(data) if is_literal else from_json(data)
