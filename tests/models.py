"""Tiny models for contracts and traps: each is a page-long idea in a few lines, with weights that hide nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.spread import spread

D = 8


@dataclass(frozen=True)
class Trap:
    """A model, its inputs, and what pre_rmsnorm must make of it.

    Attributes:
        build: makes the module.
        inputs: positional inputs.
        converted: how many LayerNorms become RMSNorms.
        codes: refusal codes of the others.
        paid: explicit mean-subtractions inserted.
    """

    build: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    converted: int
    codes: tuple[str, ...] = ()
    paid: int = 0

    def module(self) -> Any:
        """The module with spread weights, the same ones every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return spread(self.build()).eval()


def tokens(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randint(0, 11, (batch, length), generator=torch.Generator().manual_seed(1))


def noise(*sizes: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(1))


class Mlp(nn.Module):
    def __init__(self, d: int = D, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Stream(nn.Module):
    """Embedding, positions, blocks, final norm, head: variations by hooks that subclasses fill."""

    def __init__(self, blocks: int = 2, eps: float = 1e-5) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, D)
        self.positions = nn.Parameter(torch.zeros(5, D))
        self.norms = nn.ModuleList(nn.LayerNorm(D, eps=eps) for _ in range(blocks))
        self.mlps = nn.ModuleList(Mlp() for _ in range(blocks))
        self.final = nn.LayerNorm(D, eps=eps)
        self.head = nn.Linear(D, 11)

    def block(self, x: Tensor, norm: nn.Module, mlp: nn.Module) -> Tensor:
        return x + mlp(norm(x))

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids) + self.positions
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x = self.block(x, norm, mlp)
        return self.finish(x)

    def finish(self, x: Tensor) -> Any:
        return self.head(self.final(x))


class FreeStream(Stream):
    """A stream of any batch and length; a view in it says the sizes."""

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids) + self.positions[:1]
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x = self.block(x, norm, mlp).view(*ids.shape, D)
        return self.finish(x)


class Tied(Stream):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__(blocks)
        self.head.weight = self.embed.weight


class SharedNorm(Stream):
    def __init__(self) -> None:
        super().__init__()
        self.norms[1] = self.norms[0]


class SharedMlp(Stream):
    def __init__(self) -> None:
        super().__init__()
        self.mlps[1] = self.mlps[0]


class SharedOutside(Stream):
    """The last writer's Linear is also used on the normalized value, whose mean the head sees."""

    def finish(self, x: Tensor) -> Any:
        n = self.final(x)
        return self.head(n), self.mlps[1](n)


class ReturnsHidden(Stream):
    def finish(self, x: Tensor) -> Any:
        return self.head(self.final(x)), x


class RawReader(Stream):
    def finish(self, x: Tensor) -> Any:
        return self.head(self.final(x)) + self.head(x)


class RawInside(Stream):
    """Block 0's input is read raw: everything before is seen, everything behind one centring is free."""

    def block(self, x: Tensor, norm: nn.Module, mlp: nn.Module) -> Tensor:
        return mlp(x) + x if norm is self.norms[0] else super().block(x, norm, mlp)


class InPlace(Stream):
    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        x += self.positions
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x.add_(mlp(norm(x)))
        return self.finish(x)


class Gated(Stream):
    """adaLN-Zero: the branch is scaled by a gate computed from the data."""

    def __init__(self) -> None:
        super().__init__()
        self.condition, self.gate = nn.Embedding(11, D), nn.Linear(D, D)

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids) + self.positions
        gate = self.gate(torch.tanh(self.condition(ids[:, :1])))
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x = x + gate * mlp(norm(x))
        return self.finish(x)


