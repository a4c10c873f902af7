"""Fold a channel affine into all that reads a value, however far: the value gives way to its base, and a debt goes forward.

From the value on, every value v is stored as t with v = scale ⊙ t + shift along one axis: that is its debt. Layers settle a
debt in their weights and biases. Views, picks and means pass it on. A sum passes it on once what it adds has been divided by
the scale, so that the scale of a post-norm stream travels to its head (the re-basis t = D⁻¹(s - e) of the residual stream),
and another channel affine on the way composes with it and dissolves as well. Where a view splits the axis into heads, the axes
that it becomes are remembered in their order, through attention, until another view has merged them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch.fx import Node

from normfuse.analysis.affine import Affine, constant_formula, moved, product, total
from normfuse.analysis.attention import VALUES, why_no_mean
from normfuse.analysis.facts import Facts
from normfuse.analysis.scales import why_fixed
from normfuse.graph.edits import Reroute, literal
from normfuse.graph.formula import Apply, Formula, Scaled, evaluate, is_formula, substitute
from normfuse.graph.ops.carrying import METADATA, carries, rank, same, same_sizes, times_read
from normfuse.graph.program import Program
from normfuse.graph.views import arguments, aten, is_tensor, shape, tensors_in
from normfuse.transforms.draft import (
    LAYERS,
    Absorbed,
    Draft,
    Obstacle,
    channel,
    full,
    is_transposed,
    passes_shift,
    per_group,
    sizes_of,
    unpadded,
)
from normfuse.transforms.into_writers import axis_of_base, fold

CONDITION = 1e4
"""How far apart the entries of a scale may be that others are divided by: float32 has digits for twice that."""


@dataclass(frozen=True)
class Debt:
    """A value v that is stored as t: ``v = scale ⊙ t + shift`` along ``axis``."""

    axis: int
    scale: Formula | None
    shift: Formula | None


@dataclass(frozen=True)
class Split:
    """A debt along several axes of a value, which were one: the entries of scale and shift vary fastest along the last one."""

    axes: tuple[int, ...]
    scale: Formula | None
    shift: Formula | None


def into_readers(facts: Facts, form: Affine, value: Node, others: dict[Node, Affine]) -> Absorbed | Obstacle:
    """Scale and shift of a value folded into all its readers.

    Args:
        facts: of the program.
        form: of the value.
        value: the value.
        others: maximal affine values by node; those that the walk meets dissolve as well.
    """
    if form.axis is None:
        return Obstacle(value, "is scaled as a whole, not along an axis")
    walk = _Readers(facts, {out: other for out, other in others.items() if out is not value})
    obstacle = walk.settle(value, Debt(form.axis, form.scale, form.shift))
    return obstacle or Absorbed(tuple(walk.draft.edits), frozenset(walk.draft.nodes), frozenset(walk.dissolved))


class _Readers:
    """The walk forward, in execution order: when a node is looked at, the debts of all its operands are known."""

    def __init__(self, facts: Facts, others: dict[Node, Affine]) -> None:
        self.facts, self.draft = facts, Draft(facts)
        self.others: dict[Node, list[tuple[Node, Affine]]] = {}
        for out, form in others.items():
            self.others.setdefault(form.base, []).append((out, form))
        self.debts: dict[Node, Debt] = {}
        self.split: dict[Node, Split] = {}
        self.dissolved: set[Node] = set()
        self._settled: set[Node] = set()
        """nodes inside affine values that have been dissolved"""
        self._waiting: set[Node] = set()
        """readers of what owes that the walk has yet to meet"""

    def settle(self, value: Node, debt: Debt) -> Obstacle | None:
        if not any(reader.target not in METADATA for reader in value.users):
            return Obstacle(value, "is read by nobody")
        self._owe(value, debt)
        node = value
        while self._waiting:
            node = node.next
            if node in self._waiting:
                self._waiting.remove(node)
                stopped = None if node in self._settled else self._reader(node, self._owing(node))
                if stopped:
                    return stopped
        return None

    def _owing(self, node: Node) -> list[Node]:
        operands = dict.fromkeys(tensors_in((node.args, node.kwargs)))
        return [each for each in operands if each in self.debts or each in self.split]

    def _owe(self, value: Node, debt: Debt) -> None:
        self.debts[value] = debt
        self._await_readers(value)
        for out, form in self.others.get(value, ()):
            if (form.axis in (None, debt.axis) and not form.moves) or axis_of_base(self.facts, form, out) == debt.axis:
                self._compose(out, form, debt)

    def _owe_along(self, value: Node, axes: tuple[int, ...], scale: Formula | None, shift: Formula | None) -> None:
        if len(axes) == 1:
            self._owe(value, Debt(axes[0], scale, shift))
        else:
            self.split[value] = Split(axes, scale, shift)
            self._await_readers(value)

    def _await_readers(self, value: Node) -> None:
        self._waiting.update(reader for reader in value.users if reader.target not in METADATA)

    def _compose(self, out: Node, form: Affine, debt: Debt) -> None:
        """Another affine of a value that owes: one debt for both."""
        axis = debt.axis if form.axis is None else form.axis
        scale = product(debt.scale, form.scale)
        shift = total(None if debt.shift is None else product(debt.shift, form.scale), form.shift)
        self._settled |= form.inner
        self.draft.nodes |= form.inner
        self.draft.edits.append(Reroute(out.name, moved(form)))
        self.dissolved.add(out)
        self._owe(out, Debt(axis, scale, shift))

    def _reader(self, node: Node, owing: list[Node]) -> Obstacle | None:
        self.draft.nodes.add(node)
        if node.target in VALUES and owing == [arguments(node)[VALUES[node.target]]]:
            return self._mean(node, owing[0])
        if any(each in self.split for each in owing):
            return self._moved(node, owing)
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            a = arguments(node)
            if node.target in LAYERS and owing == [a["input"]]:
                return self._layer(node, a, self.debts[owing[0]])
            if node.target in PRODUCTS and owing == [a[PRODUCTS[node.target][0]]]:
                return self._product(node, a, owing[0])
            if node.target in (aten.add.Tensor, aten.sub.Tensor) and a["alpha"] == 1:
                return self._sum(node, a, owing)
            if node.target is aten.cat.default and self._joins_channels(node, a, owing):
                return self._joined(node, a)
            if node.target is aten.native_dropout.default:
                return self._dropped(node, self.debts[owing[0]])
        return self._passed(node, owing)

    # -- passing a debt on ---------------------------------------------------------------------------------------------

    def _passed(self, node: Node, owing: list[Node]) -> Obstacle | None:
        debt = self.debts[owing[0]]
        onward = [own for own in range(rank(node)) if (owing[0], debt.axis) in (carries(node, own) or ())]
        if len(onward) != 1:
            return self._moved(node, owing)
        if debt.shift is not None and not passes_shift(node):
            return Obstacle(node, "does not let a shift through")
        carried = carries(node, onward[0]) or ()
        entering, passed = Counter(tensors_in((node.args, node.kwargs))), Counter(operand for operand, _ in carried)
        if any(entering[operand] != passed[operand] for operand in owing):  # attention of a value to itself
            return Obstacle(node, "reads the value in two ways")
        for operand, axis in carried:
            if operand in self.debts:
                if self.debts[operand] != replace(debt, axis=axis):
                    return Obstacle(node, "joins values of different scales")
            else:
                stopped = self._repay(operand, axis, debt.scale, debt.shift)
                if stopped:
                    return stopped
        self._owe(node, replace(debt, axis=onward[0]))
        return None

    def _dropped(self, node: Node, debt: Debt) -> Obstacle | None:
        """Entries become zeros at random: they would lose their shift."""
        if debt.shift is not None:
            return Obstacle(node, "does not let a shift through")
        for result in node.users:
            if result.args[1] == 0:  # the other one is the mask, whatever the values are
                self._owe(result, debt)
        return None

    def _moved(self, node: Node, owing: list[Node]) -> Obstacle | None:
        """Axes that a view splits or merges, or that are moved each by itself."""
        owed = self._along(owing[0])
        onward = _onward(node, owing[0], owed.axes) if len(owing) == 1 else None
        if onward is None:
            return Obstacle(node, "is no linear layer")
        if owed.shift is not None and not passes_shift(node):
            return Obstacle(node, "does not let a shift through")
        self._owe_along(node, onward, owed.scale, owed.shift)
        return None

    def _mean(self, node: Node, value: Node) -> Obstacle | None:
        """Attention: each result is a sum of the values that owe, along the axis before their last."""
        owed, added = self._along(value), rank(node) - rank(value)
        times = sum(operand is value for operand in tensors_in((node.args, node.kwargs)))
        if rank(value) < 2 or added < 0 or rank(value) - 2 in owed.axes or times != 1:
            return Obstacle(node, "is no linear layer")
        if not all(same(shape(value)[axis], shape(node)[axis + added]) for axis in owed.axes):
            return Obstacle(node, "lets several heads share their values")
        why = why_no_mean(self.facts, node) if owed.shift is not None else ""
        if why:
            return Obstacle(node, why)
        self._owe_along(node, tuple(axis + added for axis in owed.axes), owed.scale, owed.shift)
        return None

    def _along(self, value: Node) -> Split:
        debt = self.debts.get(value)
        return self.split[value] if debt is None else Split((debt.axis,), debt.scale, debt.shift)

    def _repay(self, operand: Node, axis: int, scale: Formula | None, shift: Formula | None) -> Obstacle | None:
        """What meets values that owe must be stored as they are: t = (v - shift) / scale, in what writes it."""
        if times_read(operand) != 1:
            return Obstacle(operand, "is read more than once")
        if scale is not None and not well_conditioned(self.facts.program, scale):
            return Obstacle(operand, f"would be divided by scales that are zero, or more than {CONDITION:g} apart")
        less = None if shift is None else Apply("neg.default", (shift,))
        over = None if scale is None else Apply("reciprocal.default", (scale,))
        return fold(self.draft, operand, axis, over, product(less, over) if less is not None else None)

    def _sum(self, node: Node, a: dict[str, Any], owing: list[Node]) -> Obstacle | None:
        x, y = a["self"], a["other"]
        debt = self.debts[owing[0]]
        onward = [own for own in range(rank(node)) if _is_axis(node, own, owing[0], debt.axis)]
        if len(onward) != 1 or x is y:
            return Obstacle(node, "is no linear layer")
        minus = node.target is aten.sub.Tensor
        shift: Formula | None = None
        for operand in (x, y):
            own = self.debts.get(operand)
            if own is not None:
                if own.scale != debt.scale or not _is_axis(node, onward[0], operand, own.axis):
                    return Obstacle(node, "joins values of different scales")
                less = operand is y and minus and own.shift is not None
                shift = total(shift, Apply("neg.default", (own.shift,)) if less else own.shift)
            elif debt.scale is not None:
                stopped = self._term(node, operand, onward[0], debt.scale)
                if stopped:
                    return stopped
        self._owe(node, Debt(onward[0], debt.scale, shift))
        return None

    def _term(self, node: Node, operand: Any, axis: int, scale: Formula) -> Obstacle | None:
        """What is added to a value that owes is divided by the scale."""
        own = axis - (rank(node) - rank(operand)) if is_tensor(operand) else -1
        if own < 0 or str(shape(operand)[own]) != str(shape(node)[axis]):
            return Obstacle(node, "adds what does not vary along the channels")
        return self._repay(operand, own, scale, None)

    def _joins_channels(self, node: Node, a: dict[str, Any], owing: list[Node]) -> bool:
        return bool(self.debts[owing[0]].axis == a["dim"] % rank(node))

    def _joined(self, node: Node, a: dict[str, Any]) -> Obstacle | None:
        """Joined along the channels: one debt of all parts, in which those that owe nothing have ones and zeros."""
        axis = a["dim"] % rank(node)
        owed = [self.debts[operand] for operand in a["tensors"] if operand in self.debts]
        like = next(each for debt in owed for each in (debt.scale, debt.shift) if each)  # for the device
        scales: list[Formula] = []
        shifts: list[Formula] = []
        for operand in a["tensors"]:
            size, debt = shape(operand)[axis] if rank(operand) == rank(node) else None, self.debts.get(operand)
            if not isinstance(size, int) or (debt and debt.axis != axis):
                return Obstacle(node, "joins parts whose sizes are not known")
            for entries, own, none in ((scales, debt and debt.scale, 1.0), (shifts, debt and debt.shift, 0.0)):
                entries.append(full(own, size) if own else Apply("new_full.default", (like, (size,), none)))
        scale = Apply("cat.default", (tuple(scales),)) if any(debt.scale for debt in owed) else None
        shift = Apply("cat.default", (tuple(shifts),)) if any(debt.shift for debt in owed) else None
        self._owe(node, Debt(axis, scale, shift))
        return None

    # -- settling it ---------------------------------------------------------------------------------------------------

    def _layer(self, node: Node, a: dict[str, Any], debt: Debt) -> Obstacle | None:
        weight, groups = a["weight"], a.get("groups", 1)
        if rank(weight) < 2 or debt.axis != channel(node, a["input"]):
            return Obstacle(node, "mixes another axis than the channels")
        plain = constant_formula(self.facts, weight)
        if plain is None or times_read(weight) != 1:
            no_weight = why_fixed(self.facts, weight) or (weight, "is no stored weight")
            return Obstacle(*no_weight) if plain is None else Obstacle(weight, "is read more than once")
        scale, shift, sizes, transposed = debt.scale, debt.shift, sizes_of(weight), is_transposed(node)
        if scale is not None and groups > 1 and not transposed:
            every = full(scale, groups * sizes[1])
            stopped = self.draft.change(weight, lambda own: per_group(own, every, groups, sizes))
        else:
            stopped = fold(self.draft, weight, 0 if transposed else 1, scale, None) if scale is not None else None
        if stopped or shift is None:
            return stopped
        if transposed or not (node.target is aten.linear.default or unpadded(a["padding"])):
            return self._map(node, a, plain, shift)
        shifted = per_group(plain, full(shift, groups * sizes[1]), groups, sizes) if groups > 1 else Scaled(plain, shift, 1)
        added = Apply("sum.dim_IntList", (shifted, tuple(range(1, len(sizes)))))
        return self.draft.new_bias(node, added) if a["bias"] is None else self._added(node, a["bias"], added)

    def _map(self, node: Node, a: dict[str, Any], weight: Formula, shift: Formula) -> Obstacle | None:
        """Where zeros are added around the input, what a shift adds differs from place to place: a map of it is stored.

        It is worth its bytes where it is no larger than the weight.
        """
        (_, *places), out = shape(a["input"])[-rank(a["weight"]) + 1 :], shape(node)[-rank(a["weight"]) + 1 :]
        if not all(isinstance(size, int) for size in (*places, *out)) or prod(out) > prod(sizes_of(a["weight"])):
            return Obstacle(node, "adds zeros around its input, which a shift would change")
        channels = int(shape(a["input"])[channel(node, a["input"])])
        batch = (1,) * channel(node, a["input"])  # none where the input has no batch
        column = Apply("view.default", (full(shift, channels), (*batch, channels, *(1 for _ in places))))
        everywhere = Apply("expand.default", (column, (*batch, channels, *places)))
        given = {**a, "input": everywhere, "weight": weight, "bias": None}
        arguments_ = tuple(each if is_formula(each) else literal(each) for each in given.values())
        self.draft.add_map(node, Apply(str(node.target).removeprefix("aten."), arguments_))
        return None

    def _added(self, layer: Node, bias: Node, entries: Formula) -> Obstacle | None:
        axis = channel(layer, layer) if layer.target in LAYERS else rank(layer) - 1
        if not same(shape(bias)[-1], shape(layer)[axis]):
            return Obstacle(layer, "has a bias of another shape than its channels")
        if times_read(bias) != 1:
            return Obstacle(bias, "is read more than once")
        return fold(self.draft, bias, rank(bias) - 1, None, entries)

    def _product(self, node: Node, a: dict[str, Any], value: Node) -> Obstacle | None:
        """``x @ W``, with or without a bias: GPT-2's Conv1D; a stack of them where experts are stored as one tensor."""
        debt, weight = self.debts[value], a[PRODUCTS[node.target][1]]
        plain = constant_formula(self.facts, weight)
        if plain is None or rank(weight) < 2 or debt.axis != rank(value) - 1 or times_read(weight) != 1:
            return Obstacle(node, "multiplies by what is not a weight of its own")
        entering = rank(weight) - 2
        stopped = fold(self.draft, weight, entering, debt.scale, None) if debt.scale is not None else None
        if stopped or debt.shift is None:
            return stopped
        added = Apply("sum.dim_IntList", (Scaled(plain, debt.shift, entering), (entering,), entering > 0))
        if node.target is aten.addmm.default:
            if a["beta"] != 1 or a["alpha"] != 1:
                return Obstacle(node, "scales its bias")
            return self._added(node, a["self"], added)
        self.draft.add_map(node, added)
        return None


