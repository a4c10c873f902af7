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


Formula: TypeAlias = Read | Centered | Scaled


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
        case Centered(of, dim):
            value = evaluate(of, read)
            return value - value.mean(dim, keepdim=True)
        case Scaled(of, by, dim):
            value = evaluate(of, read)
            along = [1] * value.dim()
            along[dim] = -1
            return value * evaluate(by, read).reshape(along)


def substitute(formula: Formula, pending: Mapping[str, Formula]) -> Formula:
    """The formula with every read of a rewritten tensor replaced by what that tensor had already become."""
    match formula:
        case Read(name):
            return pending.get(name, formula)
        case Centered(of, dim):
            return Centered(substitute(of, pending), dim)
        case Scaled(of, by, dim):
            return Scaled(substitute(of, pending), substitute(by, pending), dim)


def reads(formula: Formula) -> Iterator[str]:
    """The names of the stored tensors that a formula reads; the tensor that is changed comes first."""
    match formula:
        case Read(name):
            yield name
        case Centered(of, _):
            yield from reads(of)
        case Scaled(of, by, _):
            yield from reads(of)
            yield from reads(by)


def to_json(formula: Formula) -> dict[str, Any]:
    """The formula as JSON types."""
    match formula:
        case Read(name):
            return {"read": name}
        case Centered(of, dim):
            return {"center": to_json(of), "dim": dim}
        case Scaled(of, by, dim):
            return {"scale": to_json(of), "by": to_json(by), "dim": dim}


def from_json(data: Mapping[str, Any]) -> Formula:
    """The formula that `to_json` wrote."""
    if "read" in data:
        return Read(str(data["read"]))
    if "center" in data:
        return Centered(from_json(data["center"]), int(data["dim"]))
    return Scaled(from_json(data["scale"]), from_json(data["by"]), int(data["dim"]))
