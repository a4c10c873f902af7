"""How a rewritten norm is spelled when a program becomes a module that runs operator by operator on a CPU.

torch's ``rms_norm`` is composed of several operators there and slower than its ``layer_norm``, which is one kernel; without a
gain ``layer_norm`` takes up to twice its time with one. On a value of zero mean both norms are one function (Pre-RMSNorm
paper, §3), so such an RMSNorm is called as a ``layer_norm``, and a missing gain is a stored vector of ones. Files, compilers
and exporters get ``rms_norm``: they have kernels for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.fx import Node

from normfuse.analysis.facts import analyze
from normfuse.graph.edits import Edit, NewTensor, Reroute, apply
from normfuse.graph.expressions import FLOAT32, Call, Expression, Ref, evaluate
from normfuse.graph.ops.lookup import rank
from normfuse.graph.ops.norms import operator_norm
from normfuse.graph.program import Program
from normfuse.graph.views import Norm, NormKind, aten, dtype, shape

SLOWER = (
    "operator by operator on a CPU, torch's rms_norm is slower than its layer_norm; "
    "Result.module(), torch.compile and exports do not call it"
)
ZERO = 2.0**-44
"""A mean, relative to the entries' mean size, that float64 arithmetic alone explains."""


def for_cpu(planned: Program, program: Program) -> Program:
    """A program with its norms spelled for operator-by-operator use on a CPU; itself where nothing would be gained.

    Args:
        planned: the rewritten program with its weights as formulas, which tell what has zero mean.
        program: the same program with its weights evaluated, in float32 on a CPU where anything is to be changed.
    """
    if not any(map(_norm, program.graph.nodes)):
        return program  # and no formula is evaluated for nothing
    centred = analyze(planned).centered_with(partial(_measured, planned))
    edits = list(_respelled(program, {node.name: axes for node, axes in centred.items()}))
    return apply(program, edits).baked() if edits else program


def notes(original: Program, rewritten: Program) -> tuple[str, ...]:
    """What the reader of a report should know of the speed of the norms that were made."""
    norms = ([norm.kind for norm in map(_norm, each.graph.nodes) if norm] for each in (original, rewritten))
    before, after = (kinds.count(NormKind.RMS_NORM) for kinds in norms)
    return (SLOWER,) if after > before else ()


def _respelled(program: Program, centred: dict[str, frozenset[int]]) -> Iterator[Edit]:
    ones: dict[int, Expression] = {}
    like = _like(program)
    for node in program.graph.nodes:
        norm = _norm(node)
        if norm is None or not _is_slow(norm, centred):
            continue
        width = shape(node)[-1]
        if norm.gain is None and width not in ones:
            name = f"normfuse.ones_{width}"
            ones[width] = Ref(name) if like else Call("ones.default", ((width,),), FLOAT32)
            if like:
                yield NewTensor(name, Call("ones.default", ((width,),)), like)
        out, shift = (node, norm.shift) if norm.shift is not None else _shifted(program, node, width)
        gain = ones[width] if norm.gain is None else Ref(norm.gain.name)
        by = Call("layer_norm.default", (Ref(norm.x.name), (width,), gain, shift and Ref(shift.name), norm.eps))
        yield Reroute(out.name, by)


def _norm(node: Node) -> Norm | None:
    """A call of one of the two operators, over the last axis in float32 on a CPU."""
    norm = operator_norm(node) if node.target in (aten.rms_norm.default, aten.layer_norm.default) else None
    if norm is None or norm.axes != (rank(node) - 1,) or dtype(node) is not torch.float32:
        return None
    return norm if node.meta["val"].device.type == "cpu" else None


def _is_slow(norm: Norm, centred: dict[str, frozenset[int]]) -> bool:
    """Whether ``layer_norm`` with a gain is the same function, and faster."""
    return norm.axes[0] in centred.get(norm.x.name, ()) if norm.kind == NormKind.RMS_NORM else norm.gain is None


def _shifted(program: Program, node: Node, width: int) -> tuple[Node, Node | None]:
    """The addition of a stored shift behind a norm, if that is all that reads the norm; else the norm itself."""
    match list(node.users):
        case [Node(target=aten.add.Tensor, args=(first, Node() as shift)) as out] if first is node and not out.kwargs:
            if shift.name in program.stored and tuple(shape(shift)) == (width,) and dtype(shift) is torch.float32:
                return out, shift
    return node, None


def _like(program: Program) -> str | None:
    """A stored tensor of the kind that a norm's gain is; None in a program that only computes in float32."""
    tensors = ((name, program.tensor(name)) for name in program.stored.values())
    return next((name for name, each in tensors if each.dtype is torch.float32 and each.device.type == "cpu"), None)


def _measured(planned: Program, node: Node) -> set[int]:
    """Axes along which a stored tensor has zero mean, as the weights are now: its formula's value is measured in float64."""
    new = planned.formulas.get(planned.stored.get(node.name, ""))
    if new is None:
        return set()
    value = evaluate(new, planned.tensor)
    sizes = value.abs()
    return {axis for axis in range(value.dim()) if bool((value.mean(axis).abs() <= ZERO * sizes.mean(axis)).all())}
