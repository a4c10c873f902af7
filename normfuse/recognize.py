"""Find every norm of a program, also those written by hand.

A hand-written norm is not matched by its shape, of which there are too many, but proven: around every root (``rsqrt``,
``sqrt``, ``pow``) the few nodes between a value x and a candidate result are run on numbers, in float64, and compared
with LayerNorm and RMSNorm of x for the eps that occurs among them. Agreement on ordinary, tiny-variance and large-mean
inputs is the recognition; anything else is not a norm that we know. All ops that may take part are rational functions and
roots: two such functions that agree on generic numbers agree everywhere, which is not so for clamps and other bounds.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.fx import Node

from normfuse.interpret import _default_dtype, call
from normfuse.program import Program
from normfuse.rules import rank
from normfuse.views import Norm, arguments, aten, dtype, operator_norm, shape, tensors_in

_ROOTS = {aten.rsqrt.default, aten.sqrt.default, aten.pow.Tensor_Scalar, aten.std.correction, aten.std.dim}
_MEANS = {aten.mean.dim, aten.sum.dim_IntList, aten.var.correction, aten.var.dim, aten.std.correction, aten.std.dim,
          aten.linalg_vector_norm.default, aten.var_mean.correction, aten.var_mean.dim}  # fmt: skip
_ARITHMETIC = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.pow.Tensor_Scalar, aten.square.default,
    aten.neg.default, aten.rsqrt.default, aten.sqrt.default, aten.reciprocal.default, aten._to_copy.default,
    aten.clone.default, aten.add.Scalar, aten.mul.Scalar, aten.div.Scalar, aten.expand.default, operator.getitem,
}  # fmt: skip
_LIMIT = 16  # nodes of a hand-written norm; usual spellings have 5 to 9


def norms_of(program: Program) -> tuple[Norm, ...]:
    """Every norm of a program, in execution order."""
    by_operator = [norm for node in program.graph.nodes if (norm := operator_norm(node)) is not None]
    taken = {node for norm in by_operator for node in norm.inner}
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    by_hand: list[Norm] = []
    for node in program.graph.nodes:
        if node.target in _ROOTS and node not in taken:
            norm = _around(node, order)
            if norm is not None and not norm.inner & taken:
                by_hand.append(norm)
                taken |= norm.inner
    return tuple(sorted((*by_operator, *by_hand), key=lambda norm: order[norm.out]))


def _around(root: Node, order: Mapping[Node, int]) -> Norm | None:
    """The norm that a root belongs to: the first result behind it that is proven to be one."""
    for out in _results(root):
        candidates = [(x, axis, inner) for x, axis in _operands(out) if (inner := _between(x, out)) is not None]
        # the operand furthest back explains most: a centred value under an RMSNorm is a LayerNorm
        for x, axis, inner in sorted(candidates, key=lambda candidate: -len(candidate[2])):
            if root not in inner or not _closed(inner, out):
                continue
            proven = _prove(x, out, sorted(inner, key=order.__getitem__), axis)
            if proven is not None:
                kind, eps = proven
                return Norm(out, kind, x, (axis,), None, None, eps, inner)
    return None


def _results(root: Node) -> Iterator[Node]:
    """Full-size products behind a root: where the statistic meets the value."""
    frontier = [root]
    for _ in range(_LIMIT):
        if not frontier:
            return
        node = frontier.pop(0)
        for user in node.users:
            if user.target in (aten.mul.Tensor, aten.div.Tensor) and shape(user) != shape(root):
                yield user
            elif user.target in _ARITHMETIC and user not in frontier:
                frontier.append(user)


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
        if node.target in _MEANS:
            reduced = node.args[0]
            dims = arguments(node).get("dim")
            if isinstance(reduced, Node) and isinstance(dims, (list, tuple)) and len(dims) == 1:
                axis = dims[0] % max(rank(reduced), 1)
                sources = (reduced, *reduced.all_input_nodes)
                candidates += [(s, axis) for s in sources if shape(s) == shape(out) and dtype(s) == dtype(out)]
        if node.target in _ARITHMETIC | _MEANS:
            frontier.extend(node.all_input_nodes)
    yield from dict.fromkeys(candidates)


def _between(x: Node, out: Node) -> frozenset[Node] | None:
    """All nodes from x to a result; None when the result needs any other tensor."""
    inner: set[Node] = set()
    frontier = [out]
    while frontier:
        node = frontier.pop()
        if node is x or node in inner:
            continue
        if node.target not in _ARITHMETIC | _MEANS or len(inner) >= _LIMIT:
            return None
        inner.add(node)
        frontier.extend(tensors_in((node.args, node.kwargs)))
    return frozenset(inner)


def _closed(inner: frozenset[Node], out: Node) -> bool:
    """Whether nobody outside reads a value from inside, the result apart."""
    return all(user in inner for node in inner if node is not out for user in node.users)


def _prove(x: Node, out: Node, inner: list[Node], axis: int) -> tuple[str, float] | None:
    size = shape(x)[axis]
    if not isinstance(size, int) or size < 2:
        return None
    constants = sorted({float(c) for node in inner for c in node.args if isinstance(c, float) and 0 < c < 0.5} | {0.0})
    samples = list(_samples(rank(x), axis, size, constants))
    try:
        results = [_replay(x, out, inner, sample) for sample in samples]
    except (RuntimeError, TypeError, KeyError, ValueError):
        return None  # literal sizes inside: not a norm that works on any batch
    for kind in ("layer_norm", "rms_norm"):
        for eps in constants:
            references = (_norm(kind, sample, axis, eps) for sample in samples)
            if all(_agree(result, reference) for result, reference in zip(results, references, strict=True)):
                return kind, eps
    return None


def _samples(axes: int, axis: int, size: int, eps: list[float]) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [2] * axes
    sizes[axis] = size
    plain = torch.randn(sizes, generator=generator, dtype=torch.float64)
    yield plain
    yield 3.0 * plain + 5.0
    for each in eps:  # a variance as small as eps tells where eps enters, and which one it is
        yield plain * (each or 1e-3) ** 0.5


def _norm(kind: str, x: Tensor, axis: int, eps: float) -> Tensor:
    centred = x - x.mean(axis, keepdim=True) if kind == "layer_norm" else x
    return centred / (centred.square().mean(axis, keepdim=True) + eps).sqrt()


def _agree(a: object, b: Tensor) -> bool:
    return isinstance(a, Tensor) and a.shape == b.shape and bool(torch.allclose(a, b, rtol=1e-9, atol=1e-9))


def _replay(x: Node, out: Node, inner: list[Node], sample: Tensor) -> object:
    values: dict[Node, object] = {x: sample}
    with torch.no_grad(), _default_dtype(torch.float64):
        for node in inner:
            values[node] = call(node, values, wide=True)
    return values[out]
