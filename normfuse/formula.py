"""What a stored tensor becomes, as data: an expression over stored tensors.

A formula prints, survives JSON, tells which tensors it reads, and is evaluated in float64 in one go, so that several
rewrites of one tensor still round once. It never computes by itself: `evaluate` is given a function that reads tensors.

    Read("fc.weight")                            fc.weight
    Centered(Read("fc.weight"), 0)               center(fc.weight, dim=0)
    Scaled(Read("fc.weight"), Read("ls"), 0)     scale(fc.weight, ls, dim=0)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor


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
    """An aten operator on formulas and literals, such as ``rsqrt.default``: arithmetic of the model's own on its weights."""

    op: str
    args: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.op.partition('.')[0]}({', '.join(map(str, self.args))})"


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
    match formula:
        case Read(name):
            return read(name).detach().to(torch.float64)
        case Number(number):
            return torch.tensor(number, dtype=torch.float64)
        case Centered(of, dim):
            value = evaluate(of, read)
            return value - value.mean(dim, keepdim=True)
        case Scaled(of, by, dim):
            value = evaluate(of, read)
            return value * _along(evaluate(by, read), value, dim)
        case Added(of, by, dim):
            value = evaluate(of, read)
            return value + _along(evaluate(by, read), value, dim)
        case Apply(op, args):
            result: Tensor = aten_operator(op)(*(_argument(each, read) for each in args))
            return result


def _along(entries: Tensor, value: Tensor, dim: int) -> Tensor:
    sizes = [1] * value.dim()
    sizes[dim] = -1
    return entries.to(value.device).reshape(sizes)


def _argument(value: Any, read: Callable[[str], Tensor]) -> Any:
    if is_formula(value):
        return evaluate(value, read)
    return [_argument(each, read) for each in value] if isinstance(value, tuple) else value


def aten_operator(name: str) -> torch._ops.OpOverload:
    """The aten operator of a name such as ``rsqrt.default``: one that computes, and touches neither operands nor files.

    A plan is data that may come from anywhere, so a name reaches nothing but operators.

    Raises:
        ValueError: there is no such operator, or it does more than compute.
    """
    packet, _, overload = name.partition(".")
    found = None
    if packet.isidentifier() and overload.isidentifier() and not name.startswith("__"):
        found = getattr(getattr(torch.ops.aten, packet, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload) or found._schema.is_mutable or "file" in packet:
        raise ValueError(f"aten has no operator '{name}' that only computes")
    return found


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
        case Apply(op, args):
            return Apply(op, tuple(substitute(each, pending) if is_formula(each) else each for each in args))


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
        case Apply(_, args):
            for each in args:
                if is_formula(each):
                    yield from reads(each)


def to_json(formula: Formula) -> dict[str, Any]:
    """The formula as JSON types."""
    match formula:
        case Read(name):
            return {"read": name}
        case Number(value):
            return {"number": value}
        case Centered(of, dim):
            return {"center": to_json(of), "dim": dim}
        case Scaled(of, by, dim):
            return {"scale": to_json(of), "by": to_json(by), "dim": dim}
        case Added(of, by, dim):
            return {"shift": to_json(of), "by": to_json(by), "dim": dim}
        case Apply(op, args):
            return {"apply": op, "args": [to_json(each) if is_formula(each) else {"literal": each} for each in args]}


def from_json(data: Mapping[str, Any]) -> Formula:
    """The formula that `to_json` wrote."""
    if "read" in data:
        return Read(str(data["read"]))
    if "number" in data:
        return Number(float(data["number"]))
    if "center" in data:
        return Centered(from_json(data["center"]), int(data["dim"]))
    if "apply" in data:
        return Apply(str(data["apply"]), tuple(_argument_from_json(each) for each in data["args"]))
    kind, of = (Scaled, data["scale"]) if "scale" in data else (Added, data["shift"])
    return kind(from_json(of), from_json(data["by"]), int(data["dim"]))


def _argument_from_json(data: Mapping[str, Any]) -> Any:
    if "literal" not in data:
        return from_json(data)
    literal = data["literal"]
    return tuple(literal) if isinstance(literal, list) else literal
