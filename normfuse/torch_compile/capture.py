"""A graph that dynamo captured, as a model that can be traced; and a rewritten program, as a graph in its place.

dynamo gives a model's tensors and sizes as inputs beside those of the call. Here the tensors that it found on modules become
stored ones, and sizes are read off the tensors that have them. On the way back they are inputs again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.source import is_from_unspecialized_nn_module_source
from torch._dynamo.symbolic_convert import TensorifyState
from torch.export import Dim
from torch.fx import Graph, GraphModule, Interpreter, Node

from normfuse.errors import NormfuseError
from normfuse.graph.expressions import Formula
from normfuse.graph.program import Program


@dataclass(frozen=True)
class _Size:
    """A size that the graph is given, and where it is read off: the dim of a tensor that it is given too."""

    of: int
    dim: int


class Captured(nn.Module):
    """A graph of dynamo's as a model: it owns the tensors that dynamo found on modules, and is called with the others.

    Attributes:
        stored: name of an own tensor → its position among dynamo's inputs.
        given: positions of what it is called with.
    """

    def __init__(self, graph_module: GraphModule, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.captured = graph_module
        self.nodes: list[Node] = list(graph_module.graph.find_nodes(op="placeholder"))
        _fix_floats(self.nodes)
        self.stored: dict[str, int] = {}
        self.given: list[int] = []
        for position, (node, value) in enumerate(zip(self.nodes, inputs, strict=True)):
            if isinstance(value, Tensor):
                self._take(position, node, value)
        self.sizes = {
            position: self._size(node) for position, node in enumerate(self.nodes) if not isinstance(inputs[position], Tensor)
        }

    def _take(self, position: int, node: Node, value: Tensor) -> None:
        if type(value) not in (Tensor, nn.Parameter, nn.Buffer):
            raise NormfuseError(f"'{node.name}' is a {type(value).__name__}, which is no plain tensor")
        if not node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"):
            self.given.append(position)
            return
        if value.is_inference():
            raise NormfuseError(
                f"'{node.name}' was made in inference mode, so changes of it cannot be noticed",
                hint="make the model outside of torch.inference_mode",
            )
        self.stored[node.name] = position
        self.register_parameter(node.name, value) if isinstance(value, nn.Parameter) else self.register_buffer(node.name, value)

    def _size(self, node: Node) -> _Size:
        wanted = getattr(getattr(node.meta["example_value"], "node", None), "expr", None)
        for position in self.given:
            for dim, size in enumerate(self.nodes[position].meta["example_value"].shape):
                if wanted is not None and _expression(size) == wanted:
                    return _Size(position, dim)
        raise NormfuseError(f"'{node.name}' is neither a tensor nor a size of one")

    def forward(self, *given: Tensor) -> Any:
        """The graph's outputs."""
        values: dict[int, Any] = {position: getattr(self, name) for name, position in self.stored.items()}
        values |= dict(zip(self.given, given, strict=True))
        values |= {position: values[size.of].shape[size.dim] for position, size in self.sizes.items()}
        return Interpreter(self.captured).run(*(values[position] for position in range(len(self.nodes))))

    def traced(self, inputs: Sequence[Any]) -> Program:
        """The graph as a program; sizes that dynamo left open stay open.

        Raises:
            TraceError: torch.export cannot trace it.
            NormfuseError: a size would be fixed that dynamo left open.
        """
        shapes = [self.nodes[position].meta["example_value"].shape for position in self.given]
        dims = tuple({dim: Dim.AUTO for dim, size in enumerate(shape) if _is_open(size)} for shape in shapes)
        given = tuple(inputs[position] for position in self.given)
        program = Program.trace(self, given, dynamic_shapes=(dims,) if any(dims) else None)
        for name, shape in zip(_given_names(program), shapes, strict=True):
            for ours, theirs in zip(program.nodes[name].meta["val"].shape, shape, strict=True):
                if _is_open(theirs) and not _is_open(ours):
                    raise NormfuseError(f"torch.export would fix a size of '{name}', which was left open")
        _guard(program, shapes)
        return program

    def position_of(self, program: Program, name: str) -> int:
        """The position among dynamo's inputs of a stored tensor, or of the placeholder of an input."""
        if name in self.stored:
            return self.stored[name]
        return self.given[_given_names(program).index(name)]

    def regraphed(self, program: Program, inputs: Sequence[Any]) -> Regraphed:
        """A program that was rewritten from this graph's, as a graph that takes this one's place."""
        given = iter(self.given)
        feeds: list[int | str] = []
        for placeholder in program.graph.find_nodes(op="placeholder"):
            name = program.stored.get(placeholder.name)
            kept = name not in program.formulas and name in self.stored
            feeds.append(next(given) if name is None else self.stored[name] if kept else name)
        names = [each for each in feeds if isinstance(each, str)]
        return Regraphed(
            _graph(self, program, feeds, inputs),
            tuple(feeds),
            {name: (program.formulas[name], program.tensor(name).dtype) for name in names if name in program.formulas},
            self.stored,
            {name: program.tensor(name) for name in names if name not in program.formulas},
        )


def _fix_floats(nodes: Sequence[Node]) -> None:
    """Have dynamo start again with the floats of modules, such as a norm's eps, as numbers instead of inputs.

    That is what its own compiler does with floats which it cannot compute with; they are inputs where sizes are dynamic.
    """
    floats = [node for node in nodes if is_from_unspecialized_nn_module_source(node.meta["grapharg"].source)]
    memos = [getattr(node.meta["example_value"], "item_memo", None) for node in floats]
    names = [memo.node._expr.name for memo in memos if isinstance(memo, torch.SymFloat)]
    for name in names:
        TensorifyState.specialize(name)
    if names:
        raise TensorifyScalarRestartAnalysis


