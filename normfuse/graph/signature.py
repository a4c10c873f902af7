"""What torch keeps beside a graph of its inputs and outputs."""

from __future__ import annotations

from dataclasses import replace

from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import Graph


def signature_of(graph: Graph, old: ExportGraphSignature) -> ExportGraphSignature:
    """The old signature with the names of the graph's outputs as they are now."""
    (outputs,) = graph.output_node().args
    specs = [
        replace(spec, arg=TensorArgument(node.name)) if isinstance(spec.arg, TensorArgument) else spec
        for spec, node in zip(old.output_specs, outputs, strict=True)  # type: ignore[arg-type]
    ]
    inputs = {spec.arg.name: spec for spec in old.input_specs}
    made = [
        inputs.get(node.name) or InputSpec(InputKind.PARAMETER, TensorArgument(node.name), node.meta["stored"])
        for node in graph.find_nodes(op="placeholder")
    ]
    return ExportGraphSignature(made, specs)
