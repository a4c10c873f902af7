"""Tiny models with norms that are constants at inference, beyond single BatchNorms: streams, joins, pools, padded readers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.batch_norms import Chain, Fold
from tests.models import noise


class Statistic(nn.Module):
    """Division by a stored second moment, in plain arithmetic (what Unified Norm and PowerNorm are at inference)."""

    running_var: Tensor

    def __init__(self, width: int, eps: float = 1e-4) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), eps
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x / torch.sqrt(self.running_var + self.eps)) + self.bias


class Rep(nn.Module):
    """BatchNorm over tokens plus a multiple of its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.alpha = nn.BatchNorm1d(width), nn.Parameter(torch.full((1,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return (self.norm(x) + self.alpha * x).transpose(1, 2)


class Mix(nn.Module):
    """A mix of tokens with separate projections (no softmax, which would not see a shift of the keys)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=bias) for bias in (True, False, True))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.q(x) @ self.k(x).transpose(1, 2)) @ self.v(x))


class Block(nn.Module):
    """One block of a Transformer; its norms stand before the branches or behind the sums."""

    def __init__(self, norm: Any, width: int, post: bool) -> None:
        super().__init__()
        self.post = post
        self.norm1, self.mix, self.norm2 = norm(width), Mix(width), norm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            x = self.norm1(x + self.mix(x))
            return self.norm2(x + self.down(torch.relu(self.up(x))))
        x = x + self.mix(self.norm1(x))
        return x + self.down(torch.relu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Embedding, positions, class token, blocks, a final norm, one token selected, a head (square throughout)."""

    def __init__(self, norm: Any, post: bool, tied: bool = False, width: int = 8) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(width, width), nn.Parameter(torch.randn(1, width, width))
        self.blocks = nn.Sequential(*(Block(norm, width, post) for _ in range(2)))
        self.norm, self.head = norm(width), nn.Linear(width, width, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.table(tokens) + self.place))[:, 0])


class Joined(nn.Module):
    """Two branches joined along the channels before a BatchNorm, or behind one of two."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.one, self.two = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 5, 1, bias=False)
        self.norm, self.head = nn.BatchNorm2d(4 if norm_first else 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            y = torch.relu(x)
            return torch.relu(self.head(torch.cat((self.norm(y), torch.tanh(x)), 1)))
        return torch.relu(self.norm(torch.cat((self.one(x), self.two(x)), 1)))


class WithToken(nn.Module):
    """A class token is put before normalized tokens, and the whole is read by a Linear and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.token = Statistic(8), nn.Parameter(torch.randn(1, 1, 8))
        self.read, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(torch.relu(x))
        y = torch.cat((self.token.expand(x.shape[0], -1, -1), y), 1)
        return self.head(y - self.read(y))


class Products(nn.Module):
    """GPT-2's Conv1D, and a product with a weight but no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.two = Statistic(8), nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(8, 5))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(torch.relu(x))
        one = torch.addmm(self.bias, y.view(-1, 8), self.one)
        return torch.cat((torch.tanh(one), y.view(-1, 8) @ self.two), 1)


class ActNorm(nn.Module):
    """A shift and a scale by stored vectors between activations: no more than one addition and one multiplication."""

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.scale = nn.Parameter(torch.randn(1, 4, 1, 1)), nn.Parameter(torch.randn(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.scale * (torch.relu(x) + self.loc))


class LayerScaled(nn.Module):
    """LayerScale on a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.gamma = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.down(torch.relu(self.up(x)))


class ByHand(nn.Module):
    """A frozen BatchNorm as detection code writes it."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.weight, self.bias = nn.Conv2d(4, 6, 3), nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
        self.register_buffer("running_mean", torch.randn(6))
        self.register_buffer("running_var", torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return torch.relu(self.conv(x) * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1))


def _after_relu(*layers: nn.Module) -> Chain:
    return Chain(nn.ReLU(), nn.BatchNorm2d(4), *layers)


def _pooled(**padding: Any) -> Chain:
    return _after_relu(nn.AvgPool2d(3, **padding), nn.Conv2d(4, 6, 1))


IMAGE = (noise(2, 4, 9, 9),)
SMALL = (noise(2, 4, 2, 2),)
TOKENS = (noise(2, 8, 8),)
WORDS = (torch.arange(16).view(2, 8) % 8,)

STREAMS: dict[str, Fold] = {
    "unified norm, pre-norm": Fold(lambda: Transformer(Statistic, False), WORDS, readers=5),
    "unified norm, post-norm": Fold(lambda: Transformer(Statistic, True), WORDS, readers=5),
    "rep norm, pre-norm": Fold(lambda: Transformer(Rep, False), WORDS, readers=5),
    "rep norm, post-norm": Fold(lambda: Transformer(Rep, True), WORDS, readers=5),
    "a tied head behind a norm": Fold(lambda: Transformer(Statistic, False, tied=True), WORDS, readers=4, kept=1),
    "joined before": Fold(lambda: Joined(False), IMAGE, 1),
    "joined behind": Fold(lambda: Joined(True), IMAGE, readers=1),
    "with a token": Fold(WithToken, TOKENS, readers=1),
    "products": Fold(Products, TOKENS, readers=1),
    "grouped reader": Fold(lambda: _after_relu(nn.Conv2d(4, 6, 3, groups=2)), IMAGE, readers=1),
    "depthwise reader": Fold(lambda: _after_relu(nn.Conv2d(4, 8, 3, groups=4, bias=False)), IMAGE, readers=1),
    "padded reader of a small map": Fold(lambda: _after_relu(nn.Conv2d(4, 6, 3, padding=1)), SMALL, readers=1),
    "padded grouped reader of a small map": Fold(
        lambda: _after_relu(nn.Conv2d(4, 8, 3, padding=1, groups=2, bias=False)), SMALL, readers=1
    ),
    "transposed reader of a small map": Fold(lambda: _after_relu(nn.ConvTranspose2d(4, 6, 3, 1, 1)), SMALL, readers=1),
    "grouped transposed reader": Fold(lambda: _after_relu(nn.ConvTranspose2d(4, 6, 3, 2, groups=2)), IMAGE, halves=1),
    "reflecting reader": Fold(lambda: _after_relu(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")), IMAGE, readers=1),
    "average pool between": Fold(lambda: _pooled(), IMAGE, readers=1),
    "average pool with counted padding": Fold(lambda: _pooled(padding=1), IMAGE, halves=1),
    "average pool with padding not counted": Fold(lambda: _pooled(padding=1, count_include_pad=False), IMAGE, readers=1),
    "resized": Fold(lambda: _after_relu(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(4, 6, 3)), IMAGE, readers=1),
    "padded by zeros": Fold(lambda: _after_relu(nn.ZeroPad2d(1), nn.Conv2d(4, 6, 3)), IMAGE, halves=1),
    "act norm": Fold(ActNorm, IMAGE),
    "layer scale": Fold(LayerScaled, TOKENS, 1),
    "frozen by hand": Fold(ByHand, IMAGE, 1),
}
