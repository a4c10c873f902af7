"""A program as a runtime should have it: weights that are computed are stored, and norms written by hand are operators.

The graph of a tuned (live) model forms its weights from parameters in every call, and so do weight norm, weight
standardization and the 1 + w of Gemma's norms. `evaluated` evaluates what depends on stored tensors alone in float64 and rounds
it once, as deploy mode does. A runtime recognises norms by their shape and misses most spellings; normfuse knows them by proof
(`normfuse.analysis.norms`), so `with_operators` makes one operator of each.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from normfuse.analysis.facts import analyze
from normfuse.errors import ExportError
from normfuse.graph.edits import Edit, Reroute, apply
from normfuse.graph.expressions import FLOAT32, Call, Ref, literal
from normfuse.graph.interpreter import computed, widened
from normfuse.graph.ops.lookup import keeps
from normfuse.graph.ops.row import Keeps
from normfuse.graph.program import Program
from normfuse.graph.views import HALVES, Norm, NormKind, arguments, aten, dtype, shape

OPERATOR_DTYPES = (*HALVES, torch.float32)
"""An operator's eps is a float32 in ONNX: float64 norms stay in arithmetic."""


def evaluated(program: Program) -> Program:
    """The program with every formula, and every weight that its graph computes, evaluated in float64 and rounded once.

    Views and copies of stored tensors stay, and so does what would take more room than what it is made of.

    Raises:
        ExportError: the program was traced as it trains; names the node.
    """
    for node in filter(_trains, program.graph.nodes):
        site = program.site(node)
        where = f"{site} ({site.source or 'source unknown'})"
        raise ExportError(f"the program was traced in training mode: see {where}", hint="trace it after model.eval()")
    baked = program.baked()
    wanted = _computed(baked)
    if not wanted:
        return baked
    draft = apply(baked, ())
    graph, state = draft.graph, dict(baked.exported.state_dict)
    last = [node for node in graph.nodes if node.name in baked.stored][-1]
    for node, value in zip(wanted, _values(baked, wanted), strict=True):
        name = f"computed.{node.name}"
        state[name] = nn.Parameter(value, requires_grad=False)
        with graph.inserting_after(last):
            last = graph.placeholder(f"p_computed_{node.name}")
        last.meta = {"val": node.meta["val"], "stored": name}
        draft.nodes[node.name].replace_all_uses_with(last)
    unread = {node.name for node in baked.constant}
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and node.name in unread:
            graph.erase_node(node)
    return Program(baked.rebuilt(draft.exported.graph_module, graph, state), notes=baked.notes)


