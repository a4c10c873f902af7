"""What a node of any graph tells: its operator, the graphs that it runs, whether it draws, whether it is constant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node


def graphs_of(node: Node) -> list[tuple[str, GraphModule]]:
    """The graphs that a call runs, by their names; none for an ordinary call."""
    if node.op != "call_function":
        return []
    named = [(str(each.target), attribute_of(each)) for each in node.all_input_nodes if each.op == "get_attr"]
    return [(name, module) for name, module in named if isinstance(module, GraphModule)]


def attribute_of(node: Node) -> Any:
    """What a ``get_attr`` node gives; None where the graph's module does not have it."""
    owner: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        owner = getattr(owner, part, None)
    return owner


def operator_name(node: Node) -> str:
    """The name of the operator that a call calls."""
    name = getattr(node.target, "__name__", str(node.target))
    return "map" if name == "map_impl" else name


def constants(graph: Graph, stored: Mapping[str, str]) -> frozenset[Node]:
    """The values of a graph that depend on stored tensors alone; random numbers do not.

    Args:
        graph: the graph.
        stored: names of its placeholders that stand for stored tensors which nobody updates.
    """
    constant: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.name in stored:
                constant.add(node)
        elif node.op != "output" and not draws(node) and all(operand in constant for operand in node.all_input_nodes):
            constant.add(node)
    return frozenset(constant)


def draws(node: Node) -> bool:
    """Whether a call draws random numbers, other ones each time: by itself, or in a body."""
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
        return True
    return any(draws(inner) for _, module in graphs_of(node) for inner in module.graph.nodes)


def computed_from(*values: Node) -> list[Node]:
    """Values, and all that they are computed from, the nearest first."""
    seen = list(values)
    for node in seen:
        seen.extend(each for each in node.all_input_nodes if each not in seen)
    return seen
