"""A formula in blocks, so that no more than a block of a large tensor is in float64 at a time.

A formula is laid out as calls of aten's. An axis of its value that everything large in it carries (the table of operators says
so) cuts it: entries between two places of the value are computed of entries between two places of each tensor that is cut, and
of all of those that are not, which are formed before in the same way. Blocks have a size that stays in a core's cache, which
is also the fastest way.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from normfuse.graph.expressions import ALONG_AXIS, Call, Formula, Number, Read, along_axis, evaluate, interpret, reads
from normfuse.graph.ops.lookup import carries, own_axis, rank, row, spans
from normfuse.graph.ops.row import Sized
from normfuse.graph.parts import Part
from normfuse.graph.views import arguments, shape

BLOCK = 1 << 18
"""Entries of the largest tensor in a block."""


def rounded(formula: Formula, read: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
    """The value of a formula, evaluated in float64 and rounded once: what a stored tensor becomes.

    Args:
        formula: what to compute.
        read: gives the stored tensor of a name, in any floating dtype.
        dtype: what it is rounded to.
    """
    with _one_thread():
        laid = laid_out(formula, read)
        return evaluate(formula, read).to(dtype).contiguous() if laid is None else laid.whole(dtype)


def overwrite(formula: Formula, name: str, value: Tensor, read: Callable[[str], Tensor]) -> bool:
    """Put a formula's value, rounded, where the tensor is that it changes; whether a bit of it differs.

    Args:
        formula: what the tensor becomes.
        name: its name; the formula may read it.
        value: the tensor, in memory of its own.
        read: gives the other stored tensors.

    Raises:
        ValueError: the formula's value has another shape.
    """

    def held(wanted: str) -> Tensor:
        return value if wanted == name else read(wanted)

    laid = laid_out(formula, held)
    if laid is None or shape(laid.value) != tuple(value.shape) or not laid.reads_in_step(name):
        new = rounded(formula, held, value.dtype)
        if new.shape != value.shape:
            raise ValueError(f"'{name}' has {tuple(new.shape)} entries now, and {tuple(value.shape)} where it is stored")
        differs = not _same_bits(new, value)
        value.copy_(new)
        return differs
    differs = False
    with _one_thread():
        for block in laid.blocks():
            new = block.value().to(value.dtype)
            differs = differs or not _same_bits(new, value[block.place])
            value[block.place] = new
    return differs


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The same bits on any number of threads: several that share a sum over a long row round it in another way."""
    if torch.compiler.is_compiling():
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.view(kind), other.view(kind))


Widened = Callable[[str, Part], Tensor]
"""The entries of a stored tensor in float64, or what is to be computed with in their place."""


@dataclass(frozen=True)
class Block:
    """Some entries of a formula's value, computed when they are asked for.

    Attributes:
        value: computes them.
        axis: the axis that is cut.
        start: the first place.
        size: how many.
    """

    value: Callable[[], Tensor]
    axis: int
    start: int
    size: int

    @property
    def place(self) -> tuple[slice, ...]:
        """Where they are in the whole."""
        return (*(slice(None),) * self.axis, slice(self.start, self.start + self.size))


def laid_out(
    formula: Formula,
    read: Callable[[str], Tensor],
    *,
    widened: Widened = lambda name, part: part.wide(),
    least: int | None = None,
    size: int | None = None,
) -> Blocks | None:
    """A formula in blocks; None where it is small, or not of plain tensors on a CPU: then it is evaluated as a whole.

    Args:
        formula: what to compute.
        read: gives the stored tensor of a name, in any floating dtype.
        widened: gives entries of a stored tensor.
        least: entries of the largest tensor up to which it is small; None for `BLOCK`.
        size: entries of the largest tensor in a block, likewise.
    """
    tensors = {name: read(name) for name in reads(formula)}
    plain = all(
        each.device.type == "cpu" and each.layout is torch.strided and type(each) in (Tensor, torch.nn.Parameter)
        for each in tensors.values()
    )
    if not plain or max((each.numel() for each in tensors.values()), default=0) <= (least or BLOCK):
        return None
    _keep_memory()
    try:
        return Blocks(formula, tensors, widened, size or BLOCK)
    except NotImplementedError:  # an operator whose sizes torch does not tell without numbers
        return None


