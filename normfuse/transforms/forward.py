"""The walk forward: maps are carried from a value through all that read it, until layers take them up or somebody stops them.

From the value on, every value v that has a pending map is stored as t with v = M(t) (`normfuse.transforms.maps`). In execution
order, so that what is pending on all operands of a node is known when it is met:

    layers, products      take the map up                                                           the policy
    views, picks, means   carry it to their result                                                  `carries`
    sums                  carry it once what they add has been compensated, as do other joins       the policy
    everything else       stops the walk

Where a view splits the axis of a diagonal map into heads, the axes that it becomes are remembered in their order, through
attention, until another view has merged them. A policy is a subclass of `Forward`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from heapq import heappop, heappush
from math import prod
from typing import Any

import torch
from torch.fx import Node

from normfuse.analysis.attention import why_no_mean
from normfuse.analysis.facts import Facts
from normfuse.analysis.obstacles import Obstacle, Why
from normfuse.graph.expressions import Call, Formula
from normfuse.graph.ops.lookup import (
    carries,
    carries_wholly,
    computes,
    keeps,
    layer,
    passes_shift,
    product,
    rank,
    reads_entries,
    same,
    same_sizes,
    weighed,
)
from normfuse.graph.ops.row import Computes, Keeps
from normfuse.graph.ops.sizes import follows
from normfuse.graph.views import arguments, aten, is_tensor, shape, tensors_in
from normfuse.transforms.draft import full
from normfuse.transforms.maps import Map


@dataclass(frozen=True)
class Pending:
    """A map that is pending on a value.

    Attributes:
        axes: along which; several were one axis before a view split them, and the entries vary fastest along the last one.
        map: what the value is, given what is stored of it.
    """

    axes: tuple[int, ...]
    map: Map

    @property
    def axis(self) -> int:
        """The one axis."""
        (axis,) = self.axes
        return axis


class Forward:
    """A walk forward; the methods and attributes at its end are its policy.

    Attributes:
        pending: what is pending on values.
        met: the readers that were met.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.pending: dict[Node, Pending] = {}
        self.met: set[Node] = set()
        self._waiting: list[Node] = []
        """readers that are yet to be met, a heap in execution order"""

    def run(self, value: Node, pending: Pending) -> Obstacle | None:
        """Carry a map from a value as far as it has to go; what stops it, if anything."""
        self.carry(value, pending)
        while self._waiting:
            node = heappop(self._waiting)
            if node not in self.met:
                self.met.add(node)
                stopped = self._meet(node)
                if stopped:
                    return stopped
        return None

    def carry(self, value: Node, pending: Pending) -> None:
        """A map is pending on a value: its readers are to be met."""
        self.pending[value] = pending
        for reader in value.users:
            if not (is_size_blind(reader, value, pending.axis) if pending.map.resizes else not reads_entries(reader)):
                heappush(self._waiting, reader)
        self.carried(value, pending)

    def _meet(self, node: Node) -> Obstacle | None:
        given = Counter(tensors_in((node.args, node.kwargs)))
        values = [each for each in given if each in self.pending]
        value, pending = values[0], self.pending[values[0]]
        if node.op != "call_function":
            return Obstacle(self.RETURNED, node)
        a = arguments(node) if isinstance(node.target, torch._ops.OpOverload) else {}
        averaged = weighed(node)
        if pending.map.basis is None and averaged is not None and values == [a[averaged]]:
            return self._mean(node, value)
        if any(len(self.pending[each].axes) > 1 for each in values):
            return self._moved(node, values)
        if len(values) == given[value] == 1:
            if layer(node) and a["input"] is value:
                return self.layer(node, a, pending)
            if (factors := product(node)) and a[factors.value] is value:
                return self.product(node, a, value, a[factors.weight], pending)
            composed = self.composed(node, a, value, pending)
            if isinstance(composed, Pending):
                self.carry(node, composed)
            if composed is not None:
                return composed if isinstance(composed, Obstacle) else None
        if self.COMPENSATES and computes(node) in (Computes.SUM, Computes.DIFFERENCE) and a["alpha"] == 1:
            return self._sum(node, a, values)
        if pending.map.basis is None and node.target is aten.cat.default and pending.axis == a["dim"] % rank(node):
            return self._joined(node, a)
        if pending.map.basis is None and node.target is aten.native_dropout.default:
            return self._dropped(node, pending)
        return self._passed(node, values)

    # -- carrying a map on ---------------------------------------------------------------------------------------------

    def _passed(self, node: Node, values: list[Node]) -> Obstacle | None:
        """Through an operator that carries any linear map along the axis."""
        pending = self.pending[values[0]]
        onward = [own for own in range(rank(node)) if (values[0], pending.axis) in (carries(node, own) or ())]
        if len(onward) != 1:
            return self._moved(node, values)
        if pending.map.resizes and not follows(node, onward[0]):
            return Obstacle(Why.NO_LAYER, node)
        if pending.map.shift is not None and not passes_shift(node):
            return Obstacle(Why.NO_SHIFT, node)
        operands = carries(node, onward[0]) or ()
        if not carries_wholly(node, operands, values):  # attention of a value to itself
            return Obstacle(Why.READS_TWICE, node)
        for operand, axis in operands:
            own = Pending((axis,), pending.map)
            stopped = self._as_pending(node, operand, own) if self.pending.get(operand) != own else None
            if stopped:
                return stopped
        self.carry(node, Pending((onward[0],), pending.map))
        return None

    def _as_pending(self, node: Node, operand: Node, own: Pending) -> Obstacle | None:
        if operand in self.pending or not self.COMPENSATES:
            return Obstacle(self.JOINS, node)
        return self.compensate(operand, own.axis, own.map)

    def _moved(self, node: Node, values: list[Node]) -> Obstacle | None:
        """Axes that a view splits or merges, or that are moved each by itself."""
        pending = self.pending[values[0]]
        onward = _onward(node, values[0], pending.axes) if len(values) == 1 and pending.map.basis is None else None
        if onward is None:
            return Obstacle(Why.NO_LAYER, node)
        if pending.map.shift is not None and not passes_shift(node):
            return Obstacle(Why.NO_SHIFT, node)
        self.carry(node, Pending(onward, pending.map))
        return None

    def _mean(self, node: Node, value: Node) -> Obstacle | None:
        """Attention: each result is a sum of the values on which a map is pending, along the axis before their last."""
        pending, added = self.pending[value], rank(node) - rank(value)
        times = sum(operand is value for operand in tensors_in((node.args, node.kwargs)))
        if rank(value) < 2 or added < 0 or rank(value) - 2 in pending.axes or times != 1:
            return Obstacle(Why.NO_LAYER, node)
        if not all(same(shape(value)[axis], shape(node)[axis + added]) for axis in pending.axes):
            return Obstacle(Why.SHARED_HEADS, node)
        why = why_no_mean(self.facts, node) if pending.map.shift is not None else None
        if why:
            return Obstacle(why, node)
        self.carry(node, Pending(tuple(axis + added for axis in pending.axes), pending.map))
        return None

    def _sum(self, node: Node, a: dict[str, Any], values: list[Node]) -> Obstacle | None:
        """Shifts are summed; what has nothing pending is compensated for the rest of the map."""
        pending = self.pending[values[0]]
        onward = [own for own in range(rank(node)) if _is_axis(node, own, values[0], pending.axis)]
        if len(onward) != 1 or a["self"] is a["other"]:
            return Obstacle(Why.NO_LAYER, node)
        summed = pending.map.linear
        for operand in (a["self"], a["other"]):
            own = self.pending.get(operand)
            if own is not None:
                if own.map.linear != summed.linear or not _is_axis(node, onward[0], operand, own.axis):
                    return Obstacle(self.JOINS, node)
                less, shift = operand is a["other"] and computes(node) is Computes.DIFFERENCE, own.map.shift
                summed = summed.plus(-shift if less and shift is not None else shift)
            elif summed.linear != Map():
                stopped = self._term(node, operand, onward[0], summed.linear)
                if stopped:
                    return stopped
        self.carry(node, Pending((onward[0],), summed))
        return None

    def _term(self, node: Node, operand: Any, axis: int, linear: Map) -> Obstacle | None:
        own = axis - (rank(node) - rank(operand)) if is_tensor(operand) else -1
        if own < 0 or str(shape(operand)[own]) != str(shape(node)[axis]):
            return Obstacle(Why.ADDS_OTHERS, node)
        return self.compensate(operand, own, linear)

    def _joined(self, node: Node, a: dict[str, Any]) -> Obstacle | None:
        """Joined along the channels: one map of all parts, in which those that have none pending have ones and zeros."""
        axis = a["dim"] % rank(node)
        maps = [self.pending[operand].map for operand in a["tensors"] if operand in self.pending]
        like = next(each for own in maps for each in (own.scale, own.shift) if each)  # for the device
        scales: list[Formula] = []
        shifts: list[Formula] = []
        for operand in a["tensors"]:
            size, own = shape(operand)[axis] if rank(operand) == rank(node) else None, self.pending.get(operand)
            if not isinstance(size, int) or (own and own.axis != axis):
                return Obstacle(Why.JOINS_UNKNOWN, node)
            for parts, entries, none in ((scales, own and own.map.scale, 1.0), (shifts, own and own.map.shift, 0.0)):
                parts.append(full(entries, size) if entries else Call("new_full.default", (like, (size,), none)))
        scale = Call("cat.default", (tuple(scales),)) if any(own.scale for own in maps) else None
        shift = Call("cat.default", (tuple(shifts),)) if any(own.shift for own in maps) else None
        self.carry(node, Pending((axis,), Map(scale, shift)))
        return None

    def _dropped(self, node: Node, pending: Pending) -> Obstacle | None:
        """Entries become zeros at random: they would lose their shift."""
        if pending.map.shift is not None:
            return Obstacle(Why.NO_SHIFT, node)
        for result in node.users:
            if result.args[1] == 0:  # the other one is the mask, whatever the values are
                self.carry(result, pending)
        return None

    # -- the policy ----------------------------------------------------------------------------------------------------

    COMPENSATES = False
    """whether what meets a value that has a map pending can be given the same map"""
    JOINS = Why.JOINS_ANOTHER
    """what an operator does that has operands with and without the map"""
    RETURNED = Why.NO_LAYER
    """what the caller does with a value that has a map pending"""

    def layer(self, node: Node, a: dict[str, Any], pending: Pending) -> Obstacle | None:
        """A linear layer or a convolution reads the value: it takes the map up, or says why it cannot."""
        raise NotImplementedError

    def product(self, node: Node, a: dict[str, Any], value: Node, weight: Node, pending: Pending) -> Obstacle | None:
        """The value is the first factor of a matrix product, whose other factor is to take the map up."""
        raise NotImplementedError

    def composed(self, node: Node, a: dict[str, Any], value: Node, pending: Pending) -> Pending | Obstacle | None:
        """What is pending on a result that is an affine of the value along the axis, and gives way to it."""
        return None

    def compensate(self, operand: Node, axis: int, pending: Map) -> Obstacle | None:
        """What meets a value that has a map pending is to be stored as that value is."""
        raise NotImplementedError

    def carried(self, value: Node, pending: Pending) -> None:
        """A map has been carried to a value."""


