"""Composites of a simple program, each replaced by the calls that torch makes of it, without tracing the rest again.

``run_decompositions`` traces a whole program twice to take a few reshapes, dropouts and casts apart. Where a program changes
nothing, has no bodies and fixed sizes, its other calls would only be written down again. So the composites alone are traced,
with torch's own means, and their calls are put in their places: name for name what ``run_decompositions`` gives.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch._C import DispatchKey, _ExcludeDispatchKeyGuard
from torch._dispatch.python import enable_python_dispatcher
from torch._export.utils import _compiling_state_context
from torch._export.verifier import Verifier
from torch._functorch._aot_autograd.functional_utils import from_fun, to_fun
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.export import ExportedProgram
from torch.export import exported_program as exporting
from torch.export._trace import _ignore_backend_decomps
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.graph import _Namespace
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from normfuse.graph.composites import Composites, is_composite
from normfuse.graph.signature import signature_of
from normfuse.graph.views import aten


def retraced(exported: ExportedProgram, found: Composites) -> ExportedProgram | None:
    """The program, functional, as ``run_decompositions(found)`` makes it; None where that is not as simple as that.

    Args:
        exported: the program; it is not changed.
        found: the composites that are to be taken apart.
    """
    mode = _fake_mode(exported)
    calls = [node for node in exported.graph.nodes if node.op not in ("placeholder", "output")]
    if mode is None or not all(map(_is_plain, calls)):
        return None
    parts = _parts([node for node in calls if node.target in found or is_composite(node.target)], found, mode)
    if parts is None:
        return None
    written = _Written(exported.graph, parts)
    return written.program(exported) if written.made() else None


def _fake_mode(exported: ExportedProgram) -> FakeTensorMode | None:
    """What its values live in, if all sizes are fixed, and outputs are all that it gives."""
    gives = {spec.kind.name for spec in exported.graph_signature.output_specs}
    values = [node.meta.get("val") for node in exported.graph.nodes if node.op != "output"]
    tensors = [each for each in pytree.tree_leaves(values) if isinstance(each, Tensor)]
    modes = {id(getattr(each, "fake_mode", None)): getattr(each, "fake_mode", None) for each in tensors}
    plain = all(type(each) is FakeTensor and each.layout is torch.strided for each in tensors)
    of_modules = any(entry.signature is not None and entry.fqn for entry in exported.module_call_graph)
    if exported.range_constraints or of_modules or gives != {"USER_OUTPUT"} or len(modes) != 1 or not plain:
        return None
    (mode,) = modes.values()
    return mode if isinstance(mode, FakeTensorMode) else None


def _is_plain(node: Node) -> bool:
    """Whether a call changes nothing, has no body, and gives a tensor or several."""
    op, value = node.target, node.meta.get("val")
    if op is operator.getitem:
        return True
    if not isinstance(op, torch._ops.OpOverload) or op._schema.is_mutable or op is aten.lift_fresh_copy.default:
        return False
    if is_composite(op) and op.namespace != "aten":
        return False
    return op is aten._assert_tensor_metadata.default or all(isinstance(each, Tensor) for each in _several(value))


def _several(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


@dataclass(frozen=True)
class _Part:
    """What a composite consists of: calls, the placeholders that stand for its operands, and the results."""

    operands: list[Node]
    calls: list[Node]
    results: Any


def _parts(nodes: Sequence[Node], found: Composites, mode: FakeTensorMode) -> dict[Node, _Part] | None:
    """What composites consist of; None where torch gives a result another form than it had in the first trace."""
    alike: dict[Any, list[Node]] = {}
    for node in nodes:
        alike.setdefault(_spelling(node), []).append(node)
    firsts = [several[0] for several in alike.values()]
    try:
        composites, others = exporting._split_decomp_table_to_cia_and_python_decomp(dict(found))
        with (
            mode,
            exporting._override_composite_implicit_decomp(composites),
            _ignore_backend_decomps(),
            _compiling_state_context(),
        ):
            traced = _traced(firsts, others)
    except Exception:  # torch says better what it is, where it has the whole program
        return None
    for node, part in zip(firsts, traced, strict=True):
        theirs = [each.meta["val"] if isinstance(each, Node) else each for each in _several(part.results)]
        if list(map(_layout, _several(node.meta["val"]))) != list(map(_layout, theirs)):
            return None
    return {node: part for several, part in zip(alike.values(), traced, strict=True) for node in several}


def _spelling(node: Node) -> Any:
    """All of a call that its trace depends on: numbers to their sign of zero, and which of its operands are one."""
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    operands = node.all_input_nodes
    told = [
        (operands.index(each), _layout(each.meta["val"])) if isinstance(each, Node) else (type(each), repr(each))
        for each in leaves
    ]
    return node.target, spec, tuple(told)


def _layout(value: Tensor) -> Any:
    return value.dtype, tuple(value.shape), value.stride(), value.device


def _traced(nodes: Sequence[Node], others: Mapping[Any, Callable[..., Any]]) -> list[_Part]:
    """What each of some calls consists of, in one trace."""
    given = [each for node in nodes for each in node.all_input_nodes]

    def call(*tensors: Tensor) -> Any:
        rest, results = iter(tensors), []
        for place, node in enumerate(nodes):
            with _ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(DispatchKey.Functionalize)):
                mine = {each: to_fun(next(rest)) for each in node.all_input_nodes}
                args, kwargs = map_arg((node.args, node.kwargs), mine.__getitem__)
                results.append(pytree.tree_map(from_fun, node.target(*args, **kwargs)))  # type: ignore[operator]
            _mark(place)
        return results

    values = [_empty(each) for each in given]
    with torch.no_grad(), enable_python_dispatcher(), FunctionalTensorMode():
        graph = make_fx(call, decomposition_table=dict(others))(*values).graph
    operands = iter(graph.find_nodes(op="placeholder"))
    results: Any = graph.output_node().args[0]
    return [
        _Part(
            [next(operands) for _ in node.all_input_nodes],
            [each for each in graph.nodes if each.meta.get(_PLACE) == place],
            result,
        )
        for place, (node, result) in enumerate(zip(nodes, results, strict=True))
    ]


def _empty(node: Node) -> Tensor:
    """A value like a node's that is nobody else's: what is traced is known by its tensors."""
    value = node.meta["val"]
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


_PLACE = "normfuse_place"


def _mark(place: int) -> None:
    """Write down of the calls traced since the last time whose they are."""
    mode = get_proxy_mode()
    assert mode is not None
    for node in reversed(mode.tracer.graph.nodes):
        if node.op != "call_function" or _PLACE in node.meta:
            return
        node.meta[_PLACE] = place


class _Written:
    """A graph written anew, with the calls that composites consist of in their places."""

    def __init__(self, old: Graph, parts: Mapping[Node, _Part]) -> None:
        self.old, self.parts = old, parts
        self.graph, self.names = Graph(), _Namespace()
        self.twin: dict[Node, Any] = {}
        """What of the new graph stands for a node of the old one."""
        self.clash = False
        """Whether a call would have the name of an input."""

    def made(self) -> bool:
        """Whether it could be written as torch would write it."""
        for node in self.old.nodes:
            match node.op:
                case "placeholder":
                    self.twin[node] = self.graph.node_copy(node)
                    self.twin[node].name = node.name  # fx renames what is called like a builtin
                case "output":
                    results = map_arg(node.args, self.twin.__getitem__)
                    self.graph.output(*results).meta = dict(node.meta)
                    return self._keeps_outputs(node) and not self.clash
                case _ if node in self.parts:
                    self.twin[node] = self._inlined(node, self.parts[node])
                case _ if node.target is operator.getitem:
                    of, place = cast("tuple[Node, int]", node.args)
                    self.twin[node] = self.twin[of][place]
                case _:
                    self.twin[node] = self._kept(node)
        return False

    def program(self, exported: ExportedProgram) -> ExportedProgram:
        """The old program with the new graph."""
        self.graph.eliminate_dead_code()
        program = ExportedProgram(
            root=exported.graph_module,
            graph=self.graph,
            graph_signature=signature_of(self.graph, exported.graph_signature),
            state_dict=dict(exported.state_dict),
            range_constraints=exported.range_constraints,
            module_call_graph=exported.module_call_graph,
            example_inputs=exported.example_inputs,
            constants=dict(exported.constants),
            verifiers=[Verifier],
        )
        program._guards_code = list(exported._guards_code)
        return program

    def _keeps_outputs(self, output: Node) -> bool:
        """Whether every output is a call's that was one, and one for each."""
        was, now = (pytree.tree_leaves(each.args) for each in (output, self.graph.output_node()))
        pairs = [(a, b) for a, b in zip(was, now, strict=True) if isinstance(a, Node)]
        same = all(isinstance(b, Node) and a.op == b.op for a, b in pairs)
        distinct = len({b for _, b in pairs}) == len({a for a, _ in pairs})
        return same and distinct

    def _kept(self, node: Node) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), self.twin.__getitem__)
        return self._call(node.target, *_as_dispatched(node.target, args, kwargs), node.meta.get("val"), node)

    def _inlined(self, node: Node, part: _Part) -> Any:
        values: dict[Node, Any] = dict(zip(part.operands, map(self.twin.__getitem__, node.all_input_nodes), strict=True))
        for each in part.calls:
            if each.target is operator.getitem:
                of, place = cast("tuple[Node, int]", each.args)
                values[each] = values[of][place]
            else:
                args, kwargs = map_arg((each.args, each.kwargs), values.__getitem__)
                values[each] = self._call(each.target, args, kwargs, each.meta.get("val"), node)
        return map_arg(part.results, values.__getitem__)

    def _call(self, op: Any, args: Any, kwargs: Any, value: Any, like: Node) -> Any:
        """A call; of several results, one by one."""
        made = self._node(op, args, kwargs, value, like)
        if not isinstance(value, (list, tuple)):
            return made
        return [self._node(operator.getitem, (made, place), {}, each, like) for place, each in enumerate(value)]

    def _node(self, op: Any, args: Any, kwargs: Any, value: Any, like: Node) -> Node:
        name = self.graph._target_to_str(getattr(op, "overloadpacket", op).__name__)
        node = self.graph.create_node("call_function", op, args, kwargs, name=name)
        self.clash |= node.name != self.names.create_name(name, None)
        node.meta = {key: each for key, each in like.meta.items() if key not in ("val", "tensor_meta")}
        if value is not None:
            node.meta["val"] = value
        return node


def _as_dispatched(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments as torch hands them on: by place, up to the last that is not as it is by default; by name what must be."""
    given = dict(kwargs)
    named: dict[str, Any] = {}
    placed: list[tuple[Any, bool]] = []
    for place, each in enumerate(op._schema.arguments):
        value = args[place] if place < len(args) else given.get(each.name, each.default_value)
        default = each.default_value
        is_default = each.has_default_value() and type(value) is type(default) and repr(value) == repr(default)
        if each.kwarg_only:
            named |= {} if is_default else {each.name: value}
        else:
            placed.append((value, is_default))
    while placed and placed[-1][1]:
        placed.pop()
    return tuple(value for value, _ in placed), named
