"""Bodies: graphs that an operator of a program calls, such as the branches of `torch.cond` and the steps of a scan.

A body is not part of the program's own graph. What it reads are operands of the call, so to the analyses the call is one reader
of them all, of which nothing is known. Norms inside bodies are counted, and left as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from normfuse.graph.program import Program
from normfuse.graph.nodes import constants, graphs_of, operator_name


@dataclass(frozen=True)
class Body:
    """A graph that a call of another graph runs.

    Attributes:
        name: where it is, such as ``true_graph_0``, or ``true_graph_0.scan_combine_graph_0`` inside another body.
        by: the operator that runs it, such as ``cond``.
        call: the call of the program's own graph that it belongs to, be it inside of another body.
        graph: its graph.
        stored: its placeholders that stand for a stored tensor of the program → that tensor's name.
        program: the program.
    """

    name: str
    by: str
    call: Node
    graph: Graph
    stored: Mapping[str, str]
    program: Program

    @cached_property
    def constant(self) -> frozenset[Node]:
        """Values that depend on stored tensors alone."""
        return constants(self.graph, self.stored)

    def tensor(self, name: str) -> Tensor:
        """The stored tensor of this name."""
        return self.program.tensor(name)


def bodies(program: Program) -> Iterator[Body]:
    """Every body of a program, those inside of other bodies too."""
    unwritten = {node: name for node, name in program.stored.items() if name not in program.written}
    for node in program.graph.nodes:
        yield from _below(program, node, node, unwritten, "")


def _below(program: Program, node: Node, call: Node, stored: Mapping[str, str], path: str) -> Iterator[Body]:
    for name, module in graphs_of(node):
        body = Body(f"{path}{name}", operator_name(node), call, module.graph, _bound(node, module.graph, stored), program)
        yield body
        for inner in module.graph.nodes:
            yield from _below(program, inner, call, body.stored, f"{body.name}.")


_VARYING = {"while_loop": lambda a: len(a[2]), "scan": lambda a: len(a[1]) + len(a[2]), "map_impl": lambda a: len(a[1])}
"""Operands in front that are another value at every step."""


def _bound(node: Node, graph: Graph, stored: Mapping[str, str]) -> dict[str, str]:
    """The placeholders of a body that are one stored tensor whenever it runs; operands come behind the graphs, in order."""
    places = [place for place, each in enumerate(node.args) if isinstance(each, Node) and each.op == "get_attr"]
    operands = pytree.tree_leaves(node.args[places[-1] + 1 :]) if places else []
    placeholders = graph.find_nodes(op="placeholder")
    name = getattr(node.target, "__name__", "")
    if len(operands) != len(placeholders):
        return {}
    varying = _VARYING[name](node.args) if name in _VARYING else 0
    pairs = list(zip(placeholders, operands, strict=True))[varying:]
    return {inner.name: stored[outer.name] for inner, outer in pairs if isinstance(outer, Node) and outer.name in stored}
