"""Typed views of aten calls, so that nobody indexes ``node.args``.

`arguments` names every argument of a call by its schema, with the schema's defaults filled in, however the call was
written (positional, keyword, trailing defaults absent). A `Norm` is read once from any of its aten spellings; its eps
and axis have no defaults of ours.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten

HALVES = (torch.float16, torch.bfloat16)
"""Dtypes of half precision."""


def arguments(node: Node) -> dict[str, Any]:
    """Every argument of an aten call by its schema name, defaults filled in.

    Raises:
        TypeError: the node is not a call of an aten operator.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        raise TypeError(f"{node.name} is not an operator call")
    named: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name in node.kwargs:
            named[argument.name] = node.kwargs[argument.name]
        elif position < len(node.args) and not argument.kwarg_only:
            named[argument.name] = node.args[position]
        else:
            named[argument.name] = argument.default_value if argument.has_default_value() else None
    return named


def shape(node: Node) -> tuple[Any, ...]:
    """The (possibly symbolic) shape of a tensor value; of the first one where the node yields several."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        value = next((each for each in value if isinstance(each, torch.Tensor)), None)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def dtype(node: Node) -> torch.dtype | None:
    """The dtype of a tensor value, None for anything else."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def is_tensor(node: Any) -> bool:
    """Whether an argument is a node that yields one tensor."""
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor)


class NormKind(StrEnum):
    """What a norm computes; a text too, so that answers say ``layer_norm``."""

    LAYER_NORM = "layer_norm"
    RMS_NORM = "rms_norm"
    CRMS_NORM = "crms_norm"
    """an RMSNorm of a zero-mean vector whose last entry is not stored"""
    BATCH_NORM = "batch_norm"
    GROUP_NORM = "group_norm"
    INSTANCE_NORM = "instance_norm"
    STD_NORM = "std_norm"
    """a LayerNorm that adds eps to the deviation"""
    OFFLINE_NORM = "offline_norm"
    """one that the model spells with stored statistics"""

    __repr__ = str.__repr__  # in answers that people print


@dataclass(frozen=True)
class Norm:
    """One normalization, whoever spelled it.

    Attributes:
        out: the node that yields the normalized value.
        kind: what it computes.
        x: the node that is normalized.
        axes: the axes of ``x`` that statistics are taken over, also where they are stored; of a group_norm in groups of the
            first of them.
        gain: the multiplier's node, or None.
        shift: the added term's node, or None.
        eps: as in the call.
        inner: all nodes that make up the norm, ``out`` included; more than one where it was written by hand.
    """

    out: Node
    kind: NormKind
    x: Node
    axes: tuple[int, ...]
    gain: Node | None
    shift: Node | None
    eps: float
    inner: frozenset[Node]

    @property
    def by_hand(self) -> bool:
        """Whether the model spells the norm in arithmetic rather than by one operator."""
        in_one_call = self.inner == {self.out} and self.kind is not NormKind.OFFLINE_NORM
        return not in_one_call and self.out.target is not operator.getitem

    @property
    def channels(self) -> tuple[int, ...]:
        """The axes of ``x`` along which gain and shift vary, and stored statistics where it has them."""
        if self.kind in (NormKind.BATCH_NORM, NormKind.OFFLINE_NORM):
            return tuple(axis for axis in range(len(shape(self.x))) if axis not in self.axes)
        return (1,) if self.kind in (NormKind.GROUP_NORM, NormKind.INSTANCE_NORM) else self.axes


def default_rms_eps(kind: torch.dtype | None) -> float:
    """The eps that torch's rms_norm takes when none is given: float64's own, float32's for everything narrower."""
    return torch.finfo(torch.float64 if kind == torch.float64 else torch.float32).eps


def tensors_in(args: Any) -> Iterator[Node]:
    """Every node among (nested) arguments, once per occurrence."""
    if isinstance(args, Node):
        yield args
    elif isinstance(args, (tuple, list)):
        for each in args:
            yield from tensors_in(each)
    elif isinstance(args, dict):
        for each in args.values():
            yield from tensors_in(each)
    elif isinstance(args, slice):
        yield from tensors_in((args.start, args.stop, args.step))
