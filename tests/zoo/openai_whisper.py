"""Whisper tiny.en under the names that its file has, as somebody writes it who holds that file: torch alone.

`normfuse rewrite tiny.en.pt --model tests/zoo/openai_whisper.py:tiny_en`
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MELS, CONTEXT, WIDTH, HEADS, LAYERS, WORDS, TEXT = 80, 1500, 384, 6, 4, 51864, 448


class Attention(nn.Module):
    """Of one sequence to itself or to another; keys have no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, other: Tensor | None = None, causal: bool = False) -> Tensor:
        source = x if other is None else other
        q, k, v = (
            each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (self.query(x), self.key(source), self.value(source))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, perhaps to the audio, and an MLP."""

    def __init__(self, cross: bool) -> None:
        super().__init__()
        self.attn, self.attn_ln = Attention(), nn.LayerNorm(WIDTH)
        if cross:
            self.cross_attn, self.cross_attn_ln = Attention(), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.mlp_ln = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, audio: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.attn_ln(x), causal=audio is not None)
        if audio is not None:
            x = x + self.cross_attn(self.cross_attn_ln(x), audio)
        return x + self.mlp(self.mlp_ln(x))


class Encoder(nn.Module):
    """A spectrogram to features."""

    positional_embedding: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(MELS, WIDTH, 3, padding=1), nn.Conv1d(WIDTH, WIDTH, 3, stride=2, padding=1)
        self.register_buffer("positional_embedding", sines())
        self.blocks, self.ln_post = nn.ModuleList(Block(False) for _ in range(LAYERS)), nn.LayerNorm(WIDTH)

    def forward(self, mel: Tensor) -> Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).transpose(1, 2) + self.positional_embedding
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x)


class Decoder(nn.Module):
    """Features and tokens to logits, by the table of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(WORDS, WIDTH)
        self.positional_embedding = nn.Parameter(torch.empty(TEXT, WIDTH))
        self.blocks, self.ln = nn.ModuleList(Block(True) for _ in range(LAYERS)), nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor, audio: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[-1]]
        for block in self.blocks:
            x = block(x, audio)
        return self.ln(x) @ self.token_embedding.weight.t()


class Whisper(nn.Module):
    """Speech to text."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()

    def forward(self, mel: Tensor, tokens: Tensor) -> Tensor:
        return self.decoder(tokens, self.encoder(mel))


def sines() -> Tensor:
    """Positions of the encoder."""
    steps = torch.exp(-math.log(10000) / (WIDTH // 2 - 1) * torch.arange(WIDTH // 2))
    angles = torch.arange(CONTEXT)[:, None] * steps
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def tiny_en() -> nn.Module:
    """The model."""
    return Whisper()
