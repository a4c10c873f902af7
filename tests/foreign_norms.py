"""Norms and models as other people wrote them, with nothing of normfuse in them, and what must become of each.

The norms are written anew from the papers and from how the published code lays them out (axes, views, buffers, order of the
operations), because layout is what a rewrite could stumble over. Names are those of the published code.

    UN1d                Yang et al., "Unified Normalization for Accelerating and Stabilizing Transformers", arXiv 2208.01313
    RepBN, LinearNorm   Guo et al., "SLAB", arXiv 2405.11582: vision and LLaMA
    MaskPowerNorm       Shen et al., "PowerNorm", ICML 2020
    ActNorm             Kingma and Dhariwal, "Glow", arXiv 1807.03039
    FrozenBatchNorm2d   three spellings that detection libraries have
    EvoNorm2dB0, S0     Liu et al., arXiv 2004.02967
    StdConv2d           Qiao et al., arXiv 1903.10520; Brock et al., arXiv 2101.08692
    UnMixTNS1d          Tomar et al., arXiv 2402.11652: its form for vectors, which adapts to nothing
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tests.models import noise
from tests.zoo.spread import spread

D = 16

# -- norms in LayerNorm's place ----------------------------------------------------------------------------------------


class UN1d(nn.Module):
    """Unified Normalization of (B, N, C) or (N, C); ``running_var`` is a mean of squares."""

    running_var: Tensor
    buffer_x2: Tensor
    iters: Tensor

    def __init__(self, channels: int, window_size: int = 4, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum = channels, eps, 0.9
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("ema_gz", torch.zeros(channels))
        self.register_buffer("iters", torch.zeros(1, dtype=torch.long))
        self.register_buffer("buffer_x2", torch.zeros(window_size, channels))
        self.register_buffer("buffer_gz", torch.zeros(window_size, channels))
        self.register_buffer("skip_counter", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.ndim == 2
        if flat:
            x = x.unsqueeze(0)
        tokens = x.clone().reshape(-1, self.num_features)
        x = x.permute(0, 2, 1).contiguous()
        shape = x.size()
        x = x.reshape(x.size(0), self.num_features, -1).unsqueeze(-1)
        c = x.size(1)
        moment = (self._smoothed(tokens) if self.training else self.running_var).view(1, c, 1, 1)
        x = x / (moment + self.eps).sqrt()
        x = self.weight.view(1, c, 1, 1) * x
        if self.bias is not None:
            x = x + self.bias.view(1, c, 1, 1)
        x = x.reshape(shape).permute(0, 2, 1).contiguous()
        return x.squeeze(0) if flat else x

    def _smoothed(self, tokens: Tensor) -> Tensor:
        """The geometric mean of the last batches' means of squares."""
        with torch.no_grad():
            self.iters.add_(1)
            self.buffer_x2[int(self.iters) % len(self.buffer_x2)] = tokens.square().mean(0)
            seen = self.buffer_x2[self.buffer_x2.any(1)].log().mean(0).exp()
            self.running_var.mul_(self.momentum).add_(seen, alpha=1 - self.momentum)
        return seen


