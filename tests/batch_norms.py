"""Tiny models with BatchNorms: where each must go, and the traps that published folders fall into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import noise
from tests.zoo.spread import spread


@dataclass(frozen=True)
class Fold:
    """A model, its inputs, and what conv_bn must make of its BatchNorms.

    Attributes:
        build: makes the module.
        inputs: positional inputs.
        writers: folded into the layers that write their input.
        readers: folded into the layers that read their output.
        halves: the scale folded into the layers that read the output, the shift left as one addition.
        kept: left as one multiplication and one addition.
        codes: refusal codes of the others.
    """

    build: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    writers: int = 0
    readers: int = 0
    halves: int = 0
    kept: int = 0
    codes: tuple[str, ...] = ()

    def module(self) -> Any:
        """The module with spread weights and running statistics, the same ones every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return spread(self.build()).eval()


class Chain(nn.Sequential):
    """Layers in a row and a ReLU behind, so that nothing folds past the end by chance."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class RepTokens(nn.Module):
    """RepBN on tokens: transposed BatchNorm plus a scaled copy."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.alpha = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.write(x)
        y = self.norm(y.transpose(1, 2)).transpose(1, 2) + self.alpha * y
        return self.head(torch.relu(y))


class FlatTokens(nn.Module):
    """Tokens flattened for BatchNorm1d and given their shape back, and a square trap: flattened along the other axis."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.write, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.write(x)
        flat = (y.transpose(1, 2) if self.transposed else y).reshape(-1, 8)
        return torch.relu(self.norm(flat).reshape(x.shape) + 0.5)


class Squeezed(nn.Module):
    """A pooled map loses two axes before its BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 6, 9), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x).squeeze((2, 3))))


class TwoReaders(nn.Module):
    """The convolution's output has a second reader."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.relu(self.norm(y)) + y


class SharedConv(nn.Module):
    """One convolution used twice, with a BatchNorm of its own on each path."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu(self.one(self.conv(x))), torch.relu(self.two(self.conv(x + 1)))


class WrongOrder(nn.Module):
    """Registered in another order than executed."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_b, self.conv_b = nn.BatchNorm2d(5), nn.Conv2d(6, 5, 1)
        self.norm_a, self.conv_a = nn.BatchNorm2d(6), nn.Conv2d(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm_b(self.conv_b(torch.relu(self.norm_a(self.conv_a(x))))))


class Functional(nn.Module):
    """Keyword arguments everywhere, and no modules."""

    mean: Tensor
    variance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 4, 3, 3)), nn.Parameter(torch.randn(6))
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("variance", torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(input=x, weight=self.weight, bias=self.bias, stride=2, padding=1)
        return torch.relu(F.batch_norm(input=y, running_mean=self.mean, running_var=self.variance, eps=1e-3))


class FrozenByHand(nn.Module):
    """A frozen BatchNorm in arithmetic around another one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.scale, self.shift = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)) * self.scale.view(1, 6, 1, 1) + self.shift[:, None, None]
        return torch.relu(0.5 - y / 2)


class ParallelSum(nn.Module):
    """Two writers through an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.one(x) + self.two(x)))


class ToHead(nn.Module):
    """A BatchNorm behind a ReLU, pooled and read by a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.relu(self.conv(x))).mean((2, 3)))


class TiedWriter(nn.Module):
    """The writer's weight is also the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.head.weight = self.write.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.write(x))))


class ReadTwice(nn.Module):
    """The BatchNorm's output is read by a ReLU and by more arithmetic: the arithmetic must not go into the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.scale = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Parameter(torch.randn(6, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.conv(x))
        return torch.relu(y), torch.tanh(self.scale * y - 1)


class SquareImage(nn.Module):
    """As many channels as rows and columns, turned before the BatchNorm: its axis is no axis of the convolution's channels."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.order = order
        self.conv, self.norm = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x).permute(self.order)))


class SquareTokens(nn.Module):
    """Batch, tokens and channels of one size: the batch, or the tokens, in the place of the channels."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.axes = (a, b)
        self.write, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.write(x).transpose(*self.axes)))


