"""Who reads the output of a norm, and whether all of them can read it in another basis, with its gain and shift folded.

From the norm on, every value v is owed: it is stored as t with v = scale ⊙ Lt + shift, where L gives back the entries that are
meant (`normfuse.transforms.basis`). Views and picks pass that on, further constants along the axis join scale and shift, and
products with stored weights settle it: W ← (W diag(scale))L and b ← b + W shift. Anything else stands in the way.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import Any

import torch
from torch.fx import Node

from normfuse.analysis.affine import constant, product, total
from normfuse.analysis.facts import Facts
from normfuse.graph.formula import Apply, Formula, Number
from normfuse.graph.ops.carrying import carries, rank, same, same_sizes, times_read, varies_along
from normfuse.graph.ops.sizes import follows
from normfuse.graph.views import Norm, arguments, aten, dtype, is_tensor, shape, tensors_in
from normfuse.transforms.draft import LAYERS, Obstacle, channel, is_transposed, passes_shift, unpadded
from normfuse.transforms.into_readers import PRODUCTS, Debt

Key = tuple[Node, int]
"""A value and one of its axes."""


@dataclass(frozen=True)
class Layer:
    """A product with a stored weight that settles what is owed.

    Attributes:
        node: the product.
        weight: name of the stored weight.
        dim: the axis of the weight that meets the owed one.
        way: views and casts between the stored weight and the product, each with its axis.
        debt: what is owed.
        bias: name of the stored bias, or None.
        takes_bias: whether the call has a place for a bias; otherwise what the shift adds is one more addition.
    """

    node: Node
    weight: str
    dim: int
    way: tuple[Key, ...]
    debt: Debt
    bias: str | None
    takes_bias: bool


@dataclass
class Settled:
    """The readers of a norm's output, all of which can settle it.

    Attributes:
        layers: where it ends.
        values: the values on the way, each with the axis that is owed; the norm's own output first.
        dropped: constant multiplications and additions on the way that give way to their operands.
    """

    layers: list[Layer] = field(default_factory=list)
    values: list[Key] = field(default_factory=list)
    dropped: list[tuple[Node, Node]] = field(default_factory=list)


def settle(facts: Facts, norm: Norm) -> Settled | Obstacle:
    """Who reads a norm's output, or the first reader that cannot read it in another basis."""
    scale, shift = (None if node is None else constant(facts, node) for node in (norm.gain, norm.shift))
    for node, found in ((norm.gain, scale), (norm.shift, shift)):
        if node is not None and found is None:
            return Obstacle(node, "is no stored gain or shift")
    if dtype(norm.out) != dtype(norm.x):
        return Obstacle(norm.out, "has another dtype than its input")
    return _Walk(facts).run(norm.out, Debt(norm.axes[0], scale, shift))


