"""What is proven of a program's values: one loop forward, one loop backward, over the table of `normfuse.graph.ops.lookup`.

facts.unseen[node]      axes along which no reader can see the mean of this value
facts.centered[node]    axes along which the mean of this value is zero by construction
facts.norms             every norm that may be rewritten, hand-written ones included
facts.norms_in_bodies   norms in what control flow runs, which are counted and stay
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.fx import Node

from normfuse.analysis.choice import EVERYTHING, Choice
from normfuse.analysis.norms import norms_of
from normfuse.graph.bodies import Body, bodies
from normfuse.graph.nodes import computed_from
from normfuse.graph.ops.lookup import carries, hides, is_mean_of, rank
from normfuse.graph.program import Program
from normfuse.graph.views import Norm, NormKind, arguments, aten, dtype, tensors_in

NOTHING: frozenset[int] = frozenset()
CENTRING = (NormKind.LAYER_NORM, NormKind.STD_NORM)
"""Kinds of norms that take the mean away."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # a float8 weight cannot hold its changed self


@dataclass(frozen=True)
class Facts:
    """Facts of one program; `analyze` makes them.

    Attributes:
        program: the program.
        in_place: whether what is planned is for modules, whose classes have tensors of their own and no room for others.
        choice: the norms that may be rewritten.
        variance_of: the largest variance that a LayerNorm met on data, None where that is above its eps; itself None where
            nothing was measured.
    """

    program: Program
    in_place: bool = False
    choice: Choice = EVERYTHING
    variance_of: Callable[[Norm], float | None] | None = None

    @cached_property
    def every_norm(self) -> tuple[Norm, ...]:
        """Every norm of the program in execution order."""
        return norms_of(self.program)

    @cached_property
    def norms(self) -> tuple[Norm, ...]:
        """The norms that may be rewritten, in execution order: all of them, or those that were chosen."""
        return tuple(norm for norm in self.every_norm if self.takes(norm.out))

    @cached_property
    def kept(self) -> frozenset[Node]:
        """The calls of the norms that are not chosen, and the stored tensors that they read."""
        held = {node for norm in self.every_norm if not self.takes(norm.out) for node in norm.inner}
        read = (each for node in held for each in node.all_input_nodes if each in self.constant)
        return frozenset((*held, *computed_from(*read)))

    def takes(self, node: Node) -> bool:
        """Whether a call is at a place that may be rewritten."""
        return not self.choice or self.choice.why_kept(self.program.site(node)) is None

    @cached_property
    def norms_in_bodies(self) -> tuple[tuple[Body, Norm], ...]:
        """Every norm inside a body (a branch of `torch.cond`, a step of a scan): counted, and never rewritten."""
        return tuple((body, norm) for body in bodies(self.program) for norm in norms_of(body))

    @property
    def kinds(self) -> Counter[str]:
        """How many norms of each kind there are, in bodies too."""
        return Counter(norm.kind for norm in (*self.every_norm, *(norm for _, norm in self.norms_in_bodies)))

    @cached_property
    def norm_at(self) -> dict[Node, Norm]:
        """The norm that a node is part of."""
        return {node: norm for norm in self.every_norm for node in norm.inner}

    def hidden_by(self, reader: Node, value: Node) -> frozenset[int]:
        """Axes of ``value`` along which ``reader`` itself cannot see a shift."""
        norm = self.norm_at.get(reader)
        if norm is not None and norm.x is value and norm.by_hand:
            return frozenset(norm.axes) if norm.kind in CENTRING else NOTHING
        return hides(reader, value) | _less_its_mean(reader, value)

    @cached_property
    def unseen(self) -> dict[Node, frozenset[int]]:
        """Backward: axes along which no reader, however far, can see the mean of a value."""
        unseen: dict[Node, frozenset[int]] = {}
        for node in reversed(self.program.graph.nodes):
            if node.op == "output":
                continue
            axes = frozenset(range(max(rank(node), 1)))
            for reader in node.users:
                if not axes:
                    break
                axes &= self._blind(reader, node, unseen)
            unseen[node] = axes
        return unseen

    def _blind(self, reader: Node, value: Node, unseen: Mapping[Node, frozenset[int]]) -> frozenset[int]:
        """Axes of ``value`` whose mean neither ``reader`` nor anybody behind it sees."""
        return self.hidden_by(reader, value) | self._passed_on(reader, value, unseen.get(reader, NOTHING))

    def first_sight(self, value: Node, axis: int) -> Node | None:
        """A reader, near or far, that sees the mean of ``value`` along ``axis``; None when nobody does."""
        return self._witnesses.get((value, axis))

    @cached_property
    def _witnesses(self) -> dict[tuple[Node, int], Node]:
        """For every seen axis of every value a reader that sees it; one at hand rather than one further on."""
        witness: dict[tuple[Node, int], Node] = {}
        for node in reversed(self.program.graph.nodes):
            for axis in range(max(rank(node), 1)) if node.op != "output" else ():
                for reader in node.users:
                    if axis in self.unseen[node] or axis in self._blind(reader, node, self.unseen):
                        continue
                    onward = (out for out in range(rank(reader)) if (node, axis) in (carries(reader, out) or ()))
                    further = next((witness[reader, out] for out in onward if (reader, out) in witness), None)
                    if further is None or (node, axis) not in witness:
                        witness[node, axis] = further or reader
        return witness

    def _passed_on(self, reader: Node, value: Node, unseen: frozenset[int]) -> frozenset[int]:
        """Axes of ``value`` that ``reader`` only carries to axes of its own that are unseen."""
        axes = set()
        occurrences = sum(1 for each in tensors_in((reader.args, reader.kwargs)) if each is value)
        for out_axis in unseen:
            carried = Counter(axis for operand, axis in carries(reader, out_axis) or () if operand is value)
            # the operand must not also enter where it is not carried, as in matmul(x, x)
            axes |= {axis for axis, times in carried.items() if times == occurrences}
        return frozenset(axes)

    @cached_property
    def centered(self) -> dict[Node, frozenset[int]]:
        """Forward: axes along which the mean of a value is zero whatever the weights are."""
        return self.centered_with(lambda node: ())

    def centered_with(self, known: Callable[[Node], Iterable[int]]) -> dict[Node, frozenset[int]]:
        """Forward: axes along which the mean of a value is zero, given what the caller knows besides.

        Args:
            known: axes along which a value is known to have zero mean, such as a stored tensor that a pass has centred.
        """
        centered: dict[Node, frozenset[int]] = {}
        for node in self.program.graph.nodes:
            axes = set(known(node))
            for axis in range(rank(node)):
                carried = carries(node, axis)
                if carried is not None and all(own in centered[operand] for operand, own in carried):
                    axes.add(axis)
            norm = self.norm_at.get(node)
            if norm is not None and norm.out is node and norm.kind in CENTRING and norm.gain is norm.shift is None:
                axes |= set(norm.axes) if len(norm.axes) == 1 else set()  # over several, only their joint mean is zero
            centered[node] = frozenset(axes)
        return centered

    def editable(self, node: Node) -> bool:
        """Whether a node is a stored tensor that may get another value: in an ordinary float, and never updated."""
        name = self.program.stored.get(node.name)
        return name is not None and name not in self.program.written and dtype(node) in FLOATS

    @property
    def constant(self) -> frozenset[Node]:
        """Forward: values that depend on stored tensors alone."""
        return self.program.constant


