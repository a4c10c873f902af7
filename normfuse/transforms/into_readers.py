"""Fold a channel affine into all that reads a value, however far: the value gives way to its base, and a map goes forward.

Layers take the map up in their weights and biases, another channel affine on the way composes with it and dissolves as well,
and what a sum adds is divided by the scale in what writes that: so the scale of a post-norm stream travels to its head (the
re-basis t = D⁻¹(s - e) of the residual stream).
"""

from __future__ import annotations

from math import prod
from typing import Any

from torch.fx import Node

from normfuse.analysis.affine import Affine, constant_formula, moved
from normfuse.analysis.facts import Facts
from normfuse.analysis.fixed_weights import why_fixed
from normfuse.analysis.obstacles import Obstacle, Why
from normfuse.graph.edits import Reroute
from normfuse.graph.expressions import Call, Formula, evaluate, substitute
from normfuse.graph.ops.lookup import layer, rank, reads_entries, same, times_read, unpadded
from normfuse.graph.program import Program
from normfuse.graph.views import aten, shape
from normfuse.transforms.draft import (
    Absorbed,
    Draft,
    channel,
    full,
    is_transposed,
    per_group,
    sizes_of,
)
from normfuse.transforms.forward import Forward, Pending
from normfuse.transforms.into_writers import axis_of_base, fold
from normfuse.transforms.maps import Map

CONDITION = 1e4
"""How far apart the entries of a scale may be that others are divided by: float32 has digits for twice that."""


def into_readers(facts: Facts, form: Affine, value: Node, others: dict[Node, Affine]) -> Absorbed | Obstacle:
    """Scale and shift of a value folded into all its readers.

    Args:
        facts: of the program.
        form: of the value.
        value: the value.
        others: maximal affine values by node; those that the walk meets dissolve as well.
    """
    if form.axis is None:
        return Obstacle(Why.SCALED_WHOLE, value)
    if not any(reads_entries(reader) for reader in value.users):
        return Obstacle(Why.READ_BY_NOBODY, value)
    walk = _Absorb(facts, {out: other for out, other in others.items() if out is not value})
    obstacle = walk.run(value, Pending((form.axis,), Map(form.scale, form.shift)))
    return obstacle or Absorbed(tuple(walk.draft.edits), frozenset(walk.draft.nodes | walk.met), frozenset(walk.dissolved))


