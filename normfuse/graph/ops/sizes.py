"""What becomes of a call when its result gets another number of entries along one axis.

Most calls that carry an axis (`carrying`) take its size from their operands. Some say sizes in their arguments, which
follow. A call that is in neither table here may depend on the size in ways that nobody has thought of: it has no rule, and
nothing that passes through it changes its width.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from torch.fx import Node

from normfuse.graph.ops.carrying import carries, rank, same
from normfuse.graph.views import arguments, aten, shape

_SIZED = {
    aten.view.default, aten._unsafe_view.default, aten.expand.default, aten.zeros.default, aten.new_zeros.default,
    aten.full.default, aten.new_full.default,
}  # fmt: skip
"""Calls whose argument ``size`` has an entry for each axis of the result."""

_BY_OPERANDS = {
    aten._to_copy.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.type_as.default,
    aten.neg.default, aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor, aten.rsub.Scalar, aten.mul.Tensor,
    aten.mul.Scalar, aten.addcmul.default, aten.div.Tensor, aten.div.Scalar, aten.where.self, aten.where.ScalarOther,
    aten.where.ScalarSelf, aten.masked_fill.Scalar, aten.lerp.Scalar, aten.lerp.Tensor,
    aten.permute.default, aten.transpose.int, aten.t.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.repeat.default, aten.tile.default, aten.cat.default, aten.stack.default,
    aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, operator.getitem, aten.select.int,
    aten.slice.Tensor, aten.index_select.default, aten.index.Tensor, aten._unsafe_index.Tensor, aten.cumsum.default,
    aten.repeat_interleave.self_int, aten.slice_scatter.default, aten.select_scatter.default, aten.constant_pad_nd.default,
    aten.rot90.default, aten.unfold.default, aten.diagonal.default,
    aten.pad.default, aten.roll.default, aten.flip.default, aten.mean.dim, aten.sum.dim_IntList,
    aten.avg_pool1d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool2d.default, aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec,
    aten.upsample_nearest2d.vec, aten._upsample_bilinear2d_aa.vec, aten._upsample_bicubic2d_aa.vec,
    aten.linear.default, aten.addmm.default, aten.baddbmm.default, aten.mm.default, aten.bmm.default, aten.matmul.default,
    aten.einsum.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding,
    aten.conv2d.padding, aten.conv3d.padding, aten.convolution.default, aten.conv_transpose1d.default,
    aten.conv_transpose2d.input, aten.conv_transpose3d.input, aten.embedding.default,
}  # fmt: skip
"""Of the operators with a row `narrow_copy`, `scatter`, `index_put`, `masked_scatter` and the like are left out on purpose: a
length, an index or a mask among their operands is as wide as the result, and stays so."""


def follows(node: Node, axis: int) -> bool:
    """Whether a call's result may get another size along ``axis``, which it carries, with nothing but its sizes changed."""
    if node.target in (aten.squeeze.dim, aten.squeeze.dims):
        ((x, own),) = carries(node, axis) or ((node, axis),)
        dims = arguments(node)["dim"]
        return own not in [dim % rank(x) for dim in ([dims] if isinstance(dims, int) else dims)]  # a single entry would go
    return node.target in _SIZED or node.target in _BY_OPERANDS


_ENTRY_BY_ENTRY = {
    aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.addcmul.default, aten.where.self,
    aten.where.ScalarOther, aten.where.ScalarSelf, aten.masked_fill.Scalar, aten.lerp.Scalar, aten.lerp.Tensor,
}  # fmt: skip


def meets_full_width(node: Node, axis: int, carried: Iterable[tuple[Node, int]]) -> Node | None:
    """An operand that stays as wide as a call's result along ``axis`` when those that carry the axis get another size.

    A mask or a gate that is expanded along the features is one: it is the same for all of them, and stored for each.
    """
    if node.target not in _ENTRY_BY_ENTRY:
        return None
    others = set(node.all_input_nodes) - {operand for operand, _ in carried}
    spans = ((other, axis - rank(node) + rank(other)) for other in node.all_input_nodes if other in others)
    return next((other for other, own in spans if own >= 0 and not same(shape(other)[own], 1)), None)


def says_size(node: Node) -> bool:
    """Whether a call has the sizes of its result among its arguments."""
    return node.target in _SIZED


def with_size(node: Node, axis: int, size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call whose result is to have ``size`` entries along ``axis``; inferred sizes stay inferred."""
    if node.target not in _SIZED:
        return node.args, dict(node.kwargs)
    sizes = list(arguments(node)["size"])
    place = axis - rank(node)  # expand and view say one size per axis of the result
    if sizes[place] != -1:
        sizes[place] = size
    position = next(at for at, each in enumerate(node.target._schema.arguments) if each.name == "size")  # type: ignore[union-attr]
    if position < len(node.args):
        return (*node.args[:position], sizes, *node.args[position + 1 :]), dict(node.kwargs)
    return node.args, {**node.kwargs, "size": sizes}
