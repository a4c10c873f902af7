"""Find every norm of a program, also those written by hand.

A hand-written norm is not matched by its shape, of which there are too many, but proven: around every root (``rsqrt``,
``sqrt``, ``pow``) the few nodes between a value x and a candidate result are run on numbers, in float64, and compared
with LayerNorm and RMSNorm of x and their kin, times the gain that may stand among them, for the eps that occurs there.
Agreement on ordinary, tiny-variance and large-mean inputs is the recognition; anything else is not a norm that we know. All
ops that may take part are rational functions and roots: two such functions that agree on generic numbers agree everywhere,
which is not so for clamps and other bounds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import torch
from torch import Tensor
from torch.fx import Node

from normfuse.graph.bodies import Body
from normfuse.graph.interpreter import computed
from normfuse.graph.ops.lookup import computes, keeps, rank, reads_entries, same, same_sizes, varies_along
from normfuse.graph.ops.norms import operator_norm
from normfuse.graph.ops.row import ALGEBRAIC, ROOTS, STATISTICS, Keeps
from normfuse.graph.program import Program
from normfuse.graph.views import Norm, NormKind, arguments, aten, dtype, shape, tensors_in

_IN_PLACE = (Keeps.COPY, Keeps.CAST, Keeps.EXPAND)
_LIMIT = 16  # nodes of a hand-written norm; usual spellings have 5 to 9


Code: TypeAlias = Program | Body
"""A program's own graph, or one that an operator of it calls."""


def norms_of(program: Code) -> tuple[Norm, ...]:
    """Every norm of a program or of one body, in execution order."""
    every = (operator_norm(node) for node in program.graph.nodes)
    by_operator = [norm for norm in every if norm is not None and norm.x not in program.constant]  # some standardize weights
    taken = {node for norm in by_operator for node in norm.inner}
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    by_hand: list[Norm] = []
    for node in program.graph.nodes:
        if computes(node) in ROOTS and node not in taken:
            norm = _around(program, node, order)
            if norm is not None and not norm.inner & taken:
                by_hand.append(norm)
                taken |= norm.inner
    by_hand += [norm for node in program.graph.nodes if node not in taken and (norm := _offline(program, node)) is not None]
    return tuple(sorted((*by_operator, *by_hand), key=lambda norm: order[norm.out]))


def _offline(program: Code, node: Node) -> Norm | None:
    """A product with, or a quotient by, the root of stored statistics along one axis: a norm that is a constant."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor) or node in program.constant:
        return None
    x, y = (node.args[1], node.args[0]) if node.args[0] in program.constant else node.args
    if not isinstance(x, Node) or not isinstance(y, Node) or y not in program.constant or not same_sizes(x, node):
        return None
    axes = varies_along(y, node)
    eps = _root_of_statistics(y)
    if eps is None or len(axes) != 1:
        return None
    over = tuple(axis for axis in range(rank(node)) if axis not in axes)
    return Norm(node, NormKind.OFFLINE_NORM, x, over, None, None, eps, frozenset({node}))


def _root_of_statistics(node: Node) -> float | None:
    """The eps under the root that a stored value is, or is made with; None where there is no root."""
    seen = [node]
    for each in seen:
        if each.target in (aten.rsqrt.default, aten.sqrt.default) or (
            each.target is aten.pow.Tensor_Scalar and each.args[1] in (0.5, -0.5)
        ):
            under = each.args[0]
            added = under.args[1] if isinstance(under, Node) and under.target is aten.add.Tensor else 0.0
            return float(added) if isinstance(added, (int, float)) else 0.0
        seen.extend(inner for inner in each.all_input_nodes if inner not in seen)
    return None


def _around(program: Code, root: Node, order: Mapping[Node, int]) -> Norm | None:
    """The norm that a root belongs to: the first result behind it that is proven to be one."""
    if root in program.constant:
        return None
    for out in _results(root):
        spans = [(x, axis, span) for x, axis in _operands(out) if (span := _between(program, x, out, axis)) is not None]
        # the operand furthest back explains most: a centred value under an RMSNorm is a LayerNorm
        for x, axis, (inner, stored) in sorted(spans, key=lambda span: -len(span[2][0])):
            if root not in inner or not _closed(inner, out):
                continue
            proven = _prove(program, x, out, sorted(inner, key=order.__getitem__), stored, axis)
            if proven is not None:
                kind, eps = proven
                gain = next((node for node in stored if not _is_number(node)), None)
                return Norm(out, kind, x, (axis,), gain, None, eps, inner)
    return None


def _is_arithmetic(node: Node) -> bool:
    """Whether a call is a rational function or a root of entries at one place, or one of a statistic's results."""
    return computes(node) in ALGEBRAIC or keeps(node) in _IN_PLACE or node.target is operator.getitem


