"""Fold a channel affine into what writes a value: weights, biases and tables, through whatever lies between."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from normfuse.analysis.affine import Affine, constant_formula
from normfuse.analysis.facts import Facts
from normfuse.analysis.obstacles import Obstacle, Why
from normfuse.analysis.scales import of_each, own_scale, scalable
from normfuse.graph.expressions import Call, Formula
from normfuse.graph.nodes import computed_from
from normfuse.graph.ops.lookup import carries, computes, keeps, layer, passes_shift, rank, reads_entries, same, times_read
from normfuse.graph.ops.row import MOVES, Computes
from normfuse.graph.views import arguments, aten, shape
from normfuse.transforms.backward import Backward, Key, Step, way_back
from normfuse.transforms.draft import (
    Absorbed,
    Draft,
    channel,
    full,
    is_transposed,
    per_group,
    sizes_of,
)
from normfuse.transforms.maps import Map


def into_writers(facts: Facts, form: Affine, value: Node) -> Absorbed | Obstacle:
    """Scale and shift of a value folded into the stored tensors that write its base."""
    stray = next((reader for reader in form.base.users if reader not in form.inner and reads_entries(reader)), None)
    if stray is not None:
        return Obstacle(Why.READ_BEFORE, stray)
    axis = axis_of_base(facts, form, value)
    if axis is None and form.axis is not None:
        return Obstacle(Why.RESHAPED, form.base)
    draft = Draft(facts)
    stopped = fold(draft, form.base, rank(form.base) - 1 if axis is None else axis, Map(form.scale, form.shift))
    return stopped or Absorbed(tuple(draft.edits), frozenset(draft.nodes))


def axis_of_base(facts: Facts, form: Affine, value: Node) -> int | None:
    """The axis of the base that the form's axis is; None where the views in between do not tell."""
    node, axis = value, form.axis
    while axis is not None and node is not form.base:
        if keeps(node) in MOVES:
            carried = carries(node, axis)
            node, axis = carried[0] if carried else (node, None)
        else:  # a norm, or arithmetic with constants: it keeps its operand's shape
            onward = form.inner - facts.constant | {form.base}
            node = next(each for each in node.all_input_nodes if each in onward)
    return axis


def fold(draft: Draft, node: Node, axis: int, pending: Map) -> Obstacle | None:
    """Collect the edits after which ``node`` is what a map makes of it along ``axis``; what stops it, if anything."""
    return _Fold(draft, (node, axis)).carry(((node, axis), pending), on=False)