def _given_names(program: Program) -> list[str]:
    return [spec.arg.name for spec in program.exported.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]


def _guard(program: Program, shapes: Sequence[Sequence[Any]]) -> None:
    """Have dynamo guard what torch.export takes for granted of a size: its bounds, and which sizes are the same one."""
    first: dict[Any, Any] = {}
    for name, shape in zip(_given_names(program), shapes, strict=True):
        for ours, theirs in zip(program.nodes[name].meta["val"].shape, shape, strict=True):
            if _is_open(theirs):
                bounds = program.exported.range_constraints[_expression(ours)]
                least, most = int(bounds.lower), int(bounds.upper) if bounds.upper.is_Integer else None
                same = first.setdefault(_expression(ours), theirs) == theirs
                holds = same and theirs >= least and (most is None or theirs <= most)  # asking makes a guard
                assert holds, "the example inputs are within torch.export's bounds"


def _is_open(size: Any) -> bool:
    return not isinstance(_expression(size), int)


def _expression(size: Any) -> Any:
    """A size as a number, or as dynamo's or torch.export's expression."""
    expression = size.node.expr if isinstance(size, torch.SymInt) else size
    return expression if getattr(expression, "free_symbols", None) else int(expression)


# -- and back ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regraphed:
    """A rewritten program as a graph that dynamo can call.

    Attributes:
        graph_module: the graph.
        feeds: for each of its inputs, the position among dynamo's inputs, or the name of a formula or a constant.
        formulas: tensors that are computed: their formulas over stored tensors, and their dtypes.
        stored: stored tensor → its position among dynamo's inputs.
        constants: tensors that the trace made.
    """

    graph_module: GraphModule
    feeds: tuple[int | str, ...]
    formulas: Mapping[str, tuple[Formula, torch.dtype]]
    stored: Mapping[str, int]
    constants: Mapping[str, Tensor]


def _graph(captured: Captured, program: Program, feeds: Sequence[int | str], inputs: Sequence[Any]) -> GraphModule:
    graph = Graph()
    copies: dict[Node, Node] = {}
    copied = graph.graph_copy(program.graph, copies, return_output_node=True)
    assert isinstance(copied, tuple)
    for old, feed in zip(program.graph.find_nodes(op="placeholder"), feeds, strict=True):
        _describe(copies[old], captured.nodes[feed] if isinstance(feed, int) else None)
    for node in graph.nodes:
        node.meta.pop("val", None)
    graph.output(_outputs(captured, program, graph, copies, inputs))
    graph.lint()
    made = GraphModule(program.exported.graph_module, graph)
    made.meta.update(captured.captured.meta)
    made._param_name_to_source = {}  # type: ignore[assignment]  # with the meta: tells the next backend that this comes from dynamo, all tensors as inputs
    return made


def _describe(placeholder: Node, dynamos: Node | None) -> None:
    """What dynamo tells of an input; a tensor of ours stays in place as a model's do."""
    placeholder._dynamo_source = getattr(dynamos, "_dynamo_source", None)  # type: ignore[attr-defined]
    static = {"tensor_dict": {"_dynamo_static_input_type": "unguarded"}}
    placeholder.meta = static if dynamos is None else {k: v for k, v in dynamos.meta.items() if k != "example_value"}


def _outputs(
    captured: Captured, program: Program, graph: Graph, copies: Mapping[Node, Node], inputs: Sequence[Any]
) -> tuple[Any, ...]:
    """What dynamo's graph returns; before that, what it writes to is written."""
    (values,) = program.graph.output_node().args
    pairs = list(zip(program.exported.graph_signature.output_specs, values, strict=True))  # type: ignore[arg-type]
    written: dict[int, Node] = {}
    for spec, value in pairs:
        if spec.kind.name.endswith("MUTATION"):
            position = captured.position_of(program, spec.target)
            into = program.nodes[spec.target] if spec.target in program.nodes else program.reader_of(spec.target)
            written[position] = graph.call_function(torch.ops.aten.copy_.default, (copies[into], copies[value]))
    _check_memory(written, inputs)
    returned = [value for spec, value in pairs if spec.kind.name == "USER_OUTPUT"]
    (dynamos,) = captured.captured.graph.output_node().args
    return tuple(
        _as_written(captured, theirs, written) or (copies[ours] if isinstance(ours, Node) else ours)
        for ours, theirs in zip(returned, dynamos, strict=True)  # type: ignore[arg-type]
    )


def _check_memory(written: Mapping[int, Node], inputs: Sequence[Any]) -> None:
    memory = [each.untyped_storage()._cdata if isinstance(each, Tensor) else None for each in inputs]
    if any(memory.count(memory[position]) > 1 for position in written):
        raise NormfuseError("the graph writes to a tensor that shares its memory with another input")


def _as_written(captured: Captured, returned: Any, written: Mapping[int, Node]) -> Node | None:
    """The written input that an output is, if it is one."""
    value = returned.meta.get("example_value") if isinstance(returned, Node) else None
    if not isinstance(value, Tensor):
        return None
    for position, node in written.items():
        into = captured.nodes[position].meta["example_value"]
        if value.untyped_storage()._cdata == into.untyped_storage()._cdata:
            if _form(value) != _form(into):
                raise NormfuseError("an output is a view of a tensor that the graph writes to")
            return node
    return None


def _form(value: Tensor) -> tuple[Any, ...]:
    return str(tuple(value.shape)), str(value.stride()), str(value.storage_offset()), value.dtype
