"""Arithmetic as data: what a stored tensor becomes, and what the readers of a value read instead.

An expression prints, survives JSON, tells what it reads, and never computes by itself: `interpret` is given what its leaves
and its operators are. On numbers, in float64 and in one go, it is what a stored tensor becomes, so that several rewrites of one
tensor still round once; on the nodes of a graph it is calls.

    Read("fc.weight")                                    fc.weight
    Read("fc.weight").centered(0)                        center(fc.weight, dim=0)
    Read("fc.weight").scaled(Read("ls"), 0)              scale(fc.weight, ls, dim=0)
    Ref("x") * Ref("gain")                               mul.Tensor(x, gain)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.fx import Node

from normfuse import strict_json
from normfuse.errors import InvalidPlan
from normfuse.graph.arithmetic import operator_named

T = TypeVar("T")


class Expression:
    """A stored tensor, a value, a number, or a call of an operator on such; ``+ - * /`` call aten's."""

    def __add__(self, other: Expression | float) -> Call:
        return Call("add.Tensor", (self, other))

    def __sub__(self, other: Expression | float) -> Call:
        return Call("sub.Tensor", (self, other))

    def __mul__(self, other: Expression | float) -> Call:
        return Call("mul.Tensor", (self, other))

    def __truediv__(self, other: Expression | float) -> Call:
        return Call("div.Tensor", (self, other))

    def __neg__(self) -> Call:
        return Call("neg.default", (self,))

    def centered(self, dim: int) -> Call:
        """Less its mean along ``dim``: C₀ applied to one axis (Pre-RMSNorm paper, eq. for recentring)."""
        return Call("center", (self,), (("dim", dim),))

    def scaled(self, by: Expression, dim: int) -> Call:
        """Times the entries of ``by`` (flattened) along ``dim``: diag(by) applied to one axis."""
        return Call("scale", (self, by), (("dim", dim),))

    def shifted(self, by: Expression, dim: int) -> Call:
        """Plus the entries of ``by`` (flattened) along ``dim``."""
        return Call("shift", (self, by), (("dim", dim),))


@dataclass(frozen=True)
class Read(Expression):
    """The stored tensor of this name."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Ref(Expression):
    """The value of the node of this name."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Number(Expression):
    """A literal."""

    value: float

    def __str__(self) -> str:
        return f"{self.value:g}"


@dataclass(frozen=True)
class Call(Expression):
    """An operator of aten, such as ``rsqrt.default``, or one along an axis (`ALONG_AXIS`), on expressions and literals.

    Attributes:
        op: name of the operator.
        args: its positional arguments, expressions among them, also in tuples.
        kwargs: its keyword arguments, literals only; ``dtype`` by name, as ``float32``.
        output: which of its results is meant, where it yields several.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()
    output: int = 0

    def __str__(self) -> str:
        return text(self)

    @classmethod
    def of(cls, target: Any, arguments: Sequence[Any]) -> Call:
        """A call of an operator of torch, with the arguments of a graph's call or expressions in their place."""
        return cls(str(target).removeprefix("aten."), tuple(map(literal, arguments)))

    def target(self) -> torch._ops.OpOverload:
        """The operator that a graph calls; a name reaches nothing else."""
        try:
            return operator_named(self.op, in_graph=True)
        except ValueError as error:
            raise InvalidPlan(str(error)) from error

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of a graph's call."""
        return {name: _dtype(value) if name == "dtype" else value for name, value in self.kwargs}


Formula: TypeAlias = Expression
"""An expression over stored tensors: `Read`, `Number` and calls of these."""

ALONG_AXIS = ("center", "scale", "shift")
"""The operators that aten does not have: what they are along depends on the rank of what they are of."""

FLOAT32 = (("dtype", "float32"),)
"""The keyword of a call that computes in float32."""


def _dtype(name: Any) -> torch.dtype:
    if name not in ("float16", "bfloat16", "float32", "float64"):
        raise InvalidPlan(f"'{name}' is no dtype to compute in")
    found: torch.dtype = getattr(torch, name)
    return found


def literal(value: Any) -> Any:
    """An argument of a graph's call as an argument of a `Call`: nodes by name, lists as tuples."""
    if isinstance(value, Node):
        return Ref(value.name)
    return tuple(literal(each) for each in value) if isinstance(value, (list, tuple)) else value


