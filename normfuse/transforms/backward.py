"""The walk backward: maps are carried from values to the stored tensors that write them.

A map along an axis of a value passes through `carries` to operands of it, until a stored tensor can take it up. What that
means, and what becomes of a value that nothing carries further, is a policy: a subclass of `Backward`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch.fx import Node

from normfuse.analysis.facts import Facts
from normfuse.analysis.obstacles import Obstacle, Why
from normfuse.graph.edits import Edit
from normfuse.graph.ops.lookup import carries, carries_wholly, passes_shift, times_read
from normfuse.graph.ops.sizes import follows
from normfuse.transforms.maps import Map

Key: TypeAlias = tuple[Node, int]
"""A value and the axis along which a map is pending."""


@dataclass(frozen=True)
class Step:
    """How one value becomes what it is to be.

    Attributes:
        operands: values that carry the map on; the walk looks at the last one first.
        maps: the map of each operand, where it is another one than the value's.
        edits: changes that are needed here.
        passed: other nodes that were passed over.
        obstacle: what is in the way.
    """

    operands: tuple[Key, ...] = ()
    maps: tuple[Map, ...] = ()
    edits: tuple[Edit, ...] = ()
    passed: frozenset[Node] = frozenset()
    obstacle: Obstacle | None = None


class Backward:
    """A walk backward; `decided`, `stored`, `carried` and `stuck` are its policy.

    Attributes:
        steps: what was found, by value and axis, in the order of the walk.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.steps: dict[Key, Step] = {}

    def carry(self, *pending: tuple[Key, Map], on: bool = True) -> Obstacle | None:
        """Carry maps from values to where they come from; the first obstacle.

        Args:
            pending: values, and the map that each is to get.
            on: whether to walk on elsewhere behind an obstacle.
        """
        waiting, first = list(pending), None
        while waiting:
            key, pending_map = waiting.pop()
            if key in self.steps:
                continue
            step = self.steps[key] = self._step(*key, pending_map)
            first = step.obstacle if first is None else first
            if first is not None and not on:
                return first
            waiting += zip(step.operands, step.maps or [pending_map] * len(step.operands), strict=True)
        return first

    def _step(self, node: Node, axis: int, pending: Map) -> Step:
        decided = self.decided(node, axis, pending)
        if decided is not None:
            return decided
        if node.op == "placeholder":
            return self.stored(node, axis, pending)
        operands = carries(node, axis)
        return self.carried(node, axis, pending, operands) if operands else self.stuck(node, axis, pending)

    # -- the policy ----------------------------------------------------------------------------------------------------

    def decided(self, node: Node, axis: int, pending: Map) -> Step | None:
        """What is known of a value whatever writes it: it is as it is to be, it may not change, it changes by itself."""
        return None

    def stored(self, node: Node, axis: int, pending: Map) -> Step:
        """What becomes of a stored tensor, or of an input."""
        return self.stuck(node, axis, pending)

    def carried(self, node: Node, axis: int, pending: Map, operands: tuple[Key, ...]) -> Step:
        """What becomes of a value whose operands carry the map: it is stuck where one of them also enters otherwise."""
        wholly = carries_wholly(node, operands, (operand for operand, _ in operands))
        return Step(operands) if wholly else self.stuck(node, axis, pending)

    def stuck(self, node: Node, axis: int, pending: Map) -> Step:
        """What becomes of a value that does not let the map through."""
        raise NotImplementedError


def way_back(facts: Facts, node: Node, axis: int, pending: Map, *, shared: bool = False) -> tuple[Key, ...] | None:
    """All values from one back to the stored tensors that write it, if none has another reader and all let a map through.

    Args:
        facts: of the program.
        node: the value.
        axis: its axis.
        pending: the map.
        shared: whether the stored tensors may have other readers.
    """
    way = _Way(facts, shared)
    return None if way.carry(((node, axis), pending), on=False) else tuple(way.steps)


class _Way(Backward):
    def __init__(self, facts: Facts, shared: bool) -> None:
        super().__init__(facts)
        self.shared = shared

    def decided(self, node: Node, axis: int, pending: Map) -> Step | None:
        alone = times_read(node) == 1 or (self.shared and node.op == "placeholder")
        return None if alone else Step(obstacle=Obstacle(Why.READ_AGAIN, node))

    def stored(self, node: Node, axis: int, pending: Map) -> Step:
        return Step() if self.facts.editable(node) else self.stuck(node, axis, pending)

    def carried(self, node: Node, axis: int, pending: Map, operands: tuple[Key, ...]) -> Step:
        passes = pending.shift is None or passes_shift(node)
        passes = passes and (not pending.resizes or follows(node, axis))
        return Step(operands) if passes else self.stuck(node, axis, pending)

    def stuck(self, node: Node, axis: int, pending: Map) -> Step:
        return Step(obstacle=Obstacle(Why.NO_WRITER, node))