class RepBN(nn.Module):
    """BN(x) + αx as in SLAB's vision models: (B, N, C), transposed around the BatchNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.bn = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        x = self.bn(x) + self.alpha * x
        return x.transpose(1, 2)


class LlamaRepBN(nn.Module):
    """BN(x) + αx as in SLAB's LLaMA: tokens flattened for the BatchNorm, the sum in the layout of x; all zero at first."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1))
        self.bn = nn.BatchNorm1d(channels, eps=eps)
        nn.init.zeros_(self.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        return self.bn(x.contiguous().view(-1, c)).view(b, t, c) + self.alpha * x


class LinearNorm(nn.Module):
    """λ norm1(x) + (1 - λ) norm2(x) in training, norm2(x) alone at inference."""

    iter: Tensor
    total_step: Tensor

    def __init__(self, dim: int, norm1: Callable[[int], nn.Module], norm2: Callable[[int], nn.Module], step: int = 4) -> None:
        super().__init__()
        self.register_buffer("warm", torch.tensor(0))
        self.register_buffer("iter", torch.tensor(step))
        self.register_buffer("total_step", torch.tensor(step))
        self.norm1, self.norm2 = norm1(dim), norm2(dim)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.norm2(x)
        share = self.iter / self.total_step
        self.iter.sub_((self.iter > 0).long())
        return share * self.norm1(x) + (1 - share) * self.norm2(x)


class GroupScaling1D(nn.Module):
    """x over the root mean square of its own group of channels, token by token, (T, B, C)."""

    def __init__(self, eps: float = 1e-5, group_num: int = 2) -> None:
        super().__init__()
        self.eps, self.group_num = eps, group_num

    def forward(self, x: Tensor) -> Tensor:
        t, b, c = x.shape
        grouped = x.contiguous().reshape(t, b, self.group_num, c // self.group_num)
        squares = torch.mean(grouped * grouped, dim=3, keepdim=True)
        moment = torch.repeat_interleave(squares, repeats=c // self.group_num, dim=-1).contiguous().reshape(t, b, c)
        return x / torch.sqrt(moment + self.eps)


class MaskPowerNorm(nn.Module):
    """PowerNorm of (T, B, C); without ``groups`` there is no GroupScaling, and it is a constant at inference."""

    running_phi: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, groups: int = 0) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_phi", torch.ones(1, num_features, 1, 1))
        self.register_buffer("ema_gz", torch.zeros(1, num_features, 1, 1))
        self.register_buffer("iters", torch.zeros(1, dtype=torch.long))
        self.gp = GroupScaling1D(group_num=groups) if groups else None

    def forward(self, x: Tensor) -> Tensor:
        if self.gp is not None:
            x = self.gp(x)
        x = x.permute(1, 2, 0).contiguous()
        shape = x.size()
        x = x.reshape(x.size(0), self.num_features, -1).unsqueeze(-1)
        c = x.size(1)
        phi = x.square().mean((0, 2, 3), keepdim=True) if self.training else self.running_phi
        y = x / (phi + self.eps).sqrt()
        y = self.weight.reshape(1, c, 1, 1) * y + self.bias.reshape(1, c, 1, 1)
        return y.reshape(shape).permute(2, 0, 1).contiguous()


class LayerScale(nn.Module):
    """A gain per channel behind a branch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(1e-5 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


# -- norms in BatchNorm's place ----------------------------------------------------------------------------------------


class FrozenBatchNorm2d(nn.Module):
    """A BatchNorm that is never trained, all of it in buffers.

    Attributes:
        style: "torchvision": one scale and one bias; "detectron": casts to the dtype of x on the way; "no eps": no eps at
            all, as in the first of the detection libraries.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, style: str = "torchvision") -> None:
        super().__init__()
        self.style = style
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value))

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "torchvision":
            w, b, rv, rm = (each.reshape(1, -1, 1, 1) for each in (self.weight, self.bias, self.running_var, self.running_mean))
            scale = w * (rv + 1e-5).rsqrt()
            return x * scale + (b - rm * scale)
        scale = self.weight * (self.running_var if self.style == "no eps" else self.running_var + 1e-5).rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1).to(x.dtype) + bias.reshape(1, -1, 1, 1).to(x.dtype)


class ActNorm(nn.Module):
    """Glow's (x + b) e^(s logs): statistics of the first batch, trained on from there."""

    def __init__(self, channels: int, logscale_factor: float = 3.0) -> None:
        super().__init__()
        self.logscale_factor = logscale_factor
        self.bias, self.logs = nn.Parameter(torch.zeros(1, channels, 1, 1)), nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bias) * torch.exp(self.logs * self.logscale_factor)


class Scale(nn.Module):
    """One learned number, as behind the heads of FCOS."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class ScaledBatchNorm2d(nn.Module):
    """A BatchNorm with a learned number behind it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.scale = nn.BatchNorm2d(channels), Scale()

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.norm(x))


