"""A byte-level GPT small enough to read in one sitting: the model behind `make demo`."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Sizes of a TinyGPT."""

    vocabulary: int = 256
    context: int = 128
    width: int = 128
    layers: int = 4
    heads: int = 4


class Block(nn.Module):
    """Causal self-attention, then an MLP; each reads a LayerNorm of the residual stream and adds to the stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, stream: Tensor) -> Tensor:
        """Returns the residual stream after this block."""
        queries_keys_values = self.qkv(self.norm1(stream)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in queries_keys_values)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        stream = stream + self.out(heads.transpose(1, 2).flatten(2))
        mlp: Tensor = self.down(F.gelu(self.up(self.norm2(stream))))
        return stream + mlp


class TinyGPT(nn.Module):
    """A pre-LN GPT over bytes: learned positions, a final norm, and a head that shares the embedding's table."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.bytes = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.width)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:  # 2 * layers terms are summed into the stream: the sum starts at a size near 1
                terms = 2 * config.layers if name.endswith(("out.weight", "down.weight")) else 1
                nn.init.normal_(weight, std=(config.width * terms) ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the logits of each next byte, (batch, seq, vocabulary), for tokens of shape (batch, seq)."""
        stream = self.bytes(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return F.linear(self.norm(self.blocks(stream)), self.bytes.weight)
