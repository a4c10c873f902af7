"""The draft that collects edits, and pieces that the walks share.

`into_writers` folds a channel affine into what writes a value, `into_readers` into all that read it; where neither can,
`scale_shift` leaves one multiplication and one addition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch.fx import Node

from normfuse.analysis.affine import Affine, constant_formula, moved
from normfuse.analysis.facts import Facts
from normfuse.analysis.fixed_weights import why_fixed
from normfuse.analysis.obstacles import Obstacle, Why
from normfuse.graph.edits import Edit, NewTensor, Reroute, SetTensor
from normfuse.graph.expressions import Call, Expression, Formula, Read, Ref, reads
from normfuse.graph.nodes import computed_from
from normfuse.graph.ops.lookup import layer as layer_of
from normfuse.graph.ops.lookup import rank, times_read
from normfuse.graph.views import arguments, aten, dtype, shape


@dataclass(frozen=True)
class Absorbed:
    """Edits that absorb an affine.

    Attributes:
        edits: the changes.
        nodes: what the reasoning passed over.
        values: other affine values that are dissolved with it.
    """

    edits: tuple[Edit, ...]
    nodes: frozenset[Node]
    values: frozenset[Node] = frozenset()


def channel(layer: Node, value: Node) -> int:
    """The channel axis of a layer's input or output."""
    return rank(value) - (1 if layer.target is aten.linear.default else rank(arguments(layer)["weight"]) - 1)


def is_transposed(layer: Node) -> bool:
    """Whether a layer is a transposed convolution, whose weight has its input channels first."""
    known = layer_of(layer)
    by = known is not None and known.transposed
    return bool(arguments(layer)[by]) if isinstance(by, str) else by


class Draft:
    """Edits that are being collected, and the nodes that the reasoning passed over."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.edits: list[Edit] = []
        self.nodes: set[Node] = set()
        self.biases: dict[Node, str] = {}
        """layers that had no bias -> the name of the one that they get"""
        self.added_to: set[Node] = set()
        """layers to whose results a stored tensor is added"""

    def change(self, node: Node, to: Callable[[Formula], Formula]) -> Obstacle | None:
        """Give a value that depends on stored tensors alone, and is read once, another value."""
        self.nodes.add(node)
        if times_read(node) != 1:
            return Obstacle(Why.READ_AGAIN, node)
        if self.facts.editable(node):
            name = self.facts.program.stored[node.name]
            if not self.change_again(name, to):
                self.edits.append(SetTensor(name, to(Read(name))))
            return None
        if self.change_again(f"normfuse_{node.name}", to):
            return None
        formula = constant_formula(self.facts, node) if node.op == "call_function" else None
        if formula is None or next(reads(formula), None) is None:
            return why_fixed(self.facts, node) or Obstacle(Why.NOT_STORED, node)
        new, read = new_tensor(self.facts, f"normfuse_{node.name}", to(formula), node)
        self.edits += [new, Reroute(node.name, read)]
        return None

    def change_again(self, name: str, to: Callable[[Formula], Formula]) -> bool:
        """Change what the draft makes of a tensor already: a layer may both read a value and write to its stream."""
        for place, edit in enumerate(self.edits):
            if isinstance(edit, SetTensor | NewTensor) and edit.name == name:
                self.edits[place] = replace(edit, formula=to(edit.formula))
                return True
        return False

    def new_bias(self, layer: Node, value: Formula) -> Obstacle | None:
        """A bias for a layer that has none: beside its weight, as torch would call it where that name is free."""
        behind = (self.facts.program.stored.get(each.name) for each in computed_from(arguments(layer)["weight"]))
        weight = next((name for name in behind if name is not None), None)
        if weight is None:
            return Obstacle(Why.WEIGHT_NOT_STORED, layer)
        folder, _, own = weight.rpartition(".")
        made = f"{folder}.bias" if folder else "bias"
        program = self.facts.program
        if made in {*program.tensor_names(), *program.nodes, *self.biases.values()} or own == "bias":
            made = f"{weight.replace('.', '_')}_normfuse_bias"
        new, read = new_tensor(self.facts, made, value, arguments(layer)["weight"])
        named = {**arguments(layer), "bias": read}
        self.edits += [new, Reroute(layer.name, Call.of(layer.target, [*named.values()]))]
        self.biases[layer] = made
        return None

    def add(self, layer: Node, value: Formula) -> None:
        """Add a stored tensor to what a layer gives."""
        new, read = new_tensor(self.facts, f"normfuse_{layer.name}_map", value, layer)
        self.edits += [new, Reroute(layer.name, Ref(layer.name) + read)]
        self.added_to.add(layer)


def new_tensor(facts: Facts, name: str, formula: Formula, at: Node) -> tuple[NewTensor, Expression]:
    """A new stored tensor, and what reads it in the dtype of the value ``at``, which under autocast no stored one may have."""
    program, kind = facts.program, dtype(at)
    known = [each for each in (*reads(formula), *program.stored.values()) if program.tensor(each).is_floating_point()]
    alike = next((each for each in known if program.tensor(each).dtype == kind), None)
    if alike is not None:
        return NewTensor(name, formula, alike), Ref(name)
    in_dtype = (("dtype", str(kind).removeprefix("torch.")),)
    return NewTensor(name, formula, known[0]), Call("_to_copy.default", (Ref(name),), in_dtype)


def per_group(weight: Formula, entries: Formula, groups: int, sizes: tuple[int, ...]) -> Formula:
    """A grouped weight times the entries of the channels along its second axis, which are other ones in each group.

    A convolution's weight [Cout, Cin/g, …] has input channels there, a transposed one's [Cin, Cout/g, …] output channels.
    Either way row i belongs to group i // (rows/g), and entry (i, j) to channel j of that group.
    """
    split = Call("view.default", (weight, (groups, sizes[0] // groups, sizes[1], -1)))
    own = Call("view.default", (entries, (groups, 1, sizes[1], 1)))
    return Call("view.default", (split * own, sizes))


def full(entries: Formula, size: int) -> Formula:
    """One entry per channel, also where a single one stands for all of them."""
    return Call("expand.default", (entries, (size,)))


def column(entries: Formula, axis: int, value: Node) -> Formula:
    """Entries along an axis of a value, in a shape that broadcasts with it."""
    return Call("view.default", (entries, (-1, *(1 for _ in range(rank(value) - 1 - axis)))))


def sizes_of(node: Node) -> tuple[int, ...]:
    """The sizes of a stored tensor."""
    return tuple(int(size) for size in shape(node))


def scale_shift(facts: Facts, form: Affine, value: Node) -> tuple[Edit, ...]:
    """One multiplication and one addition in place of whatever computes the value."""
    edits: list[Edit] = []
    expression = moved(form)
    for op, entries in (("mul.Tensor", form.scale), ("add.Tensor", form.shift)):
        if entries is not None:
            made = f"normfuse_{value.name}_{'scale' if op == 'mul.Tensor' else 'shift'}"
            new, read = new_tensor(facts, made, column(entries, form.axis or 0, value), value)
            edits.append(new)
            expression = Call(op, (expression, read))
    return (*edits, Reroute(value.name, expression))
