"""Models whose outputs have more to hide a mistake in: masks, entries of several sizes, and numbers that are none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests import every_model
from tests.models import IDS, D, Stream, Trap, noise


class MaskedLM(Stream):
    """Causal attention with a mask, and logits of which some tokens are forbidden."""

    def __init__(self) -> None:
        super().__init__(blocks=1)
        self.attended = nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def finish(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(self.attended(x)).chunk(3, -1)
        later = torch.ones(5, 5, dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(1, 2) * D**-0.5).masked_fill(later, -1e4)
        x = x + self.out(scores.softmax(-1) @ v)
        return self.head(self.final(x)).masked_fill(torch.arange(11) > 6, -3e4), scores


class Detector(nn.Module):
    """Boxes in pixels, scores beside them, and a mask for each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, D, 3, stride=2, bias=False), nn.BatchNorm2d(D)
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.final = nn.LayerNorm(D)
        self.box, self.score, self.mask = nn.Linear(D, 4), nn.Linear(D, 2), nn.Linear(D, 9)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.bn(self.stem(image)).relu().flatten(2).transpose(1, 2)
        x = x + self.down(self.up(self.norm(x)).relu())
        x = self.final(x)
        return torch.cat([320.0 + 100.0 * self.box(x), self.score(x).sigmoid()], -1), self.mask(x).masked_fill(
            torch.arange(9) % 4 == 3, -torch.inf
        )


class PartlyNaN(Stream):
    """A mean over the tokens of each kind, of which some do not occur."""

    def finish(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.final(x))
        kinds = (torch.arange(5)[:, None] == torch.tensor([0, 1, 7])).to(x.dtype)
        return logits, (logits.transpose(1, 2) @ kinds) / kinds.sum(0)


HIDING = {
    "masked LM": Trap(MaskedLM, IDS, 3),
    "detector": Trap(Detector, (noise(2, 3, 9, 9),), 2),
    "partly NaN": Trap(PartlyNaN, IDS, 3),
}
MODELS: dict[str, Any] = {**every_model.MODELS, **HIDING}

CANNOT_RUN = {("masked logits", torch.float16), ("masked logits", torch.bfloat16)}
"""Model and dtype: the mask's number, float32's least, is none of half precision, and the model itself raises."""