# -- walking -----------------------------------------------------------------------------------------------------------


def parts(value: Any) -> Iterator[Expression]:
    """The expressions that a call is of, also those in tuples."""
    for each in value.args if isinstance(value, Call) else value if isinstance(value, tuple) else ():
        if isinstance(each, Expression):
            yield each
        else:
            yield from parts(each)


def reads(value: Any) -> Iterator[str]:
    """The names of the stored tensors, or of the nodes, that an expression reads; the one that is changed comes first."""
    if isinstance(value, Read | Ref):
        yield value.name
    for each in parts(value):
        yield from reads(each)


def substitute(value: Any, by: Mapping[str, Expression]) -> Any:
    """The expression with other expressions in place of some that it reads, by their names."""
    match value:
        case Read(name) | Ref(name):
            return by.get(name, value)
        case Call(args=args):
            return replace(value, args=substitute(args, by))
        case tuple():
            return tuple(substitute(each, by) for each in value)
        case _:
            return value


def uncentered(expression: Expression) -> tuple[Expression, frozenset[int]]:
    """What an expression centres last, and along which axes; itself and none where it does not."""
    match expression:
        case Call("center", (of,), (("dim", dim),)):
            inner, dims = uncentered(of)
            return inner, dims | {dim}
        case _:
            return expression, frozenset()


def size(expression: Expression, known: dict[int, int] | None = None) -> int:
    """How many parts an expression has, one that occurs twice counted twice."""
    known = {} if known is None else known
    if id(expression) not in known:
        known[id(expression)] = 1 + sum(size(each, known) for each in parts(expression))
    return known[id(expression)]


def interpret(value: Any, leaf: Callable[[Any], T], call: Callable[[Call, list[Any]], T]) -> Any:
    """What an expression is where ``leaf`` says what its leaves are, and ``call`` what a call of such is."""
    match value:
        case Call(args=args):
            return call(value, [interpret(each, leaf, call) for each in args])
        case Expression():
            return leaf(value)
        case tuple():
            return [interpret(each, leaf, call) for each in value]
        case _:
            return value


def along_axis(call: Call, values: Sequence[T], rank: int, aten: Callable[..., T]) -> T:
    """``center``, ``scale`` or ``shift`` (`ALONG_AXIS`) of values, the first of this rank, by operators of aten.

    ``aten`` is given the name of an operator and its operands.
    """
    (_, dim), *_ = call.kwargs
    if call.op == "center":
        return aten("sub.Tensor", values[0], aten("mean.dim", values[0], [dim], True))
    sizes = [1] * rank
    sizes[dim] = -1
    return aten("mul.Tensor" if call.op == "scale" else "add.Tensor", values[0], aten("reshape.default", values[1], sizes))


# -- computing ---------------------------------------------------------------------------------------------------------


def evaluate(formula: Formula, read: Callable[[str], Tensor]) -> Tensor:
    """The value of a formula, always in float64; the caller casts once.

    Args:
        formula: what to compute.
        read: gives the stored tensor of a name, in any floating dtype.

    Returns:
        A float64 tensor of the shape of the innermost `Read`.
    """
    return formed(formula, lambda name: read(name).detach(), torch.float64)


