"""Stored tensors that are never in float64 as a whole: products and look-ups take them block by block.

The values that a run computes are small beside the weights of a large model. A weight in float64 is four times as large as
it is stored in half precision, and the table of a large vocabulary is gigabytes then. A product is a sum over blocks of its
weight, or consists of blocks of entries; a look-up needs the blocks in which the rows are that are asked for. Smaller blocks
than a weight are also faster: they are widened, changed and read in a core's cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from normfuse.graph.blocks import Block, Blocks
from normfuse.graph.views import arguments, aten, tensors_in

_WEIGHT: dict[Any, str] = {
    aten.linear.default: "weight", aten.embedding.default: "weight",
    aten.mm.default: "mat2", aten.addmm.default: "mat2", aten.matmul.default: "other",
}  # fmt: skip
"""Operator -> the operand that it takes in blocks."""


@dataclass(frozen=True)
class Large:
    """The value of a stored tensor, block by block.

    Attributes:
        formula: what it is, laid out.
        width: the dtype to compute in.
    """

    formula: Blocks
    width: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return self.formula.shape

    def blocks(self) -> Iterator[Block]:
        """Its blocks, none of which is computed yet."""
        return self.formula.blocks()


def taken_in_blocks(stored: Node) -> bool:
    """Whether all readers of a stored tensor take it block by block."""
    return bool(stored.users) and all(_takes(reader, stored) for reader in stored.users)


def _takes(reader: Node, stored: Node) -> bool:
    place = _WEIGHT.get(reader.target)
    if place is None:
        return False
    given = arguments(reader)
    return (
        given[place] is stored
        and sum(each is stored for each in tensors_in((reader.args, reader.kwargs))) == 1
        and _is_matrix(stored)
    )


def _is_matrix(stored: Node) -> bool:
    return len(stored.meta["val"].shape) == 2


def read_in_blocks(node: Node, values: Mapping[Node, Any]) -> Tensor | None:
    """The result of a call that reads a tensor in blocks; None where it reads none."""
    place = _WEIGHT.get(node.target)
    given = arguments(node) if place else {}
    weight = values.get(given[place]) if place and isinstance(given[place], Node) else None
    if not isinstance(weight, Large):
        return None

    def value(name: str) -> Any:
        return values[given[name]] if isinstance(given.get(name), Node) else given.get(name)

    if node.target is aten.embedding.default:
        return _looked_up(value("indices"), weight)
    if node.target is aten.linear.default:
        result = _product(value("input"), weight, out=0)
        return result if value("bias") is None else result + value("bias")
    if node.target is aten.addmm.default:
        result = value("alpha") * _product(value("mat1"), weight, out=1)
        return torch.add(result, value("self"), alpha=value("beta"))
    return _product(value("self"), weight, out=1)


def _product(x: Tensor, weight: Large, out: int) -> Tensor:
    """A product with a matrix whose axis ``out`` is that of the results."""
    results: list[Tensor] = []
    for block in weight.blocks():
        matrix = block.value().to(weight.width)
        matrix = matrix if out == 1 else matrix.t()
        if block.axis == out:
            results.append(x @ matrix)
        else:
            some = x.narrow(-1, block.start, block.size) @ matrix
            results = [results[0].add_(some) if results else some]
    return torch.cat(results, -1) if len(results) > 1 else results[0]


def _looked_up(indices: Tensor, table: Large) -> Tensor:
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < table.shape[0]:
        raise IndexError("index out of range in self")
    columns: list[Tensor] = []
    found = torch.zeros(*indices.shape, table.shape[1], dtype=table.width)
    for block in table.blocks():
        if block.axis == 1:
            columns.append(F.embedding(indices, block.value().to(table.width)))
            continue
        here = (indices >= block.start) & (indices < block.start + block.size)
        if bool(here.any()):
            found[here] = block.value().to(table.width)[indices[here] - block.start]
    return torch.cat(columns, -1) if columns else found
