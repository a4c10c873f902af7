"""The table of operators is read here: how a linear map passes through a call, what hides a shift, what keeps entries.

Let M be any linear map applied along ``axis`` of a call's result (centring C₀ = I - 11ᵀ/d, or a diagonal scale). Which
operands, each along which of its own axes, must M be applied to instead?

    carries(node, axis) -> ((operand, its axis), ...)     M(op(x, …)) = op(Mx, …)
                        -> ()                             M(result) = result whatever M = C₀ is: its mean is zero
                        -> None                           M does not pass

Everything else follows from this. Forward: a result has zero mean if all its carried operands have. Backward: a shift of an
operand along its axis is invisible if it is invisible in the result. Establishing: to centre a value, centre its carried
operands, until stored tensors are reached: "the writer of a Linear" is no special case, because a Linear carries its output
axis to dim 0 of its weight and bias.

Torch's other names (`concat`, `multiply`, `vstack`, …) never get here: `normfuse.graph.composites` writes them as the operators
that they are. An op without a row passes nothing. Axes are carried, never guessed from sizes. Rows stand in a file per family
beside this one; each column of each has a property test against numbers (tests/graph/ops), so a new row is one entry there and
a case in the tests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from normfuse.graph.ops.installed import installed
from normfuse.graph.ops.row import TABLE, Carried, Computes, Keeps, Layer, Mean, Normalization, Operator, Product, everything
from normfuse.graph.views import arguments, dtype, is_tensor, shape, tensors_in


def row(node: Node) -> Operator | None:
    """The row of a call's operator; None where nothing is known of it."""
    return row_of(node.target)


def row_of(op: Any) -> Operator | None:
    """The row of an operator, of another package's where normfuse has none; None where nothing is known of it."""
    known = TABLE.get(op)
    return installed().get(op) if known is None and isinstance(op, torch._ops.OpOverload) else known


def carries(node: Node, axis: int) -> Carried:
    """Which operands carry a linear map applied along ``axis`` of ``node``; None when it does not pass.

    Args:
        node: any node of a functional aten graph.
        axis: a non-negative axis of its value; for a node that yields several tensors, of each of them.
    """
    known = row(node)
    if known is None or not known.carries or node.op != "call_function" or axis >= rank(node):
        return None  # a scalar has no axis
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and not value.is_floating_point():
        return None  # a cast to integers rounds: not linear
    return known.carries(node, _named(node), axis)


def hides(node: Node, operand: Node) -> frozenset[int]:
    """The axes of ``operand`` along which a per-position shift leaves ``node`` unchanged."""
    known = row(node)
    return known.hides(node, _named(node), operand) if known is not None and known.hides else frozenset()


def _named(node: Node) -> dict[str, Any]:
    return arguments(node) if isinstance(node.target, torch._ops.OpOverload) else {}


def knows(op: Any) -> bool:
    """Whether an operator is known by its name: it carries or hides something, or is a norm."""
    known = row_of(op)
    return known is not None and bool(known.carries or known.hides or isinstance(known.role, Normalization))


def reads_entries(node: Node) -> bool:
    """Whether a reader takes more of a value than its shape and dtype."""
    known = row(node)
    return known is None or known.hides is not everything


def passes_shift(node: Node) -> bool:
    """Whether an op picks, moves or averages entries: a constant added to all its operands is added to its result."""
    known = row(node)
    if known is None or not known.shift:
        return False
    return known.shift is True or known.shift(arguments(node))


def keeps(node: Node) -> Keeps | None:
    """How a result consists of its first operand's entries; None where it does not."""
    known = row(node)
    return known.keeps or None if known is not None else None


def computes(node: Node) -> Computes | None:
    """What a call computes, where the table says it."""
    known = row(node)
    return known.computes or None if known is not None else None


def neutral(node: Node) -> float | None:
    """The ``other`` with which arithmetic gives its ``self``; None for what is no arithmetic of two."""
    known = computes(node)
    return _NEUTRAL.get(known) if known is not None else None


_NEUTRAL = {Computes.SUM: 0.0, Computes.DIFFERENCE: 0.0, Computes.PRODUCT: 1.0, Computes.QUOTIENT: 1.0}


def layer(node: Node) -> Layer | None:
    """The names of operands of a product with a weight and a bias; None for other calls."""
    role = _role(node)
    return role if isinstance(role, Layer) else None


def product(node: Node) -> Product | None:
    """The names of a matrix product's factors; None for other calls."""
    role = _role(node)
    return role if isinstance(role, Product) else None


def weighed(node: Node) -> str | None:
    """The name of the operand that is summed with weights along the axis before its last; None for other calls."""
    match _role(node):
        case Product(term=None) as both:
            return both.weight
        case Mean() as mean:
            return mean.values
    return None