class OneConvTwoNorms(nn.Module):
    """One output of one convolution, read by two BatchNorms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.relu(self.one(y)) + torch.tanh(self.two(y))


class SharedPath(nn.Module):
    """A convolution and its BatchNorm, both used on two paths; ``other`` adds a path with the convolution alone."""

    def __init__(self, other: bool) -> None:
        super().__init__()
        self.other = other
        self.conv, self.norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        paths = (torch.relu(self.norm(self.conv(x))), torch.relu(self.norm(self.conv(x - 1))))
        return (*paths, torch.relu(self.conv(x + 1))) if self.other else paths


class SharedNorm(nn.Module):
    """One BatchNorm behind two convolutions, or twice behind one."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.twice = twice
        self.one, self.two, self.norm = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        if self.twice:
            return torch.relu(self.norm(self.norm(self.one(x))))
        return torch.relu(self.norm(self.one(x))) + torch.relu(self.norm(self.two(x)))


class Keywords(nn.Module):
    """Modules called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(input=self.norm(input=self.conv(input=x)))


class SameConv2d(nn.Conv2d):
    """TensorFlow's padding: as much as the stride needs, more of it behind."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class LoudConv2d(nn.Conv2d):
    """A subclass that does more than to convolve: the BatchNorm is not directly behind the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x)) * 2


class ScaledConv2d(nn.Conv2d):
    """A subclass whose result is scaled."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.7 + 1


class MaskedConv2d(nn.Conv2d):
    """PixelCNN's: the weight is what is stored times a mask."""

    mask: Tensor

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("mask", torch.ones_like(self.weight))
        self.mask[:, :, 1, 2:] = self.mask[:, :, 2:] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias)


class RepPatches(nn.Module):
    """RepBN behind a patch embedding whose convolution has a bias: α times the bias is part of the new one."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(4, 9, 3, 3), nn.BatchNorm1d(9)
        self.alpha = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.proj(x).flatten(2).transpose(1, 2)
        y = tokens.transpose(1, 2)
        return torch.tanh((self.norm(y) + self.alpha * y).transpose(1, 2))


class PaddedWindows(nn.Module):
    """Zeros between a RepBN and its reader, as where windows do not divide the map."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.alpha = nn.BatchNorm1d(4), nn.Linear(4, 12), nn.Parameter(torch.tensor([0.7]))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = torch.relu(x).flatten(2)
        y = (self.norm(y) + self.alpha * y).transpose(1, 2).view(b, h, w, c)
        y = F.pad(y, (0, 0, 0, 3, 0, 3))
        return self.qkv(y.view(b, 3, 4, 3, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c))


