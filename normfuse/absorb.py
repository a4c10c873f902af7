"""Take a channel affine into the layers around it: `into_writers`, `into_readers`, or `scale_shift` where neither can.

Each says which stored tensors change so that the affine is not needed any more, or names the node that stands in the way.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from normfuse.affine import MOVES, Affine, moved
from normfuse.edits import Call, Edit, NewTensor, Ref, Reroute, SetTensor, literal
from normfuse.facts import Facts
from normfuse.formula import Added, Apply, Formula, Read, Scaled
from normfuse.rules import METADATA, carries, rank, same, times_read
from normfuse.views import arguments, aten, shape


@dataclass(frozen=True)
class Obstacle:
    """Why an affine cannot be absorbed: the node in the way, and what about it is."""

    at: Node
    kind: str


@dataclass(frozen=True)
class Absorbed:
    """Edits that absorb an affine, and the nodes that the reasoning passed over."""

    edits: tuple[Edit, ...]
    nodes: frozenset[Node]


_KEEPS = MOVES | {
    aten._to_copy.default, aten.expand.default, aten.repeat.default, aten.select.int, aten.slice.Tensor,
    aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, operator.getitem, aten.index_select.default,
    aten.index.Tensor, aten.gather.default, aten.roll.default, aten.flip.default, aten.mean.dim, aten.embedding.default,
    aten.cat.default, aten.stack.default,
}  # fmt: skip
"""Ops that pick, move or average entries: a constant added to all of them is added to the result."""

_WITH_BIAS = {
    aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding,
    aten.conv2d.padding, aten.conv3d.padding, aten.conv_transpose1d.default, aten.conv_transpose2d.input,
    aten.conv_transpose3d.input, aten.convolution.default,
}  # fmt: skip


def into_writers(facts: Facts, form: Affine, value: Node) -> Absorbed | Obstacle:
    """Scale and shift of a value folded into the stored tensors that write its base."""
    axis = _axis_of_base(form, value)
    strays = [reader for reader in form.base.users if reader not in form.inner and reader.target not in METADATA]
    if strays:
        return Obstacle(strays[0], "reader")
    if axis is None and form.axis is not None:
        return Obstacle(form.base, "axis")
    walk = _Writers(facts)
    obstacle = walk.fold(form.base, rank(form.base) - 1 if axis is None else axis, form.scale, form.shift)
    return obstacle or Absorbed(tuple(walk.edits), frozenset(walk.nodes))


def _axis_of_base(form: Affine, value: Node) -> int | None:
    """The axis of the base that the form's axis is; None where the views in between do not tell."""
    if form.axis is None or not form.moves:
        return form.axis
    ((name, args), *others) = form.moves
    if others:
        return None
    if name == "permute.default":
        return int(args[0][form.axis])
    views = [reader for reader in form.base.users if reader in form.inner and reader.target in MOVES]
    if len(views) != 1 or str(shape(views[0])) != str(shape(value)):
        return None
    carried = carries(views[0], form.axis)
    return carried[0][1] if carried else None


