"""After `recalibrate` norms are constants as before: they fold, and the folded weights hold the new statistics."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.nn import PRepBN, RepBN, UnifiedNorm, recalibrate
from tests.zoo.spread import spread

C = 6


class Net(nn.Module):
    """A BatchNorm behind a convolution, then token norms in front of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, C, 3, bias=False), nn.BatchNorm2d(C)
        self.norms = nn.ModuleList([RepBN(C), UnifiedNorm(C), PRepBN(C, total=0)])
        self.layers = nn.ModuleList(nn.Linear(C, C) for _ in self.norms)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv(x))).flatten(2).transpose(1, 2)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            y = y + torch.tanh(layer(norm(y)))
        return y


def source() -> Any:
    model = spread(Net()).eval()
    for name, value in model.named_buffers():
        if name.endswith("running_var"):
            value.uniform_(0.3, 2.0)
    return model


def target() -> list[Tensor]:
    """Batches of other data: another size, another mean, another spread."""
    return [torch.randn(n, 3, 6, 6) * 3.0 + 2.0 for n in (4, 7)]


def folded(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the folded model, which is proven to be the model and to have no norm left."""
    x = torch.randn(2, 3, 6, 6)
    result = normfuse.rewrite(model, "offline_norm", inputs=(x,))
    assert len(result.report.to_dict()["rewrites"]) == 4
    assert not result.report.to_dict()["norms"]["after"]
    assert result.report.evidence.ok
    torch.testing.assert_close(result.module()(x), model(x), rtol=1e-4, atol=1e-4)
    return dict(result.program.exported.state_dict)


@pytest.mark.parametrize("alpha", [1.0, 0.1])
def test_new_statistics_fold(alpha: float) -> None:
    model, data = source(), target()
    before = copy.deepcopy(model)
    recalibrate(model, data, alpha=alpha)
    new, old = folded(model), folded(before)
    assert not torch.allclose(new["conv.weight"], old["conv.weight"], rtol=1e-2)
    pixels = torch.cat([before.conv(x) for x in data]).movedim(1, -1).flatten(0, -2).detach()
    variance = (1 - alpha) * before.bn.running_var + alpha * pixels.var(0)
    mean = (1 - alpha) * before.bn.running_mean + alpha * pixels.mean(0)
    scale = before.bn.weight / (variance + before.bn.eps).sqrt()
    torch.testing.assert_close(new["conv.weight"], before.conv.weight * scale[:, None, None, None])
    torch.testing.assert_close(new["conv.bias"], before.bn.bias - scale * mean)


def test_a_share_of_nothing_folds_as_if_nothing_had_been_measured() -> None:
    model = source()
    before = copy.deepcopy(model)
    recalibrate(model, target(), alpha=0.0)
    new, old = folded(model), folded(before)
    assert all(torch.equal(new[name], old[name]) for name in old)