class TiedHead(nn.Module):
    """The last BatchNorm is read by the table that embeds the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.write, self.norm = nn.Embedding(11, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + torch.relu(self.write(x))
        return self.head(self.norm(x.transpose(1, 2)).transpose(1, 2))


IMAGE = (noise(2, 4, 9, 9),)
TOKENS = (noise(2, 8, 8),)

FOLDS: dict[str, Fold] = {
    "conv": Fold(lambda: Chain(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), IMAGE, 1),
    "conv without bias": Fold(lambda: Chain(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)), IMAGE, 1),
    "conv1d": Fold(lambda: Chain(nn.Conv1d(8, 6, 3), nn.BatchNorm1d(6)), TOKENS, 1),
    "conv3d": Fold(lambda: Chain(nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6)), (noise(2, 4, 3, 3, 3),), 1),
    "grouped conv": Fold(lambda: Chain(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), IMAGE, 1),
    "depthwise conv": Fold(lambda: Chain(nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.BatchNorm2d(8)), IMAGE, 1),
    "reflecting conv": Fold(lambda: Chain(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6)), IMAGE, 1),
    "transposed conv": Fold(lambda: Chain(nn.ConvTranspose2d(4, 6, 2, 2), nn.BatchNorm2d(6)), IMAGE, 1),
    "grouped transposed conv": Fold(
        lambda: Chain(nn.ConvTranspose2d(4, 6, 2, 2, groups=2, bias=False), nn.BatchNorm2d(6)), IMAGE, 1
    ),
    "linear": Fold(lambda: Chain(nn.Linear(8, 6), nn.BatchNorm1d(6)), (noise(5, 8),), 1),
    "linear, square (N, C, L)": Fold(lambda: Chain(nn.Linear(8, 8), nn.BatchNorm1d(8)), TOKENS, kept=1),
    "no affine": Fold(lambda: Chain(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)), IMAGE, 1),
    "synchronized": Fold(lambda: Chain(nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6)), IMAGE, 1),
    "no running statistics": Fold(
        lambda: Chain(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)), IMAGE, codes=("NF301",)
    ),
    "two in a row": Fold(
        lambda: Chain(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.BatchNorm2d(6, eps=1e-3)), IMAGE, 2
    ),
    "dropout between": Fold(lambda: Chain(nn.Conv2d(4, 6, 3), nn.Dropout(0.5), nn.BatchNorm2d(6)), IMAGE, 1),
    "relu between": Fold(lambda: Chain(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)), IMAGE, kept=1),
    "before a conv": Fold(lambda: Chain(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, bias=False)), IMAGE, readers=1),
    "before a padded conv": Fold(lambda: Chain(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)), IMAGE, halves=1),
    "before a reflecting conv": Fold(
        lambda: Chain(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")), IMAGE, readers=1
    ),
    "before a strided transposed conv": Fold(lambda: Chain(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3, 2)), IMAGE, halves=1),
    "weight norm": Fold(lambda: Chain(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6)), IMAGE, 1),
    "squeezed": Fold(Squeezed, IMAGE, 1),
    "flattened tokens": Fold(lambda: FlatTokens(False), TOKENS, 1),
    "flattened along the other axis": Fold(lambda: FlatTokens(True), TOKENS, kept=1),
    "rep tokens": Fold(RepTokens, (noise(2, 5, 8),), 1),
    "a second reader": Fold(TwoReaders, IMAGE, kept=1),
    "an output read twice": Fold(ReadTwice, IMAGE, 1),
    "a shared conv": Fold(SharedConv, IMAGE, kept=2),
    "registration order": Fold(WrongOrder, IMAGE, 2),
    "functional": Fold(Functional, IMAGE, 1),
    "arithmetic around": Fold(FrozenByHand, IMAGE, 1),
    "two writers": Fold(ParallelSum, IMAGE, 1),
    "to a head": Fold(ToHead, IMAGE, readers=1),
    "a tied writer": Fold(TiedWriter, (noise(5, 8),), kept=1),
    "square image, rows first": Fold(lambda: SquareImage((0, 2, 1, 3)), (noise(2, 4, 6, 6),), kept=1),
    "square image, turned all round": Fold(lambda: SquareImage((0, 3, 1, 2)), (noise(2, 4, 6, 6),), kept=1),
    "square image, rows and columns exchanged": Fold(lambda: SquareImage((0, 1, 3, 2)), (noise(2, 4, 6, 6),), 1),
    "square tokens, transposed": Fold(lambda: SquareTokens(1, 2), (noise(8, 8, 8),), 1),
    "square tokens, batch first": Fold(lambda: SquareTokens(0, 1), (noise(8, 8, 8),), kept=1),
    "one conv, two norms": Fold(OneConvTwoNorms, IMAGE, kept=2),
    "a shared conv and norm": Fold(lambda: SharedPath(False), IMAGE, kept=2),
    "a shared conv with a path of its own": Fold(lambda: SharedPath(True), IMAGE, kept=2),
    "a norm behind two convs": Fold(lambda: SharedNorm(False), IMAGE, 2),
    "a norm twice behind one conv": Fold(lambda: SharedNorm(True), IMAGE, 2),
    "keyword arguments": Fold(Keywords, IMAGE, 1),
    "a conv that pads by itself": Fold(lambda: Chain(SameConv2d(4, 6, 3, 2), nn.BatchNorm2d(6)), IMAGE, 1),
    "a conv with an activation in it": Fold(lambda: Chain(LoudConv2d(4, 6, 3), nn.BatchNorm2d(6)), IMAGE, kept=1),
    "a conv with arithmetic in it": Fold(lambda: Chain(ScaledConv2d(4, 6, 3), nn.BatchNorm2d(6)), IMAGE, 1),
    "a masked conv": Fold(lambda: Chain(MaskedConv2d(4, 6, 3), nn.BatchNorm2d(6)), IMAGE, 1),
    "after a relu, before a conv": Fold(
        lambda: Chain(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3)), IMAGE, readers=1
    ),
    "rep patches": Fold(RepPatches, IMAGE, 1),
    "padded windows": Fold(PaddedWindows, IMAGE, halves=1),
    "a tied head": Fold(TiedHead, (torch.arange(10).view(2, 5),), kept=1),
}
