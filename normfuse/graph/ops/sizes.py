"""What becomes of a call when its result gets another number of entries along one axis.

Most calls that carry an axis take its size from their operands, some say sizes in their arguments, which follow, and some
depend on the size in another way: nothing that passes through these changes its width. The table says which is which.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.fx import Node

from normfuse.graph.ops.lookup import computes, rank, row, same
from normfuse.graph.ops.row import ENTRYWISE, Sized
from normfuse.graph.views import arguments, shape


def follows(node: Node, axis: int) -> bool:
    """Whether a call's result may get another size along ``axis``, which it carries, with nothing but its sizes changed."""
    known = row(node)
    if known is None or not known.width:
        return False
    return known.width is True or isinstance(known.width, Sized) or known.width(node, arguments(node), axis)


def meets_full_width(node: Node, axis: int, carried: Iterable[tuple[Node, int]]) -> Node | None:
    """An operand that stays as wide as a call's result along ``axis`` when those that carry the axis get another size.

    A mask or a gate that is expanded along the features is one: it is the same for all of them, and stored for each.
    """
    if computes(node) not in ENTRYWISE:
        return None
    others = set(node.all_input_nodes) - {operand for operand, _ in carried}
    spans = ((other, axis - rank(node) + rank(other)) for other in node.all_input_nodes if other in others)
    return next((other for other, own in spans if own >= 0 and not same(shape(other)[own], 1)), None)


def says_size(node: Node) -> bool:
    """Whether a call has the sizes of its result among its arguments."""
    return _sized(node) is not None


def _sized(node: Node) -> str | None:
    known = row(node)
    return known.width.argument if known is not None and isinstance(known.width, Sized) else None


def with_size(node: Node, axis: int, size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call whose result is to have ``size`` entries along ``axis``; inferred sizes stay inferred."""
    name = _sized(node)
    if name is None:
        return node.args, dict(node.kwargs)
    sizes = list(arguments(node)[name])
    place = axis - rank(node)  # expand and view say one size per axis of the result
    if sizes[place] != -1:
        sizes[place] = size
    position = next(at for at, each in enumerate(node.target._schema.arguments) if each.name == name)  # type: ignore[union-attr]
    if position < len(node.args):
        return (*node.args[:position], sizes, *node.args[position + 1 :]), dict(node.kwargs)
    return node.args, {**node.kwargs, name: sizes}
