"""Standardized convolutions against their definitions and against timm's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from normfuse.nn import ScaledStdConv1d, ScaledStdConv2d, StdConv1d, StdConv2d
from normfuse.nn.standardized_conv import Variant


def by_hand(weight: Tensor, variant: str) -> Tensor:
    rows = []
    for row in weight.flatten(1):
        n, centered = len(row), row - row.sum() / len(row)
        biased, unbiased = centered.square().sum() / n, centered.square().sum() / (n - 1)
        deviation = {
            "ws": unbiased.sqrt() + 1e-5,
            "bcn": (unbiased + 1e-5).sqrt(),
            "timm": (biased + 1e-6).sqrt(),
        }[variant]
        rows.append(centered / deviation)
    return torch.stack(rows).reshape(weight.shape)


@pytest.mark.parametrize("variant", ["ws", "bcn", "timm"])
@pytest.mark.parametrize("options", [{}, {"groups": 2, "stride": 2}, {"padding": 1, "padding_mode": "reflect", "bias": False}])
def test_weight_and_convolution(variant: Variant, options: dict[str, Any]) -> None:
    conv = StdConv2d(4, 6, 3, variant=variant, dtype=torch.float64, **options)
    weight = by_hand(conv.weight.detach(), variant)
    torch.testing.assert_close(conv.standardized_weight(), weight, rtol=1e-12, atol=1e-12)
    plain = torch.nn.Conv2d(4, 6, 3, dtype=torch.float64, **options)
    plain.load_state_dict({**conv.state_dict(), "weight": weight})
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(conv(x), plain(x), rtol=1e-12, atol=1e-12)


def test_gradients_are_of_the_raw_weight() -> None:
    conv = StdConv1d(2, 3, 4, dtype=torch.float64)
    x = torch.randn(2, 2, 8, dtype=torch.float64)
    weight = conv.weight.detach().clone().requires_grad_()
    F.conv1d(x, by_hand(weight, "ws"), conv.bias).square().sum().backward()
    conv(x).square().sum().backward()
    torch.testing.assert_close(conv.weight.grad, weight.grad, rtol=1e-10, atol=1e-10)


def test_variants_differ() -> None:
    weights = [StdConv2d(4, 6, 3, variant=variant) for variant in ("ws", "bcn", "timm")]
    for conv in weights[1:]:
        conv.load_state_dict(weights[0].state_dict())
    one, _, three = (conv.standardized_weight() for conv in weights)
    torch.testing.assert_close(three, one * (36 / 35) ** 0.5, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(one, three, rtol=1e-3)


def test_they_are_timm_s() -> None:
    theirs = pytest.importorskip("timm.layers")
    x = torch.randn(2, 4, 8, 8)
    pairs = [
        (StdConv2d(4, 6, 3, padding=1, bias=False, variant="timm"), theirs.StdConv2d(4, 6, 3)),
        (ScaledStdConv2d(4, 6, 3, padding=1, gamma=1.7, gain_init=0.9), theirs.ScaledStdConv2d(4, 6, 3, gamma=1.7)),
    ]
    for ours, published in pairs:
        published.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(x), published(x), rtol=1e-4, atol=1e-5)


def test_scaled_in_one_dimension() -> None:
    conv = ScaledStdConv1d(4, 6, 3, groups=2, gamma=1.5, gain_init=0.8, dtype=torch.float64)
    assert conv.gain.shape == (6, 1, 1)
    expected = by_hand(conv.weight.detach(), "timm") * (1.5 * 0.8 / 6**0.5)
    torch.testing.assert_close(conv.standardized_weight(), expected, rtol=1e-12, atol=1e-12)


def test_constant_filters_are_finite() -> None:
    conv = StdConv2d(1, 1, 3)
    torch.nn.init.ones_(conv.weight)
    assert torch.equal(conv.standardized_weight(), torch.zeros(1, 1, 3, 3))


def test_half_weights_have_exact_statistics() -> None:
    conv = StdConv2d(64, 2, 3, dtype=torch.float16)
    torch.nn.init.normal_(conv.weight, 100, 1)
    exact = by_hand(conv.weight.detach().double(), "ws")
    torch.testing.assert_close(conv.standardized_weight().double(), exact, rtol=1e-3, atol=1e-3)


def test_a_filter_of_one_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="unbiased"):
        StdConv2d(4, 4, 1, groups=4)
    StdConv2d(4, 4, 1, groups=4, variant="timm")
    with pytest.raises(ValueError, match="one of ws, bcn, timm"):
        StdConv2d(4, 4, 3, variant="w")  # type: ignore[arg-type]
