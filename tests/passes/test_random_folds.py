"""Random networks of norms, layers, sums, joins and views: whatever is folded, the proof holds, and nothing raises."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import normfuse
from tests.zoo.spread import spread

CHANNELS = 4
KINDS = (
    "norm", "norm", "rep", "scale", "root", "conv", "grouped", "padded", "transposed", "reflected", "linear", "relu",
    "pool", "counted pool", "zero pad", "residual", "join", "twice", "flip", "subtract", "token",
)  # fmt: skip


class Layer(nn.Module):
    """One step of a random network on maps [N, 4, H, W]; sizes of maps stay as they are."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.BatchNorm2d(CHANNELS, affine=kind != "root")
        self.scale, self.alpha = nn.Parameter(torch.randn(CHANNELS, 1, 1)), nn.Parameter(torch.randn(1))
        self.one, self.wide = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False), nn.Conv2d(2 * CHANNELS, CHANNELS, 1)
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=2 if kind == "grouped" else 1, bias=kind != "padded")
        self.reflected = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, padding_mode="reflect")
        self.transposed = nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, padding=1, groups=2)
        self.linear = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "norm":
                return self.norm(x)
            case "rep":
                return self.norm(x) + self.alpha * x
            case "scale":
                return self.scale * x - 0.5
            case "root":
                return x / (self.norm.get_buffer("running_var").view(-1, 1, 1) + 1e-3).sqrt()
            case "conv":
                return self.one(x)
            case "grouped" | "padded":
                return self.conv(x)
            case "transposed":
                return self.transposed(x)
            case "reflected":
                return self.reflected(x)
            case "linear":
                return self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            case "relu":
                return torch.relu(x)
            case "pool" | "counted pool":
                return nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=self.kind != "pool")
            case "zero pad":
                return nn.functional.pad(x, (1, 0, 0, 1))[:, :, 1:, :-1]
            case "residual":
                return x + self.one(torch.tanh(self.conv(x)))
            case "join":
                return self.wide(torch.cat((x, torch.tanh(x)), 1))
            case "twice":
                return self.norm(x) + torch.relu(self.norm(x))
            case "flip":
                return x.flip(3).transpose(2, 3)
            case "subtract":
                return self.one(x) - self.norm(x)
            case _:
                return torch.cat((self.scale.expand(x.shape[0], -1, x.shape[2], 1), x[:, :, :, 1:]), 3)


@settings(
    max_examples=25, deadline=None, derandomize=True, database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(st.lists(st.sampled_from(KINDS), min_size=2, max_size=7), st.integers(0, 99))
def test_whatever_is_folded_is_proven(kinds: list[str], seed: int) -> None:
    torch.manual_seed(seed)
    model: Any = spread(nn.Sequential(*map(Layer, kinds))).eval()
    result = normfuse.rewrite(model, "offline_norm", inputs=(torch.randn(2, CHANNELS, 5, 5),))
    assert result.report.evidence.ok
    assert result.report.evidence.relative <= 1e-9
    assert result.report.to_dict()["norms"]["after"] == {}
