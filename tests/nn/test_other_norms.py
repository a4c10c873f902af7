"""Batch-channel norm, IBN, EvoNorm, scaled norms and SLAB's attention against their formulas."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normfuse.nn import (
    IBN,
    BatchChannelNorm,
    EstimatedBatchNorm,
    EvoNormB0,
    EvoNormS0,
    ScaledLayerNorm,
    ScaledRMSNorm,
    SimplifiedLinearAttention,
)

C = 8


def images(*shape: int) -> Tensor:
    return torch.randn(*(shape or (3, C, 4, 5)), dtype=torch.float64) * 2 + 1


# ---- batch-channel normalization


@pytest.mark.parametrize("mode", [True, False])
def test_batch_channel_norm(mode: bool) -> None:
    norm = BatchChannelNorm(C, num_groups=2, dtype=torch.float64)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 2)
    plain = nn.BatchNorm2d(C, dtype=torch.float64)
    plain.load_state_dict(norm.bn.state_dict())
    for _ in range(3):
        x = images()
        y, normed = norm.train(mode)(x), plain.train(mode)(x)
    parts = normed.reshape(3, 2, -1)
    parts = (parts - parts.mean(-1, keepdim=True)) / torch.sqrt(parts.var(-1, correction=0, keepdim=True) + 1e-5)
    torch.testing.assert_close(y, (parts * norm.weight + norm.bias).reshape(x.shape), rtol=1e-12, atol=1e-12)
    assert norm.weight.shape == (1, 2, 1)


def test_estimated_batch_norm() -> None:
    norm = EstimatedBatchNorm(C, 0.2, dtype=torch.float64)
    mean, variance = torch.zeros(C, dtype=torch.float64), torch.ones(C, dtype=torch.float64)
    for _ in range(4):
        x = images(1, C, 4, 5)
        y = norm(x)
        new_mean = x.mean((0, 2, 3))
        around_old = (x - mean.reshape(-1, 1, 1)).square().mean((0, 2, 3))
        mean, variance = 0.8 * mean + 0.2 * new_mean, 0.8 * variance + 0.2 * around_old
        expected = (x - mean.reshape(-1, 1, 1)) / torch.sqrt(variance + 1e-5).reshape(-1, 1, 1)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.eval()(x), y, rtol=1e-12, atol=1e-12)
    assert not torch.equal(norm.running_mean, torch.zeros(C))


def test_its_speed_can_be_scheduled() -> None:
    norm = EstimatedBatchNorm(C, 0.0)
    norm(torch.randn(2, C))
    assert torch.equal(norm.running_mean, torch.zeros(C))
    norm.estbn_moving_speed.fill_(1)
    x = torch.randn(5, C)
    norm(x)
    torch.testing.assert_close(norm.running_mean, x.mean(0))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_estimate_is_the_first_one(reentrant: bool) -> None:
    plain = BatchChannelNorm(C, 2, moving_speed=0.3, dtype=torch.float64)
    saving = copy.deepcopy(plain)
    x = images().requires_grad_()
    first, second = (images() for _ in range(2))
    (plain(x * first) + plain(x * second)).square().sum().backward()
    expected, x.grad = x.grad, None
    parts = [checkpoint(lambda x, y=y: saving(x * y), x, use_reentrant=reentrant) for y in (first, second)]
    (parts[0] + parts[1]).square().sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=1e-12)
    for (name, ours), theirs in zip(saving.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


# ---- IBN


@pytest.mark.parametrize("mode", [True, False])
def test_ibn(mode: bool) -> None:
    norm = IBN(C, ratio=0.3, dtype=torch.float64)  # 2 and 6
    batch, x = copy.deepcopy(norm.BN), images()
    y = norm.train(mode)(x)
    torch.testing.assert_close(y[:, :2], F.instance_norm(x[:, :2]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y[:, 2:], batch.train(mode)(x[:, 2:]), rtol=1e-12, atol=1e-12)
    inner = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert set(norm.state_dict()) == {"IN.weight", "IN.bias", *(f"BN.{name}" for name in inner)}
    assert norm.half().BN.weight.dtype == torch.float16  # the published class hides this method


@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_ibn_needs_both_halves(ratio: float) -> None:
    with pytest.raises(ValueError, match="no channel"):
        IBN(C, ratio)


# ---- EvoNorm


def test_evo_norms_are_timm_s() -> None:
    theirs = pytest.importorskip("timm.layers.evo_norm")
    pairs = [
        (EvoNormB0(C), theirs.EvoNorm2dB0(C)),
        (EvoNormB0(C, apply_act=False), theirs.EvoNorm2dB0(C, apply_act=False)),
        (EvoNormS0(C, num_groups=2), theirs.EvoNorm2dS0(C, groups=2)),
        (EvoNormS0(C, num_groups=2, apply_act=False), theirs.EvoNorm2dS0(C, groups=2, apply_act=False)),
    ]
    for ours, published in pairs:
        for parameter in ours.parameters():
            nn.init.uniform_(parameter, 0.5, 2)
        published.load_state_dict(ours.state_dict())
        for mode in (True, True, False):
            x = torch.randn(3, C, 4, 5)
            torch.testing.assert_close(ours.train(mode)(x), published.train(mode)(x), rtol=1e-4, atol=1e-5)
        for (name, mine), yours in zip(ours.named_buffers(), published.buffers(), strict=True):
            torch.testing.assert_close(mine, yours, msg=name)


def test_evo_norm_gradients() -> None:
    for norm in (EvoNormB0(2, dtype=torch.float64), EvoNormS0(2, 1, dtype=torch.float64)):
        x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(norm, (x,))


def test_without_activation_it_is_a_gain_and_a_shift() -> None:
    for norm in (EvoNormB0(C, apply_act=False), EvoNormS0(C, 2, apply_act=False)):
        x = torch.randn(2, C, 3, 3)
        assert torch.equal(norm(x), x)
        assert "v" not in norm.state_dict()


def test_evo_norm_b0_needs_two_values() -> None:
    with pytest.raises(ValueError, match="more than one value"):
        EvoNormB0(C)(torch.randn(1, C, 1, 1))


# ---- LayerNorm scaling


@pytest.mark.parametrize("layer", [1, 2, 24])
def test_scaled_norms(layer: int) -> None:
    x = torch.randn(3, 5, C)
    for scaled, plain in (
        (ScaledLayerNorm(C, layer, eps=1e-3), nn.LayerNorm(C, eps=1e-3)),
        (ScaledRMSNorm(C, layer), nn.RMSNorm(C, eps=1e-6)),
    ):
        torch.testing.assert_close(scaled(x), plain(x) / layer**0.5)
        assert set(scaled.state_dict()) == set(plain.state_dict())


def test_the_scale_survives_the_meta_device() -> None:
    with torch.device("meta"):
        norm = ScaledLayerNorm(C, 4)
    norm = norm.to_empty(device="cpu")
    norm.load_state_dict(nn.LayerNorm(C).state_dict())
    x = torch.randn(3, C)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (C,)) / 2)


def test_layers_are_counted_from_one() -> None:
    with pytest.raises(ValueError, match="from 1"):
        ScaledLayerNorm(C, 0)


# ---- SLAB's attention


def test_attention_is_its_formula() -> None:
    heads, height, width = 2, 3, 5
    attention = SimplifiedLinearAttention(C, heads, (height, width), dtype=torch.float64)
    nn.init.normal_(attention.positional_encoding)
    x = torch.randn(2, height * width, C, dtype=torch.float64)
    q, k, v = attention.qkv(x).split(C, -1)
    q, k = q.relu(), (k + attention.positional_encoding).relu()
    parts = []
    for head in range(heads):
        own = slice(head * C // heads, (head + 1) * C // heads)
        scores = q[..., own] @ k[..., own].transpose(1, 2)  # every token with every other: what linear attention avoids
        attended = scores @ v[..., own] / (scores.sum(-1, keepdim=True) + 1e-6)
        image = v[..., own].transpose(1, 2).reshape(2, -1, height, width)
        parts.append(attended + attention.dwc(image).flatten(2).transpose(1, 2))
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(parts, -1)), rtol=1e-11, atol=1e-11)
    assert {name.split(".")[0] for name in attention.state_dict()} == {"qkv", "proj", "dwc", "positional_encoding"}


def test_attention_learns() -> None:
    attention = SimplifiedLinearAttention(C, 2, 4)
    attention(torch.randn(2, 16, C)).square().sum().backward()
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in attention.parameters())


def test_attention_to_nothing_is_finite() -> None:
    attention = SimplifiedLinearAttention(C, 2, 2)
    assert attention.qkv.bias is not None
    nn.init.zeros_(attention.qkv.weight)
    nn.init.constant_(attention.qkv.bias, -1)  # all queries and keys are 0 behind the ReLU
    assert torch.isfinite(attention(torch.randn(2, 4, C))).all()


def test_attention_sums_in_float32_under_autocast() -> None:
    attention = SimplifiedLinearAttention(C, 2, 16)
    x = torch.randn(2, 256, C) * 10
    with torch.autocast("cpu", torch.float16):
        assert torch.isfinite(attention(x)).all()


@pytest.mark.parametrize("shape", [(2, 15, C), (2, 16, C + 1), (16, C)])
def test_attention_is_on_its_grid(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        SimplifiedLinearAttention(C, 2, 4)(torch.zeros(shape))
