"""A byte-level GPT with dropout wherever such models have it, and real text to train it on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.spread import spread

TEXT = Path(__file__).parents[2] / "examples" / "validation_bytes.bin"
CONTEXT = 16


@dataclass(frozen=True)
class Drops:
    """Probabilities of dropout: on the sum of embeddings, on what is added to the stream, inside of the branches."""

    embedding: float = 0.0
    residual: float = 0.0
    inside: float = 0.0


class Block(nn.Module):
    """Attention and MLP of a GPT."""

    def __init__(self, width: int, drops: Drops) -> None:
        super().__init__()
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.residual, self.inside = nn.Dropout(drops.residual), nn.Dropout(drops.inside)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        dropped = self.inside.p if self.training else 0.0
        heads = F.scaled_dot_product_attention(q, k, v, dropout_p=dropped, is_causal=True)
        x = x + self.residual(self.out(heads.transpose(1, 2).flatten(2)))
        return x + self.residual(self.down(self.inside(F.gelu(self.up(self.norm2(x))))))


class Gpt(nn.Module):
    """Pre-LN, learned positions, a final norm, a head that may share the table."""

    def __init__(self, width: int = 12, blocks: int = 2, tied: bool = False, drops: Drops | None = None) -> None:
        super().__init__()
        drops = drops or Drops()
        self.bytes, self.places = nn.Embedding(256, width), nn.Parameter(torch.zeros(CONTEXT, width))
        self.dropped = nn.Dropout(drops.embedding)
        self.blocks = nn.Sequential(*(Block(width, drops) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        if tied:
            self.head.weight = self.bytes.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.dropped(self.bytes(ids) + self.places))))


def gpt(**options: Any) -> Gpt:
    """The model in float64 with weights that hide nothing, set to train."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return spread(Gpt(**options)).double().train()


def twins(model: nn.Module, count: int) -> Iterator[nn.Module]:
    """Copies with parameters of their own."""
    return (copy.deepcopy(model) for _ in range(count))


def text(steps: int, batch: int = 4) -> Tensor:
    """Windows of real text, (steps, batch, CONTEXT + 1) bytes."""
    size = steps * batch * (CONTEXT + 1)
    return torch.frombuffer(bytearray(TEXT.read_bytes()[:size]), dtype=torch.uint8).long().view(steps, batch, CONTEXT + 1)


def cross_entropy(model: Any, window: Tensor) -> Tensor:
    """The loss of the next byte."""
    logits = model(window[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
