"""Every graph, node and value of an ``onnx_ir.Model``, those of functions and of bodies of loops and conditions too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def nodes_of(model: Any) -> Iterator[Any]:
    """All nodes."""
    for graph in (model.graph, *model.functions.values()):
        yield from graph.all_nodes()


def graphs_of(model: Any) -> Iterator[Any]:
    """All graphs."""
    yield from (model.graph, *model.functions.values())
    for node in nodes_of(model):
        yield from bodies_of(node)


def bodies_of(node: Any) -> Iterator[Any]:
    """The graphs that a node runs."""
    for attribute in node.attributes.values():
        if attribute.type.name == "GRAPH":
            yield attribute.as_graph()
        elif attribute.type.name == "GRAPHS":
            yield from attribute.as_graphs()


def values_of(model: Any) -> Iterator[Any]:
    """All inputs, stored tensors and results."""
    for graph in graphs_of(model):
        yield from graph.inputs
        yield from getattr(graph, "initializers", {}).values()
    for node in nodes_of(model):
        yield from node.outputs


def attributes_of(node: Any) -> dict[str, Any]:
    """What a node's attributes are set to, by name."""
    return {name: attribute.value for name, attribute in node.attributes.items()}
