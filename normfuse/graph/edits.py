"""Edits are inert data; `apply` is the only code that changes a program, and it changes a copy.

Four kinds suffice. `SetTensor` gives a stored tensor a new value by a formula, `NewTensor` adds one. `Reroute` makes readers of
a node read an expression instead; nodes that nobody reads any more are dropped. `Resize` says that a value gets another size
along an axis; every value that does must be named by one, so nothing changes its shape by accident.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from normfuse import limits, strict_json
from normfuse.errors import InvalidPlan, first_line
from normfuse.graph import expressions
from normfuse.graph.expressions import Call, Expression, Formula, interpret, text
from normfuse.graph.nodes import draws
from normfuse.graph.program import Program
from normfuse.graph.shapes import Shapes, bounded, fake_mode
from normfuse.limits import OverLimit


@dataclass(frozen=True)
class SetTensor:
    """The stored tensor ``name`` becomes ``formula`` (over the tensors before the plan's round)."""

    name: str
    formula: Formula

    def __str__(self) -> str:
        return f"{self.name} ← {self.formula}"


@dataclass(frozen=True)
class NewTensor:
    """A stored tensor ``name`` that the program did not have; expressions read it as ``Ref(name)``.

    Attributes:
        name: its name in the state dict.
        formula: its value.
        like: name of the stored tensor whose dtype and device it takes.
    """

    name: str
    formula: Formula
    like: str

    def __str__(self) -> str:
        return f"new {self.name} ← {self.formula}"


@dataclass(frozen=True)
class Reroute:
    """Readers of ``node`` read ``by`` instead.

    Attributes:
        node: name of the node that is no longer read.
        by: what is read instead; it may itself read ``node``.
        readers: names of the readers concerned, or None for all of them.
        name: what later edits of the same rewrite call the new value, or None.
    """

    node: str
    by: Expression
    readers: tuple[str, ...] | None = None
    name: str | None = None

    def __str__(self) -> str:
        some = "" if self.readers is None else f" for {len(self.readers)} of its readers"
        return f"{self.node} ← {text(self.by, in_graph=True)}{some}"


@dataclass(frozen=True)
class Resize:
    """The value of ``node`` gets ``size`` entries along ``axis``; sizes that its call says follow.

    Attributes:
        node: name of a node, stored tensors included, or of a new value of the same plan.
        axis: the axis.
        size: its new size, at least one.
    """

    node: str
    axis: int
    size: int

    def __str__(self) -> str:
        return f"{self.node} has {self.size} entries along axis {self.axis}"


Edit: TypeAlias = SetTensor | NewTensor | Reroute | Resize


def apply(program: Program, edits: Iterable[Edit], *, by: Mapping[Edit, tuple[str, str]] | None = None) -> Program:
    """A new program with the edits made; the old one is untouched. All formulas read the old program.

    Args:
        program: the program to start from.
        edits: the changes of one round of a plan.
        by: (pass, site) of each edit, kept in ``node.meta["normfuse"]`` of the nodes that it makes.

    Raises:
        InvalidPlan: an edit names a node, a reader or a tensor that the program does not have, or a value would change its
            shape or dtype otherwise than the edits say.
    """
    try:
        with bounded(program.graph):
            return _applied(program, tuple(edits), by or {})
    except InvalidPlan:
        raise
    except OverLimit as error:
        raise InvalidPlan(f"the plan asks for too much: {error}", hint=error.hint) from error
    except Exception as error:  # torch's own, where an operator does not take what it is given
        raise InvalidPlan(f"the plan does not fit this program: {first_line(error)}") from error


def _applied(program: Program, edits: Sequence[Edit], by: Mapping[Edit, tuple[str, str]]) -> Program:
    draft, twin = copied(program)
    shapes = Shapes(program.nodes, twin, [(edit.node, edit.axis, edit.size) for edit in edits if isinstance(edit, Resize)])
    formulas, state = dict(program.formulas), dict(program.exported.state_dict)
    for edit in edits:
        match edit:
            case SetTensor(name, new):
                _check_tensors(program, new, name)
                formulas[name] = _composed(new, program)
                shapes.store(program.reader_of(name).name, _sizes(program, new))
            case NewTensor(name, new, like):
                _check_tensors(program, new, like)
                formulas[name] = _composed(new, program)
                state[name] = _add_tensor(program, draft.graph, twin, edit)
            case Reroute():
                _reroute(draft, twin, shapes, edit, by.get(edit))
    graph = draft.graph
    _drop_unread(graph)
    shapes.propagate(graph)
    graph.lint()
    return Program(program.rebuilt(draft, graph, state), formulas, program.notes)


def _add_tensor(program: Program, graph: Graph, nodes: dict[str, Node], edit: NewTensor) -> nn.Parameter:
    """A placeholder for a new stored tensor; its storage is on the meta device until the formula is evaluated."""
    if edit.name in set(program.tensor_names()) or edit.name in nodes:
        raise InvalidPlan(f"the plan makes the tensor '{edit.name}', which this model already has")
    like = program.reader_of(edit.like).meta["val"]  # not the tensor, which an earlier round may only have promised
    form = _sizes(program, edit.formula)
    with fake_mode(graph):
        value = torch.empty(form, dtype=like.dtype, device=like.device)
    last = max((node for node in graph.nodes if node.name in program.stored), key=_places(graph).__getitem__)
    with graph.inserting_after(last):
        node = graph.placeholder(f"p_{edit.name}")
    node.target = node.name  # an argument in generated code: a name that Python takes, and nobody else's
    node.meta["val"] = value
    node.meta["stored"] = edit.name
    nodes[edit.name] = node
    return nn.Parameter(torch.empty(form, dtype=like.dtype, device="meta"))


def _sizes(program: Program, new: Formula) -> tuple[int, ...]:
    """The sizes of a formula's value."""
    with fake_mode(program.graph):
        return tuple(expressions.evaluate(new, lambda name: program.reader_of(name).meta["val"]).shape)


def _places(graph: Graph) -> dict[Node, int]:
    return {node: place for place, node in enumerate(graph.nodes)}


def copied(program: Program) -> tuple[GraphModule, dict[str, Node]]:
    """A copy of a program's graph to make changes in, and its nodes by the names that they have in the program."""
    graph = Graph()
    mapping: dict[Node, Node] = {}
    output = graph.graph_copy(program.graph, mapping, return_output_node=True)
    assert isinstance(output, tuple)
    for old, new in mapping.items():
        new.name = old.name  # fx renames nodes that are called like builtins ("input"); the signature knows them by name
    value, old_output = output
    new_output = graph.output(value)
    new_output.meta = dict(old_output.meta)
    module = GraphModule(program.exported.graph_module, graph)
    module.meta.update(program.exported.graph_module.meta)
    return module, {old.name: new for old, new in mapping.items()}


def _check_tensors(program: Program, new: Formula, *others: str) -> None:
    known = set(program.stored.values())
    for name in (*expressions.reads(new), *others):
        if name not in known:
            raise InvalidPlan(f"the plan reads the tensor '{name}', which this model does not have")


def _composed(new: Formula, program: Program) -> Formula:
    """The formula over the original tensors."""
    composed: Formula = expressions.substitute(new, program.formulas)
    if expressions.size(composed) > limits.OCCURRENCES:
        raise OverLimit("a formula has too many parts", "OCCURRENCES")
    return composed


def _reroute(draft: GraphModule, nodes: dict[str, Node], shapes: Shapes, edit: Reroute, origin: tuple[str, str] | None) -> None:
    node = _find(nodes, edit.node)
    readers = list(node.users) if edit.readers is None else [_find(nodes, name) for name in edit.readers]
    new = _Emitter(draft.graph, nodes, node, origin).emit(edit.by)
    for reader in readers:
        reader.replace_input_with(node, new)
    if edit.readers is None:
        nodes[edit.node] = new  # later edits of the round mean what took its place
    if edit.name is not None:
        nodes[edit.name] = new
    shapes.replace(node, new, edit.node if edit.readers is None else edit.name or "")


def _find(nodes: Mapping[str, Node], name: str) -> Node:
    if name not in nodes:
        raise InvalidPlan(f"the plan speaks of '{name}', which this model's graph does not have")
    return nodes[name]


class _Emitter:
    """Emits an expression behind a node; its calls get their values when all edits are made (`normfuse.graph.shapes`).

    What stands in an expression twice is computed once, so that x - mean x is of one x.
    """

    def __init__(self, graph: Graph, nodes: Mapping[str, Node], at: Node, origin: tuple[str, str] | None) -> None:
        self.graph, self.nodes, self.at = graph, nodes, at
        kept: dict[str, Any] = {key: at.meta[key] for key in ("nn_module_stack", "stack_trace") if key in at.meta}
        kept["stands_for"] = at.meta.get("stands_for", at.name)  # what messages call it: a node of the user's model
        self.meta = {**kept, "normfuse": origin} if origin else kept
        self.cursor = at
        self.made: dict[tuple[Any, ...], Node] = {}

    def emit(self, by: Expression) -> Any:
        return interpret(by, lambda leaf: _find(self.nodes, leaf.name), self._call)

    def _call(self, call: Call, args: list[Any]) -> Node:
        key = (call.target(), repr(args), repr(call.keywords()))
        if key not in self.made:
            self.made[key] = self._new(call, args)
        return self.made[key]

    def _new(self, call: Call, args: list[Any]) -> Node:
        with self.graph.inserting_after(self.cursor):
            self.cursor = self.graph.call_function(call.target(), tuple(args), call.keywords())
        self.cursor.meta = dict(self.meta)
        return self.cursor


def _drop_unread(graph: Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and not _is_assertion(node) and not draws(node):
            graph.erase_node(node)  # what draws moves the numbers that others draw


def _is_assertion(node: Node) -> bool:
    if node.target is torch.ops.aten._assert_tensor_metadata.default:  # of a value that nobody else reads it says nothing
        return any(reader is not node for operand in node.all_input_nodes for reader in operand.users)
    return "assert" in str(node.target) or "sym_constrain" in str(node.target)


# -- JSON --------------------------------------------------------------------------------------------------------------


def to_json(edit: Edit) -> dict[str, Any]:
    """An edit as JSON types."""
    match edit:
        case SetTensor(name, new):
            return {"set": name, "to": expressions.to_json(new)}
        case NewTensor(name, new, like):
            return {"new": name, "to": expressions.to_json(new), "like": like}
        case Reroute(node, by, readers, name):
            readers_json = None if readers is None else list(readers)
            return {"reroute": node, "by": expressions.to_json(by, in_graph=True), "readers": readers_json, "name": name}
        case Resize(node, axis, size):
            return {"resize": node, "axis": axis, "size": size}


def from_json(data: Any) -> Edit:
    """The edit that `to_json` wrote.

    Raises:
        ValueError: it is none, or names operators that do more than compute.
    """
    match strict_json.record(data):
        case {"new": name, "to": new, "like": like}:
            return NewTensor(strict_json.name(name), expressions.formula_from_json(new), strict_json.text(like))
        case {"set": name, "to": new}:
            return SetTensor(strict_json.text(name), expressions.formula_from_json(new))
        case {"resize": node, "axis": axis, "size": size}:
            return Resize(strict_json.text(node), strict_json.whole(axis), strict_json.whole(size))
        case {"reroute": node, "by": by, "readers": readers, "name": name}:
            some = None if readers is None else strict_json.texts(readers)
            called = None if name is None else strict_json.name(name)
            return Reroute(strict_json.text(node), expressions.calls_from_json(by), some, called)
    raise ValueError(f"an edit of {', '.join(data) or 'nothing'} is not known")