class _Writers:
    """The walk back from a base to its writers, collecting edits."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.edits: list[Edit] = []
        self.nodes: set[Node] = set()

    def fold(self, node: Node, axis: int, scale: Formula | None, shift: Formula | None) -> Obstacle | None:
        self.nodes.add(node)
        if node.op == "placeholder":
            return self._stored(node, axis, scale, shift)
        if node.target in _WITH_BIAS:
            return self._biased(node, axis, scale, shift)
        carried = carries(node, axis)
        if not carried:
            return Obstacle(node, "op")
        if shift is not None and node.target not in (*_KEEPS, aten.add.Tensor, aten.sub.Tensor, aten.addmm.default):
            return Obstacle(node, "shift")
        if node.target is aten.addmm.default and arguments(node)["beta"] != 1:
            return Obstacle(node, "shift")  # the bias is scaled on its way
        for place, (operand, own) in enumerate(carried):
            everyone = node.target in _KEEPS
            first = place == (len(carried) - 1 if node.target is aten.addmm.default else 0)
            stopped = self._onward(operand, own, scale, shift if everyone or first else None)
            if stopped:
                return stopped
        return None

    def _onward(self, operand: Node, axis: int, scale: Formula | None, shift: Formula | None) -> Obstacle | None:
        if times_read(operand) != 1:
            return Obstacle(operand, "shared")
        return self.fold(operand, axis, scale, shift)

    def _stored(self, node: Node, axis: int, scale: Formula | None, shift: Formula | None) -> Obstacle | None:
        if not self.facts.editable(node):
            return Obstacle(node, "tensor")
        name = self.facts.program.stored[node.name]
        formula: Formula = Read(name)
        formula = formula if scale is None else Scaled(formula, scale, axis)
        self.edits.append(SetTensor(name, formula if shift is None else Added(formula, shift, axis)))
        return None

    def _biased(self, node: Node, axis: int, scale: Formula | None, shift: Formula | None) -> Obstacle | None:
        a = arguments(node)
        weight, bias, groups = a["weight"], a["bias"], a.get("groups", 1)
        transposed = a.get("transposed", "conv_transpose" in str(node.target))
        channel = _channel(node, node, weight)
        if axis != channel or rank(weight) < 2:
            return Obstacle(node, "axis")
        if bias is not None and (rank(bias) != 1 or not same(shape(bias)[0], shape(node)[channel])):
            return Obstacle(node, "op")
        if transposed and groups > 1:
            stopped = self._grouped_transposed(weight, scale, groups)
        else:
            stopped = None if scale is None else self._onward(weight, 1 if transposed else 0, scale, None)
        if stopped or (bias is None and shift is None):
            return stopped
        if bias is not None:
            return self._onward(bias, 0, scale, shift)
        return self._new_bias(node, weight, shift)

    def _grouped_transposed(self, weight: Node, scale: Formula | None, groups: int) -> Obstacle | None:
        """W[i, j] of group i // (Cin/g) writes channel (i // (Cin/g))·(Cout/g) + j."""
        self.nodes.add(weight)
        if scale is None:
            return None
        if not self.facts.editable(weight) or times_read(weight) != 1:
            return Obstacle(weight, "shared")
        name = self.facts.program.stored[weight.name]
        sizes = tuple(int(size) for size in shape(weight))
        split = Apply("view.default", (Read(name), (groups, sizes[0] // groups, sizes[1], -1)))
        entries = Apply("view.default", (scale, (groups, 1, sizes[1], 1)))
        self.edits.append(SetTensor(name, Apply("view.default", (Apply("mul.Tensor", (split, entries)), sizes))))
        return None

    def _new_bias(self, node: Node, weight: Node, shift: Formula | None) -> Obstacle | None:
        name = _stored_behind(self.facts, weight)
        size = shape(node)[_channel(node, node, weight)]
        if name is None or shift is None:
            return Obstacle(weight, "op")
        ones = Apply("ones.default", ((int(size),),))
        self.edits.extend(_with_new_bias(self.facts, node, name, Apply("mul.Tensor", (shift, ones))))
        return None


def _bias_name(facts: Facts, weight: str) -> str:
    """The name of a bias that a layer did not have: beside its weight, as torch would call it where that name is free."""
    folder, _, own = weight.rpartition(".")
    name = f"{folder}.bias" if folder else "bias"
    taken = name in set(facts.program.tensor_names()) or own == "bias"
    return f"{weight.replace('.', '_')}_normfuse_bias" if taken else name


def _stored_behind(facts: Facts, node: Node) -> str | None:
    while node.op == "call_function" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return facts.program.stored.get(node.name)


def _with_new_bias(facts: Facts, layer: Node, weight: str, value: Formula) -> tuple[Edit, Edit]:
    """A bias for a layer that has none, and the call that reads it."""
    made = _bias_name(facts, weight)
    named = {**arguments(layer), "bias": Ref(made)}
    call = Call(str(layer.target).removeprefix("aten."), tuple(map(literal, named.values())))
    return NewTensor(made, value, weight), Reroute(layer.name, call)


def _channel(layer: Node, value: Node, weight: Node) -> int:
    """The channel axis of a layer's input or output."""
    return rank(value) - (1 if layer.target is aten.linear.default else rank(weight) - 1)


def into_readers(facts: Facts, form: Affine, value: Node) -> Absorbed | Obstacle:
    """Scale and shift of a value folded into the weights and biases of all its readers."""
    if form.axis is None:
        return Obstacle(value, "axis")
    walk = _Readers(facts, form.scale, form.shift)
    obstacle = walk.down(value, form.axis)
    return obstacle or Absorbed(tuple(walk.edits), frozenset(walk.nodes))


class _Readers:
    """The walk forward from a value to its readers, collecting edits."""

    def __init__(self, facts: Facts, scale: Formula | None, shift: Formula | None) -> None:
        self.facts, self.scale, self.shift = facts, scale, shift
        self.edits: list[Edit] = []
        self.nodes: set[Node] = set()

    def down(self, value: Node, axis: int) -> Obstacle | None:
        readers = [reader for reader in value.users if reader.target not in METADATA]
        for reader in readers:
            self.nodes.add(reader)
            stopped = self._reader(reader, value, axis)
            if stopped:
                return stopped
        return None if readers else Obstacle(value, "reader")

    def _reader(self, reader: Node, value: Node, axis: int) -> Obstacle | None:
        if reader.target in _KEEPS - {aten.cat.default, aten.stack.default, aten.embedding.default, operator.getitem}:
            onward = [own for own in range(rank(reader)) if carries(reader, own) == ((value, axis),)]
            return self.down(reader, onward[0]) if len(onward) == 1 else Obstacle(reader, "axis")
        if reader.target in _WITH_BIAS and list(reader.all_input_nodes).count(value) == 1:
            return self._layer(reader, value, axis)
        return Obstacle(reader, "reader")

    def _layer(self, reader: Node, value: Node, axis: int) -> Obstacle | None:
        a = arguments(reader)
        weight, bias = a["weight"], a["bias"]
        linear = reader.target is aten.linear.default
        transposed = a.get("transposed", "conv_transpose" in str(reader.target))
        if a["input"] is not value or axis != _channel(reader, value, weight) or rank(weight) < 2:
            return Obstacle(reader, "axis")
        if transposed or a.get("groups", 1) != 1:
            return Obstacle(reader, "groups")
        if self.shift is not None and not linear and not _unpadded(a.get("padding", 0)):
            return Obstacle(reader, "padding")
        if not self.facts.editable(weight) or times_read(weight) != 1:
            return Obstacle(weight, "shared")
        name = self.facts.program.stored[weight.name]
        if self.scale is not None:
            self.edits.append(SetTensor(name, Scaled(Read(name), self.scale, 1)))
            self.nodes.add(weight)
        return None if self.shift is None else self._bias(reader, weight, bias, name)

    def _bias(self, reader: Node, weight: Node, bias: Node | None, name: str) -> Obstacle | None:
        assert self.shift is not None
        others = (1, *range(2, rank(weight)))
        added = Apply("sum.dim_IntList", (Scaled(Read(name), self.shift, 1), others))
        if bias is not None:
            if not self.facts.editable(bias) or times_read(bias) != 1:
                return Obstacle(bias, "shared")
            bias_name = self.facts.program.stored[bias.name]
            self.nodes.add(bias)
            self.edits.append(SetTensor(bias_name, Added(Read(bias_name), added, 0)))
            return None
        self.edits.extend(_with_new_bias(self.facts, reader, name, added))
        return None


def _unpadded(padding: Any) -> bool:
    return padding == "valid" or (not isinstance(padding, str) and all(p == 0 for p in _as_list(padding)))


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def scale_shift(form: Affine, value: Node, like: str) -> tuple[Edit, ...]:
    """One multiplication and one addition in place of whatever computes the value.

    Args:
        form: of the value.
        value: the value.
        like: name of a stored tensor that gives the new ones their dtype.
    """
    edits: list[Edit] = []
    expression = moved(form)
    axis = 0 if form.axis is None else form.axis
    sizes = (-1, *(1 for _ in range(rank(value) - 1 - axis)))
    for op, entries in (("mul.Tensor", form.scale), ("add.Tensor", form.shift)):
        if entries is not None:
            made = f"normfuse_{value.name}_{'scale' if op == 'mul.Tensor' else 'shift'}"
            edits.append(NewTensor(made, Apply("view.default", (entries, sizes)), like))
            expression = Call(op, (expression, Ref(made)))
    return (*edits, Reroute(value.name, expression))