def _results(root: Node) -> Iterator[Node]:
    """Full-size values behind a root, the nearest first: where the statistic has met the value."""
    frontier = [root]
    for node in frontier:
        for user in node.users:
            if _is_arithmetic(user) and user not in frontier and len(frontier) < _LIMIT:
                frontier.append(user)
                if not same_sizes(user, root):
                    yield user


def _operands(out: Node) -> Iterator[tuple[Node, int]]:
    """Candidates for the normalized value: what the reductions behind a result reduce, or what that was made of."""
    seen: set[Node] = set()
    frontier = [out]
    candidates: list[tuple[Node, int]] = []
    while frontier and len(seen) < 2 * _LIMIT:
        node = frontier.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if computes(node) in STATISTICS:
            reduced = node.args[0]
            dims = arguments(node).get("dim")
            if isinstance(reduced, Node) and isinstance(dims, (list, tuple)) and len(dims) == 1:
                axis = dims[0] % max(rank(reduced), 1)
                sources = [reduced, *reduced.all_input_nodes]
                sources += [_uncast(source) for source in sources]
                candidates += [(s, axis) for s in sources if same_sizes(s, out) and dtype(s) == dtype(out)]
        if _is_arithmetic(node) or computes(node) in STATISTICS:
            frontier.extend(node.all_input_nodes)
    yield from dict.fromkeys(candidates)


def _uncast(node: Node) -> Node:
    """What was cast for the statistics alone: T5 takes the variance in float32 and scales the value as it is."""
    cast = node.target is aten._to_copy.default and not any(user.target is node.target for user in node.users)
    return node.args[0] if cast and isinstance(node.args[0], Node) else node  # what is cast twice was rounded


Span: TypeAlias = tuple[frozenset[Node], frozenset[Node]]
"""Nodes between a value and a result, and the stored values that take part: numbers, and at most one gain."""


def _between(program: Code, x: Node, out: Node, axis: int) -> Span | None:
    """All nodes from x to a result; None when the result needs anything else than x, numbers and one gain."""
    inner: set[Node] = set()
    stored: set[Node] = set()
    frontier = [out]
    while frontier:
        node = frontier.pop()
        if node is x or node in inner:
            continue
        if node in program.constant:
            stored.add(node)
            continue
        if not (_is_arithmetic(node) or computes(node) in STATISTICS) or len(inner) >= _LIMIT:
            return None
        inner.add(node)
        frontier.extend(tensors_in((node.args, node.kwargs)))
    vectors = [node for node in stored if not _is_number(node)]
    if len(vectors) > 1 or not all(_varies_along(node, x, axis) for node in vectors):
        return None
    return frozenset(inner), frozenset(stored)


def _is_number(node: Node) -> bool:
    return all(same(size, 1) for size in shape(node))


def _varies_along(node: Node, x: Node, axis: int) -> bool:
    own = axis - (rank(x) - rank(node))
    return own >= 0 and all(same(size, shape(x)[axis] if place == own else 1) for place, size in enumerate(shape(node)))


