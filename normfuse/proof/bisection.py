"""Where two programs part: the first value that differs for a reason of its own.

A rewrite changes values on purpose, and most of the graph may differ in two equal programs: a stream that has lost its
mean, a convolution that has taken over a norm's scale. Such a difference heals: no path from it reaches an output
without passing a value that agrees again. So the search goes back from the outputs that differ, through values that
differ, and ends where all that a value was computed from agrees. A value that differs only by its mean along one axis
counts as agreeing, since that is what Pre-RMSNorm removes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from normfuse.interpret import run
from normfuse.program import Program
from normfuse.proof.evidence import MARGIN
from normfuse.proof.proving import FLOOR, distance, distances, nudged, rounding_of


@dataclass(frozen=True)
class Parting:
    """The first place where two programs part.

    Attributes:
        node: the node's name, which is the same in both programs.
        op: its operator in the second program.
        site: the module that it belongs to.
        source: file and line of the model's code; empty where the trace does not tell.
        error: how far its values are apart, relative to their largest entry.
        allowed: how far noise explains.
        only_in_b: nodes behind it that the first program does not have, up to the last ones that agree.
    """

    node: str
    op: str
    site: str
    source: str
    error: float
    allowed: float
    only_in_b: tuple[str, ...]

    def __str__(self) -> str:
        where = f"{self.site} ({self.source})" if self.source else self.site
        text = f"they part at {self.node}, {self.op} of {where}: values differ by {self.error:.1e} (relative)"
        text += f", where noise explains {self.allowed:.1e}"
        if self.only_in_b:
            text += f"; new in the second model just before it: {', '.join(self.only_in_b)}"
        return text

    def to_dict(self) -> dict[str, Any]:
        """The parting as JSON types."""
        return {**asdict(self), "only_in_b": list(self.only_in_b)}


def bisect(a: Program, b: Program, flat: Sequence[Any]) -> Parting | None:
    """The first node where the two part on these inputs, both in float64; None where their outputs agree.

    Programs are compared by the names of their nodes, which a rewrite keeps. All values are held in memory at once.

    Args:
        a: the reference.
        b: the other; it takes the same flat inputs.
        flat: the inputs, as `normfuse.interpret.flat_inputs` gives them.
    """
    (ours, truth), (shaken, noisy), (theirs, got) = _values(a, flat), _values(a, flat, rounding_of(a)), _values(b, flat)
    noise = [MARGIN * max(each, FLOOR) for each in distances(truth, noisy)]
    wrong_places = [place for place, (x, y) in enumerate(zip(distances(truth, got), noise, strict=False)) if x > y]
    errors: dict[str, tuple[float, float]] = {}
    for name in ours.keys() & theirs.keys():
        if ours[name].shape == theirs[name].shape:
            allowed = MARGIN * max(distance(ours[name], shaken[name]), FLOOR)
            errors[name] = _apart(ours[name], theirs[name], allowed), allowed
    parted = {name for name, (error, allowed) in errors.items() if error > allowed}
    (results,) = b.graph.output_node().args
    tensors = [node for node in results if isinstance(node, Node)]  # type: ignore[union-attr]
    wrong = _back([tensors[place] for place in wrong_places], parted, errors)
    first = next((node for node in b.graph.nodes if node in wrong and node.name in parted), None)
    if first is None:
        return None
    new = [node.name for node in b.graph.nodes if node in _unknown_behind(first, errors)]
    site = b.site(first)
    return Parting(first.name, str(first.target), str(site), site.source or "", *errors[first.name], tuple(new))


def _values(program: Program, flat: Sequence[Any], nudge: float | None = None) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Every value by the name of its node, and the outputs."""
    values: dict[str, Tensor] = {}

    def keep(node: Node, value: Any) -> Any:
        if isinstance(value, Tensor):
            values[node.name] = value.clone()  # a later call may write into it
        return value

    outputs = run(program, flat, wide=True, weights=None if nudge is None else nudged(nudge), through=keep)
    return values, outputs[: sum(s.kind.name == "USER_OUTPUT" for s in program.exported.graph_signature.output_specs)]


def _apart(a: Tensor, b: Tensor, allowed: float) -> float:
    error = distance(a, b)
    if error <= allowed or not a.is_floating_point() or not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return error
    gap, scale = a - b, float(a.abs().max()) or 1.0
    axes = [axis for axis in range(a.dim()) if a.shape[axis] > 1]
    without_mean = [float((gap - gap.mean(axis, keepdim=True)).abs().max()) / scale for axis in axes]
    return min([error, *without_mean])


def _back(outputs: Sequence[Node], parted: set[str], known: dict[str, Any]) -> set[Node]:
    """Every node from which an output is reached through values that differ, or that only one program has."""
    seen: set[Node] = set()
    todo = [node for node in outputs if node.name in parted or node.name not in known]
    while todo:
        node = todo.pop()
        if node not in seen and node.op == "call_function":
            seen.add(node)
            todo += [each for each in node.all_input_nodes if each.name in parted or each.name not in known]
    return seen


def _unknown_behind(node: Node, known: dict[str, Any]) -> set[Node]:
    found: set[Node] = set()
    todo = list(node.all_input_nodes)
    while todo:
        each = todo.pop()
        if each not in found and each.op == "call_function" and each.name not in known:
            found.add(each)
            todo += each.all_input_nodes
    return found