def formed(formula: Formula, read: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
    """The value of a formula in a dtype of the caller's; gradients flow to the tensors that are read (live mode).

    Args:
        formula: what to compute.
        read: gives the stored tensor of a name.
        dtype: the floating dtype to compute in.
    """

    def leaf(of: Read | Number) -> Tensor:
        if isinstance(of, Read):
            return read(of.name).to(dtype)
        return torch.full((), of.value, dtype=dtype)  # a literal of the graph that this is traced into, not a stored tensor

    value: Tensor = interpret(formula, leaf, _computed)
    return value


def _computed(call: Call, values: list[Any]) -> Tensor:
    if call.op in ALONG_AXIS:
        values = [each.to(values[0].device) for each in values]
        along: Tensor = along_axis(call, values, values[0].dim(), lambda op, *args: _operator(op)(*args))
        return along
    result = _operator(call.op)(*values, **dict(call.kwargs))
    chosen: Tensor = (result if isinstance(result, (tuple, list)) else (result,))[call.output]
    return chosen


def _operator(name: str) -> Any:
    """The operator of a name; a compiler cannot follow the look at its schema, which the plan has had."""
    if torch.compiler.is_compiling():
        packet, _, overload = name.partition(".")
        return getattr(getattr(torch.ops.aten, packet), overload)
    return operator_named(name)


# -- text --------------------------------------------------------------------------------------------------------------


def text(value: Any, *, in_graph: bool = False) -> str:
    """An expression as people read it; one of a graph's calls with overloads and lists, as graphs are printed."""
    match value:
        case Call(op, args, kwargs, output):
            given = [text(each, in_graph=in_graph) for each in args]
            if in_graph:
                return f"{op.removesuffix('.default')}({', '.join(given)})"
            given += [f"{name}={text(each)}" for name, each in kwargs]
            return f"{op.partition('.')[0]}({', '.join(given)}){f'[{output}]' if output else ''}"
        case tuple():
            inner = ", ".join(text(each, in_graph=in_graph) for each in value)
            return f"[{inner}]" if in_graph else f"({inner}{',' * (len(value) == 1)})"
        case _:
            return str(value)


def to_json(value: Any, *, in_graph: bool = False) -> Any:
    """An expression as JSON types: a formula, or calls that a graph is to have."""
    match value:
        case Read(name):
            return {"read": name}
        case Ref(name):
            return {"ref": name}
        case Number(number):
            return {"number": strict_json.number_to_json(number)}
        case Call("center", (of,), (("dim", dim),)):
            return {"center": to_json(of), "dim": dim}
        case Call("scale" | "shift" as op, (of, by), (("dim", dim),)):
            return {op: to_json(of), "by": to_json(by), "dim": dim}
        case Call(op, args, kwargs, output):
            given = [to_json(each, in_graph=in_graph) for each in args]
            keywords = {name: to_json(each) for name, each in kwargs}
            if in_graph:
                return {"call": op, "args": given, **keywords}
            return {"apply": op, "args": given, "kwargs": keywords, "output": output}
        case tuple():
            return [to_json(each, in_graph=in_graph) for each in value]
        case _:
            return strict_json.literal_to_json(value)


def formula_from_json(data: Any) -> Formula:
    """The formula that `to_json` wrote.

    Raises:
        ValueError: it is none, or has operators that do more than compute.
    """
    match strict_json.record(data):
        case {"read": name}:
            return Read(strict_json.text(name))
        case {"number": value}:
            return Number(strict_json.number(value))
        case {"center": of, "dim": dim}:
            return formula_from_json(of).centered(strict_json.whole(dim))
        case {"apply": op, "args": args}:
            operator_named(strict_json.text(op))
            keywords = strict_json.record(data.get("kwargs", {})).items()
            given = tuple((strict_json.name(key), _argument(value, formula_from_json)) for key, value in keywords)
            operands = tuple(_argument(each, formula_from_json) for each in strict_json.items(args))
            return Call(op, operands, given, strict_json.whole(data.get("output", 0)))
        case {"scale": of, "by": by, "dim": dim}:
            return formula_from_json(of).scaled(formula_from_json(by), strict_json.whole(dim))
        case {"shift": of, "by": by, "dim": dim}:
            return formula_from_json(of).shifted(formula_from_json(by), strict_json.whole(dim))
    raise ValueError(f"a formula of {', '.join(data) or 'nothing'} is not known")


def calls_from_json(data: Any) -> Any:
    """The expression of a graph's calls that `to_json` wrote.

    Raises:
        ValueError: it is none.
        InvalidPlan: it has operators that do more than compute, or computes in what is no dtype.
    """
    match data:
        case {"ref": name}:
            return Ref(strict_json.text(name))
        case {"call": op, "args": args}:
            operands = tuple(_argument(each, calls_from_json) for each in strict_json.items(args))
            dtype = data.get("dtype")
            call = Call(strict_json.text(op), operands, () if dtype is None else (("dtype", dtype),))
            call.target(), call.keywords()  # raise where it names what it may not
            return call
        case _:
            return strict_json.literal(data)


def _argument(data: Any, expression: Callable[[Any], Any]) -> Any:
    if isinstance(data, list):
        return tuple(_argument(each, expression) for each in data)
    is_literal = not isinstance(data, dict) or set(data) == {"float"}
    return strict_json.literal(data) if is_literal else expression(data)
