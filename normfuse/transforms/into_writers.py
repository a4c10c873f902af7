"""Fold a channel affine into what writes a value: weights, biases and tables, through whatever lies between."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from normfuse.analysis.affine import MOVES, Affine, constant_formula
from normfuse.analysis.facts import Facts
from normfuse.analysis.scales import computed_from, of_each, own_scale, scalable
from normfuse.graph.formula import Added, Apply, Formula, Scaled
from normfuse.graph.ops.carrying import METADATA, carries, rank, same, times_read
from normfuse.graph.views import arguments, aten, shape
from normfuse.transforms.draft import (
    LAYERS,
    Absorbed,
    Draft,
    Obstacle,
    channel,
    full,
    is_transposed,
    passes_shift,
    per_group,
    sizes_of,
)


def into_writers(facts: Facts, form: Affine, value: Node) -> Absorbed | Obstacle:
    """Scale and shift of a value folded into the stored tensors that write its base."""
    stray = next((reader for reader in form.base.users if reader not in form.inner and reader.target not in METADATA), None)
    if stray is not None:
        return Obstacle(stray, "reads the value before the norm as well")
    axis = axis_of_base(facts, form, value)
    if axis is None and form.axis is not None:
        return Obstacle(form.base, "is reshaped so that its channels are no longer one axis")
    draft = Draft(facts)
    stopped = fold(draft, form.base, rank(form.base) - 1 if axis is None else axis, form.scale, form.shift)
    return stopped or Absorbed(tuple(draft.edits), frozenset(draft.nodes))


def axis_of_base(facts: Facts, form: Affine, value: Node) -> int | None:
    """The axis of the base that the form's axis is; None where the views in between do not tell."""
    node, axis = value, form.axis
    while axis is not None and node is not form.base:
        if node.target in MOVES:
            carried = carries(node, axis)
            node, axis = carried[0] if carried else (node, None)
        else:  # a norm, or arithmetic with constants: it keeps its operand's shape
            onward = form.inner - facts.constant | {form.base}
            node = next(each for each in node.all_input_nodes if each in onward)
    return axis


def fold(draft: Draft, node: Node, axis: int, scale: Formula | None, shift: Formula | None) -> Obstacle | None:
    """Collect the edits after which ``node`` is ``scale ⊙ node + shift`` along ``axis``; what stops it, if anything."""
    draft.nodes.add(node)
    if node in draft.mapped:
        return Obstacle(node, "has a map added to what it gives")
    if node in draft.facts.constant:
        return _constant(draft, node, axis, scale, shift)
    if node.target in LAYERS:
        return _layer(draft, node, axis, scale, shift)
    if node.target is aten.cat.default and axis == arguments(node)["dim"] % rank(node):
        return _joined(draft, node, axis, scale, shift)
    if node.target is operator.getitem and _splits_along(node.args[0], axis):
        return _parted(draft, node, axis, scale, shift)
    carried = carries(node, axis)
    if not carried:
        return Obstacle(node, "does not let a scale of its channels through")
    if shift is not None and not passes_shift(node) and not _is_sum(node):
        return Obstacle(node, "does not let a shift through")
    # a sum takes the shift once, where there is a bias: addmm names it last
    taker = len(carried) - 1 if node.target is aten.addmm.default else 0
    for place, (operand, own) in enumerate(carried):
        stopped = _onward(draft, operand, own, scale, shift if place == taker or not _is_sum(node) else None)
        if stopped:
            return stopped
    return None


def _is_sum(node: Node) -> bool:
    if node.target is aten.addmm.default:
        return bool(arguments(node)["beta"] == 1)  # otherwise the bias is scaled on its way
    return node.target in (aten.add.Tensor, aten.sub.Tensor)


def _onward(draft: Draft, operand: Node, axis: int, scale: Formula | None, shift: Formula | None) -> Obstacle | None:
    if times_read(operand) != 1:
        return Obstacle(operand, "is read more than once")
    return fold(draft, operand, axis, scale, shift)


def _constant(draft: Draft, node: Node, axis: int, scale: Formula | None, shift: Formula | None) -> Obstacle | None:
    """A stored tensor, or arithmetic on stored tensors: changed where it is stored if it gets there, else anew."""
    if node.op != "placeholder" and _comes_from_stored(draft.facts, node, axis, shifted=shift is not None):
        stops = (_onward(draft, operand, own, scale, shift) for operand, own in carries(node, axis) or ())
        return next((stopped for stopped in stops if stopped), None)
    if scale is not None and shift is None and node.op != "placeholder" and constant_formula(draft.facts, node) is None:
        return _product(draft, node, axis, scale)
    return draft.change(node, lambda own: _affine(own, axis, scale, shift))


