"""Entries of a stored tensor, so that a change of all weights can be made block by block and gives the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = 1 << 22
"""Entries that are looked at in float64 at a time."""


@dataclass(frozen=True)
class Part:
    """The entries of a stored tensor between two places of an axis.

    Attributes:
        whole: the tensor as it is stored.
        axis: the axis.
        start: the first place.
        size: how many; None for the whole tensor.
    """

    whole: Tensor
    axis: int = 0
    start: int = 0
    size: int | None = None

    def of(self, other: Tensor) -> Tensor:
        """The same entries of a tensor of the same shape."""
        return other if self.size is None else other.narrow(self.axis, self.start, self.size)

    def wide(self) -> Tensor:
        """The entries in float64."""
        return self.of(self.whole.detach()).to(torch.float64)


Weights = Callable[[str, Tensor, Part], Tensor]
"""Other values for the stored tensors: given a tensor's name, some of its entries in float64 and which ones they are, the
entries to run with."""


def deviation(whole: Tensor) -> float:
    """The standard deviation of a tensor's entries, in float64; no more than a piece of it is widened at a time."""
    if whole.numel() <= PIECE:
        return float(whole.detach().to(torch.float64).std())
    mean = math.fsum(float(each.sum()) for each in _pieces(whole)) / whole.numel()
    squares = math.fsum(float((each - mean).square_().sum()) for each in _pieces(whole))
    return math.sqrt(squares / (whole.numel() - 1))


def _pieces(whole: Tensor) -> Iterator[Tensor]:
    return (each.to(torch.float64) for each in torch.split(whole.detach().reshape(-1), PIECE))


def row_sizes(whole: Tensor) -> Tensor:
    """The sum of the squares of each row of a tensor, in float64."""
    rows = whole.detach().reshape(len(whole), -1)
    some = max(1, PIECE // max(rows.shape[1], 1))
    return torch.cat([each.to(torch.float64).square().sum(1) for each in torch.split(rows, some)])


def any_filled(whole: Tensor) -> bool:
    """Whether an entry of a tensor is not zero."""
    return any(bool(each.any()) for each in torch.split(whole.detach().reshape(-1), PIECE))
