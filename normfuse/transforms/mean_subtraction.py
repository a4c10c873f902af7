"""Fold an explicit mean-subtraction, x - mean x along one axis, into what reads it or into what writes it.

Centring is a linear map, C₀ = I - 11ᵀ/d, so a linear layer that reads C₀x can do it in its own weight: W(C₀x) = (WC₀)x. Where
some reader is no linear layer, the writers of x may be centred instead, by the machinery of `normfuse.transforms.zero_mean`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.fx import Node

from normfuse.analysis.affine import constant_formula
from normfuse.analysis.facts import Facts
from normfuse.graph.formula import Centered
from normfuse.graph.ops.carrying import METADATA, carries, is_mean_of, rank, times_read
from normfuse.graph.views import Norm, arguments, aten, shape, tensors_in
from normfuse.transforms.draft import LAYERS, Absorbed, Draft, Obstacle, channel, is_transposed
from normfuse.transforms.into_readers import PRODUCTS


@dataclass(frozen=True)
class Centring:
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


def centrings(facts: Facts) -> tuple[Centring, ...]:
    """Every mean-subtraction of a program that is no part of a norm, in execution order."""
    found = []
    for node in facts.program.graph.nodes:
        if node.target is aten.sub.Tensor and node not in facts.norm_at and node not in facts.constant:
            a = arguments(node)
            x, mean = a["self"], a["other"]
            axis = next((own for own in range(rank(node)) if a["alpha"] == 1 and is_mean_of(mean, x, own)), None)
            if axis is not None and isinstance(shape(x)[axis], int) and times_read(mean) == 1:
                found.append(Centring(node, x, axis, frozenset({node, mean})))
    return tuple(found)


@dataclass(frozen=True)
class Blind(Facts):
    """Facts of a program in which mean-subtractions count as LayerNorms: they do not see the mean of what they read."""

    centrings: tuple[Centring, ...] = ()

    @cached_property
    def norms(self) -> tuple[Norm, ...]:
        """The program's norms, and its mean-subtractions as if each were a LayerNorm of unit deviation."""
        return (*Facts(self.program).norms, *map(as_norm, self.centrings))


def as_norm(each: Centring) -> Norm:
    """A mean-subtraction as `normfuse.transforms.zero_mean` takes its wishes."""
    return Norm(each.out, "layer_norm", each.x, (each.axis,), None, None, 0.0, each.inner)


def into_weights(facts: Facts, each: Centring) -> Absorbed | Obstacle:
    """The centring folded into the weights of all layers that read it, however far.

    Args:
        facts: of the program.
        each: the mean-subtraction; afterwards its readers are to read x.
    """
    draft = Draft(facts)
    frontier = [(each.out, each.axis)]
    for value, axis in frontier:
        readers = [reader for reader in value.users if reader.target not in METADATA]
        if not readers:
            return Obstacle(value, "is read by nobody")
        for reader in readers:
            draft.nodes.add(reader)
            stopped = _settle(draft, reader, value, axis, frontier)
            if stopped is not None:
                return stopped
    return Absorbed(tuple(draft.edits), frozenset(draft.nodes))


def _settle(draft: Draft, reader: Node, value: Node, axis: int, frontier: list[tuple[Node, int]]) -> Obstacle | None:
    """Centre the weight of a layer, or go on behind a view; what is in the way otherwise."""
    if reader.op == "call_function" and isinstance(reader.target, torch._ops.OpOverload):
        a = arguments(reader)
        occurs = sum(each is value for each in tensors_in((reader.args, reader.kwargs)))
        if occurs == 1 and reader.target in LAYERS and a["input"] is value and rank(a["weight"]) > 1:
            if axis != channel(reader, value) or a.get("groups", 1) != 1:
                return Obstacle(reader, "mixes other channels than those of the mean")
            return _centre(draft, a["weight"], 0 if is_transposed(reader) else 1)
        if occurs == 1 and reader.target in PRODUCTS and a[PRODUCTS[reader.target][0]] is value:
            weight = a[PRODUCTS[reader.target][1]]
            if rank(weight) != 2 or axis != rank(value) - 1:
                return Obstacle(reader, "multiplies by what is not a weight of its own")
            return _centre(draft, weight, 0)
    onward = [own for own in range(rank(reader)) if carries(reader, own) == ((value, axis),)]
    if len(onward) != 1 or reader.op == "output":
        return Obstacle(reader, "is no linear layer")
    frontier.append((reader, onward[0]))
    return None


def _centre(draft: Draft, weight: Node, dim: int) -> Obstacle | None:
    if constant_formula(draft.facts, weight) is None:
        return Obstacle(weight, "is no stored weight")
    return draft.change(weight, lambda own: Centered(own, dim))


def blind(facts: Facts, chosen: Iterable[Centring]) -> Blind:
    """The facts of a program in which these mean-subtractions do not see what they take away."""
    return Blind(facts.program, centrings=tuple(chosen))
