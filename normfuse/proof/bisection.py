"""Where two programs part: the first value that differs for a reason of its own.

A rewrite changes values on purpose, and most of the graph may differ in two equal programs: a stream that has lost its
mean, a convolution that has taken over a norm's scale. Such a difference heals: no path from it reaches an output
without passing a value that agrees again. So the search goes back from the outputs that differ, through values that
differ, and ends where all that a value was computed from agrees. A value that differs only by its mean along an axis as long
as a LayerNorm counts as agreeing, since that is what Pre-RMSNorm removes; not so where the graphs are the same and only stored
tensors differ, nor in a file, which holds what one program says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from normfuse.analysis.facts import analyze
from normfuse.graph.interpreter import NARROW, run
from normfuse.graph.program import Program
from normfuse.graph.views import NormKind, shape
from normfuse.proof.agreement import FLOOR
from normfuse.proof.differences import distance, distances
from normfuse.proof.evidence import MARGIN
from normfuse.proof.noise import nudged, rounding_of


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
        tensors: stored tensors that it reads and that are others in the second program.
    """

    node: str
    op: str
    site: str
    source: str
    error: float
    allowed: float
    only_in_b: tuple[str, ...]
    tensors: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f"{self.site} ({self.source})" if self.source else self.site
        text = f"they part at {self.node}, {self.op} of {where}: values differ by {self.error:.1e} (relative)"
        text += f", where noise explains {self.allowed:.1e}"
        if self.tensors:
            text += f"; it reads other values of {', '.join(self.tensors)}"
        if self.only_in_b:
            text += f"; new in the second model just before it: {', '.join(self.only_in_b)}"
        return text

    def to_dict(self) -> dict[str, Any]:
        """The parting as JSON types."""
        return {**asdict(self), "only_in_b": list(self.only_in_b), "tensors": list(self.tensors)}


def bisect(a: Program, b: Program, flat: Sequence[Any]) -> Parting | None:
    """The first node where the two part on these inputs, both in float64; None where their outputs agree.

    Programs are compared by the names of their nodes, which a rewrite keeps. All values are held in memory at once.

    Args:
        a: the reference.
        b: the other; it takes the same flat inputs.
        flat: the inputs, as `normfuse.graph.interpreter.flat_inputs` gives them.
    """
    centred = set() if _same_graph(a, b) else _widths(a)
    found = _parting(b, _Reference.of(a, flat), *_values(b, flat), centred)
    return found and replace(found, tensors=tuple(_differing(a, b, b.nodes[found.node])))


def bisect_file(a: Program, names: Sequence[str], values: Sequence[Tensor], flat: Sequence[Any]) -> Parting | None:
    """The first node where a file that was written of a program parts from it.

    Args:
        a: the program.
        names: of the file's values, which are those of the program's nodes where it was written of them.
        values: the values on these inputs, and behind them the outputs.
        flat: the inputs.
    """
    theirs = {name: value for name, value in zip(names, values, strict=False) if name in a.nodes}
    return _parting(a, _Reference.of(a, flat, NARROW), theirs, list(values[len(names) :]), set())


@dataclass(frozen=True)
class _Reference:
    """Every value of the reference and its outputs, and the same after one rounding of every weight."""

    ours: dict[str, Tensor]
    truth: list[Tensor]
    shaken: dict[str, Tensor]
    noisy: list[Tensor]

    @classmethod
    def of(cls, program: Program, flat: Sequence[Any], short: Sequence[torch.dtype] = ()) -> _Reference:
        return cls(*_values(program, flat, short=short), *_values(program, flat, rounding_of(program), short=short))


def _parting(
    graph: Program, reference: _Reference, theirs: Mapping[str, Tensor], got: Sequence[Tensor], centred: set[int]
) -> Parting | None:
    """Goes back from the outputs that differ in the graph of either program."""
    noise = [MARGIN * max(each, FLOOR) for each in distances(reference.truth, reference.noisy)]
    apart = zip(distances(reference.truth, got), noise, strict=False)
    wrong_places = [place for place, (x, y) in enumerate(apart) if not x <= y]
    errors: dict[str, tuple[float, float]] = {}
    for name, value in reference.ours.items():
        if name in theirs and value.shape == theirs[name].shape:
            allowed = MARGIN * max(distance(value, reference.shaken[name]), FLOOR)
            errors[name] = _apart(value, theirs[name], allowed, centred), allowed
    parted = {name for name, (error, allowed) in errors.items() if error > allowed}
    (results,) = graph.graph.output_node().args
    tensors = [node for node in results if isinstance(node, Node)]  # type: ignore[union-attr]
    wrong = _behind((tensors[place] for place in wrong_places), lambda node: node.name in parted or node.name not in errors)
    first = next((node for node in graph.graph.nodes if node in wrong and node.name in parted), None)
    if first is None:
        return None
    unknown = _behind(first.all_input_nodes, lambda node: node.name not in errors)
    new = [node.name for node in graph.graph.nodes if node in unknown]
    site = graph.site(first)
    return Parting(first.name, str(first.target), str(site), site.source or "", *errors[first.name], tuple(new))


def _same_graph(a: Program, b: Program) -> bool:
    """Whether only stored tensors can differ."""
    ours, theirs = ([(node.op, node.name, str(node.target), str(node.args)) for node in each.graph.nodes] for each in (a, b))
    return ours == theirs


def _widths(program: Program) -> set[int]:
    """How long the axes are whose mean a LayerNorm takes away."""
    norms = [norm for norm in analyze(program).norms if norm.kind == NormKind.LAYER_NORM]
    sizes = (shape(norm.x)[axis] for norm in norms for axis in norm.axes)
    return {size for size in sizes if isinstance(size, int)}


def _differing(a: Program, b: Program, node: Node) -> Iterator[str]:
    """Stored tensors that a node reads and that are others in the two."""
    for each in node.all_input_nodes:
        name, other = b.stored.get(each.name), a.stored.get(each.name)
        if name is not None and other is not None:
            ours, theirs = a.tensor(other), b.tensor(name)
            if ours.shape != theirs.shape or not torch.equal(ours, theirs.to(ours.dtype)):
                yield name


def _values(
    program: Program, flat: Sequence[Any], nudge: float | None = None, short: Sequence[torch.dtype] = ()
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Every value by the name of its node, and the outputs."""
    values: dict[str, Tensor] = {}

    def keep(node: Node, value: Any) -> Any:
        if isinstance(value, Tensor):
            values[node.name] = value.clone()  # a later call may write into it
        return value

    outputs = run(program, flat, wide=True, short=short, weights=None if nudge is None else nudged(nudge), through=keep)
    return values, outputs[: sum(s.kind.name == "USER_OUTPUT" for s in program.exported.graph_signature.output_specs)]


def _apart(a: Tensor, b: Tensor, allowed: float, centred: set[int]) -> float:
    error = distance(a, b)
    if error <= allowed or not a.is_floating_point() or not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return error
    gap, scale = a - b, float(a.abs().max()) or 1.0
    axes = [axis for axis in range(a.dim()) if a.shape[axis] > 1 and a.shape[axis] in centred]
    without_mean = [float((gap - gap.mean(axis, keepdim=True)).abs().max()) / scale for axis in axes]
    return min([error, *without_mean])


def _behind(nodes: Iterable[Node], concerned: Callable[[Node], bool]) -> set[Node]:
    """The calls among some nodes, and among all that they are computed from, as far as these are concerned."""
    found: set[Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found and node.op == "call_function" and concerned(node):
            found.add(node)
            todo += node.all_input_nodes
    return found
