"""Operators that have no row on purpose: a mean-subtraction really does not pass, or none of them is carried anyway."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from normfuse.graph.ops.lookup import knows
from normfuse.graph.ops.row import WITHOUT_ROW

BY_NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan_to_num": lambda x: torch.nan_to_num(torch.where(x > 1, torch.inf, x)),
    "nansum": lambda x: torch.nansum(torch.where(x > 1, torch.nan, x), 0),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "relu": torch.relu,
    "amax": lambda x: x.amax(0),
    "sort": lambda x: x.sort(0).values,
    "median": lambda x: x.median(0).values,
    "cumprod": lambda x: x.cumprod(0),
    "index_reduce": lambda x: x.index_reduce(0, torch.tensor([0, 0, 1]), x[:3], "amax"),
    "scatter_reduce": lambda x: x.scatter_reduce(0, torch.zeros(2, x.shape[1], dtype=torch.int64), x[:2], "prod"),
    "cross": lambda x: torch.linalg.cross(x[:, :3], x[:, 1:4]),
    "kron": lambda x: torch.kron(x, x),
    "cdist": lambda x: torch.cdist(x, -x),
}


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


@pytest.mark.parametrize("name", WITHOUT_ROW)
def test_it_has_no_row(name: str) -> None:
    packet = getattr(torch.ops.aten, name)
    assert not any(knows(getattr(packet, overload)) for overload in packet.overloads())


@pytest.mark.parametrize("name", BY_NUMBERS)
def test_a_mean_subtraction_does_not_pass(name: str) -> None:
    assert name in WITHOUT_ROW
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inside, outside = BY_NUMBERS[name](_centred(x)), _centred(BY_NUMBERS[name](x))
    assert not torch.allclose(inside, outside, equal_nan=True)