class LogScale(nn.Module):
    """Glow's gain behind the last convolution of a coupling."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.exp(self.logs * 3)


class EvoNorm2dB0(nn.Module):
    """EvoNorm B0; γx + β where its activation is off."""

    running_var: Tensor

    def __init__(self, channels: int, apply_act: bool = True, eps: float = 1e-3) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.v = nn.Parameter(torch.ones(channels)) if apply_act else None
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        form = (1, -1, 1, 1)
        if self.v is not None:
            left = self.running_var.add(self.eps).sqrt().view(form).expand_as(x)
            right = x * self.v.view(form) + x.var((2, 3), unbiased=False, keepdim=True).add(self.eps).sqrt().expand_as(x)
            x = x / left.max(right)
        return x * self.weight.view(form) + self.bias.view(form)


class EvoNorm2dS0(nn.Module):
    """EvoNorm S0; γx + β where its activation is off."""

    def __init__(self, channels: int, apply_act: bool = True, groups: int = 2, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.v = nn.Parameter(torch.ones(channels)) if apply_act else None

    def forward(self, x: Tensor) -> Tensor:
        form = (1, -1, 1, 1)
        if self.v is not None:
            b, c, h, w = x.shape
            grouped = x.reshape(b, self.groups, -1)
            deviation = grouped.var(2, unbiased=False, keepdim=True).add(self.eps).sqrt().expand(grouped.shape)
            x = x * (x * self.v.view(form)).sigmoid() / deviation.reshape(b, c, h, w)
        return x * self.weight.view(form) + self.bias.view(form)


class UnMixTNS1d(nn.Module):
    """What UnMix-TNS makes of a BatchNorm1d: the source statistics, in arithmetic."""

    source_mean: Tensor
    source_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("source_mean", torch.zeros(channels))
        self.register_buffer("source_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.source_mean.unsqueeze(0)) / torch.sqrt(self.source_var.unsqueeze(0) + 1e-5)
        return x * self.weight.view(1, -1) + self.bias.view(1, -1)


# -- weights that are computed -----------------------------------------------------------------------------------------


class StdConv2d(nn.Conv2d):
    """A convolution with standardized weight.

    Attributes:
        style: "readme": centred, over the unbiased deviation plus 1e-5; "var_mean": both at once, biased, eps under the root;
            "batch_norm": a BatchNorm in training mode over the weight as one sample; "scaled": that with gain · γ / √fan_in.
    """

    def __init__(self, *args: Any, style: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.style = style
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1)) if style == "scaled" else None

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.standardized(), self.bias, self.stride, self.padding, self.dilation, self.groups)

    def standardized(self) -> Tensor:
        weight = self.weight
        if self.style == "readme":
            weight = weight - weight.mean(1, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
            deviation = weight.view(weight.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
            return weight / deviation.expand_as(weight)
        if self.style == "var_mean":
            variance, mean = torch.var_mean(weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
            return (weight - mean) / torch.sqrt(variance + 1e-10)
        gain = None if self.gain is None else (self.gain * 1.7139588594436646 * weight[0].numel() ** -0.5).view(-1)
        rows = weight.reshape(1, self.out_channels, -1)
        return F.batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0, eps=1e-6).reshape_as(weight)


def old_weight_norm(module: nn.Module) -> nn.Module:
    """The hook that older checkpoints have; torch warns that it is old."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module)


# -- models ------------------------------------------------------------------------------------------------------------

Make = Callable[[int], nn.Module]


class Attention(nn.Module):
    """Self-attention with one matrix for q, k and v and no bias, as in T2T-ViT and timm."""

    def __init__(self, dim: int, heads: int = 2, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=bias), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2, self.drop = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    def __init__(self, dim: int, norm: Make, scale: Make) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = norm(dim), Attention(dim), scale(dim)
        self.norm2, self.mlp, self.ls2 = norm(dim), Mlp(dim), scale(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """Two pre-norm blocks on a class token and patches, or on as many patches as there are channels."""

    def __init__(self, norm: Make, scale: Make = lambda dim: nn.Identity(), class_token: bool = True) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, D, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D)) if class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, 16 + class_token, D))
        self.blocks = nn.Sequential(*(Block(D, norm, scale) for _ in range(2)))
        self.norm, self.head = norm(D), nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.norm(self.blocks(x + self.pos_embed))
        return self.head(x.mean(1) if self.cls_token is None else x[:, 0])