class ScalarGated(Stream):
    """One scalar per token (a router's weight, DropPath, ReZero) passes a mean-subtraction."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, 1)

    def block(self, x: Tensor, norm: nn.Module, mlp: nn.Module) -> Tensor:
        n = norm(x)
        return x + torch.sigmoid(self.router(n)) * mlp(n) * 0.5


class LayerScaled(Stream):
    def __init__(self) -> None:
        super().__init__()
        self.gammas = nn.ParameterList(torch.ones(1, 1, D) for _ in range(2))

    def block(self, x: Tensor, norm: nn.Module, mlp: nn.Module) -> Tensor:
        place = 0 if norm is self.norms[0] else 1
        return x + self.gammas[place] * mlp(norm(x))


class LayerScaleReadTwice(LayerScaled):
    """The scaled branch is also read unscaled: the scale must not go into its weight."""

    def block(self, x: Tensor, norm: nn.Module, mlp: nn.Module) -> Tensor:
        place = 0 if norm is self.norms[0] else 1
        y = mlp(norm(x))
        return x + self.gammas[place] * y + y


class LayerScaleOfASquare(LayerScaled):
    """The scaled branch is written by W @ W: a scale in W would enter twice."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Parameter(torch.zeros(D, D))

    def block(self, x: Tensor, norm: nn.Module, mlp: nn.Module) -> Tensor:
        place = 0 if norm is self.norms[0] else 1
        return x + self.gammas[place] * (norm(x) @ (self.square @ self.square))


class UpdatedLayerScale(LayerScaled):
    """The scale is a buffer that every call changes: folding today's value would be wrong tomorrow."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 1.5, D))

    def forward(self, ids: Tensor) -> Any:
        result = super().forward(ids)
        self.scale.mul_(0.5)
        return result

    def block(self, x: Tensor, norm: nn.Module, mlp: nn.Module) -> Tensor:
        return x + self.scale * mlp(norm(x))


class TiedByData(Stream):
    """The head's weight is another Parameter over the table's memory, as old language models tie them."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(self.embed.weight.data)


class TiedBuffer(Stream):
    """A buffer over the table's memory is read as a matrix."""

    shadow: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shadow", self.embed.weight.detach())

    def finish(self, x: Tensor) -> Any:
        return self.final(x) @ self.shadow.T


class ScaledUnderNorm(nn.Module):
    """A scale directly under the norm, with no addition between."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.norm, self.head = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, 3)
        self.gamma = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.gamma * self.write(x)))


class Squares(nn.Module):
    """A value that enters one reader twice, carried once: it must not be centred for both."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.LayerNorm(D), nn.LayerNorm(D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.one(x @ x) + self.two(x))


class MaskedLogits(Stream):
    """A mask of finfo.min in the output must not hide an error beside it."""

    def finish(self, x: Tensor) -> Any:
        return self.head(self.final(x)).masked_fill(torch.arange(11) > 8, torch.finfo(torch.float32).min)


class JoinsTokens(Stream):
    """Patch merging: the norm is over the concatenation of two tokens."""

    def __init__(self) -> None:
        super().__init__(1)
        self.merge, self.reduce = nn.LayerNorm(2 * D), nn.Linear(2 * D, D, bias=False)

    def finish(self, x: Tensor) -> Any:
        x = torch.cat([x[:, :4:2], x[:, 1:4:2]], -1)
        return self.head(self.final(self.reduce(self.merge(x))))


class PostNorm(Stream):
    def block(self, x: Tensor, norm: nn.Module, mlp: nn.Module) -> Tensor:
        return norm(x + mlp(x))


class OutputNorm(Stream):
    """Peri-LN's output norms: the norm's input is one Linear's output, which nobody else reads."""

    def block(self, x: Tensor, norm: nn.Module, mlp: nn.Module) -> Tensor:
        return x + norm(mlp(x))


class MixLn(Stream):
    """Post-norm first, pre-norm afterwards: one mean-subtraction at the boundary serves all behind it."""

    def __init__(self) -> None:
        super().__init__(4)

    def block(self, x: Tensor, norm: nn.Module, mlp: nn.Module) -> Tensor:
        return norm(x + mlp(x)) if norm is self.norms[0] else super().block(x, norm, mlp)


class NormPre(Stream):
    """CLIP: a norm before the first block writes the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.pre = nn.LayerNorm(D)

    def forward(self, ids: Tensor) -> Any:
        x = self.pre(self.embed(ids) + self.positions)
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x = self.block(x, norm, mlp)
        return self.finish(x)


class NoBias(Stream):
    def __init__(self) -> None:
        super().__init__()
        self.mlps[0] = Mlp(bias=False)
        self.norms[1] = nn.LayerNorm(D, bias=False)
        self.final = nn.LayerNorm(D, elementwise_affine=False)


class SquareTransposed(nn.Module):
    """(N, C, L) with C = L: the Linear writes one axis, the norm is over the other."""

    def __init__(self, transpose: bool) -> None:
        super().__init__()
        self.transpose = transpose
        self.write, self.norm, self.head = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.write(x)
        return self.head(self.norm(y.transpose(1, 2) if self.transpose else y))


class SquareReshaped(nn.Module):
    """The written axis is split and merged again with its neighbour: same sizes, other entries."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.write(x).transpose(1, 2).reshape(-1, 4, 4)
        return self.head(self.norm(y))


