"""Values that are y = a⊙x + c along one axis, with a and c computed from stored tensors, found in a program.

`forms` is one loop forward: BatchNorm with running statistics, arithmetic with constants, views in between, and sums of two
such values of the same x (BN(x) + αx) compose, whoever wrote them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from normfuse.analysis.facts import Facts
from normfuse.graph.arithmetic import only_computes
from normfuse.graph.expressions import Call, Expression, Formula, Number, Read, Ref, literal
from normfuse.graph.ops.lookup import carries, keeps, rank, same, same_sizes, times_read, varies_along
from normfuse.graph.ops.rounding import rounds
from normfuse.graph.ops.row import MOVES, Keeps
from normfuse.graph.ops.sizes import says_size
from normfuse.graph.views import Norm, NormKind, arguments, aten, dtype, is_tensor, shape

Move: TypeAlias = tuple[str, tuple[Any, ...], str]
"""One shape op on the way from the base to the value: its name, its arguments after the first, and the shape it is given."""


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


# -- finding -----------------------------------------------------------------------------------------------------------


def forms(facts: Facts) -> dict[Node, Affine]:
    """Every value that is a channel affine of an earlier one, with the earliest such base."""
    found: dict[Node, Affine] = {}
    batch_norms = {norm.out: norm for norm in facts.norms if norm.kind in (NormKind.BATCH_NORM, NormKind.INSTANCE_NORM)}
    for node in facts.program.graph.nodes:
        if node in facts.constant or not _is_float(node) or not (keeps(node) in MOVES or facts.takes(node)):
            continue  # a kept norm ends with its own gain and shift
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
        or a.get("use_input_stats")
        or a.get("running_mean") is None
        or not all(each is None or each in facts.constant for each in _statistics(a))
    ):
        return None
    mean, variance = (constant(facts, each) for each in (a["running_mean"], a["running_var"]))
    if mean is None or variance is None:
        return None
    root = Call("rsqrt.default", (variance + norm.eps,))
    scale = root if norm.gain is None else Call("mul.Tensor", (constant(facts, norm.gain), root))
    shift = -(mean * scale)
    if norm.shift is not None:
        shift = Call("add.Tensor", (constant(facts, norm.shift), shift))
    return _then(norm.x, found, 1, scale, shift, norm.inner)


def why_adaptive(facts: Facts, norm: Norm) -> str:
    """Why a norm is no constant at inference, as a sentence for the user."""
    read = {facts.program.stored.get(each.name) for node in norm.inner for each in node.all_input_nodes}
    return "the program updates its statistics" if read & facts.program.written else "its statistics come from each input"


def _statistics(a: dict[str, Any]) -> tuple[Any, ...]:
    return a["weight"], a["bias"], a["running_mean"], a["running_var"]


def _form(facts: Facts, node: Node, found: dict[Node, Affine]) -> Affine | None:
    match node.target:
        case aten.mul.Tensor | aten.div.Tensor | aten.add.Tensor | aten.sub.Tensor | aten.neg.default:
            return _arithmetic(facts, node, found)
        case _ if keeps(node) in MOVES:
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
            return less and replace(less, scale=product(less.scale, minus) or minus, shift=product(less.shift, minus))
        x, y = y, x
    if is_tensor(y) and y not in facts.constant:
        return _sum(node, x, y, found) if node.target in (aten.add.Tensor, aten.sub.Tensor) else None
    return _with_constant(facts, node, x, y, node.target, found)


def _with_constant(facts: Facts, node: Node, x: Any, y: Any, target: Any, found: dict[Node, Affine]) -> Affine | None:
    if not is_tensor(x) or not same_sizes(x, node) or dtype(x) != dtype(node):
        return None
    axis: int | None = None
    inner = frozenset({node})
    if isinstance(y, Node):
        axes = varies_along(y, node)
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
            return _then(x, found, axis, Call("reciprocal.default", (entries,)), None, inner)
        case aten.add.Tensor:
            return _then(x, found, axis, None, entries, inner)
        case _:
            return _then(x, found, axis, None, -entries, inner)


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
        product(form.scale, scale),
        total(None if form.shift is None else product(form.shift, scale), shift),
        form.inner | inner,
    )


def product(a: Formula | None, b: Formula | None) -> Formula | None:
    """The product of two scales, where None stands for one; a shift times a scale likewise."""
    return b if a is None else a if b is None else a * b


def total(a: Formula | None, b: Formula | None) -> Formula | None:
    """The sum of two shifts, where None stands for zero."""
    return b if a is None else a if b is None else a + b


def _sum(node: Node, x: Any, y: Any, found: dict[Node, Affine]) -> Affine | None:
    """BN(x) + αx: two affines of one value, in one layout, are one."""
    one, other = _of(x, found), _of(y, found)
    axes = {form.axis for form in (one, other)} - {None}
    if one.base is not other.base or one.moves != other.moves or len(axes) > 1 or not same_sizes(x, y, node):
        return None
    sign = Number(-1.0 if node.target is aten.sub.Tensor else 1.0)
    scale = (one.scale or Number(1.0)) + (product(other.scale, sign) or sign)
    shift = total(one.shift, None if other.shift is None else product(other.shift, sign))
    inner = one.inner | other.inner | {node}
    return _past_views(Affine(one.base, one.moves, next(iter(axes), None), scale, shift, inner), found)


def _past_views(form: Affine, found: dict[Node, Affine]) -> Affine:
    """The form over an earlier base, where that is a view which nobody else reads: RepBN's transpose is read twice."""
    view = found.get(form.base)
    if view is None or view.scale is not None or view.shift is not None or not set(form.base.users) <= form.inner:
        return form
    return replace(form, base=view.base, moves=(*view.moves, *form.moves), inner=view.inner | form.inner)


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
    if keeps(node) is Keeps.COPY:
        return form.moves
    given = str(shape(node.args[0]))  # type: ignore[arg-type]
    if keeps(node) is Keeps.PERMUTE:
        order, rest = _permutation(node), form.moves
        if rest and rest[-1][0] == "permute.default":
            order, given = tuple(rest[-1][1][0][own] for own in order), rest[-1][2]
            rest = rest[:-1]
        return rest if order == tuple(range(len(order))) else (*rest, ("permute.default", (order,), given))
    # one reshape after the other is one reshape, and none if it ends where they began
    began, rest = given, form.moves
    while rest and rest[-1][0] != "permute.default":
        began, rest = rest[-1][2], rest[:-1]
    if began == str(shape(node)):
        return rest
    if says_size(node):
        direct = not rest and _in_rows(form.base)  # otherwise a copy that was left out may be needed
        name = "view.default" if direct else "reshape.default"
        return (*rest, (name, (literal(node.args[1]),), began))
    return (*form.moves, (str(node.target).removeprefix("aten."), literal(node.args[1:]), given))