def _product(draft: Draft, node: Node, axis: int, scale: Formula) -> Obstacle | None:
    """A weight computed from integers, masks or a quantizer, which stay: one factor of it takes the scale."""
    draft.nodes.update(computed_from(node))
    found = scalable(draft.facts, node, axis)
    if found is not None:
        return draft.change(found[0], lambda own: Scaled(own, scale, found[1]))
    again = f"normfuse_{node.name}_scale"
    if times_read(node) != 1 or own_scale(draft.facts, node, axis) is None:
        return draft.change(node, lambda own: own)  # which says why it cannot change
    if not draft.change_again(again, lambda own: Scaled(own, scale, axis)):
        draft.edits += of_each(draft.facts, node, axis, scale)
    return None


def _comes_from_stored(facts: Facts, node: Node, axis: int, *, shifted: bool) -> bool:
    """Whether a scale (and a shift) of a computed value is one of the stored tensors it is computed from, each read once."""
    if times_read(node) != 1:
        return False
    if node.op == "placeholder":
        return facts.editable(node)
    carried = carries(node, axis)
    if not carried or (shifted and not passes_shift(node)):
        return False
    return all(_comes_from_stored(facts, operand, own, shifted=shifted) for operand, own in carried)


def _affine(formula: Formula, axis: int, scale: Formula | None, shift: Formula | None) -> Formula:
    formula = formula if scale is None else Scaled(formula, scale, axis)
    return formula if shift is None else Added(formula, shift, axis)


def _joined(draft: Draft, node: Node, axis: int, scale: Formula | None, shift: Formula | None) -> Obstacle | None:
    """Joined along the channels: each operand takes its own part."""
    total = shape(node)[axis]
    if not isinstance(total, int) or any(rank(operand) != rank(node) for operand in arguments(node)["tensors"]):
        return Obstacle(node, "joins parts whose sizes are not known")
    scale, shift = (entries and full(entries, total) for entries in (scale, shift))
    start = 0
    for operand in arguments(node)["tensors"]:
        size = shape(operand)[axis]
        stopped = _onward(draft, operand, axis, part(scale, start, size), part(shift, start, size))
        if stopped:
            return stopped
        start += size
    return None


def _splits_along(split: Any, axis: int) -> bool:
    return split.target in (aten.split.Tensor, aten.split_with_sizes.default) and axis == arguments(split)["dim"] % rank(split)


def _parted(draft: Draft, node: Node, axis: int, scale: Formula | None, shift: Formula | None) -> Obstacle | None:
    """Split along the channels: the other parts are scaled by ones and shifted by zeros."""
    split: Any = node.args[0]
    place: Any = node.args[1]
    sizes = [each.shape[axis] for each in split.meta["val"]]
    if not all(isinstance(size, int) for size in sizes) or sum(each.args[1] == place for each in split.users) != 1:
        return Obstacle(node, "is a part of what is read in other ways")

    def whole(entries: Formula | None, none: float) -> Formula | None:
        if entries is None:
            return None
        others = (Apply("new_full.default", (entries, (size,), none)) for size in sizes)
        parts = (full(entries, sizes[place]) if own == place else other for own, other in enumerate(others))
        return Apply("cat.default", (tuple(parts),))

    return _onward(draft, arguments(split)["self"], axis, whole(scale, 1.0), whole(shift, 0.0))


def part(entries: Formula | None, start: int, size: int) -> Formula | None:
    """The entries of some of the channels; a single entry stands for all of them."""
    return None if entries is None else Apply("slice.Tensor", (entries, 0, start, start + size))


def _layer(draft: Draft, node: Node, axis: int, scale: Formula | None, shift: Formula | None) -> Obstacle | None:
    a = arguments(node)
    weight, bias, groups = a["weight"], a["bias"], a.get("groups", 1)
    if rank(weight) < 2 or axis != channel(node, node):
        return Obstacle(node, "writes its channels along another axis")
    if bias is not None and (rank(bias) != 1 or not same(shape(bias)[0], shape(node)[axis])):
        return Obstacle(node, "has a bias of another shape than its channels")
    stopped = None if scale is None else _weight(draft, weight, scale, groups, transposed=is_transposed(node))
    if stopped:
        return stopped
    if bias is not None:
        return _onward(draft, bias, 0, scale, shift)
    if node in draft.biases:
        draft.change_again(draft.biases[node], lambda own: _affine(own, 0, scale, shift))
        return None
    if shift is None:
        return None
    return draft.new_bias(node, full(shift, int(shape(node)[axis])))


def _weight(draft: Draft, weight: Node, scale: Formula, groups: int, *, transposed: bool) -> Obstacle | None:
    if not transposed:
        return _onward(draft, weight, 0, scale, None)
    if groups == 1:
        return _onward(draft, weight, 1, scale, None)
    sizes = sizes_of(weight)
    every = full(scale, groups * sizes[1])
    return draft.change(weight, lambda own: per_group(own, every, groups, sizes))
