"""The axes that a norm's statistics are taken over, and those along which its gain and shift vary, against numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.analysis.norms import norms_of
from normfuse.graph.program import Program
from normfuse.graph.views import NormKind

D = 4  # each axis has as many entries, so that nothing tells axes apart by their sizes
SHAPE = (D, D, D, D)
KINDS: dict[tuple[NormKind, int], tuple[int, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    (NormKind.LAYER_NORM, 1): (1, lambda x, g, b: F.layer_norm(x, SHAPE[:1], g, b)),
    (NormKind.LAYER_NORM, 2): (2, lambda x, g, b: F.layer_norm(x, SHAPE[:2], g, b)),
    (NormKind.RMS_NORM, 1): (1, lambda x, g, b: F.rms_norm(x, SHAPE[:1], g)),
    (NormKind.GROUP_NORM, 1): (1, lambda x, g, b: F.group_norm(x, 1, g, b)),
    (NormKind.INSTANCE_NORM, 1): (1, lambda x, g, b: F.instance_norm(x, None, None, g, b)),
    (NormKind.BATCH_NORM, 1): (1, lambda x, g, b: F.batch_norm(x, None, None, g, b, training=True)),
}


class Two(nn.Module):
    """One norm with a gain and a shift, and one without."""

    def __init__(self, affine_axes: int, norm: Callable[[Tensor, Any, Any], Tensor]) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.randn(SHAPE[:affine_axes])), nn.Parameter(torch.randn(SHAPE[:affine_axes]))
        self._norm = norm

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._norm(x, self.gain, self.shift), self._norm(x, None, None)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_axes_are_those_of_the_statistics_and_channels_those_of_the_gain(kind: tuple[NormKind, int]) -> None:
    torch.manual_seed(0)
    model, x = Two(*KINDS[kind]), 3 * torch.randn(SHAPE) + torch.randn(SHAPE).cumsum(1).cumsum(2)
    affine, plain = norms_of(Program.trace(model, (x,)))
    assert plain.kind == affine.kind == kind[0]
    with torch.no_grad():
        with_gain, without = model(x)
    squares = without.square().mean(plain.axes)
    torch.testing.assert_close(squares, torch.ones_like(squares), rtol=1e-4, atol=1e-4)
    one_fewer = without.square().mean(plain.axes[1:]) if len(plain.axes) > 1 else without.square()
    assert (one_fewer - 1).abs().max() > 1e-2  # over fewer axes they are not one

    # (gain, shift) at each place, by two readings of it
    second = 2 * torch.randn(SHAPE)
    with torch.no_grad():
        other_gain, other = model(second)
    gain = (with_gain - other_gain) / (without - other)
    for axis in range(x.dim()):
        spread = (gain - gain.select(axis, 0).unsqueeze(axis)).abs().quantile(0.9)
        assert (spread > 1e-2) == (axis in affine.channels), axis


def test_stored_statistics_vary_along_the_channels() -> None:
    class Stored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.root = nn.BatchNorm2d(D), nn.Parameter(torch.rand(D, 1, 1) + 0.5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.norm(x), x * torch.rsqrt(self.root + 1e-5)

    norms = norms_of(Program.trace(Stored().eval(), (torch.randn(SHAPE),)))
    assert {norm.kind: (norm.axes, norm.channels) for norm in norms} == {
        NormKind.BATCH_NORM: ((0, 2, 3), (1,)),
        NormKind.OFFLINE_NORM: ((0, 2, 3), (1,)),
    }


def test_a_kind_is_a_text() -> None:
    assert [f"{kind} {kind!r}" for kind in (NormKind.RMS_NORM,)] == ["rms_norm 'rms_norm'"]
    assert {NormKind.RMS_NORM: 1} == {"rms_norm": 1}
