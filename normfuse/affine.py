"""Values that are y = a⊙x + c along one axis, with a and c computed from stored tensors: found, and absorbed.

`forms` is one loop forward: BatchNorm with running statistics, arithmetic with constants, views in between, and sums of two
such values of the same x (BN(x) + αx) compose, whoever wrote them. `into_writers` and `into_readers` say which stored
tensors change so that the affine is not needed any more; each answers with edits or with the node that stands in the way.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from normfuse.edits import Call, Edit, Expression, NewTensor, Ref, Reroute, SetTensor
from normfuse.facts import Facts
from normfuse.formula import Added, Apply, Formula, Number, Read, Scaled
from normfuse.rules import METADATA, carries, rank, same, spans, times_read
from normfuse.views import Norm, arguments, aten, dtype, is_tensor, shape

Move: TypeAlias = tuple[str, tuple[Any, ...]]
"""One shape op on the way from the base to the value: its name and its arguments after the first."""


@dataclass(frozen=True)
class Affine:
    """A value that is ``scale ⊙ moved(base) + shift`` along ``axis``.

    Attributes:
        base: the value that it is affine in.
        moves: shape ops between base and value, those that cancel left out.
        axis: the axis of the *value* along which scale and shift vary; None where both are numbers.
        scale: entries along the axis, or one entry; None for one.
        shift: likewise; None for zero.
        inner: the nodes from the base (excluded) to the value (included).
    """

    base: Node
    moves: tuple[Move, ...] = ()
    axis: int | None = None
    scale: Formula | None = None
    shift: Formula | None = None
    inner: frozenset[Node] = field(default=frozenset())


@dataclass(frozen=True)
class Obstacle:
    """Why an affine cannot be absorbed: the node in the way and a kind that the passes turn into words."""

    at: Node
    kind: str


@dataclass(frozen=True)
class Absorbed:
    """Edits that absorb an affine, and the nodes that the reasoning passed over."""

    edits: tuple[Edit, ...]
    nodes: frozenset[Node]


# -- finding -----------------------------------------------------------------------------------------------------------


def forms(facts: Facts) -> dict[Node, Affine]:
    """Every value that is a channel affine of an earlier one, with the earliest such base."""
    found: dict[Node, Affine] = {}
    batch_norms = {norm.out: norm for norm in facts.norms if norm.kind == "batch_norm"}
    for node in facts.program.graph.nodes:
        if node in facts.constant or not _is_float(node):
            continue
        form = _batch_norm(facts, batch_norms[node], found) if node in batch_norms else _form(facts, node, found)
        if form is not None:
            found[node] = form
    return found


def _is_float(node: Node) -> bool:
    kind = dtype(node)
    return node.op == "call_function" and kind is not None and kind.is_floating_point


def _of(node: Node, found: dict[Node, Affine]) -> Affine:
    """The form to go on from; a value with other readers stays itself, because they need it as it is."""
    return found[node] if node in found and times_read(node) == 1 else Affine(node)


def _batch_norm(facts: Facts, norm: Norm, found: dict[Node, Affine]) -> Affine | None:
    (call,) = norm.inner - {norm.out} or norm.inner
    a = arguments(call)
    if (
        a.get("training")
        or a.get("running_mean") is None
        or not all(each is None or each in facts.constant for each in _statistics(a))
    ):
        return None
    mean, variance = (constant(facts, each) for each in (a["running_mean"], a["running_var"]))
    if mean is None or variance is None:
        return None
    root = Apply("rsqrt.default", (Apply("add.Tensor", (variance, norm.eps)),))
    scale = root if norm.gain is None else Apply("mul.Tensor", (constant(facts, norm.gain), root))
    shift: Formula = Apply("neg.default", (Apply("mul.Tensor", (mean, scale)),))
    if norm.shift is not None:
        shift = Apply("add.Tensor", (constant(facts, norm.shift), shift))
    return _then(norm.x, found, 1, scale, shift, norm.inner)


def _statistics(a: dict[str, Any]) -> tuple[Any, ...]:
    return a["weight"], a["bias"], a["running_mean"], a["running_var"]


def _form(facts: Facts, node: Node, found: dict[Node, Affine]) -> Affine | None:
    match node.target:
        case aten.mul.Tensor | aten.div.Tensor | aten.add.Tensor | aten.sub.Tensor | aten.neg.default:
            return _arithmetic(facts, node, found)
        case _ if node.target in _MOVES:
            return _moved(node, found)
    return None


def _arithmetic(facts: Facts, node: Node, found: dict[Node, Affine]) -> Affine | None:
    a = arguments(node)
    x, y = a["self"], a.get("other")
    if a.get("alpha", 1) != 1:
        return None
    if node.target is aten.neg.default:
        return _then(x, found, None, Number(-1.0), None, frozenset({node}))
    if isinstance(x, Node) and x in facts.constant:
        if node.target is aten.div.Tensor:
            return None  # a constant over a value is no affine
        if node.target is aten.sub.Tensor:  # c - y = -(y - c)
            less = _with_constant(facts, node, y, x, aten.sub.Tensor, found)
            minus = Number(-1.0)
            return less and replace(less, scale=_product(less.scale, minus) or minus, shift=_product(less.shift, minus))
        x, y = y, x
    if is_tensor(y) and y not in facts.constant:
        return _sum(node, x, y, found) if node.target in (aten.add.Tensor, aten.sub.Tensor) else None
    return _with_constant(facts, node, x, y, node.target, found)


def _with_constant(facts: Facts, node: Node, x: Any, y: Any, target: Any, found: dict[Node, Affine]) -> Affine | None:
    if not is_tensor(x) or shape(x) != shape(node) or dtype(x) != dtype(node):
        return None
    axis: int | None = None
    inner = frozenset({node})
    if isinstance(y, Node):
        axes = [own for own in range(rank(node)) if spans(y, node, own) and not same(shape(node)[own], 1)]
        entries = constant(facts, y)
        if len(axes) > 1 or entries is None:
            return None
        axis = axes[0] if axes else None
    elif isinstance(y, (int, float)):
        entries = Number(float(y))
    else:
        return None
    match target:
        case aten.mul.Tensor:
            return _then(x, found, axis, entries, None, inner)
        case aten.div.Tensor:
            return _then(x, found, axis, Apply("reciprocal.default", (entries,)), None, inner)
        case aten.add.Tensor:
            return _then(x, found, axis, None, entries, inner)
        case _:
            return _then(x, found, axis, None, Apply("neg.default", (entries,)), inner)


def _then(
    x: Node,
    found: dict[Node, Affine],
    axis: int | None,
    scale: Formula | None,
    shift: Formula | None,
    inner: frozenset[Node],
) -> Affine:
    """The form of ``scale ⊙ x + shift``; where x is affine along another axis, x itself is the base."""
    form = _of(x, found)
    if None not in (axis, form.axis) and axis != form.axis:
        return Affine(x, (), axis, scale, shift, inner)
    return Affine(
        form.base,
        form.moves,
        form.axis if axis is None else axis,
        _product(form.scale, scale),
        _total(None if form.shift is None else _product(form.shift, scale), shift),
        form.inner | inner,
    )


def _product(a: Formula | None, b: Formula | None) -> Formula | None:
    return b if a is None else a if b is None else Apply("mul.Tensor", (a, b))


def _total(a: Formula | None, b: Formula | None) -> Formula | None:
    return b if a is None else a if b is None else Apply("add.Tensor", (a, b))


def _sum(node: Node, x: Any, y: Any, found: dict[Node, Affine]) -> Affine | None:
    """BN(x) + αx: two affines of one value, in one layout, are one."""
    one, other = _of(x, found), _of(y, found)
    axes = {form.axis for form in (one, other)} - {None}
    if one.base is not other.base or one.moves != other.moves or len(axes) > 1 or shape(x) != shape(y) != shape(node):
        return None
    sign = Number(-1.0 if node.target is aten.sub.Tensor else 1.0)
    scale = Apply("add.Tensor", (one.scale or Number(1.0), _product(other.scale, sign) or sign))
    shift = _total(one.shift, None if other.shift is None else _product(other.shift, sign))
    return Affine(one.base, one.moves, next(iter(axes), None), scale, shift, one.inner | other.inner | {node})


_MOVES = {
    aten.permute.default, aten.transpose.int, aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.clone.default, aten.alias.default, aten.t.default,
}  # fmt: skip


def _moved(node: Node, found: dict[Node, Affine]) -> Affine | None:
    x = node.args[0]
    if not isinstance(x, Node):
        return None
    form = _of(x, found)
    axis = form.axis
    if axis is not None:
        onward = [own for own in range(rank(node)) if carries(node, own) == ((x, axis),)]
        if len(onward) != 1:
            return None
        (axis,) = onward
    return replace(form, moves=_reduced(form, node), axis=axis, inner=form.inner | {node})


def _reduced(form: Affine, node: Node) -> tuple[Move, ...]:
    """The moves with ``node``'s added; permutations and views that undo each other are left out."""
    if node.target in (aten.clone.default, aten.alias.default):
        return form.moves
    if node.target in (aten.permute.default, aten.transpose.int, aten.t.default):
        order = _permutation(node)
        if form.moves and form.moves[-1][0] == "permute.default":
            before = form.moves[-1][1][0]
            order = tuple(before[own] for own in order)
            rest = form.moves[:-1]
        else:
            rest = form.moves
        return rest if order == tuple(range(len(order))) else (*rest, ("permute.default", (order,)))
    sizes = tuple(node.args[1]) if node.target in (aten.view.default, aten._unsafe_view.default) else None  # type: ignore[arg-type]
    rest = form.moves[:-1] if form.moves and form.moves[-1][0] == "view.default" else form.moves
    if not rest and str(shape(node)) == str(shape(form.base)):
        return ()
    if sizes is None:
        arguments_ = tuple(node.args[1:])
        return (*form.moves, (str(node.target).removeprefix("aten."), arguments_))
    return (*rest, ("view.default", (tuple(Ref(s.name) if isinstance(s, Node) else s for s in sizes),)))