def _closed(inner: frozenset[Node], out: Node) -> bool:
    """Whether nobody outside reads a value from inside, the result apart."""
    readers = (user for node in inner if node is not out for user in node.users)
    return all(user in inner or not reads_entries(user) for user in readers)


def _prove(
    program: Code, x: Node, out: Node, inner: list[Node], stored: frozenset[Node], axis: int
) -> tuple[NormKind, float] | None:
    """Kind and eps of ``out`` as gain ⊙ norm(x), if it is that for a gain drawn at random."""
    size = shape(x)[axis]
    if not isinstance(size, int) or size < 2:
        return None
    given = {node: _value(program, node) for node in stored}
    if any(value is None for value in given.values()):
        return None
    numbers = [float(c) for node in inner for c in node.args if isinstance(c, float)]
    numbers += [float(value) for node, value in given.items() if value is not None and _is_number(node)]
    constants = sorted({number for number in numbers if 0 < number < 0.5} | {0.0})
    gain: Tensor | float = next((value for node, value in given.items() if value is not None and not _is_number(node)), 1.0)
    samples = list(_samples(rank(x), axis, size, constants))
    try:
        results = [computed(out, {**given, x: sample}, wide=True) for sample in samples]
    except (RuntimeError, TypeError, KeyError, ValueError):
        return None  # literal sizes inside: not a norm that works on any batch
    for kind, norm in _KINDS:
        for eps in constants:
            references = (gain * norm(sample, axis, eps) for sample in samples)
            if all(_agree(result, reference) for result, reference in zip(results, references, strict=True)):
                return kind, eps
    return None


def _value(program: Code, node: Node) -> Tensor | None:
    """A number as it is stored, a vector at random: a gain must be one whatever its entries are."""
    if not _is_number(node):
        generator = torch.Generator().manual_seed(1)
        sizes = [int(size) for size in shape(node)]
        return torch.rand(sizes, generator=generator, dtype=torch.float64) + 0.5
    name = program.stored.get(node.name)
    return None if name is None or program.tensor(name).is_meta else program.tensor(name).detach().double().cpu()


def _samples(axes: int, axis: int, size: int, eps: list[float]) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [2] * axes
    sizes[axis] = size
    plain = torch.randn(sizes, generator=generator, dtype=torch.float64)
    yield plain
    yield 3.0 * plain + 5.0
    for each in eps:  # a variance as small as eps tells where eps enters, and which one it is
        yield plain * (each or 1e-3) ** 0.5


def _layer_norm(x: Tensor, axis: int, eps: float) -> Tensor:
    return _rms_norm(x - x.mean(axis, keepdim=True), axis, eps)


def _rms_norm(x: Tensor, axis: int, eps: float) -> Tensor:
    return x / (x.square().mean(axis, keepdim=True) + eps).sqrt()


def _crms_norm(x: Tensor, axis: int, eps: float) -> Tensor:
    """Of a zero-mean vector whose last entry is not stored."""
    total, squares = x.sum(axis, keepdim=True), x.square().sum(axis, keepdim=True)
    return x / ((squares + total.square()) / (x.shape[axis] + 1) + eps).sqrt()


def _std_norm(correction: int) -> Callable[[Tensor, int, float], Tensor]:
    """The Annotated Transformer's: eps is added to the deviation, not under its root."""

    def norm(x: Tensor, axis: int, eps: float) -> Tensor:
        return (x - x.mean(axis, keepdim=True)) / (x.std(axis, correction=correction, keepdim=True) + eps)

    return norm


_KINDS = (
    (NormKind.LAYER_NORM, _layer_norm), (NormKind.RMS_NORM, _rms_norm), (NormKind.CRMS_NORM, _crms_norm),
    (NormKind.STD_NORM, _std_norm(1)), (NormKind.STD_NORM, _std_norm(0)),
)  # fmt: skip


def _agree(a: object, b: Tensor) -> bool:
    return isinstance(a, Tensor) and a.shape == b.shape and bool(torch.allclose(a, b, rtol=1e-9, atol=1e-9))
