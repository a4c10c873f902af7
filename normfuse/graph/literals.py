"""Numbers in a model's code, such as a slope of 0.01: files and torch's own kernels outside float64 hold them as float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate

from normfuse.graph.views import arguments, dtype


def shortened(literal: float) -> float:
    """A number of the model's code as a float32: what torch's own kernels compute with, and what files hold."""
    short = torch.tensor(literal, dtype=torch.float32).item()
    return short if math.isfinite(short) else literal


def _in_double(node: Node) -> bool:
    return any(dtype(each) in (torch.float64, torch.complex128) for each in (node, *node.all_input_nodes))


def _held_otherwise(node: Node) -> bool:
    """Whether a file holds a reciprocal or the like of a call's number: scales of a resizing."""
    return isinstance(node.target, torch._ops.OpOverload) and "upsample" in str(node.target)


def short_arguments(node: Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments with every number `shortened`, those among them that the call leaves to the operator's defaults."""
    args, kwargs = map_aggregate((args, kwargs), lambda each: shortened(each) if isinstance(each, float) else each)
    schema = node.target._schema.arguments if isinstance(node.target, torch._ops.OpOverload) else ()
    left_out = (each for each in schema[len(args) :] if each.name not in kwargs)
    numbers = {each.name: shortened(each.default_value) for each in left_out if isinstance(each.default_value, float)}
    return args, {**kwargs, **numbers}


def numbers_cut(node: Node) -> list[float]:
    """The numbers of a call in float64 that float32 does not hold."""
    if not isinstance(node.target, torch._ops.OpOverload) or not _in_double(node):
        return []
    return [each for each in arguments(node).values() if isinstance(each, float) and each != shortened(each)]


def counts_short(node: Node, short: Sequence[torch.dtype]) -> bool:
    """Whether the numbers of a call count as float32 where those of calls in these dtypes do."""
    return bool(short) and (torch.float64 in short or not (_in_double(node) or _held_otherwise(node)))
