"""A traced program made functional, of operators that we know, without decomposing linear, conv or norms.

`torch.export` leaves in-place ops, ``no_grad`` blocks and torch's other names of operators (`normfuse.graph.composites`) in
the graph; ``run_decompositions`` takes them out, by tracing the program a second time with all of torch's composites
overridden, which takes several times as long as the first trace of a small model. Where a program has nothing of the kind but
BatchNorms, these are written as ``run_decompositions`` writes them, and torch's verifier of functional programs judges the
result. Where it has other operators' names and nothing else, they alone are traced (`normfuse.graph.retraced`).
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch._export.utils import _check_valid_to_preserve
from torch._export.verifier import Verifier
from torch.export import ExportedProgram
from torch.fx import Node

from normfuse.graph.composites import Composites, composites, is_composite
from normfuse.graph.signature import signature_of
from normfuse.graph.views import aten

try:
    from normfuse.graph.retraced import retraced
except ImportError:  # it speaks with the inside of torch, which another torch may have changed

    def retraced(exported: ExportedProgram, found: Composites) -> ExportedProgram | None:
        """Nothing: `ExportedProgram.run_decompositions` does all of it, as it does what is not simple."""
        return None


def functional(exported: ExportedProgram) -> ExportedProgram:
    """The program, functional; the one that is given is not changed.

    Raises:
        RuntimeError: an updated buffer has two names for one, or what else torch raises.
    """
    return _taken_apart(exported, composites(exported))


def _taken_apart(exported: ExportedProgram, found: Composites) -> ExportedProgram:
    made: ExportedProgram = retraced(exported, found) or exported.run_decompositions(found)
    while further := composites(made):  # composites are made of composites
        made = retraced(made, further) or made.run_decompositions(further)
    # guards of a loaded file are known by their text alone, which torch does not hand on
    made._guards_code = list(dict.fromkeys((*exported._guards_code, *made._guards_code)))
    return made


def functional_in_place(exported: ExportedProgram) -> ExportedProgram:
    """The same of a program that nobody else has: it may be changed."""
    found = composites(exported)
    if found or not _is_simple(exported):
        return _taken_apart(exported, found)
    for node in exported.graph.find_nodes(op="call_function", target=_BATCH_NORM):
        _at_inference(node)
    exported.graph_module.recompile()
    exported._graph_signature = signature_of(exported.graph, exported.graph_signature)
    exported._verifiers = [Verifier]
    exported.validate()  # type: ignore[no-untyped-call]
    return exported


_BATCH_NORM, _PLAIN = aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default
_TRACES = {aten.lift_fresh_copy.default, aten.detach.default, aten.alias.default}
"""What tracing itself leaves behind, and ``run_decompositions`` may take away."""


def _is_simple(exported: ExportedProgram) -> bool:
    """Whether all sizes are fixed, all is read, nothing is changed or has a body, and all operators are ones that stay."""
    calls = [node for node in exported.graph.nodes if node.op not in ("placeholder", "output")]
    if exported.range_constraints or not all(node.users for node in calls):
        return False
    return all(map(_stays, calls))


def _stays(node: Node) -> bool:
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or op._schema.is_mutable or op in _TRACES:
        return False
    if op is _BATCH_NORM:
        return len(node.args) == 9 and node.args[5] is False and isinstance(node.args[3], Node)
    return not is_composite(op) or _check_valid_to_preserve(op)


def _at_inference(node: Node) -> None:
    """A BatchNorm as the operator without training that it is, whose first result is its own."""
    x, gain, shift, mean, variance, _, momentum, eps, _ = node.args
    graph, (value, stats) = node.graph, (each.meta["val"] for each in (node, mean))  # type: ignore[union-attr]
    assert isinstance(value, Tensor)
    with graph.inserting_before(node):
        given = (x, gain, shift, mean, variance, momentum, eps)
        all_results = graph.create_node("call_function", _PLAIN, given, {}, name="_native_batch_norm_legit_no_training")
        result, *unread = (graph.call_function(operator.getitem, (all_results, place)) for place in range(3))
    for each in unread:  # as torch does it, so that whatever comes later has the same name
        graph.erase_node(each)
    none = stats.new_empty(0)  # statistics of the batch, which are not taken
    all_results.meta = {**node.meta, "val": (value, none, none)}
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