def _role(node: Node) -> Any:
    known = row(node)
    return known.role if known is not None else None


# -- shapes ------------------------------------------------------------------------------------------------------------


def rank(node: Node) -> int:
    """Number of axes of a value."""
    return len(shape(node))


def same(a: Any, b: Any) -> bool:
    """Whether two (possibly symbolic) sizes are proven equal."""
    return statically_known_true(a == b)


def same_sizes(*nodes: Node) -> bool:
    """Whether values are proven to have one shape; dynamic sizes are told apart by what they are, not by the example's."""
    return len({str(shape(node)) for node in nodes}) == 1


def spans(operand: Any, out: Node, axis: int) -> bool:
    """Whether an operand has the broadcast axis ``axis`` of ``out`` (and is not repeated along it)."""
    if not is_tensor(operand):
        return False
    own = axis - (rank(out) - rank(operand))
    return own >= 0 and (not same(shape(operand)[own], 1) or same(shape(out)[axis], 1)) and not repeated(operand, own)


def varies_along(operand: Node, out: Node) -> list[int]:
    """The axes of ``out`` along which a broadcast operand has more than one entry, be they equal."""
    before = rank(out) - rank(operand)
    return [before + own for own, size in enumerate(shape(operand)) if not same(size, 1)]


def repeated(node: Node, axis: int) -> bool:
    """Whether a value is proven constant along an axis because it was expanded along it."""
    while keeps(node) in (Keeps.COPY, Keeps.CAST):
        node = arguments(node)["self"]
    if _picks(node):
        operands = [each for each in node.all_input_nodes if is_tensor(each)]
        return bool(operands) and not any(spans(each, node, axis) or same(shape(node)[axis], 1) for each in operands)
    if computes(node) is Computes.FILL:
        return dtype(node) in (torch.int32, torch.int64) and not same(shape(node)[axis], 1)
    if keeps(node) is not Keeps.EXPAND:
        return False
    source = arguments(node)["self"]
    own = axis - (rank(node) - rank(source))
    if own >= 0 and same(shape(source)[own], shape(node)[axis]):
        return repeated(source, own)
    return own < 0 or same(shape(source)[own], 1)


def _picks(node: Node) -> bool:
    """Whether a value is a mask or an index that is computed entry by entry."""
    exact = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    kind = dtype(node)
    return exact and kind is not None and not kind.is_floating_point and not kind.is_complex


def is_mean_of(node: Any, x: Node, axis: int) -> bool:
    """Whether ``node`` is the mean of ``x`` along exactly ``axis``, kept as a size-1 axis."""
    if not is_tensor(node) or node.target is not torch.ops.aten.mean.dim:
        return False
    a = arguments(node)
    return a["self"] is x and a["keepdim"] is True and [axis_of(x, d) for d in a["dim"] or []] == [axis]


def times_read(value: Node) -> int:
    """How often a value is read; a reader that takes it twice counts twice, readers of its metadata do not count."""
    readers = filter(reads_entries, value.users)
    return sum(operand is value for reader in readers for operand in tensors_in((reader.args, reader.kwargs)))


def carries_wholly(node: Node, operands: Iterable[tuple[Node, int]], of: Iterable[Node]) -> bool:
    """Whether none of some operands also enters where it does not carry the map, as in ``matmul(x, x)``."""
    given, carrying = Counter(tensors_in((node.args, node.kwargs))), Counter(operand for operand, _ in operands)
    return all(given[each] == carrying[each] for each in of)


# -- what rows are written with ----------------------------------------------------------------------------------------


def axis_of(node: Node, dim: int) -> int:
    """A possibly negative axis of a value as a non-negative one."""
    return dim % max(rank(node), 1)


def own_axis(operand: Node, out: Node, axis: int) -> tuple[Node, int]:
    """A broadcast operand with the axis of its own that is ``axis`` of ``out``."""
    return operand, axis - (rank(out) - rank(operand))


def is_zero(value: Any) -> bool:
    """Whether an argument is the number zero."""
    return isinstance(value, (int, float)) and value == 0


def terms(node: Node, axis: int, *given: Any) -> Carried:
    """What is added up, or chosen from: all of it carries an axis, zeros apart."""
    carried = []
    for term in given:
        if spans(term, node, axis):
            carried.append(own_axis(term, node, axis))
        elif not is_zero(term):
            return None  # a term that is constant along the axis has a mean of its own
    return tuple(carried)


def unpadded(padding: Any) -> bool:
    """Whether a convolution's or a pool's padding adds nothing."""
    sizes = padding if isinstance(padding, (list, tuple)) else [padding]
    return padding == "valid" or all(size == 0 for size in sizes)