def _permutation(node: Node) -> tuple[int, ...]:
    x = node.args[0]
    assert isinstance(x, Node)
    order = list(range(rank(x)))
    if node.target is aten.permute.default:
        return tuple(d % rank(x) for d in arguments(node)["dims"])
    a, b = (0, 1) if node.target is aten.t.default else (arguments(node)["dim0"] % rank(x), arguments(node)["dim1"] % rank(x))
    order[a], order[b] = order[b], order[a]
    return tuple(order)


def constant(facts: Facts, node: Node) -> Formula | None:
    """A value that depends on stored tensors alone, as a formula with its entries in one row."""
    formula = _constant(facts, node)
    return formula if formula is None or rank(node) == 1 else Apply("flatten.using_ints", (formula, 0, -1))


def _constant(facts: Facts, node: Any) -> Formula | None:
    if not isinstance(node, Node):
        return None
    if node.op == "placeholder":
        name = facts.program.stored.get(node.name)
        return None if name is None or name in facts.program.written else Read(name)
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    args: list[Any] = []
    for value in (arguments(node)[each.name] for each in node.target._schema.arguments if not each.kwarg_only):
        if isinstance(value, Node):
            inner = _constant(facts, value)
            if inner is None:
                return None
            args.append(inner)
        elif isinstance(value, (list, tuple)):
            if any(not isinstance(each, (int, float)) for each in value):
                return None
            args.append(tuple(value))
        else:
            args.append(value)
    return Apply(str(node.target).removeprefix("aten."), tuple(args))


