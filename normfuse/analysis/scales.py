"""A scale of the channels of a computed weight, moved into a stored tensor that it is computed from.

A weight may be computed from integers, masks or a quantizer: w = q·s, w ⊙ mask, fake_quantize(w)·g. Its channels are scaled
exactly by scaling one factor of such a product, and the integers, the mask and the grid stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from normfuse.analysis.facts import Facts
from normfuse.graph.edits import NewTensor, Reroute
from normfuse.graph.expressions import Call, Formula, Read, Ref
from normfuse.graph.ops.lookup import carries, computes, rank, same, times_read
from normfuse.graph.ops.row import Computes
from normfuse.graph.views import arguments, aten, is_tensor, shape


def scalable(facts: Facts, weight: Node, axis: int) -> tuple[Node, int] | None:
    """The stored tensor whose scale along one of its axes is a computed weight's along ``axis``; None where there is none."""
    if times_read(weight) != 1:
        return None
    if weight.op == "placeholder":
        return (weight, axis) if facts.editable(weight) else None
    if weight.target is aten.mul.Tensor:
        found = (scalable(facts, factor, own) for factor, own in _factors(weight, axis))
        return next((each for each in found if each is not None), None)
    if (kept := _masked(weight)) is not None:
        own = axis - (rank(weight) - rank(kept))
        return scalable(facts, kept, own) if own >= 0 and same(shape(kept)[own], shape(weight)[axis]) else None
    carried = carries(weight, axis)
    return scalable(facts, *carried[0]) if carried and len(carried) == 1 else None


def _masked(weight: Node) -> Node | None:
    """What a mask keeps of a weight whose other entries are zeros, of any scale."""
    a = arguments(weight) if computes(weight) is Computes.CHOICE else {}
    pair = [a.get(name) for name in ("self", "value" if "value" in a else "other")]
    for kept, other in (pair, pair[::-1]):
        filled = other.target in (aten.zeros.default, aten.zeros_like.default) if isinstance(other, Node) else other == 0
        if filled and isinstance(kept, Node) and (kept is a["self"] or "value" not in a):
            return kept
    return None


def _factors(product: Node, axis: int) -> Iterator[tuple[Node, int]]:
    """The factors that have the whole axis, the smallest first: a scale before what it scales."""
    factors = [each for each in product.all_input_nodes if is_tensor(each)]
    for factor in sorted(factors, key=lambda each: int(each.meta["val"].numel())):
        own = axis - (rank(product) - rank(factor))
        if own >= 0 and same(shape(factor)[own], shape(product)[axis]):
            yield factor, own


def own_scale(facts: Facts, product: Node, axis: int) -> tuple[Node, Node] | None:
    """A stored scale in a product that is one number for all channels, or is read elsewhere too, and what it scales."""
    if product.target is aten.mul.Tensor:
        a = arguments(product)
        for factor, other in ((a["self"], a["other"]), (a["other"], a["self"])):
            if not (is_tensor(factor) and is_tensor(other) and facts.editable(factor)) or shape(other) != shape(product):
                continue
            if factor.meta["val"].numel() == 1 or any(each is factor for each, _ in _factors(product, axis)):
                return factor, other
    return None


def of_each(facts: Facts, product: Node, axis: int, scale: Formula) -> tuple[NewTensor, Reroute]:
    """The scale in a product (`own_scale`) becomes one of its own for each channel, times the channel's scale."""
    found = own_scale(facts, product, axis)
    assert found is not None
    factor, other = found
    name, made = facts.program.stored[factor.name], f"normfuse_{product.name}_scale"
    sizes = tuple(shape(product)[axis] if own == axis else 1 for own in range(rank(product)))
    every = Call("view.default", (Call("expand.default", (scale, (sizes[axis],))), sizes))
    new = NewTensor(made, every * Read(name), name)
    return new, Reroute(product.name, Ref(other.name) * Ref(made))