class ConvStem(nn.Module):
    def __init__(self, groups: int = 1, transposed: bool = False) -> None:
        super().__init__()
        self.stem: nn.Module = (
            nn.ConvTranspose2d(4, D, 2, 2, groups=groups) if transposed else nn.Conv2d(4, D, 2, 2, groups=groups)
        )
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


class TwoAxes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.write, self.norm = nn.Linear(D, D), nn.LayerNorm((5, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.write(x))


class Padded(Stream):
    """The stream is zero-padded and rolled over tokens, masked, and a part of it taken back."""

    def block(self, x: Tensor, norm: nn.Module, mlp: nn.Module) -> Tensor:
        x = F.pad(x, (0, 0, 1, 2))
        x = torch.roll(x, 1, dims=1).masked_fill(torch.arange(8)[None, :, None] > 6, 0.0)
        return super().block(x, norm, mlp)[:, 1:6]


class PaddedWithOnes(Stream):
    """Padding the feature axis or with another value is no zero padding."""

    def block(self, x: Tensor, norm: nn.Module, mlp: nn.Module) -> Tensor:
        return super().block(F.pad(x, (0, 0, 1, 0), value=1.0), norm, mlp)[:, 1:]


class Experts(Stream):
    """A sum of experts with scalar router weights: every expert is centred."""

    def __init__(self) -> None:
        super().__init__(1)
        self.router = nn.Linear(D, 3)
        self.up, self.down = nn.Parameter(torch.zeros(3, D, 6)), nn.Parameter(torch.zeros(3, 6, D))

    def block(self, x: Tensor, norm: nn.Module, mlp: nn.Module) -> Tensor:
        n = norm(x)
        weights = self.router(n).softmax(-1)  # batch, length, expert
        hidden = F.gelu(n.unsqueeze(2).unsqueeze(3) @ self.up)  # batch, length, expert, 1, 6
        return x + ((hidden @ self.down).squeeze(3) * weights.unsqueeze(-1)).sum(2)


class Lora(Stream):
    """A writer with an unmerged low-rank addition."""

    def __init__(self) -> None:
        super().__init__(1)
        self.a, self.b = nn.Linear(2 * D, 2, bias=False), nn.Linear(2, D, bias=False)

    def block(self, x: Tensor, norm: nn.Module, mlp: nn.Module) -> Tensor:
        assert isinstance(mlp, Mlp)
        hidden = F.gelu(mlp.up(norm(x)))
        return x + (mlp.down(hidden) + 2.0 * self.b(self.a(hidden)))


class ByHand(Stream):
    """LayerNorm in arithmetic."""

    def norm_of(self, x: Tensor, norm: Any) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight + norm.bias

    def block(self, x: Tensor, norm: nn.Module, mlp: nn.Module) -> Tensor:
        return x + mlp(self.norm_of(x, norm))


class ByHandGainFirst(ByHand):
    """The gain multiplies before the division, as in the Annotated Transformer."""

    def norm_of(self, x: Tensor, norm: Any) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return norm.weight * (x - mean) / torch.sqrt(variance + norm.eps) + norm.bias


class UpdatedBuffer(nn.Module):
    """The position table is updated by the model itself."""

    positions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.randn(5, D))
        self.write, self.norm, self.head = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.norm(self.write(x) + self.positions))
        self.positions.mul_(0.5)
        return y


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(D, D, 3, padding=1, groups=D), nn.LayerNorm(D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x).transpose(1, 2)))


class RmsStream(Stream):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(D, eps=1e-6) for _ in range(2))
        self.final = nn.RMSNorm(D)  # type: ignore[assignment]


