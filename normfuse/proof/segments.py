"""A part of a program as a program of its own: from values that enter it to one value."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument
from torch.fx import Graph, Node

from normfuse.graph.program import Program
from normfuse.graph.views import aten


@dataclass(frozen=True)
class Entry:
    """A value that enters.

    Attributes:
        name: of the input.
        node: whose readers read it.
        axis: the axis along which they read it without its mean; None where they read it as it is.
    """

    name: str
    node: Node
    axis: int | None


@dataclass(frozen=True)
class _Lifted:
    """What a `Program` asks of an exported program; torch's own is checked and compiled anew each time that one is made."""

    graph: Graph
    graph_signature: ExportGraphSignature
    state_dict: dict[str, Any]
    constants: dict[str, Any]
    range_constraints: dict[Any, Any] = field(default_factory=dict)


def segment(program: Program, calls: Collection[Node], entries: Sequence[Entry], value: Node, axis: int | None) -> Program:
    """A program that computes one value from others.

    Args:
        program: what it is a part of.
        calls: what is between, and the stored tensors that it reads.
        entries: what enters, in the order of the inputs.
        value: what it gives.
        axis: the axis along which it gives it without its mean.
    """
    graph = Graph()
    graph.owning_module = program.graph.owning_module
    specs = {spec.arg.name: spec for spec in program.exported.graph_signature.input_specs}
    made: dict[Node, Node] = {}
    inputs = []
    inside = [node for node in program.graph.nodes if node in calls]
    for node in (each for each in inside if each.op == "placeholder"):
        made[node] = _named(graph.placeholder(node.name), node.name, node.meta)
        inputs.append(specs[node.name])
    for entry in entries:
        made[entry.node] = _named(graph.placeholder(entry.name), entry.name, entry.node.meta)
        inputs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(entry.name), None))
    for entry in entries:
        made[entry.node] = _centred(graph, made[entry.node], entry.axis)
    for node in (each for each in inside if each.op != "placeholder"):
        made[node] = _named(graph.node_copy(node, made.__getitem__), node.name, node.meta)
    result = _centred(graph, made[value], axis)
    graph.output((result,))
    signature = ExportGraphSignature(inputs, [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(result.name), None)])
    exported = _Lifted(graph, signature, program.exported.state_dict, program.exported.constants)
    return Program(cast(ExportedProgram, exported), program.formulas)


def _named(node: Node, name: str, meta: dict[str, Any]) -> Node:
    node.name = name  # fx renames nodes that are called like builtins
    node.meta = dict(meta)
    return node


def _centred(graph: Graph, node: Node, axis: int | None) -> Node:
    if axis is None:
        return node
    like: Tensor = node.meta["val"]
    number = torch.empty([1] * like.dim(), dtype=like.dtype, device="meta")  # of which nobody asks more than the dtype
    mean = graph.call_function(aten.mean.dim, (node, [axis], True))
    centred = graph.call_function(aten.sub.Tensor, (node, mean))
    _named(mean, f"mean_of_{node.name}", {**node.meta, "val": number})
    return _named(centred, f"centred_{node.name}", node.meta)
