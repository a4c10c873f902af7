"""A vision Transformer small enough to train on a CPU in minutes, in three twins that differ in their norms alone."""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.nn import PRepBN, UnifiedNorm, convert

TWINS = ("layer_norm", "prepbn", "unified_norm")


@dataclass(frozen=True)
class Config:
    """Sizes of a SmallViT; each convolution of the stem halves the image, and what is left are the tokens."""

    image: int = 32
    stem: tuple[int, ...] = (16, 32)
    width: int = 96
    layers: int = 4
    heads: int = 3
    classes: int = 10


class Block(nn.Module):
    """Self-attention, then an MLP; each reads a norm of the residual stream and adds to the stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, stream: Tensor) -> Tensor:
        """Returns the residual stream after this block."""
        queries_keys_values = self.qkv(self.norm1(stream)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in queries_keys_values)
        heads = F.scaled_dot_product_attention(q, k, v)
        stream = stream + self.out(heads.transpose(1, 2).flatten(2))
        mlp: Tensor = self.down(F.gelu(self.up(self.norm2(stream))))
        return stream + mlp


class SmallViT(nn.Module):
    """A pre-norm vision Transformer: tokens from strided convolutions, learned positions, a final norm, the mean, a head.

    Every norm is read by Linear layers alone (the last one through a mean), so a norm that is a constant scale and shift
    at inference leaves nothing behind. Convolutions in place of one large patch are those of Xiao et al., "Early
    Convolutions Help Transformers See Better", NeurIPS 2021, without their BatchNorms.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        sizes = list(pairwise((3, *config.stem, config.width)))
        convolutions = [nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in sizes]
        self.stem = nn.Sequential(*(layer for each in convolutions[:-1] for layer in (each, nn.GELU())), convolutions[-1])
        self.positions = nn.Parameter(torch.empty(1, (config.image >> len(sizes)) ** 2, config.width))
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        self.norm, self.head = nn.LayerNorm(config.width), nn.Linear(config.width, config.classes)
        nn.init.normal_(self.positions, std=0.02)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:  # 2 * layers terms are summed into the stream: the sum starts at a size near 1
                terms = 2 * config.layers if name.endswith(("out.weight", "down.weight")) else 1
                nn.init.normal_(weight, std=(weight.shape[1] * terms) ** -0.5)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits of the classes, (batch, classes), for images of shape (batch, 3, image, image)."""
        stream = self.stem(images).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(stream)).mean(1))
        return logits


def make_twin(norm: str, steps: int) -> nn.Module:
    """Returns the model with one of the norms of `TWINS`; `steps` is how long it will be trained.

    λ of PRepBN is 0 after six tenths of the training; Unified Norm takes every batch's own statistics for the first quarter.
    """
    model = SmallViT(Config())
    if norm == "prepbn":
        convert(model, nn.LayerNorm, to=PRepBN, total=steps * 6 // 10)
    if norm == "unified_norm":
        convert(model, nn.LayerNorm, to=UnifiedNorm, warmup_iters=steps // 4)
    return model