def _in_rows(node: Node) -> bool:
    """Whether a value is proven to lie in memory row by row, as a view of it takes for granted."""
    behind: Any = 1
    for size, stride in zip(reversed(shape(node)), reversed(node.meta["val"].stride()), strict=True):
        if not (same(size, 1) or same(stride, behind)):
            return False
        behind = behind * size
    return True


def _permutation(node: Node) -> tuple[int, ...]:
    x = node.args[0]
    assert isinstance(x, Node)
    order = list(range(rank(x)))
    if rank(x) < 2:
        return tuple(order)
    if node.target is aten.permute.default:
        return tuple(d % rank(x) for d in arguments(node)["dims"])
    a, b = (0, 1) if node.target is aten.t.default else (arguments(node)["dim0"] % rank(x), arguments(node)["dim1"] % rank(x))
    order[a], order[b] = order[b], order[a]
    return tuple(order)


def constant(facts: Facts, node: Node) -> Formula | None:
    """A value that depends on stored tensors alone, as a formula with its entries in one row."""
    formula = constant_formula(facts, node)
    return formula if formula is None or rank(node) == 1 else Call("flatten.using_ints", (formula, 0, -1))


def constant_formula(facts: Facts, node: Any) -> Formula | None:
    """A value that depends on stored tensors alone, as a formula in its own shape; None where it has none."""
    if node not in facts.constant:
        return None
    if node.op == "placeholder":
        return Read(facts.program.stored[node.name])
    if node.target is operator.getitem:
        if node.args[0].target is aten._native_batch_norm_legit.no_stats:
            return _normalized(facts, arguments(node.args[0])) if node.args[1] == 0 else None
        source = constant_formula(facts, node.args[0])
        return replace(source, output=node.args[1]) if isinstance(source, Call) else None
    if not only_computes(node.target) or not _stays_float(node) or rounds(node):
        return None
    if keeps(node) in (Keeps.COPY, Keeps.CAST):
        return constant_formula(facts, node.args[0])
    named = arguments(node)
    args, kwargs = [], []
    for each in node.target._schema.arguments:
        value = _literal(facts, named[each.name])
        if value is _NO_LITERAL or (each.kwarg_only and isinstance(value, Expression)):
            return None
        if not each.kwarg_only:
            args.append(value)
        elif value is not None:
            kwargs.append((each.name, value))
    if keeps(node) is Keeps.RESHAPE and says_size(node):  # the same entries, however the operand lies in memory
        return Call("reshape.default", tuple(args))
    return Call(str(node.target).removeprefix("aten."), tuple(args), tuple(kwargs))