class TwoReaders(Stream):
    """Two heads read the final norm, one of them without a bias; the key projection of attention is like that."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(D, 7, bias=False)

    def finish(self, x: Tensor) -> Any:
        n = self.final(x)
        return self.head(n), self.other(n)


IDS = (tokens(),)
SQUARE = (noise(2, D, D),)

TRAPS: dict[str, Trap] = {
    "plain": Trap(Stream, IDS, 3),
    "eps 1e-12": Trap(lambda: Stream(eps=1e-12), IDS, 3),
    "eps 1e-3": Trap(lambda: Stream(eps=1e-3), IDS, 3),
    "tied head": Trap(Tied, IDS, 3, paid=1),
    "tied head, one norm": Trap(lambda: Tied(0), IDS, 0, ("NF206",)),
    "shared norm": Trap(SharedNorm, IDS, 3),
    "shared writer, both inside": Trap(SharedMlp, IDS, 3),
    "shared writer, one outside": Trap(SharedOutside, IDS, 2, ("NF206",)),
    "returned hidden state": Trap(ReturnsHidden, IDS, 0, ("NF201", "NF201", "NF201")),
    "raw-stream reader": Trap(RawReader, IDS, 0, ("NF201", "NF201", "NF201")),
    "raw reader before, one centring behind": Trap(RawInside, IDS, 2, paid=1),
    "in-place residual": Trap(InPlace, IDS, 3),
    "data-dependent gate": Trap(Gated, IDS, 1, ("NF208", "NF208")),
    "scalar gate": Trap(ScalarGated, IDS, 3),
    "layer scale": Trap(LayerScaled, IDS, 3),
    "layer scale read twice": Trap(LayerScaleReadTwice, IDS, 1, ("NF201", "NF201")),
    "layer scale of a square": Trap(LayerScaleOfASquare, IDS, 1, ("NF208", "NF208")),
    "layer scale that is updated": Trap(UpdatedLayerScale, IDS, 1, ("NF208", "NF208")),
    "tied by data": Trap(TiedByData, IDS, 3, paid=1),
    "tied buffer": Trap(TiedBuffer, IDS, 3, paid=1),
    "scale under a norm": Trap(ScaledUnderNorm, SQUARE, 1),
    "squares": Trap(Squares, SQUARE, 0, ("NF202", "NF201")),
    "masked logits": Trap(MaskedLogits, IDS, 3),
    "concatenated tokens": Trap(JoinsTokens, IDS, 1, ("NF201", "NF204")),
    "post-norm": Trap(PostNorm, IDS, 0, ("NF201", "NF205", "NF205")),
    "output norms": Trap(OutputNorm, IDS, 2, ("NF201",)),
    "mix-ln": Trap(MixLn, IDS, 4, ("NF201",), paid=1),
    "norm before the stream": Trap(NormPre, IDS, 4, paid=1),
    "missing biases": Trap(NoBias, IDS, 3),
    "square, norm over the written axis": Trap(lambda: SquareTransposed(False), SQUARE, 1),
    "square, norm over the other axis": Trap(lambda: SquareTransposed(True), SQUARE, 0, ("NF202",)),
    "square, transposed and reshaped": Trap(SquareReshaped, (noise(2, 4, 4),), 0, ("NF202",)),
    "conv stem": Trap(ConvStem, (noise(2, 4, 4, 4),), 1),
    "grouped conv stem": Trap(lambda: ConvStem(groups=2), (noise(2, 4, 4, 4),), 0, ("NF202",)),
    "transposed conv stem": Trap(lambda: ConvStem(transposed=True), (noise(2, 4, 4, 4),), 1),
    "grouped transposed conv stem": Trap(lambda: ConvStem(2, True), (noise(2, 4, 4, 4),), 0, ("NF202",)),
    "two axes": Trap(TwoAxes, (noise(2, 5, D),), 0, ("NF203",)),
    "zero padding": Trap(Padded, IDS, 3),
    "padding with ones": Trap(PaddedWithOnes, IDS, 2, ("NF201",), paid=1),
    "experts": Trap(Experts, IDS, 2),
    "low-rank addition": Trap(Lora, IDS, 2),
    "by hand": Trap(ByHand, IDS, 3),
    "by hand, gain first": Trap(ByHandGainFirst, IDS, 3),
    "updated buffer": Trap(UpdatedBuffer, (noise(2, 5, D),), 0, ("NF209",)),
    "depthwise conv": Trap(Depthwise, (noise(2, D, 5),), 0, ("NF202",)),
    "bias on one of two readers": Trap(TwoReaders, IDS, 3),
    "rms norms": Trap(RmsStream, IDS, 0),
}
