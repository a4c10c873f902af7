"""Norms whose statistics come from each input: there is nothing constant to fold, and `offline_norm` says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse.transforms.constant_norms import WRITERS
from tests.foreign_norms import EvoNorm2dB0, EvoNorm2dS0, GroupScaling1D, trained
from tests.models import noise


class UnMixTNS2d(nn.Module):
    """Test-time statistics: K stored components, mixed with the sample's own by how alike they are.

    Tomar et al., "Un-Mixing Test-Time Normalization Statistics", ICLR 2024, arXiv 2402.11652. With ``moving`` the components
    follow what they see, as published.
    """

    running_means: Tensor
    running_vars: Tensor

    def __init__(self, channels: int, components: int = 4, moving: bool = False, momentum: float = 0.1) -> None:
        super().__init__()
        self.moving, self.momentum = moving, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_means", torch.randn(components, channels))
        self.register_buffer("running_vars", 0.5 * torch.rand(components, channels) + 0.2)

    def forward(self, x: Tensor) -> Tensor:
        own_mean, own_var = x.mean((2, 3)), x.var((2, 3), unbiased=False)
        alike = F.normalize(own_mean, dim=1) @ F.normalize(self.running_means, dim=1).T
        share = torch.softmax(alike / 0.07, dim=1).unsqueeze(-1)
        means = (1 - share) * self.running_means + share * own_mean.unsqueeze(1)
        variances = (1 - share) * self.running_vars + share * own_var.unsqueeze(1)
        mean = means.mean(1)
        variance = variances.mean(1) + (means**2).mean(1) - mean**2
        if self.moving:
            self.running_means += self.momentum * (share * (own_mean.unsqueeze(1) - self.running_means)).mean(0)
            self.running_vars += self.momentum * (share * (own_var.unsqueeze(1) - self.running_vars)).mean(0)
        x = (x - mean[:, :, None, None]) / torch.sqrt(variance[:, :, None, None] + 1e-5)
        return x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class RegionNorm(nn.Module):
    """Statistics of the masked region and of the rest, each for itself; the mask is drawn from the sample.

    Yu et al., "Region Normalization for Image Inpainting", AAAI 2020, arXiv 1911.10375: the learnable form.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.response = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.gamma, self.beta = nn.Conv2d(1, channels, 3, padding=1), nn.Conv2d(1, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat((x.amax(1, keepdim=True), x.mean(1, keepdim=True)), 1)
        response = torch.sigmoid(self.response(pooled))
        mask = (response > 0.5).to(x)
        y = self.region(x * mask, mask) + self.region(x * (1 - mask), 1 - mask)
        return y * (1 + self.gamma(response)) + self.beta(response)

    def region(self, region: Tensor, mask: Tensor) -> Tensor:
        count = mask.sum((0, 2, 3)).clamp(min=1)
        mean = region.sum((0, 2, 3)) / count
        filled = region + (1 - mask) * mean[None, :, None, None]
        share = torch.sqrt(count / (mask.numel() // mask.shape[1]))
        return F.batch_norm(filled, None, None, training=True) / share


class IBN(nn.Module):
    """InstanceNorm on one half of the channels, BatchNorm on the other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.sizes = [channels // 2, channels - channels // 2]
        self.IN, self.BN = nn.InstanceNorm2d(self.sizes[0], affine=True), nn.BatchNorm2d(self.sizes[1])

    def forward(self, x: Tensor) -> Tensor:
        one, other = torch.split(x, self.sizes, 1)
        return torch.cat((self.IN(one.contiguous()), self.BN(other.contiguous())), 1)


class Bottleneck(nn.Module):
    """IBN-a has IBN in place of the first norm; IBN-b an InstanceNorm behind the addition."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 1, bias=False), IBN(6) if kind == "a" else nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.IN = nn.InstanceNorm2d(4, affine=True) if kind == "b" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.IN(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + x))


def behind_conv(norm: nn.Module) -> nn.Module:
    """The norm where a BatchNorm would have folded."""
    return nn.Sequential(nn.Conv2d(4, 6, 3), norm, nn.ReLU(), nn.Conv2d(6, 5, 3))


@dataclass(frozen=True)
class Adaptive:
    """A model with such norms.

    Attributes:
        build: makes the module.
        refused: names of its norms that depend on the input.
        folded: how many do not; all are folded into the layers that write their input.
        inputs: positional inputs.
    """

    build: Callable[[], nn.Module]
    refused: frozenset[str] = frozenset({"1"})
    folded: int = 0
    inputs: tuple[Any, ...] = (noise(2, 4, 9, 9),)


ADAPTIVE: dict[str, Adaptive] = {
    "UnMix-TNS": Adaptive(lambda: behind_conv(UnMixTNS2d(6))),
    "UnMix-TNS that moves": Adaptive(lambda: behind_conv(UnMixTNS2d(6, moving=True))),
    "Region Norm": Adaptive(lambda: behind_conv(RegionNorm(6))),
    "InstanceNorm": Adaptive(lambda: behind_conv(nn.InstanceNorm2d(6, affine=True))),
    "InstanceNorm without affine": Adaptive(lambda: behind_conv(nn.InstanceNorm2d(6))),
    "InstanceNorm with running statistics": Adaptive(
        lambda: behind_conv(nn.InstanceNorm2d(6, affine=True, track_running_stats=True)), refused=frozenset(), folded=1
    ),
    "IBN-a": Adaptive(lambda: Bottleneck("a"), refused=frozenset({"bn1.IN"}), folded=2),
    "IBN-b": Adaptive(lambda: Bottleneck("b"), refused=frozenset({"IN"}), folded=2),
    "BatchNorm of each batch": Adaptive(lambda: behind_conv(nn.BatchNorm2d(6, track_running_stats=False))),
    "GroupNorm": Adaptive(lambda: behind_conv(nn.GroupNorm(2, 6))),
    "EvoNorm B0": Adaptive(lambda: behind_conv(EvoNorm2dB0(6))),
    "EvoNorm S0": Adaptive(lambda: behind_conv(EvoNorm2dS0(6))),
    "LayerNorm": Adaptive(lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), inputs=(noise(2, 5, 8),)),
    "group scaling": Adaptive(lambda: nn.Sequential(nn.Linear(8, 8), GroupScaling1D()), inputs=(noise(5, 2, 8),)),
}


def module(case: Adaptive) -> nn.Module:
    torch.manual_seed(0)
    return trained(case.build()).eval()


@pytest.mark.parametrize("name", ADAPTIVE)
def test_it_is_refused_for_that_reason(name: str) -> None:
    case = ADAPTIVE[name]
    result = normfuse.rewrite(module(case), "offline_norm", inputs=case.inputs)
    report = result.report.to_dict()
    assert {refusal["code"] for refusal in report["refusals"]} <= {"NF311"}
    assert {refusal["module"] for refusal in report["refusals"]} == case.refused
    assert all("each input" in refusal["reason"] for refusal in report["refusals"])
    norms = [each["because"] for each in report["rewrites"] if each["was"] != "affine"]
    assert [because.startswith(WRITERS) for because in norms] == [True] * case.folded
    assert result.report.evidence.ok
    assert result.report.evidence.relative <= 1e-11


@pytest.mark.parametrize("name", [name for name, case in ADAPTIVE.items() if case.refused])
def test_its_statistics_do_come_from_the_input(name: str) -> None:
    """At every place the input stays as it is, or changes; the norm's result changes where its input has not."""
    case = ADAPTIVE[name]
    model = module(case)
    (norm,) = (model.get_submodule(name) for name in case.refused)
    seen: list[Tensor] = []
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(*case.inputs)
    (x,) = seen
    changed = x.clone()
    changed[..., 1:] *= 2.0
    assert not torch.allclose(norm(x)[..., 0], norm(changed)[..., 0])


class Deviations(nn.Module):
    """Means and deviations over time as features, as speaker models pool them: a root of statistics that scales nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x.mean(2), x.var(2, unbiased=False).add(1e-5).sqrt(), x.mean(2) ** 2), 1)


def test_what_scales_nothing_is_no_norm() -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), Deviations(), nn.Linear(18, 3))
    result = normfuse.rewrite(trained(model).eval(), "offline_norm", inputs=(noise(2, 4, 9),))
    assert not result.report.to_dict()["refusals"]
    assert [each["because"] for each in result.report.to_dict()["rewrites"]] == [WRITERS]