def _normalized(facts: Facts, a: dict[str, Any]) -> Formula | None:
    """A weight that is normalized by a BatchNorm without statistics, spelled out: its kernel trusts all sizes."""
    x, entries = a["input"], [each and constant_formula(facts, each) for each in (a["weight"], a["bias"])]
    of = constant_formula(facts, x)
    missing = any(own is None for own, each in zip(entries, (a["weight"], a["bias"]), strict=True) if each is not None)
    if of is None or missing or not _stays_float(x) or not a["training"]:
        return None
    dims, sizes = tuple(own for own in range(rank(x)) if own != 1), (1, -1, *[1] * (rank(x) - 2))
    variance = Call("var.correction", (of, dims), (("correction", 0), ("keepdim", True)))
    made = (of - Call("mean.dim", (of, dims, True))) / Call("sqrt.default", (variance + a["eps"],))
    for op, each in zip(("mul.Tensor", "add.Tensor"), entries, strict=True):
        made = made if each is None else Call(op, (made, Call("reshape.default", (each, sizes))))
    return made


_NO_LITERAL = object()


def _literal(facts: Facts, value: Any) -> Any:
    """An argument of a constant call in a formula."""
    if isinstance(value, Node):
        return _NO_LITERAL if (formula := constant_formula(facts, value)) is None else formula
    if isinstance(value, (list, tuple)):
        parts = tuple(_literal(facts, each) for each in value)
        return _NO_LITERAL if any(part is _NO_LITERAL for part in parts) else parts
    return value if value is None or isinstance(value, (bool, int, float, str)) else _NO_LITERAL


def _stays_float(node: Node) -> bool:
    """Whether a call takes and gives ordinary floats: formulas know no integers, masks or complex numbers."""
    values = (each.meta.get("val") for each in (node, *node.all_input_nodes))
    tensors = (each for value in values for each in (value if isinstance(value, (tuple, list)) else (value,)))
    return all(isinstance(each, torch.Tensor) and each.is_floating_point() for each in tensors)


def maximal(found: dict[Node, Affine]) -> Iterator[tuple[Node, Affine]]:
    """Values whose affine no reader extends: where absorbing is decided."""
    extended = {inner for value, form in found.items() for inner in form.inner if inner is not value}
    for value, form in found.items():
        if value not in extended and (form.scale is not None or form.shift is not None):
            yield value, form


def moved(form: Affine) -> Expression:
    """The base in the value's layout, as an expression."""
    expression: Expression = Ref(form.base.name)
    for name, args, _ in form.moves:
        expression = Call(name, (expression, *args))
    return expression
