"""A rewrite cut into regions, each of which can be proven by itself.

A *cut* is a value of both programs that is the same in both, or that a rewrite has freed of its mean along an axis on purpose.
Everything between cuts that a rewrite has not touched is the same calls of the same operands, and needs no proof. What is left
are regions: from cuts to one further cut, in the original and in the rewritten program. A region holds if it gives the same
for any values of the cuts that enter it, so cuts are found one behind the other, and all of them together say by induction
that the outputs are the same. Which value may be a cut is guessed on random numbers; only a proof of its region makes it one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from normfuse.graph.interpreter import run
from normfuse.graph.nodes import attribute_of
from normfuse.graph.program import Program, identity
from normfuse.proof.differences import distance, same_bits
from normfuse.proof.segments import Entry, segment

GUESSED = 1e-9
"""Values this near each other, relative to the largest entry, are guessed to be one."""


@dataclass(frozen=True, eq=False)
class Cut:
    """A value of both programs.

    Attributes:
        ours: its node in the original.
        theirs: its node in the rewritten program.
        axis: the axis along which the rewritten program's has lost its mean; None where the two are one.
        region: what proves it; None where it is the same call of the same operands.
    """

    ours: Node
    theirs: Node
    axis: int | None = None
    region: Region | None = None


@dataclass(frozen=True, eq=False)
class Region:
    """What computes a value from cuts, in both programs.

    Attributes:
        ours: the value's node in the original.
        theirs: in the rewritten program.
        cuts: what enters, in the order of the original.
        calls: the calls in between, in the original and in the rewritten program, tensors that they read among them.
    """

    ours: Node
    theirs: Node
    cuts: tuple[Cut, ...]
    calls: tuple[frozenset[Node], frozenset[Node]]

    def programs(self, original: Program, rewritten: Program, axis: int | None) -> tuple[Program, Program]:
        """Both as programs of the cuts, whose values are those of the original.

        Args:
            original: the original.
            rewritten: the rewritten program.
            axis: the axis along which the rewritten value is to have lost its mean.
        """
        ours = [Entry(cut.ours.name, cut.ours, None) for cut in self.cuts]
        theirs = [Entry(cut.ours.name, cut.theirs, cut.axis) for cut in self.cuts]
        return (
            segment(original, self.calls[0], ours, self.ours, axis),
            segment(rewritten, self.calls[1], theirs, self.theirs, None),
        )


Values = Callable[[Sequence[Node]], Sequence[Any]]
"""Random values for nodes of the original."""


@dataclass
class Search:
    """Finds cuts and regions of two programs.

    Attributes:
        original: the original.
        rewritten: the rewritten program, whose nodes are called as the original's.
        values: gives random values for nodes of the original, or those of a run where they are no floats.
        sunk: names of nodes of the rewritten program that no region begins at, whatever they are.
        refused: of those that no region ends at.
    """

    original: Program
    rewritten: Program
    values: Values
    sunk: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    cuts: dict[Node, Cut] = field(default_factory=dict)
    _ours: dict[Node, Cut] = field(default_factory=dict)
    _guessed: dict[Any, tuple[bool, int | None]] = field(default_factory=dict)

    def outputs(self) -> list[Cut | Region]:
        """For each output the cut that it is; the region behind the last cuts where it is none."""
        self.cuts, self._ours = {}, {}
        for node in self.rewritten.graph.nodes:
            partner = self._partners.get(node)
            if partner is not None and (cut := self._cut(partner, node)):
                self.cuts[node], self._ours[partner] = cut, cut
        return [self._output(*pair) for pair in zip(*map(_outputs, (self.original, self.rewritten)), strict=True)]

    def needed(self, found: Sequence[Cut]) -> list[Cut]:
        """The cuts with a region that some cuts rest on, in their order."""
        seen: set[tuple[Node, Node]] = set()
        needed: list[Cut] = []
        waiting = list(found)
        while waiting:
            cut = waiting.pop()
            if (cut.ours, cut.theirs) in seen:  # two outputs may have become one
                continue
            seen.add((cut.ours, cut.theirs))
            needed += [cut] if cut.region else []
            waiting += cut.region.cuts if cut.region else [self.cuts[each] for each in cut.theirs.all_input_nodes]
        return sorted(needed, key=lambda cut: self._order[cut.theirs])

    def first_open(self, outputs: Sequence[Node]) -> Node:
        """The first node that no cut is between and outputs."""
        inside: set[Node] = set()
        waiting = list(outputs)
        while waiting:
            node = waiting.pop()
            if node not in inside and node.op == "call_function" and (node in outputs or node not in self.cuts):
                inside.add(node)
                waiting += node.all_input_nodes
        return min(inside, key=self._order.__getitem__)

    def grow(self, node: Node, depth: int) -> bool:
        """Let a region take in what its value is computed of and what is computed of it, so many calls deep; whether it did."""
        before = len(self.sunk), len(self.refused)
        self.sunk |= {each.name for each in _within(node, depth, lambda node: node.all_input_nodes)}
        self.refused |= {node.name, *(each.name for each in _within(node, depth, lambda node: list(node.users)))}
        return (len(self.sunk), len(self.refused)) != before

    # -- pairs ---------------------------------------------------------------------------------------------------------

    @cached_property
    def _order(self) -> dict[Node, int]:
        return {node: place for program in (self.original, self.rewritten) for place, node in enumerate(program.graph.nodes)}

    @cached_property
    def _partners(self) -> dict[Node, Node]:
        """Node of the rewritten program -> that of the original of the same name, or that it stands for."""
        partners: dict[Node, Node] = {}
        for node in self.rewritten.graph.nodes:
            ours = self.original.nodes.get(node.name)
            if ours is not None and ours.op == node.op:
                partners[node] = ours
        taken = set(partners.values())
        stand_ins = {str(each.meta["stands_for"]): each for each in self.rewritten.graph.nodes if "stands_for" in each.meta}
        for name, node in stand_ins.items():
            ours = self.original.nodes.get(name)
            if ours is not None and ours not in taken and node not in partners:
                partners[node] = ours
        return partners

    def _cut(self, ours: Node, theirs: Node) -> Cut | None:
        if theirs.op == "output":
            return None
        if theirs.op == "placeholder":
            return Cut(ours, theirs) if self._same_placeholder(ours, theirs) else None
        if self._same_call(ours, theirs):
            return Cut(ours, theirs)
        values = (ours.meta.get("val"), theirs.meta.get("val"))
        if theirs.name in self.refused or not all(isinstance(each, Tensor) for each in values):
            return None
        region = self._region(ours, theirs)
        found, axis = self._guess(region)
        return Cut(ours, theirs, axis, region) if found else None

    def _same_placeholder(self, ours: Node, theirs: Node) -> bool:
        name, other = self.original.stored.get(ours.name), self.rewritten.stored.get(theirs.name)
        if name is None or other is None:
            return name is other
        same_formula = self.original.formulas.get(name) == self.rewritten.formulas.get(name)
        return name == other and same_formula and identity(self.original.tensor(name)) == identity(self.rewritten.tensor(name))

    def _same_call(self, ours: Node, theirs: Node) -> bool:
        """Whether both call the same on operands that are the same."""
        if theirs.op == "get_attr":
            return _same_attribute(ours, theirs)
        if ours.target is not theirs.target or ours.op != theirs.op:
            return False
        mine, other = ours.all_input_nodes, theirs.all_input_nodes
        if len(mine) != len(other):
            return False
        if not all((cut := self.cuts.get(b)) and cut.ours is a and cut.axis is None for a, b in zip(mine, other, strict=True)):
            return False
        names = {b: a for a, b in zip(mine, other, strict=True)}
        return bool(torch.fx.node.map_arg((theirs.args, theirs.kwargs), names.__getitem__) == (ours.args, ours.kwargs))

    def _output(self, ours: Any, theirs: Any) -> Cut | Region:
        if not isinstance(ours, Node) or not isinstance(theirs, Node):
            raise ValueError("an output that is no value")
        cut = self.cuts.get(theirs)
        if cut is not None and cut.ours is ours and cut.axis is None:
            return cut
        region = self._region(ours, theirs)
        found, axis = self._guess(region)
        return Cut(ours, theirs, None, region) if found and axis is None else region

    # -- regions -------------------------------------------------------------------------------------------------------

    def _region(self, ours: Node, theirs: Node) -> Region:
        mine, entering = self._behind(ours, self._ours)
        other, entered = self._behind(theirs, self.cuts)
        cuts = {cut.ours: cut for cut in (*entering, *entered)}
        return Region(ours, theirs, tuple(sorted(cuts.values(), key=lambda cut: self._order[cut.ours])), (mine, other))

    def _behind(self, node: Node, cuts: Mapping[Node, Cut]) -> tuple[frozenset[Node], list[Cut]]:
        """What computes a node from cuts, and these."""
        inside, entering = {node}, dict[Node, Cut]()
        waiting = list(node.all_input_nodes)
        while waiting:
            each = waiting.pop()
            if each in inside or each in entering:
                continue
            if (cut := cuts.get(each)) and self._enters(cut):
                entering[each] = cut
            else:
                inside.add(each)
                waiting += each.all_input_nodes
        return frozenset(inside), list(entering.values())

    def _enters(self, cut: Cut) -> bool:
        """Whether a cut is where a region ends: an input, or a value that is not to be inside."""
        if cut.theirs.op == "placeholder":
            return cut.theirs.name not in self.rewritten.stored
        is_value = cut.theirs.op == "call_function" and not isinstance(cut.ours.meta.get("val"), (tuple, list))
        return is_value and cut.theirs.name not in self.sunk

    def _guess(self, region: Region) -> tuple[bool, int | None]:
        """Whether a region's values are one on random numbers, or but for the mean along an axis."""
        key = (region.ours, region.theirs, tuple((cut.ours, cut.axis) for cut in region.cuts))
        if key not in self._guessed:
            self._guessed[key] = self._tried(region)
        return self._guessed[key]

    def _tried(self, region: Region) -> tuple[bool, int | None]:
        try:
            flat = self.values([cut.ours for cut in region.cuts])
            (ours,), (theirs,) = (run(each, flat, wide=True) for each in region.programs(self.original, self.rewritten, None))
        except Exception:  # operators refuse numbers that they cannot compute with
            return False, None
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return False, None
        if not ours.is_floating_point():
            return same_bits(ours, theirs), None
        if distance(ours, theirs) <= GUESSED:
            return True, None
        axes = (axis for axis in reversed(range(ours.dim())) if ours.shape[axis] > 1)
        axis = next((each for each in axes if distance(ours - ours.mean(each, keepdim=True), theirs) <= GUESSED), None)
        return axis is not None, axis


def _within(node: Node, depth: int, beside: Callable[[Node], Sequence[Node]]) -> set[Node]:
    """The calls that are so many steps away from a node at most."""
    seen, level = set[Node](), {node}
    while level and depth > 0:
        level = {each for known in level for each in beside(known) if each.op == "call_function"} - seen
        seen |= level
        depth -= 1
    return seen


def _same_attribute(ours: Node, theirs: Node) -> bool:
    one, other = attribute_of(ours), attribute_of(theirs)
    if one is other:
        return True
    graphs = isinstance(one, torch.fx.GraphModule) and isinstance(other, torch.fx.GraphModule)
    return graphs and str(one.graph) == str(other.graph)


def _outputs(program: Program) -> Iterator[Any]:
    (results,) = program.graph.output_node().args
    return (each for each in results if isinstance(each, Node))  # type: ignore[union-attr]
