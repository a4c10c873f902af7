"""How much running a program may take: the numbers that it computes, and the values that it makes.

A program of a few nodes can multiply a number by itself until it fills the memory, or join a tensor with itself. Both are
seen on the graph, before any of it runs.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from normfuse import limits
from normfuse.limits import OverLimit
from normfuse.sources.pickles import Unreadable

WORD = 128
"""Bits of a number that a program is given, and may give to its bodies (of loops and conditions) and get from them."""


def check_numbers(module: GraphModule) -> None:
    """Refuse arithmetic on sizes that could come to endless numbers, whatever the inputs are.

    Raises:
        OverLimit: a number could have more than `limits.EXPRESSION_BITS`.
        Unreadable: there is arithmetic on what is no number.
    """
    for graph in all_graphs(module):
        bits: dict[Node, float] = {}
        for node in graph.nodes:
            bits[node] = _bits(node, bits)
            passed = max((bits[each] for each in node.all_input_nodes), default=0) if _is_passing(node) else 0
            if bits[node] > limits.EXPRESSION_BITS or passed > WORD:
                many = f"{max(bits[node], passed):,.0f}" if math.isfinite(bits[node]) else "endlessly many"
                raise OverLimit(f"its program computes a number of {many} bits ('{node.name}')", "EXPRESSION_BITS")


def check_values(module: GraphModule) -> None:
    """Refuse a program one of whose values alone would fill the memory. Sizes that are not known yet are not judged.

    Raises:
        OverLimit: a value would take more than `limits.VALUE_BYTES`.
    """
    for graph in all_graphs(module):
        for node in graph.nodes:
            for value in pytree.tree_leaves(node.meta.get("val")):
                taken = _bytes(value) if isinstance(value, Tensor) and value.layout is torch.strided else 0
                if taken > limits.VALUE_BYTES:
                    raise OverLimit(f"'{node.name}' would take {taken:,} bytes", "VALUE_BYTES")


def _bytes(value: Tensor) -> int:
    """What a tensor takes that is written out; of a view that shows the same entries many times, what is stored."""
    if not all(isinstance(extent, int) for extent in (*value.shape, *value.stride())):
        return 0
    return math.prod(size for size, step in zip(value.shape, value.stride(), strict=True) if step) * value.dtype.itemsize


def _is_passing(node: Node) -> bool:
    return node.op == "output" or isinstance(node.target, torch._ops.HigherOrderOperator)


def _bits(node: Node, bits: Mapping[Node, float]) -> float:
    """A bound on the bits of what a node gives, if that is a number."""
    if node.op != "call_function" or isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem:
        return WORD
    if not inspect.isbuiltin(node.target):  # such as torch.sym_max
        return max((WORD, *(bits[each] for each in node.all_input_nodes)))
    if any(not isinstance(each, int | float | Node) or _is_sequence(each) for each in node.args):
        raise Unreadable(f"its program computes '{node.name}' of what is no number")
    parts = [bits[each] if isinstance(each, Node) else _bits_of(each) for each in node.args]
    if node.target in (operator.pow, operator.lshift):
        exponent = node.args[1]
        return max(parts[0], 1) * max(abs(exponent), 1) if isinstance(exponent, int | float) else math.inf
    return sum(parts) if node.target is operator.mul else max(parts, default=0) + 1


def _bits_of(number: Any) -> float:
    return number.bit_length() if isinstance(number, int) else WORD


def _is_sequence(value: Any) -> bool:
    """Whether a node gives several values, which arithmetic would join or repeat."""
    target = value.target if isinstance(value, Node) else None
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    returns = target._schema.returns if isinstance(target, torch._ops.OpOverload) else ()
    return len(returns) > 1 or any("List" in type(each.type).__name__ for each in returns)


def all_graphs(module: torch.nn.Module) -> Iterator[Graph]:
    """The graph of a module and those of all bodies in it."""
    return (each.graph for each in module.modules() if isinstance(each, GraphModule))