class _Walk:
    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.debts: dict[Node, Debt] = {}
        self.found = Settled()
        self.frontier: list[Node] = []
        """readers still to be looked at, in execution order: what their operands owe is known by then"""

    def run(self, value: Node, debt: Debt) -> Settled | Obstacle:
        self._owe(value, debt)
        met: set[Node] = set()
        while self.frontier:
            node = heappop(self.frontier)
            if node not in met:
                met.add(node)
                stopped = self._reader(node)
                if stopped:
                    return stopped
        return self.found if self.found.layers else Obstacle(value, "is read by no linear layer")

    def _owe(self, value: Node, debt: Debt) -> None:
        self.debts[value] = debt
        self.found.values.append((value, debt.axis))
        for reader in value.users:
            heappush(self.frontier, reader)

    def _reader(self, node: Node) -> Obstacle | None:
        given = Counter(tensors_in((node.args, node.kwargs)))
        owing = [each for each in given if each in self.debts]
        if all(is_blind(node, each, self.debts[each].axis) for each in owing):
            return None
        if node.op != "call_function":
            return Obstacle(node, "reads it")
        if len(owing) == given[owing[0]] == 1 and isinstance(node.target, torch._ops.OpOverload):
            (x,), a = owing, arguments(node)
            if node.target in LAYERS and a["input"] is x:
                return self._layer(node, a, self.debts[x])
            if node.target in _PRODUCTS and a[_PRODUCTS[node.target][0]] is x:
                return self._product(node, a, self.debts[x])
            if node.target in _ARITHMETIC and a.get("alpha", 1) == 1 and same_sizes(x, node) and dtype(x) == dtype(node):
                other = a["other"] if a["self"] is x else a["self"]
                if other in self.facts.constant or isinstance(other, (int, float)):
                    return self._constant(node, x, other, is_first=a["self"] is x)
        return self._passed(node, given, owing)

    # -- passing it on -------------------------------------------------------------------------------------------------

    def _passed(self, node: Node, given: Counter[Node], owing: list[Node]) -> Obstacle | None:
        debt = self.debts[owing[0]]
        onward = [own for own in range(rank(node)) if (owing[0], debt.axis) in (carries(node, own) or ())]
        carried = Counter(carries(node, onward[0]) or ()) if len(onward) == 1 else Counter()
        if not carried or not follows(node, onward[0]):
            return Obstacle(node, "is no linear layer")
        if debt.shift is not None and not passes_shift(node):
            return Obstacle(node, "does not let a shift through")
        for (operand, axis), times in carried.items():
            if self.debts.get(operand) != replace(debt, axis=axis) or given[operand] != times:
                return Obstacle(node, "joins it with another value")
        if {operand for operand, _ in carried} != set(owing):
            return Obstacle(node, "reads the value in two ways")
        self._owe(node, replace(debt, axis=onward[0]))
        return None

    def _constant(self, node: Node, x: Node, other: Any, is_first: bool) -> Obstacle | None:
        """Multiplied by, or added to, what varies along the axis alone."""
        debt = self.debts[x]
        entries: Formula | None = Number(float(other)) if not isinstance(other, Node) else constant(self.facts, other)
        axes = varies_along(other, node) if isinstance(other, Node) else []
        if entries is None or axes not in ([], [debt.axis]) or not (is_first or node.target in _COMMUTING):
            return Obstacle(node, "differs along another axis than the channels")
        if node.target in (aten.div.Tensor, aten.sub.Tensor):
            entries = Apply("reciprocal.default" if node.target is aten.div.Tensor else "neg.default", (entries,))
        if node.target in (aten.add.Tensor, aten.sub.Tensor):
            debt = replace(debt, shift=total(debt.shift, entries))
        else:
            shift = None if debt.shift is None else product(debt.shift, entries)
            debt = replace(debt, scale=product(debt.scale, entries), shift=shift)
        self.found.dropped.append((node, x))
        self._owe(node, debt)
        return None

    # -- settling it ---------------------------------------------------------------------------------------------------

    def _layer(self, node: Node, a: dict[str, Any], debt: Debt) -> Obstacle | None:
        weight, bias, transposed = a["weight"], a["bias"], is_transposed(node)
        if rank(weight) < 2 or debt.axis != channel(node, a["input"]) or a.get("groups", 1) != 1:
            return Obstacle(node, "mixes the channels in groups, or another axis")
        padded = not (node.target is aten.linear.default or unpadded(a["padding"]))
        if debt.shift is not None and (transposed or padded):
            return Obstacle(node, "adds zeros around its input, which a shift would change")
        return self._settle(node, weight, 0 if transposed else 1, debt, bias, bias is None)

    def _product(self, node: Node, a: dict[str, Any], debt: Debt) -> Obstacle | None:
        x, weight = (a[name] for name in _PRODUCTS[node.target])
        if rank(x) < 2 or rank(weight) < 2 or debt.axis != rank(x) - 1:
            return Obstacle(node, "mixes another axis than the channels")
        if debt.shift is not None and a.get("alpha", 1) != 1:
            return Obstacle(node, "scales what it multiplies")
        bias = a["self"] if node.target is aten.addmm.default and a["beta"] == 1 else None
        return self._settle(node, weight, rank(weight) - 2, debt, bias, False)

    def _settle(self, node: Node, weight: Node, dim: int, debt: Debt, bias: Any, takes_bias: bool) -> Obstacle | None:
        way: list[Key] = []
        while weight.op != "placeholder":
            carried = carries(weight, dim) or ()
            if len(carried) != 1 or not follows(weight, dim) or times_read(weight) != 1:
                return Obstacle(node, "multiplies by what is no stored weight")
            way.append((weight, dim))
            ((weight, dim),) = carried
        if not self.facts.editable(weight) or (way and rank(weight) != 2):
            return Obstacle(node, "multiplies by what is no stored weight")
        stored = self.facts.program.stored
        out = shape(node)[channel(node, node) if node.target in LAYERS else -1]
        owned = is_tensor(bias) and self.facts.editable(bias) and rank(bias) == 1 and same(shape(bias)[0], out)
        if debt.shift is not None and bias is not None and not owned and rank(weight) > 2:
            return Obstacle(bias, "is no bias of its own")
        name = stored[bias.name] if owned else None
        self.found.layers.append(Layer(node, stored[weight.name], dim, tuple(way), debt, name, takes_bias))
        return None


_PRODUCTS = {**PRODUCTS, aten.bmm.default: ("self", "mat2")}
_COMMUTING = (aten.mul.Tensor, aten.add.Tensor)
_ARITHMETIC = (*_COMMUTING, aten.div.Tensor, aten.sub.Tensor)


def is_blind(reader: Node, value: Node, axis: int) -> bool:
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