class _Fold(Backward):
    """Each value on the way is read once; weights, biases and tables take the map up."""

    def __init__(self, draft: Draft, start: Key) -> None:
        super().__init__(draft.facts)
        self.draft, self.start = draft, start

    def decided(self, node: Node, axis: int, pending: Map) -> Step | None:
        if (node, axis) != self.start and times_read(node) != 1:
            return _stopped(Why.READ_AGAIN, node)
        self.draft.nodes.add(node)
        if node in self.draft.added_to:
            return _stopped(Why.HAS_MAP, node)
        if node in self.facts.constant:
            return self._constant(node, axis, pending)
        if layer(node):
            return self._layer(node, axis, pending)
        if pending.basis is None and node.target is aten.cat.default and axis == arguments(node)["dim"] % rank(node):
            return _joined(node, axis, pending)
        if pending.basis is None and node.target is operator.getitem and _splits_along(node.args[0], axis):
            return _parted(node, axis, pending)
        return None

    def carried(self, node: Node, axis: int, pending: Map, operands: tuple[Key, ...]) -> Step:
        if pending.shift is not None and not passes_shift(node) and not _is_sum(node):
            return _stopped(Why.NO_SHIFT, node)
        if not _is_sum(node):
            return Step(operands[::-1])
        # a sum takes the shift once, where there is a bias: addmm names it last
        taker = len(operands) - 1 if node.target is aten.addmm.default else 0
        maps = tuple(pending if place == taker else pending.linear for place in range(len(operands)))
        return Step(operands[::-1], maps[::-1])

    def stuck(self, node: Node, axis: int, pending: Map) -> Step:
        return _stopped(Why.NO_SCALE, node)

    # -- taking it up --------------------------------------------------------------------------------------------------

    def _constant(self, node: Node, axis: int, pending: Map) -> Step:
        """A stored tensor, or arithmetic on stored tensors: changed where it is stored if it gets there, else anew."""
        if node.op != "placeholder" and way_back(self.facts, node, axis, pending) is not None:
            return Step((carries(node, axis) or ())[::-1])
        computed = node.op != "placeholder" and constant_formula(self.facts, node) is None
        if computed and pending.scale is not None and pending == Map(pending.scale):
            return Step(obstacle=self._product(node, axis, pending.scale))
        return Step(obstacle=self.draft.change(node, lambda own: pending.written(own, axis, shape(node)[axis])))

    def _product(self, node: Node, axis: int, scale: Formula) -> Obstacle | None:
        """A weight computed from integers, masks or a quantizer, which stay: one factor of it takes the scale."""
        self.draft.nodes.update(computed_from(node))
        found = scalable(self.facts, node, axis)
        if found is not None:
            return self.draft.change(found[0], lambda own: own.scaled(scale, found[1]))
        again = f"normfuse_{node.name}_scale"
        if times_read(node) != 1 or own_scale(self.facts, node, axis) is None:
            return self.draft.change(node, lambda own: own)  # which says why it cannot change
        if not self.draft.change_again(again, lambda own: own.scaled(scale, axis)):
            self.draft.edits += of_each(self.facts, node, axis, scale)
        return None

    def _layer(self, node: Node, axis: int, pending: Map) -> Step:
        a = arguments(node)
        weight, bias, groups = a["weight"], a["bias"], a.get("groups", 1)
        if rank(weight) < 2 or axis != channel(node, node):
            return _stopped(Why.WRITES_ELSEWHERE, node)
        if groups != 1 and pending.basis is not None:
            return _stopped(Why.WRITES_GROUPS, node)
        if bias is not None and (rank(bias) != 1 or not same(shape(bias)[0], shape(node)[axis])):
            return _stopped(Why.OTHER_BIAS, node)
        stopped = self._weight(weight, pending.linear, groups, transposed=is_transposed(node))
        if stopped:
            return Step(obstacle=stopped)
        if bias is not None:
            return Step(((bias, 0),))
        if node in self.draft.biases:
            self.draft.change_again(self.draft.biases[node], lambda own: pending.written(own, 0, shape(node)[axis]))
        elif pending.shift is not None:
            entries = full(pending.shift, int(shape(node)[axis]))
            made = entries if pending.basis is None else pending.basis.written(entries, 0, shape(node)[axis])
            return Step(obstacle=self.draft.new_bias(node, made))
        return Step()

    def _weight(self, weight: Node, pending: Map, groups: int, *, transposed: bool) -> Obstacle | None:
        if pending == Map():
            return None
        if not transposed or groups == 1:
            return self.carry(((weight, 1 if transposed else 0), pending), on=False)
        assert pending.scale is not None
        sizes = sizes_of(weight)
        every = full(pending.scale, groups * sizes[1])
        return self.draft.change(weight, lambda own: per_group(own, every, groups, sizes))


def _stopped(code: Why, node: Node) -> Step:
    return Step(obstacle=Obstacle(code, node))


def _is_sum(node: Node) -> bool:
    if node.target is aten.addmm.default:
        return bool(arguments(node)["beta"] == 1)  # otherwise the bias is scaled on its way
    return computes(node) in (Computes.SUM, Computes.DIFFERENCE)


def _joined(node: Node, axis: int, pending: Map) -> Step:
    """Joined along the channels: each operand takes its own part."""
    tensors, total = arguments(node)["tensors"], shape(node)[axis]
    if not isinstance(total, int) or any(rank(operand) != rank(node) for operand in tensors):
        return _stopped(Why.JOINS_UNKNOWN, node)
    scale, shift = (entries and full(entries, total) for entries in (pending.scale, pending.shift))
    start, maps = 0, []
    for operand in tensors:
        size = shape(operand)[axis]
        maps.append(Map(part(scale, start, size), part(shift, start, size)))
        start += size
    return Step(tuple((operand, axis) for operand in reversed(tensors)), tuple(reversed(maps)))


def _splits_along(split: Any, axis: int) -> bool:
    return split.target in (aten.split.Tensor, aten.split_with_sizes.default) and axis == arguments(split)["dim"] % rank(split)


def _parted(node: Node, axis: int, pending: Map) -> Step:
    """Split along the channels: the other parts are scaled by ones and shifted by zeros."""
    split: Any = node.args[0]
    place: Any = node.args[1]
    sizes = [each.shape[axis] for each in split.meta["val"]]
    if not all(isinstance(size, int) for size in sizes) or sum(each.args[1] == place for each in split.users) != 1:
        return _stopped(Why.PART, node)

    def whole(entries: Formula | None, none: float) -> Formula | None:
        if entries is None:
            return None
        others = (Call("new_full.default", (entries, (size,), none)) for size in sizes)
        parts = (full(entries, sizes[place]) if own == place else other for own, other in enumerate(others))
        return Call("cat.default", (tuple(parts),))

    return Step(((arguments(split)["self"], axis),), (Map(whole(pending.scale, 1.0), whole(pending.shift, 0.0)),))


def part(entries: Formula | None, start: int, size: int) -> Formula | None:
    """The entries of some of the channels; a single entry stands for all of them."""
    return None if entries is None else Call("slice.Tensor", (entries, 0, start, start + size))
