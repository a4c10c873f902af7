"""Give values zero mean: the edits that do it and what they cost, or what stands in the way.

`center` answers for many values at once: "which of these norms can have an input of zero mean, and at what price?" From
each norm's input it walks back over `carries`. The walk ends well at stored tensors whose mean nobody sees
(they are centred for free) and at values that are centred by construction; it is stuck at anything else. A stuck walk can
still be paid for: one explicit mean-subtraction on any value between the obstacle and the norms. Which payments are worth
it is a minimum cut: every path from an obstacle to a norm must be cut, either by a payment (price: just over one norm) or by
giving up that norm. So a payment is made only where it serves at least two norms.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import networkx as nx
import torch
from torch.fx import Node

from normfuse.analysis.facts import Facts
from normfuse.analysis.obstacles import Obstacle, Why
from normfuse.graph.edits import Edit, Reroute, SetTensor
from normfuse.graph.expressions import FLOAT32, Call, Formula, Read, Ref
from normfuse.graph.ops.lookup import carries, keeps, rank, same, same_sizes, spans
from normfuse.graph.ops.row import SAME, Keeps
from normfuse.graph.ops.sizes import says_size
from normfuse.graph.views import Norm, arguments, aten, dtype, shape
from normfuse.transforms.backward import Backward, Key, Step, way_back
from normfuse.transforms.maps import Centring, Map


@dataclass(frozen=True)
class Region:
    """Norms whose inputs get zero mean together, and the edits that do it (the norms themselves not included)."""

    norms: tuple[Norm, ...]
    edits: tuple[Edit, ...]
    nodes: frozenset[Node]
    centered_copies: dict[Key, str]
    """values that stay as they are beside an explicitly centred copy of this name"""


@dataclass(frozen=True)
class CentredRegions:
    """The answer of `center`: regions that are worth it, and for every other norm its nearest obstacle."""

    regions: tuple[Region, ...]
    blocked: tuple[tuple[Norm, Obstacle], ...]


def center(facts: Facts, norms: Iterable[Norm]) -> CentredRegions:
    """Choose the norms whose inputs are given zero mean along their (single) axis, and say how.

    Args:
        facts: of the program.
        norms: the norms that would profit, each over one axis.
    """
    wishes = {norm: (norm.x, norm.axes[0]) for norm in norms}
    walk = _Centre(facts)
    walk.carry(*((key, ZERO_MEAN) for key in wishes.values()))
    steps = walk.steps
    way = nx.DiGraph([(key, operand) for key, step in steps.items() for operand in step.operands])
    way.add_nodes_from(steps)
    kept, paid = _choose(facts, wishes, steps, way)
    regions = tuple(_regions(facts, kept, paid, steps, way))
    blocked = tuple((norm, _nearest(key, steps, way)) for norm, key in wishes.items() if norm not in kept)
    return CentredRegions(regions, blocked)


# -- walking back ------------------------------------------------------------------------------------------------------

ZERO_MEAN = Map(basis=Centring())


class _Centre(Backward):
    """Values centred by construction end it well, and so do stored tensors whose mean nobody sees."""

    def decided(self, node: Node, axis: int, pending: Map) -> Step | None:
        facts = self.facts
        if axis in facts.centered[node]:
            return Step()
        if facts.program.stored.get(node.name) in facts.program.written:
            return Step(obstacle=Obstacle(Why.UPDATED, node))
        if axis not in facts.unseen[node]:
            code, reader = Why.TIED if node.name in facts.program.stored else Why.SEEN, facts.first_sight(node, axis)
            return Step(obstacle=Obstacle(code, node, () if reader is None else (reader,)))
        return None

    def stored(self, node: Node, axis: int, pending: Map) -> Step:
        name = self.facts.program.stored.get(node.name)
        if name is None or not self.facts.editable(node):
            return Step(obstacle=Obstacle(Why.INPUT if name is None else Why.UNCENTRED, node))
        return Step(edits=(SetTensor(name, pending.written(Read(name), axis, shape(node)[axis])),))

    def stuck(self, node: Node, axis: int, pending: Map) -> Step:
        return _scaled(self.facts, node, axis, pending) or Step(obstacle=Obstacle(_in_the_way(self.facts, node), node))


def _scaled(facts: Facts, node: Node, axis: int, pending: Map) -> Step | None:
    """A per-channel scale by a stored vector (LayerScale): folded into the writers behind it, which are then centred."""
    if node.target is not aten.mul.Tensor:
        return None
    a = arguments(node)
    for branch, scale in ((a["self"], a["other"]), (a["other"], a["self"])):
        if not (spans(branch, node, axis) and spans(scale, node, axis)):
            continue
        vector = _vector_behind(facts, scale, axis - (rank(node) - rank(scale)))
        writers = way_back(facts, branch, axis - (rank(node) - rank(branch)), pending)
        if vector is None or writers is None or not same_sizes(branch, node) or dtype(branch) != dtype(node):
            continue
        stored, both = facts.program.stored, replace(pending, scale=Read(vector))
        folds = (
            SetTensor(stored[writer.name], both.written(Read(stored[writer.name]), dim, shape(writer)[dim]))
            for writer, dim in writers
            if writer.op == "placeholder"
        )
        return Step(edits=(*folds, Reroute(node.name, Ref(branch.name))), passed=frozenset(passed for passed, _ in writers))
    return None


def _vector_behind(facts: Facts, node: Node, axis: int) -> str | None:
    """The stored tensor that a value is, up to its shape, if it varies along ``axis`` alone."""
    while keeps(node) in (*SAME, Keeps.EXPAND):
        carried = carries(node, axis)
        if carried is None:
            return None
        ((node, axis),) = carried
    if facts.program.stored.get(node.name) in {None, *facts.program.written}:
        return None
    others = (size for own, size in enumerate(shape(node)) if own != axis)
    return facts.program.stored[node.name] if all(same(size, 1) for size in others) else None


def _in_the_way(facts: Facts, node: Node) -> Why:
    if node.target is aten.cat.default or (keeps(node) is Keeps.RESHAPE and says_size(node)):
        return Why.JOINED
    if node in facts.norm_at:
        return Why.NORM
    return Why.GATE if node.target is aten.mul.Tensor else Why.UNCENTRED


def _nearest(key: Key, steps: dict[Key, Step], way: nx.DiGraph) -> Obstacle:
    """The first obstacle met on the way back from a norm, which is given up only where there is one."""
    met = itertools.chain([key], (operand for _, operand in nx.bfs_edges(way, key)))
    return next(obstacle for each in met if (obstacle := steps[each].obstacle) is not None)


# -- choosing ----------------------------------------------------------------------------------------------------------


def _choose(facts: Facts, wishes: dict[Norm, Key], steps: dict[Key, Step], way: nx.DiGraph) -> tuple[set[Norm], set[Key]]:
    """The norms to convert and the values to centre explicitly: a minimum cut between obstacles and norms."""
    obstacles = [key for key, step in steps.items() if step.obstacle is not None]
    tainted = {key for layer in nx.bfs_layers(way.reverse(copy=False), obstacles) for key in layer}
    if not tainted:
        return set(wishes), set()
    worth = len(steps) + 1  # one norm; a payment costs one more, so that it must serve two norms to pay
    flow = nx.DiGraph()
    flow.add_nodes_from(("obstacles", "norms"))
    for key in tainted:
        step = steps[key]
        if step.obstacle is not None:
            flow.add_edge("obstacles", (key, "is"))
        if _payable(facts, key):
            flow.add_edge((key, "is"), (key, "read"), capacity=worth + 1)
        else:
            flow.add_edge((key, "is"), (key, "read"))
        for operand in step.operands:
            if operand in tainted:
                flow.add_edge((operand, "read"), (key, "is"))
    concerned = {norm: key for norm, key in wishes.items() if key in tainted}
    for norm, key in concerned.items():
        flow.add_edge((key, "read"), norm)
        flow.add_edge(norm, "norms", capacity=worth)
    _, (_, served) = nx.minimum_cut(flow, "obstacles", "norms", flow_func=nx.algorithms.flow.shortest_augmenting_path)
    kept = {norm for norm in wishes if norm not in concerned or norm in served}
    paid = {key for key in tainted if (key, "is") not in served and (key, "read") in served}
    return kept, paid


def _payable(facts: Facts, key: Key) -> bool:
    """Whether an explicit mean-subtraction may stand here: on an activation, never on weights (it would run each call)."""
    node, _ = key
    return dtype(node) is not None and node not in facts.constant


# -- writing it down ---------------------------------------------------------------------------------------------------


def _regions(facts: Facts, kept: set[Norm], paid: set[Key], steps: dict[Key, Step], way: nx.DiGraph) -> Iterator[Region]:
    """Norms that share a centred value belong together."""
    centred = nx.DiGraph(way.out_edges(way.nodes - paid))
    centred.add_edges_from((norm, (norm.x, norm.axes[0])) for norm in kept)
    links = centred.subgraph(key for layer in nx.bfs_layers(centred, kept) for key in layer).to_undirected(as_view=True)
    place = {node: order for order, node in enumerate(facts.program.graph.nodes)}
    for members in sorted(nx.connected_components(links), key=lambda each: min(_places(each, place))):
        norms = tuple(sorted((m for m in members if isinstance(m, Norm)), key=lambda norm: place[norm.out]))
        keys = sorted((m for m in members if not isinstance(m, Norm)), key=lambda key: (place[key[0]], key[1]))
        yield _region(norms, keys, paid, steps)


def _places(members: Iterable[Norm | Key], place: dict[Node, int]) -> Iterator[int]:
    return (place[m.out] if isinstance(m, Norm) else place[m[0]] for m in members)


def _region(norms: tuple[Norm, ...], keys: list[Key], paid: set[Key], steps: dict[Key, Step]) -> Region:
    copies = {key: f"{key[0].name}_centered_{key[1]}" for key in keys if key in paid}
    tensors: dict[str, Formula] = {}
    reroutes: list[Edit] = [_explicit(key, name, keys, paid, steps, norms) for key, name in copies.items()]
    for key in keys:
        if key in paid:
            continue
        for edit in steps[key].edits:
            match edit:
                case SetTensor(name, Call("center", (Read(),), (("dim", dim),))) if name in tensors:
                    tensors[name] = tensors[name].centered(dim)  # along a second axis as well
                case SetTensor(name, formula):
                    tensors[name] = formula
                case Reroute():
                    reroutes.append(edit)
    nodes = {key[0] for key in keys} | {node for norm in norms for node in norm.inner}
    nodes |= {node for key in keys if key not in paid for node in steps[key].passed}
    edits = (*(SetTensor(name, formula) for name, formula in tensors.items()), *dict.fromkeys(reroutes))
    return Region(norms, edits, frozenset(nodes), copies)


def _explicit(key: Key, name: str, keys: list[Key], paid: set[Key], steps: dict[Key, Step], norms: tuple[Norm, ...]) -> Reroute:
    """An explicit mean-subtraction for those readers that want the centred value."""
    node, axis = key
    readers = {reader.name for reader, own in keys if (reader, own) not in paid and key in steps[reader, own].operands}
    readers |= {
        inner.name for norm in norms if (norm.x, norm.axes[0]) == key for inner in norm.inner if node in inner.all_input_nodes
    }
    return Reroute(node.name, _less_its_mean(node, axis), tuple(sorted(readers)), name)


def _less_its_mean(node: Node, axis: int) -> Call:
    x = Ref(node.name)
    if dtype(node) in (torch.float32, torch.float64):
        return x - Call("mean.dim", (x, (axis,), True))
    # a mean that is rounded to half precision would leave a mean behind that RMSNorm sees
    centered = x - Call("mean.dim", (x, (axis,), True), FLOAT32)
    return Call("type_as.default", (centered, x))