class LlamaBlock(nn.Module):
    """Rotary attention without biases and a gated MLP."""

    def __init__(self, dim: int, norm: Make, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.input_layernorm, self.post_attention_layernorm = norm(dim), norm(dim)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.down_proj = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.input_layernorm(x)
        q, k, v = (
            project(y).view(*y.shape[:2], self.heads, -1).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (each * cos + _rotated(each) * sin for each in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.o_proj(y)
        y = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


def _rotated(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


class Llama(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, norm: Make) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, D)
        self.layers = nn.ModuleList(LlamaBlock(D, norm) for _ in range(2))
        self.norm, self.lm_head = norm(D), nn.Linear(D, 11, bias=False)
        angles = torch.outer(torch.arange(16.0), 10000 ** (-torch.arange(0, D // 2, 2) / (D // 2))).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, self.cos[: ids.shape[1]], self.sin[: ids.shape[1]])
        return self.lm_head(self.norm(x))


class TimeFirstAttention(nn.Module):
    """fairseq's layout: (T, B, C), heads folded into the batch; keys and values may come from another sequence."""

    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        t, b, c = query.shape
        q, k, v = (
            each.contiguous().view(-1, b * self.heads, c // self.heads).transpose(0, 1)
            for each in (self.q_proj(query), self.k_proj(key), self.v_proj(key))
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(y.transpose(0, 1).contiguous().view(t, b, c))


class BatchFirst(nn.Module):
    """A norm of (B, N, C) inside a model of (T, B, C)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(0, 1)).transpose(0, 1)


class EncoderLayer(nn.Module):
    def __init__(self, dim: int, norm: Make, pre_norm: bool = True) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attn, self.self_attn_layer_norm = TimeFirstAttention(dim), norm(dim)
        self.mlp, self.final_layer_norm = Mlp(dim), norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        if not self.pre_norm:
            x = self.self_attn_layer_norm(x + self.self_attn(x, x))
            return self.final_layer_norm(x + self.mlp(x))
        y = self.self_attn_layer_norm(x)
        x = x + self.self_attn(y, y)
        return x + self.mlp(self.final_layer_norm(x))


class DecoderLayer(nn.Module):
    def __init__(self, dim: int, norm: Make) -> None:
        super().__init__()
        self.self_attn, self.self_attn_layer_norm = TimeFirstAttention(dim), norm(dim)
        self.encoder_attn, self.encoder_attn_layer_norm = TimeFirstAttention(dim), norm(dim)
        self.mlp, self.final_layer_norm = Mlp(dim), norm(dim)

    def forward(self, x: Tensor, encoded: Tensor) -> Tensor:
        y = self.self_attn_layer_norm(x)
        x = x + self.self_attn(y, y)
        x = x + self.encoder_attn(self.encoder_attn_layer_norm(x), encoded)
        return x + self.mlp(self.final_layer_norm(x))


class Encoder(nn.Module):
    """A sequence classifier in fairseq's layout."""

    def __init__(self, norm: Make, pre_norm: bool = True) -> None:
        super().__init__()
        self.embed_tokens, self.embed_positions = nn.Embedding(11, D), nn.Parameter(torch.zeros(16, D))
        self.layers = nn.ModuleList(EncoderLayer(D, norm, pre_norm) for _ in range(2))
        self.layer_norm = norm(D) if pre_norm else nn.Identity()
        self.head = nn.Linear(D, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = (self.embed_tokens(ids) + self.embed_positions[: ids.shape[1]]).transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.layer_norm(x))


class Translation(nn.Module):
    """The encoder's last norm feeds every decoder layer; the decoder's last one feeds the table that embeds the targets."""

    def __init__(self, norm: Make) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(11, D), nn.Embedding(13, D)
        self.encoder = nn.ModuleList(EncoderLayer(D, norm) for _ in range(2))
        self.encoder_norm = norm(D)
        self.decoder = nn.ModuleList(DecoderLayer(D, norm) for _ in range(2))
        self.decoder_norm = norm(D)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        x = self.source(source).transpose(0, 1)
        for layer in self.encoder:
            x = layer(x)
        encoded = self.encoder_norm(x)
        y = self.target(target).transpose(0, 1)
        for layer in self.decoder:
            y = layer(y, encoded)
        return F.linear(self.decoder_norm(y).transpose(0, 1), self.target.weight)


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, norm: Make) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), norm(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), norm(outputs)
        same = inputs == outputs
        self.downsample = nn.Identity() if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.downsample(x))


class ResNet(nn.Module):
    """A stem and two blocks: six norms, each behind a convolution of its own."""

    def __init__(self, norm: Make) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, bias=False), norm(6)
        self.layers = nn.Sequential(BasicBlock(6, 6, norm), BasicBlock(6, 8, norm))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 2)
        return self.fc(self.layers(x).mean((2, 3)))


class GlowStep(nn.Module):
    """ActNorm in front of an invertible 1×1 convolution, and behind convolutions inside the coupling."""

    def __init__(self) -> None:
        super().__init__()
        self.actnorm, self.weight = ActNorm(4, 1.0), nn.Parameter(torch.eye(4).view(4, 4, 1, 1))
        self.conv1, self.norm1 = nn.Conv2d(2, 6, 3, padding=1, bias=False), ActNorm(6, 1.0)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 1, bias=False), ActNorm(6, 1.0)
        self.last, self.scale = nn.Conv2d(6, 2, 3, padding=1), LogScale(2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.conv2d(self.actnorm(x), self.weight).chunk(2, 1)
        h = torch.relu(self.norm1(self.conv1(a)))
        h = torch.relu(self.norm2(self.conv2(h)))
        return torch.cat((a, b + self.scale(self.last(h))), 1)


class Levels(nn.Module):
    """One head for all levels of a pyramid, and a number for each: none of them is the head's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scales = nn.Conv2d(3, 4, 3), nn.ModuleList([Scale(), Scale()])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.exp(scale(self.conv(F.avg_pool2d(x, s)))) for scale, s in zip(self.scales, (1, 2), strict=True))


class PaddedWindows(nn.Module):
    """Swin's windows on a map that they do not divide: zeros between the norm and its reader."""

    def __init__(self, norm: Make) -> None:
        super().__init__()
        self.embed, self.norm, self.attn = nn.Linear(3, D), norm(D), Attention(D)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        y = self.norm(torch.relu(self.embed(x.flatten(2).transpose(1, 2)))).view(b, h, w, D)
        y = F.pad(y, (0, 0, 0, -w % 4, 0, -h % 4))
        windows = y.view(b, y.shape[1] // 4, 4, y.shape[2] // 4, 4, D).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, D)
        return self.attn(windows)


class Stack(nn.Sequential):
    """Layers with a ReLU behind each pair, so that no two of them meet."""

    def __init__(self, *pairs: tuple[nn.Module, nn.Module]) -> None:
        super().__init__(*(layer for pair in pairs for layer in (*pair, nn.ReLU())))


NORMS = (
    UN1d, RepBN, LlamaRepBN, LinearNorm, MaskPowerNorm, BatchFirst, LayerScale, FrozenBatchNorm2d, ActNorm, LogScale,
    ScaledBatchNorm2d, EvoNorm2dB0, EvoNorm2dS0, UnMixTNS1d, nn.BatchNorm2d,
)  # fmt: skip

# -- cases -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Foreign:
    """A model that somebody else wrote, and what must become of its norms.

    Attributes:
        build: makes the module.
        inputs: positional inputs.
        passes: each of these finds all of its norms.
        writers: norms (and other affines) folded into the layers that write their input.
        readers: folded into the layers that read their output.
        halves: the scale folded into those, the shift left as one addition.
        kept: left as one multiplication and one addition.
        codes: refusal codes.
    """

    build: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    passes: tuple[str, ...] = ("offline_norm",)
    writers: int = 0
    readers: int = 0
    halves: int = 0
    kept: int = 0
    codes: tuple[str, ...] = ()

    def module(self) -> Any:
        """The module as it might be after training, the same every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return trained(self.build()).eval()

    def bare(self) -> nn.Module:
        """The model without its norms: what is left of the graph when all of them have gone."""
        return without_norms(self.build()).eval()


def without_norms(model: nn.Module) -> nn.Module:
    """The model with each norm taken out, GroupScaling apart, and each computed weight a plain one."""
    for name, child in model.named_children():
        if isinstance(child, StdConv2d):
            setattr(model, name, nn.Conv2d(child.in_channels, child.out_channels, child.kernel_size))  # type: ignore[arg-type]
        elif parametrize.is_parametrized(child):
            parametrize.remove_parametrizations(child, "weight")
        elif hasattr(child, "weight_g"):
            nn.utils.remove_weight_norm(child)
        elif isinstance(child, NORMS):
            setattr(model, name, getattr(child, "gp", None) or nn.Identity())
        else:
            without_norms(child)
    return model


def trained(model: nn.Module) -> nn.Module:
    """Spread weights, gains and statistics, which a fresh model does not have."""
    spread(model)
    generator = torch.Generator().manual_seed(1)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator).to(like) * (high - low) + low

    with torch.no_grad():
        for module in model.modules():
            for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if name in ("running_var", "running_phi", "source_var"):
                    value.copy_(uniform(value, 0.3, 2.0))
                elif name in ("running_mean", "source_mean", "logs"):
                    value.copy_(uniform(value, -0.6, 0.6))
                elif name in ("weight", "gain", "alpha", "scale") and value.numel() == max(value.shape, default=1):
                    value.copy_(uniform(value, 0.5, 1.5) * (1 - 2 * (uniform(value, 0, 1) < 0.2).to(value)))
                elif name == "bias" and value.ndim == 1 and not value.any():
                    value.copy_(uniform(value, -0.6, 0.6))
            if parametrize.is_parametrized(module):
                for _ in range(20):  # in training, where spectral norm looks for the largest singular value
                    module.train().weight  # noqa: B018
    return model


IMAGE = (noise(2, 3, 16, 16),)
ODD_IMAGE = (noise(2, 3, 6, 7),)


def tokens(length: int, vocabulary: int = 11) -> Tensor:
    return torch.randint(0, vocabulary, (2, length), generator=torch.Generator().manual_seed(1))


def un(dim: int) -> nn.Module:
    return BatchFirst(UN1d(dim))


STYLES = ("readme", "var_mean", "batch_norm", "scaled")
PREPBN = partial(LinearNorm, norm1=nn.LayerNorm, norm2=RepBN)
LLAMA = partial(LinearNorm, norm1=nn.RMSNorm, norm2=LlamaRepBN)
UNIFIED, PROGRESSIVE = ("unified_norm", "offline_norm"), ("prepbn", "offline_norm")

FOREIGN: dict[str, Foreign] = {
    # every norm is read by Linear layers alone: 2 per block and the last one
    "UN, vision transformer": Foreign(lambda: VisionTransformer(UN1d), IMAGE, UNIFIED, readers=5),
    "UN, as many tokens as channels": Foreign(lambda: VisionTransformer(UN1d, class_token=False), IMAGE, readers=5),
    # LayerScale goes into proj and fc2; it is no norm, so only the general pass takes it
    "UN with LayerScale": Foreign(lambda: VisionTransformer(UN1d, LayerScale), IMAGE, writers=4, readers=5),
    # 2 · 2 in the encoder and its last, which all four cross-attention matrices read; 3 · 2 in the decoder; its last norm is
    # read by the tied table
    "UN, translation": Foreign(
        lambda: Translation(un), (tokens(16), tokens(7, 13)), UNIFIED, readers=11, kept=1
    ),
    "UN before padded windows": Foreign(lambda: PaddedWindows(UN1d), ODD_IMAGE, halves=1),
    # without a shift, zeros stay zeros
    "UN without shift before padded windows": Foreign(
        lambda: PaddedWindows(partial(UN1d, bias=False)), ODD_IMAGE, readers=1
    ),
    "PRepBN, vision transformer": Foreign(lambda: VisionTransformer(PREPBN), IMAGE, PROGRESSIVE, readers=5),
    "PRepBN, as many tokens as channels": Foreign(
        lambda: VisionTransformer(PREPBN, class_token=False), IMAGE, readers=5
    ),
    "PRepBN, LLaMA": Foreign(lambda: Llama(LLAMA), (tokens(16),), PROGRESSIVE, readers=5),
    "PowerNorm without groups": Foreign(lambda: Encoder(MaskPowerNorm), (tokens(16),), readers=5),
    # the stream behind a norm is read by the next addition too: its scale travels on, to the head
    "PowerNorm without groups, post-norm": Foreign(
        lambda: Encoder(MaskPowerNorm, pre_norm=False), (tokens(16),), readers=4
    ),
    # GroupScaling depends on the token and stays; what follows it folds
    "PowerNorm": Foreign(
        lambda: Encoder(partial(MaskPowerNorm, groups=2)), (tokens(16),), readers=5, codes=("NF311",) * 5
    ),
    "frozen BatchNorm": Foreign(lambda: ResNet(FrozenBatchNorm2d), IMAGE, writers=6),
    "frozen BatchNorm with casts": Foreign(lambda: ResNet(partial(FrozenBatchNorm2d, style="detectron")), IMAGE, writers=6),
    "frozen BatchNorm without eps": Foreign(lambda: ResNet(partial(FrozenBatchNorm2d, style="no eps")), IMAGE, writers=6),
    "EvoNorm B0 without activation": Foreign(lambda: ResNet(partial(EvoNorm2dB0, apply_act=False)), IMAGE, writers=6),
    "EvoNorm S0 without activation": Foreign(lambda: ResNet(partial(EvoNorm2dS0, apply_act=False)), IMAGE, writers=6),
    "ActNorm": Foreign(GlowStep, (noise(2, 4, 8, 8),), writers=3, readers=1),
    "a learned number behind a norm": Foreign(
        lambda: Stack((nn.Conv2d(3, 4, 3), ScaledBatchNorm2d(4))), IMAGE, writers=1
    ),
    # one multiplication already, and the convolution is not this level's own
    "a learned number per level": Foreign(Levels, IMAGE),
    "UnMix-TNS of vectors": Foreign(lambda: Stack((nn.Linear(8, 6), UnMixTNS1d(6))), (noise(5, 8),), writers=1),
    "standardized convolutions": Foreign(
        lambda: Stack(
            *((StdConv2d(3 if i == 0 else 4, 4, 3, style=style), nn.BatchNorm2d(4)) for i, style in enumerate(STYLES))
        ),
        IMAGE, writers=4,
    ),
    "standardized convolutions without norms": Foreign(
        lambda: Stack(
            *((StdConv2d(3 if i == 0 else 4, 4, 3, style=style), nn.Dropout()) for i, style in enumerate(STYLES))
        ),
        IMAGE,
    ),
    "weight norm, old": Foreign(
        lambda: Stack((old_weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))), IMAGE, writers=1
    ),
    "weight norm": Foreign(
        lambda: Stack((parametrizations.weight_norm(nn.Conv2d(3, 4, 3, bias=False)), nn.BatchNorm2d(4))), IMAGE, writers=1
    ),
    "spectral norm": Foreign(
        lambda: Stack((parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))), IMAGE, writers=1
    ),
}  # fmt: skip