def is_size_blind(reader: Node, value: Node, axis: int) -> bool:
    """Whether a reader takes neither a value's entries nor its size along an axis."""
    if not isinstance(reader.target, torch._ops.OpOverload):
        return False
    a = arguments(reader)
    match reader.target:
        case aten.sym_size.int:
            return bool(a["dim"] % rank(value) != axis)
        case aten._assert_tensor_metadata.default:
            return a["size"] is None and a["stride"] is None
        case aten.type_as.default:
            return a["other"] is value and a["self"] is not value
    return False


def _onward(node: Node, operand: Node, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes of a node that axes of an operand become, in their order; None where it does more than move them."""
    found = tuple(own for axis in axes for own in range(rank(node)) if carries(node, own) == ((operand, axis),))
    if len(found) == len(axes):
        return found
    neighbours = axes == tuple(range(axes[0], axes[-1] + 1))
    return _reshaped(node, operand, axes) if keeps(node) is Keeps.RESHAPE and neighbours else None


def _reshaped(node: Node, operand: Node, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Row-major order: neighbouring axes survive a reshape iff as many entries as before are in them and behind them."""

    def entries(value: Node, first: int, last: int) -> tuple[Any, Any]:
        return prod(shape(value)[first : last + 1]), prod(shape(value)[last + 1 :])

    wanted = entries(operand, axes[0], axes[-1])
    runs = ((first, last) for last in reversed(range(rank(node))) for first in reversed(range(last + 1)))
    found = next((run for run in runs if all(map(same, entries(node, *run), wanted))), None)
    return None if found is None else tuple(range(found[0], found[1] + 1))


def _is_axis(node: Node, own: int, operand: Any, axis: int) -> bool:
    """Whether axis ``own`` of an elementwise result is that axis of an operand."""
    return is_tensor(operand) and own - (rank(node) - rank(operand)) == axis and same_sizes(operand, node)
