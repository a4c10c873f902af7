"""Fold a mean-subtraction that the model has, x - mean x along one axis, into what reads it or into what writes it.

Centring is a linear map, C₀ = I - 11ᵀ/d, so a linear layer that reads C₀x can do it in its own weight: W(C₀x) = (WC₀)x. Where
some reader is no linear layer, the writers of x may be centred instead, by the machinery of `normfuse.transforms.zero_mean`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch.fx import Node

from normfuse.analysis.affine import constant_formula
from normfuse.analysis.facts import Facts
from normfuse.analysis.obstacles import Obstacle, Why
from normfuse.graph.ops.lookup import is_mean_of, rank, reads_entries, times_read
from normfuse.graph.views import Norm, NormKind, arguments, aten, shape
from normfuse.transforms.draft import Absorbed, Draft, channel, is_transposed
from normfuse.transforms.forward import Forward, Pending
from normfuse.transforms.maps import Map
from normfuse.transforms.zero_mean import ZERO_MEAN


@dataclass(frozen=True)
class MeanSubtraction:
    """An explicit mean-subtraction.

    Attributes:
        out: the node that yields x - mean x.
        x: the value.
        axis: the axis of the mean.
        inner: the nodes that make it up.
    """

    out: Node
    x: Node
    axis: int
    inner: frozenset[Node]


def centrings(facts: Facts) -> tuple[MeanSubtraction, ...]:
    """Every mean-subtraction of a program that is no part of a norm, in execution order."""
    found = []
    for node in facts.program.graph.nodes:
        if node.target is aten.sub.Tensor and node not in facts.norm_at and node not in facts.constant:
            a = arguments(node)
            x, mean = a["self"], a["other"]
            axis = next((own for own in range(rank(node)) if a["alpha"] == 1 and is_mean_of(mean, x, own)), None)
            if axis is not None and isinstance(shape(x)[axis], int) and times_read(mean) == 1:
                found.append(MeanSubtraction(node, x, axis, frozenset({node, mean})))
    return tuple(found)


@dataclass(frozen=True)
class Blind(Facts):
    """Facts of a program in which mean-subtractions count as LayerNorms: they do not see the mean of what they read."""

    centrings: tuple[MeanSubtraction, ...] = ()

    @cached_property
    def every_norm(self) -> tuple[Norm, ...]:
        """The program's norms, and its mean-subtractions as if each were a LayerNorm of unit deviation."""
        return (*Facts(self.program).every_norm, *map(as_norm, self.centrings))


def as_norm(each: MeanSubtraction) -> Norm:
    """A mean-subtraction as `normfuse.transforms.zero_mean` takes its wishes."""
    return Norm(each.out, NormKind.LAYER_NORM, each.x, (each.axis,), None, None, 0.0, each.inner)


def into_weights(facts: Facts, each: MeanSubtraction) -> Absorbed | Obstacle:
    """The centring folded into the weights of all layers that read it, however far.

    Args:
        facts: of the program.
        each: the mean-subtraction; afterwards its readers are to read x.
    """
    if not any(reads_entries(reader) for reader in each.out.users):
        return Obstacle(Why.READ_BY_NOBODY, each.out)
    walk = _Take(facts)
    stopped = walk.run(each.out, Pending((each.axis,), ZERO_MEAN))
    return stopped or Absorbed(tuple(walk.draft.edits), frozenset(walk.draft.nodes | walk.met))


class _Take(Forward):
    """Layers and products take a change of basis up in weights of their own; nothing is compensated."""

    JOINS = Why.NO_LAYER

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self.draft = Draft(facts)

    def layer(self, node: Node, a: dict[str, Any], pending: Pending) -> Obstacle | None:
        if rank(a["weight"]) < 2 or pending.axis != channel(node, a["input"]) or a.get("groups", 1) != 1:
            return Obstacle(Why.MIXES_OTHER_MEANS, node)
        return self._take(a["weight"], 0 if is_transposed(node) else 1, pending.map)

    def product(self, node: Node, a: dict[str, Any], value: Node, weight: Node, pending: Pending) -> Obstacle | None:
        if rank(weight) != 2 or pending.axis != rank(value) - 1:
            return Obstacle(Why.NO_WEIGHT_OF_ITS_OWN, node)
        return self._take(weight, 0, pending.map)

    def _take(self, weight: Node, dim: int, pending: Map) -> Obstacle | None:
        if constant_formula(self.facts, weight) is None:
            return Obstacle(Why.NO_STORED_WEIGHT, weight)
        return self.draft.change(weight, lambda own: pending.read(own, dim, shape(weight)[dim]))


def blind(facts: Facts, chosen: Iterable[MeanSubtraction]) -> Blind:
    """The facts of a program in which these mean-subtractions do not see what they take away."""
    return Blind(facts.program, centrings=tuple(chosen))