class _Absorb(Forward):
    """All that reads the value takes the map up, or carries it on; what meets it is compensated in what writes that."""

    COMPENSATES = True
    JOINS = Why.JOINS_SCALES

    def __init__(self, facts: Facts, others: dict[Node, Affine]) -> None:
        super().__init__(facts)
        self.draft = Draft(facts)
        self.others: dict[Node, list[tuple[Node, Affine]]] = {}
        for out, form in others.items():
            self.others.setdefault(form.base, []).append((out, form))
        self.dissolved: set[Node] = set()

    def carried(self, value: Node, pending: Pending) -> None:
        """Another affine of a value composes with what is pending, and dissolves."""
        for out, form in self.others.get(value, ()) if len(pending.axes) == 1 else ():
            axis = pending.axis
            if (form.axis in (None, axis) and not form.moves) or axis_of_base(self.facts, form, out) == axis:
                self.met |= form.inner
                self.draft.edits.append(Reroute(out.name, moved(form)))
                self.dissolved.add(out)
                own = axis if form.axis is None else form.axis
                self.carry(out, Pending((own,), pending.map.then(form.scale, form.shift)))

    def compensate(self, operand: Node, axis: int, pending: Map) -> Obstacle | None:
        """What meets the value must be stored as it is: t = (v - shift) / scale, in what writes it."""
        if times_read(operand) != 1:
            return Obstacle(Why.READ_AGAIN, operand)
        if pending.scale is not None and not well_conditioned(self.facts.program, pending.scale):
            return Obstacle(Why.ILL_CONDITIONED, operand, (CONDITION,))
        return fold(self.draft, operand, axis, pending.inverse)

    # -- taking it up --------------------------------------------------------------------------------------------------

    def layer(self, node: Node, a: dict[str, Any], pending: Pending) -> Obstacle | None:
        weight, groups = a["weight"], a.get("groups", 1)
        if rank(weight) < 2 or pending.axis != channel(node, a["input"]):
            return Obstacle(Why.MIXES_OTHERS, node)
        plain = constant_formula(self.facts, weight)
        if plain is None or times_read(weight) != 1:
            no_weight = why_fixed(self.facts, weight) or Obstacle(Why.NO_STORED_WEIGHT, weight)
            return no_weight if plain is None else Obstacle(Why.READ_AGAIN, weight)
        scale, shift, sizes, transposed = pending.map.scale, pending.map.shift, sizes_of(weight), is_transposed(node)
        if scale is not None and groups > 1 and not transposed:
            every = full(scale, groups * sizes[1])
            stopped = self.draft.change(weight, lambda own: per_group(own, every, groups, sizes))
        else:
            stopped = fold(self.draft, weight, 0 if transposed else 1, Map(scale)) if scale is not None else None
        if stopped or shift is None:
            return stopped
        if transposed or not (node.target is aten.linear.default or unpadded(a["padding"])):
            return self._map(node, a, plain, shift)
        shifted = per_group(plain, full(shift, groups * sizes[1]), groups, sizes) if groups > 1 else plain.scaled(shift, 1)
        added = Call("sum.dim_IntList", (shifted, tuple(range(1, len(sizes)))))
        return self.draft.new_bias(node, added) if a["bias"] is None else self._added(node, a["bias"], added)

    def _map(self, node: Node, a: dict[str, Any], weight: Formula, shift: Formula) -> Obstacle | None:
        """Where zeros are added around the input, what a shift adds differs from place to place: a map of it is stored.

        It is worth its bytes where it is no larger than the weight.
        """
        (_, *places), out = shape(a["input"])[-rank(a["weight"]) + 1 :], shape(node)[-rank(a["weight"]) + 1 :]
        if not all(isinstance(size, int) for size in (*places, *out)) or prod(out) > prod(sizes_of(a["weight"])):
            return Obstacle(Why.PADS, node)
        channels = int(shape(a["input"])[channel(node, a["input"])])
        batch = (1,) * channel(node, a["input"])  # none where the input has no batch
        column = Call("view.default", (full(shift, channels), (*batch, channels, *(1 for _ in places))))
        everywhere = Call("expand.default", (column, (*batch, channels, *places)))
        given = {**a, "input": everywhere, "weight": weight, "bias": None}
        self.draft.add(node, Call.of(node.target, [*given.values()]))
        return None

    def _added(self, node: Node, bias: Node, entries: Formula) -> Obstacle | None:
        axis = channel(node, node) if layer(node) else rank(node) - 1
        if not same(shape(bias)[-1], shape(node)[axis]):
            return Obstacle(Why.OTHER_BIAS, node)
        if times_read(bias) != 1:
            return Obstacle(Why.READ_AGAIN, bias)
        return fold(self.draft, bias, rank(bias) - 1, Map(shift=entries))

    def product(self, node: Node, a: dict[str, Any], value: Node, weight: Node, pending: Pending) -> Obstacle | None:
        """``x @ W``, with or without a bias: GPT-2's Conv1D; a stack of them where experts are stored as one tensor."""
        scale, shift = pending.map.scale, pending.map.shift
        plain = constant_formula(self.facts, weight)
        if plain is None or rank(weight) < 2 or pending.axis != rank(value) - 1 or times_read(weight) != 1:
            return Obstacle(Why.NO_WEIGHT_OF_ITS_OWN, node)
        entering = rank(weight) - 2
        stopped = fold(self.draft, weight, entering, Map(scale)) if scale is not None else None
        if stopped or shift is None:
            return stopped
        added = Call("sum.dim_IntList", (plain.scaled(shift, entering), (entering,), entering > 0))
        if node.target is aten.addmm.default:
            if a["beta"] != 1 or a["alpha"] != 1:
                return Obstacle(Why.SCALES_BIAS, node)
            return self._added(node, a["self"], added)
        self.draft.add(node, added)
        return None


def well_conditioned(program: Program, scale: Formula) -> bool:
    """Whether one may divide by a scale: no zeros, and entries less than `CONDITION` apart."""
    sizes = evaluate(substitute(scale, program.formulas), program.tensor).abs()
    return bool(sizes.min() > 0 and sizes.max() <= CONDITION * sizes.min())