# -- absorbing ---------------------------------------------------------------------------------------------------------

_KEEPS = _MOVES | {
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
    views = [reader for reader in form.base.users if reader in form.inner and reader.target in _MOVES]
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
        name = self.facts.program.stored.get(node.name)
        kind = dtype(node)
        if name is None or name in self.facts.program.written or kind is None or not kind.is_floating_point:
            return Obstacle(node, "input" if name is None else "written")
        formula: Formula = Read(name)
        formula = formula if scale is None else Scaled(formula, scale, axis)
        self.edits.append(SetTensor(name, formula if shift is None else Added(formula, shift, axis)))
        return None

    def _biased(self, node: Node, axis: int, scale: Formula | None, shift: Formula | None) -> Obstacle | None:
        a = arguments(node)
        weight, bias, groups = a["weight"], a["bias"], a.get("groups", 1)
        transposed = a.get("transposed", "conv_transpose" in str(node.target))
        channel = rank(node) - (1 if node.target is aten.linear.default else rank(weight) - 1)
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
        name = self.facts.program.stored.get(weight.name)
        self.nodes.add(weight)
        if scale is None:
            return None
        if name is None or times_read(weight) != 1:
            return Obstacle(weight, "shared")
        sizes = tuple(int(size) for size in shape(weight))
        split = Apply("view.default", (Read(name), (groups, sizes[0] // groups, sizes[1], -1)))
        entries = Apply("view.default", (scale, (groups, 1, sizes[1], 1)))
        self.edits.append(SetTensor(name, Apply("view.default", (Apply("mul.Tensor", (split, entries)), sizes))))
        return None

    def _new_bias(self, node: Node, weight: Node, shift: Formula | None) -> Obstacle | None:
        name = _stored_behind(self.facts, weight)
        size = shape(node)[rank(node) - (1 if node.target is aten.linear.default else rank(weight) - 1)]
        if name is None or shift is None:
            return Obstacle(weight, "op")
        made = _bias_name(self.facts, name)
        ones = Apply("ones.default", ((int(size),),))
        self.edits.append(NewTensor(made, Apply("mul.Tensor", (shift, ones)), name))
        args = [_literal(value) for value in _positional(node)]
        args[2] = Ref(made)
        self.edits.append(Reroute(node.name, Call(str(node.target).removeprefix("aten."), tuple(args))))
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


def _positional(node: Node) -> Iterator[Any]:
    named = arguments(node)
    yield from named.values()


def _literal(value: Any) -> Any:
    if isinstance(value, Node):
        return Ref(value.name)
    return tuple(_literal(each) for each in value) if isinstance(value, (list, tuple)) else value


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
        channel = rank(value) - 1 if linear else rank(value) - (rank(weight) - 1)
        if a["input"] is not value or axis != channel or rank(weight) < 2:
            return Obstacle(reader, "axis")
        if transposed or a.get("groups", 1) != 1:
            return Obstacle(reader, "groups")
        if self.shift is not None and not linear and not _unpadded(a.get("padding", 0)):
            return Obstacle(reader, "padding")
        name = self.facts.program.stored.get(weight.name)
        if name is None or name in self.facts.program.written or times_read(weight) != 1:
            return Obstacle(weight, "shared")
        if self.scale is not None:
            self.edits.append(SetTensor(name, Scaled(Read(name), self.scale, 1)))
            self.nodes.add(weight)
        return None if self.shift is None else self._bias(reader, weight, bias, name)

    def _bias(self, reader: Node, weight: Node, bias: Node | None, name: str) -> Obstacle | None:
        assert self.shift is not None
        others = (1, *range(2, rank(weight)))
        added = Apply("sum.dim_IntList", (Scaled(Read(name), self.shift, 1), others))
        if bias is not None:
            bias_name = self.facts.program.stored.get(bias.name)
            if bias_name is None or times_read(bias) != 1 or bias_name in self.facts.program.written:
                return Obstacle(bias, "shared")
            self.nodes.add(bias)
            self.edits.append(SetTensor(bias_name, Added(Read(bias_name), added, 0)))
            return None
        made = _bias_name(self.facts, name)
        self.edits.append(NewTensor(made, added, name))
        args = [_literal(each) for each in _positional(reader)]
        args[2] = Ref(made)
        self.edits.append(Reroute(reader.name, Call(str(reader.target).removeprefix("aten."), tuple(args))))
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


def maximal(found: dict[Node, Affine]) -> Iterator[tuple[Node, Affine]]:
    """Values whose affine no reader extends: where absorbing is decided."""
    extended = {inner for value, form in found.items() for inner in form.inner if inner is not value}
    for value, form in found.items():
        if value not in extended and (form.scale is not None or form.shift is not None):
            yield value, form


def moved(form: Affine) -> Expression:
    """The base in the value's layout, as an expression."""
    expression: Expression = Ref(form.base.name)
    for name, args in form.moves:
        expression = Call(name, (expression, *args))
    return expression