@cache
def _keep_memory() -> None:
    """Let the C library keep what a block has taken for the next one, in place of the kernel, which fills it with zeros anew.

    Glibc keeps pieces up to the size of the largest one that it has given back, if that was no more than 32 MiB.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


class Blocks:
    """A formula as the calls of a graph; every place where it reads a tensor is a node of its own.

    Attributes:
        value: the node whose value is the formula's.
        of: placeholder -> the tensor or the number that it stands for.
    """

    def __init__(self, formula: Formula, tensors: Mapping[str, Tensor], widened: Widened, size: int) -> None:
        self.graph = Graph()
        self.tensors, self.widened, self.size = tensors, widened, size
        self.of: dict[Node, Tensor | float] = {}
        self.names: dict[Node, str] = {}
        self.value: Node = interpret(formula, self._leaf, self._call)
        self.nodes = list(self.graph.nodes)

    def _leaf(self, of: Read | Number) -> Node:
        node = self.graph.placeholder(f"of_{len(self.of)}")
        self.of[node] = self.tensors[of.name].detach() if isinstance(of, Read) else of.value
        if isinstance(of, Read):
            self.names[node] = of.name
        sizes = self.tensors[of.name].shape if isinstance(of, Read) else ()
        node.meta["val"] = torch.empty(sizes, dtype=torch.float64, device="meta")
        return node

    def _call(self, call: Call, values: list[Any]) -> Node:
        if call.op in ALONG_AXIS:
            along: Node = along_axis(call, values, rank(values[0]), self._aten)
            return along
        result = self._node(call.target(), tuple(values), call.keywords())
        several = isinstance(result.meta["val"], (tuple, list))
        return self._node(operator.getitem, (result, call.output)) if several else result

    def _aten(self, name: str, *args: Any) -> Node:
        return self._node(Call(name, ()).target(), args)

    def _node(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Node:
        node: Node = self.graph.call_function(target, args, kwargs or {})
        given = map_arg((node.args, node.kwargs), lambda each: each.meta["val"])
        node.meta["val"] = target(*given[0], **given[1])
        return node

    # -- cutting -------------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the formula's value."""
        return shape(self.value)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The formula's value in a dtype."""
        value = torch.empty(self.shape, dtype=dtype)
        for block in self.blocks():
            value[block.place if self.shape else ()] = block.value()
        return value

    def blocks(self, of: Node | None = None) -> Iterator[Block]:
        """The formula's value in float64, or that of a node on the way, block by block."""
        value = of or self.value
        axis, cut = self._cut(value)
        if not cut:
            yield Block(partial(self._uncut, value), 0, 0, shape(value)[0] if rank(value) else 1)
            return
        whole = {
            each: self._whole(each) for node in cut if node not in self.of for each in node.all_input_nodes if each not in cut
        }
        size = shape(value)[axis]
        thickest = max(each.numel() // size for node in cut if isinstance(each := self.of.get(node), Tensor))
        step = max(1, self.size // max(thickest, 1))
        for start, end in pairwise((*range(0, size, step), size)):
            yield Block(partial(self._block, value, cut, start, end - start, whole), axis, start, end - start)

    def reads_in_step(self, name: str) -> bool:
        """Whether a block of the value reads the tensor of this name at its own place only."""
        axis, cut = self._cut(self.value)
        return bool(cut) and all(cut.get(node) == axis for node, of in self.names.items() if of == name)

    def _cut(self, value: Node) -> tuple[int, dict[Node, int]]:
        """The axis along which a value is cut, and node -> the axis along which it is; no nodes where it cannot be cut."""
        for axis in range(rank(value)):
            cut = self._cut_along(value, axis)
            if any(node in self.names for node in cut):
                return axis, cut
        return 0, {}

    def _cut_along(self, value: Node, axis: int) -> dict[Node, int]:
        cut, whole = {value: axis}, set[Node]()
        for node in reversed(self.nodes):
            if node in cut and node not in self.of:
                parts = dict(_parts(node, cut[node]))
                if not parts or any(cut.get(each, own) != own for each, own in parts.items()):
                    return {}
                cut |= parts
                whole.update(each for each in node.all_input_nodes if each not in parts)
        return cut if whole.isdisjoint(cut) else {}

    # -- computing -----------------------------------------------------------------------------------------------------

    def _block(self, value: Node, cut: Mapping[Node, int], start: int, size: int, whole: Mapping[Node, Tensor]) -> Tensor:
        values = dict(whole)
        for node in self.nodes:
            if node in cut:
                of = self.of.get(node)
                part = Part(of, cut[node], start, size) if isinstance(of, Tensor) else None
                values[node] = self.widened(self.names[node], part) if part else self._called(node, values)
        return values[value]

    def _uncut(self, value: Node) -> Tensor:
        if value in self.of:
            return self._whole(value)
        return self._called(value, {each: self._whole(each) for each in value.all_input_nodes})

    def _whole(self, node: Node) -> Tensor:
        of = self.of.get(node)
        if isinstance(of, Tensor):
            return self.widened(self.names[node], Part(of))
        if of is not None:
            return torch.full((), of, dtype=torch.float64)
        value = torch.empty(shape(node), dtype=torch.float64)
        for block in self.blocks(node):
            value[block.place if rank(node) else ()] = block.value()
        return value

    def _called(self, node: Node, values: Mapping[Node, Any]) -> Tensor:
        args, kwargs = map_arg((node.args, node.kwargs), lambda each: values[each])
        with torch.no_grad():
            result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
        return result


def _parts(node: Node, axis: int) -> tuple[tuple[Node, int], ...]:
    """Of which entries of its operands the entries of a call are, between two places of an axis: (operand, its axis)."""
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        return tuple(own_axis(each, node, axis) for each in node.all_input_nodes if spans(each, node, axis))
    return (carries(node, axis) or ()) if _may_be_shorter(node, axis) else ()


def _may_be_shorter(node: Node, axis: int) -> bool:
    """Whether a result is shorter along an axis where its operands are."""
    match getattr(row(node), "width", None):
        case True:
            return True
        case Sized(argument):
            return bool(arguments(node)[argument][axis] == -1)
        case rule if callable(rule):
            return bool(rule(node, arguments(node), axis))
    return False
