"""Small models with attention in every spelling, and a training loop that is the same each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.stripping import attach, places
from tests.zoo.spread import spread

D, HEADS, CONTEXT, VOCABULARY = 16, 2, 8, 23


class Attention(nn.Module):
    """Causal attention; how queries, keys and values are made is told by ``kind``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.out = kind, nn.Linear(D, D)
        if kind == "three":
            self.q_proj, self.k_proj, self.v_proj = nn.Linear(D, D), nn.Linear(D, D, bias=False), nn.Linear(D, D)
        elif kind != "functional":
            self.qkv = nn.Linear(D, 3 * D)
        else:
            self.weight = nn.Parameter(torch.zeros(3 * D, D))

    def made(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.kind == "three":
            made: tuple[Tensor, ...] = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        elif self.kind == "functional":
            made = tuple(F.linear(x, self.weight).chunk(3, -1))
        elif self.kind == "per head":  # (head, q k v, features): values are no one run of channels
            return self.qkv(x).unflatten(-1, (HEADS, 3, -1)).transpose(1, 2).unbind(3)
        else:
            made = self.qkv(x).chunk(3, -1)
        return tuple(part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in made)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.made(x)
        if self.kind == "eager":
            weights = (q @ k.transpose(-1, -2) / (D // HEADS) ** 0.5).softmax(-1)
            return self.out((weights @ v).transpose(1, 2).flatten(2))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, kind: str, bias: bool = True) -> None:
        super().__init__()
        self.ln_1, self.attention, self.ln_2 = nn.LayerNorm(D, bias=bias), Attention(kind), nn.LayerNorm(D, eps=1e-3)
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class Gpt(nn.Module):
    def __init__(self, kind: str = "fused", layers: int = 2, *, bias: bool = True, tied: bool = False) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(VOCABULARY, D), nn.Embedding(CONTEXT, D)
        self.blocks = nn.ModuleList(Block(kind, bias) for _ in range(layers))
        self.final, self.head = nn.LayerNorm(D), nn.Linear(D, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.final(x))


KINDS = ("fused", "three", "per head", "eager", "functional")


def gpt(kind: str = "fused", **options: Any) -> Any:
    """A GPT with spread weights, the same ones every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return spread(Gpt(kind, **options))


def tokens(seed: int = 1, batch: int = 4) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, CONTEXT), generator=torch.Generator().manual_seed(seed))


def batches(begin: int, end: int) -> Iterator[tuple[int, Tensor]]:
    """Steps and their batches: the batch depends on the step alone."""
    return ((step, tokens(100 + step)) for step in range(begin, end))


def removed(model: Any, *inputs: Tensor, first_token: bool = False) -> Any:
    """The model with every norm removed, each with a σ of its own."""
    made = attach(model, places(model, inputs), first_token=first_token)
    model.train()(*inputs)
    for number, norm in enumerate(made.values()):
        norm.running_sigma.mul_(1.0 + 0.1 * number)  # whatever σ is, it folds
        norm.remove()
    return model.eval()


@dataclass(frozen=True)
class Removed:
    """A GPT whose LayerNorms were removed: how it is made, and what it is called with."""

    kind: str
    options: dict[str, Any]
    first_token: bool = False

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Positional inputs."""
        return (tokens(batch=2),)

    def module(self) -> Any:
        """The module with spread weights, the same ones every time."""
        return removed(gpt(self.kind, layers=1, **self.options), *self.inputs, first_token=self.first_token)


REMOVED = {
    "removed": Removed("fused", {}),
    "removed, no shifts": Removed("three", {"bias": False}),
    "removed, per head": Removed("per head", {}),
    "removed, tied head": Removed("functional", {"tied": True}),
    "removed, first token": Removed("eager", {}, first_token=True),
}


def next_token_loss(model: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