def _less_its_mean(reader: Node, value: Node) -> frozenset[int]:
    """Axes along which ``reader`` is x - mean x of the value, or the mean in it that nobody else reads: both move together."""
    if reader.target is aten.sub.Tensor:
        a = arguments(reader)
        axes = range(rank(value)) if a["self"] is value and a["alpha"] == 1 else ()
        return frozenset(axis for axis in axes if is_mean_of(a["other"], value, axis))
    if reader.target is not aten.mean.dim or not reader.users:
        return NOTHING
    return frozenset.intersection(
        *(_less_its_mean(user, value) if _is_less(user, reader) else NOTHING for user in reader.users)
    )


def _is_less(node: Node, mean: Node) -> bool:
    return node.target is aten.sub.Tensor and arguments(node)["other"] is mean is not arguments(node)["self"]


def analyze(
    program: Program,
    *,
    in_place: bool = False,
    choice: Choice = EVERYTHING,
    variance_of: Callable[[Norm], float | None] | None = None,
) -> Facts:
    """The facts of a program, each computed when it is first asked for; the other arguments as in `Facts`."""
    return Facts(program, in_place, choice, variance_of)


def norm_counts(program: Program) -> dict[str, int]:
    """How many norms of each kind a program has."""
    return dict(analyze(program).kinds)