def _trains(node: Node) -> bool:
    """Whether a call drops entries at random or takes statistics of the batch, though it has stored ones."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    named = arguments(node)
    by_batch = named.get("training") is True and named.get("running_mean") is not None
    return bool(named.get("dropout_p")) or named.get("train") is True or by_batch


def _computed(program: Program) -> list[Node]:
    """Values computed from stored tensors that something else reads, in execution order."""
    sources: dict[Node, frozenset[Node]] = {}
    arithmetic: set[Node] = set()
    for node in program.graph.nodes:
        if node not in program.constant:
            continue
        operands = node.all_input_nodes
        sources[node] = frozenset({node}) if node.op == "placeholder" else frozenset().union(*(sources[o] for o in operands))
        copies = keeps(node) in (Keeps.COPY, Keeps.CAST) or getattr(node.target, "is_view", False)
        if node.op == "call_function" and not copies:
            arithmetic.add(node)
        arithmetic |= {node} if any(operand in arithmetic for operand in operands) else set()

    def worth_it(node: Node) -> bool:
        kept = sum(program.tensor(program.stored[each.name]).numel() for each in sources[node])
        value = node.meta.get("val")
        return isinstance(value, Tensor) and value.is_floating_point() and kept >= value.numel() > 0

    return [
        node
        for node in program.graph.nodes
        if node in arithmetic and worth_it(node) and any(reader not in program.constant for reader in node.users)
    ]


def _values(program: Program, wanted: Sequence[Node]) -> Iterator[Tensor]:
    """What the graph computes, in float64, rounded once to the dtype that it has there."""
    values: dict[Node, Tensor] = {}
    for node in wanted:
        computed(node, values, lambda each: widened(program.tensor(program.stored[each.name]).detach()), wide=True)
        yield values[node].to(node.meta["val"].dtype).clone(memory_format=torch.contiguous_format)


def with_operators(program: Program) -> Program:
    """The program with LayerNorms and RMSNorms over the last axis that are written by hand as operators, their gains inside.

    A CRMSNorm stays in arithmetic: as an RMSNorm of one entry more, joined before and cut off behind, it is slower.
    """
    found = [spelled for norm in analyze(program).norms if (spelled := _operator(program, norm)) is not None]
    return _with(program, dict(found))


def _operator(program: Program, norm: Norm) -> tuple[Node, Reroute] | None:
    """For a norm that is no operator yet, or whose gain still stands behind it: its node, and the operator for it."""
    last, size = len(shape(norm.x)) - 1, (shape(norm.x) or (None,))[-1]
    if norm.kind not in (NormKind.LAYER_NORM, NormKind.RMS_NORM) or norm.axes != (last,) or not isinstance(size, int):
        return None
    if dtype(norm.x) not in OPERATOR_DTYPES or dtype(norm.out) != dtype(norm.x) or norm.shift is not None:
        return None
    out, gain = (norm.out, norm.gain) if norm.gain is not None else _behind(program, norm.out, aten.mul.Tensor)
    out, shift = _behind(program, out, aten.add.Tensor) if norm.kind == NormKind.LAYER_NORM else (out, None)
    if out is norm.out and not norm.by_hand:
        return None
    if not all(_is_vector(each, norm.x, size) for each in (gain, shift) if each):
        return None
    weight, bias = (_as_vector(each, size) for each in (gain, shift))
    affine = (weight, bias) if norm.kind == NormKind.LAYER_NORM else (weight,)
    return norm.out, Reroute(out.name, Call(f"{norm.kind}.default", (Ref(norm.x.name), (size,), *affine, norm.eps)))


def _behind(program: Program, value: Node, target: torch._ops.OpOverload) -> tuple[Node, Node | None]:
    """The sole reader of a value, if it combines it with a stored vector along the last axis, and that vector."""
    reader = next(iter(value.users), None)
    if reader is None or len(value.users) > 1 or reader.target is not target or reader.kwargs:
        return value, None
    others = [operand for operand in reader.all_input_nodes if operand is not value]
    if len(others) == 1 and others[0] in program.constant and _is_vector(others[0], value, shape(value)[-1]):
        return reader, others[0]
    return value, None


def in_float32(program: Program, kinds: Collection[str]) -> Program:
    """The program with norms of these kinds that read half precisions computed in float32, as torch computes them."""
    norms = [norm for norm in analyze(program).norms if norm.kind in kinds and dtype(norm.x) in HALVES and not norm.by_hand]
    edits = {norm.out: _cast_around(norm.out, norm.x) for norm in norms if norm.out.op == "call_function"}
    return _with(program, edits)


def _with(program: Program, edits: Mapping[Node, Edit]) -> Program:
    """The program with an edit at each of some nodes; which pass made a node is kept."""
    made = {edit: out.meta["normfuse"] for out, edit in edits.items() if "normfuse" in out.meta}
    return apply(program, edits.values(), by=made) if edits else program


def _cast_around(out: Node, x: Node) -> Reroute:
    def cast(argument: Any) -> Any:
        is_half = isinstance(argument, Node) and dtype(argument) in HALVES
        return Call("_to_copy.default", (literal(argument),), FLOAT32) if is_half else literal(argument)

    wide = Call.of(out.target, [cast(each) for each in arguments(out).values()])
    return Reroute(out.name, Call("type_as.default", (wide, Ref(x.name))))


def _as_vector(node: Node | None, size: int) -> Ref | Call | None:
    if node is None or len(shape(node)) == 1:
        return Ref(node.name) if node is not None else None
    return Call("view.default", (Ref(node.name), (size,)))


def _is_vector(node: Node, like: Node, size: int) -> bool:
    sizes = shape(node)
    flat = sizes[-1:] == (size,) and all(each == 1 for each in sizes[:-1])
    return flat and len(sizes) <= len(shape(like)) and dtype(node) == dtype(like)