PRODUCTS: dict[Any, tuple[str, str]] = {
    aten.mm.default: ("self", "mat2"),
    aten.matmul.default: ("self", "other"),
    aten.bmm.default: ("self", "mat2"),
    aten.addmm.default: ("mat1", "mat2"),
}
"""Products of two factors: the names of the value's argument and of the weight's."""


def _onward(node: Node, operand: Node, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes of a node that axes of an operand become, in their order; None where it does more than move them."""
    found = tuple(own for axis in axes for own in range(rank(node)) if carries(node, own) == ((operand, axis),))
    if len(found) == len(axes):
        return found
    neighbours = axes == tuple(range(axes[0], axes[-1] + 1))
    return _reshaped(node, operand, axes) if node.target in _RESHAPES and neighbours else None


def _reshaped(node: Node, operand: Node, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Row-major order: neighbouring axes survive a reshape iff as many entries as before are in them and behind them."""

    def entries(value: Node, first: int, last: int) -> tuple[Any, Any]:
        return prod(shape(value)[first : last + 1]), prod(shape(value)[last + 1 :])

    wanted = entries(operand, axes[0], axes[-1])
    runs = ((first, last) for last in reversed(range(rank(node))) for first in reversed(range(last + 1)))
    found = next((run for run in runs if all(map(same, entries(node, *run), wanted))), None)
    return None if found is None else tuple(range(found[0], found[1] + 1))


_RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}


def _is_axis(node: Node, own: int, operand: Any, axis: int) -> bool:
    """Whether axis ``own`` of an elementwise result is that axis of an operand."""
    return is_tensor(operand) and own - (rank(node) - rank(operand)) == axis and same_sizes(operand, node)


def well_conditioned(program: Program, scale: Formula) -> bool:
    """Whether one may divide by a scale: no zeros, and entries less than `CONDITION` apart."""
    sizes = evaluate(substitute(scale, program.formulas), program.tensor).abs()
    return bool(sizes.min() > 0 and sizes.max() <= CONDITION * sizes.min())
