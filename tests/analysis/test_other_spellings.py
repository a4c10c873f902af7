"""Norms that are spelled in arithmetic of two dtypes, with eps beside the deviation, or with statistics that are stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.analysis.facts import analyze
from normfuse.graph.program import Program

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class T5(nn.Module):
    """The variance is taken in float32; the value itself is not cast, the result is cast back where weights are narrow."""

    def __init__(self, wrong: str = "") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16) + 0.5)
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        measured = x.roll(1, 0) if self.wrong == "another value" else x
        variance = measured.to(torch.float32).pow(2).mean(-1, keepdim=True)
        if self.wrong == "bound":
            variance = variance.clamp(min=0.5)
        scaled = x * torch.rsqrt(variance + 1e-6)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            scaled = scaled.to(self.weight.dtype)
        return self.weight * scaled


class Annotated(nn.Module):
    """(x - mean x) / (σ + eps)."""

    def __init__(self, *, unbiased: bool, by_root: bool = False) -> None:
        super().__init__()
        self.unbiased, self.by_root = unbiased, by_root
        self.gain, self.shift = nn.Parameter(torch.rand(16) + 0.5), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        if self.by_root:
            deviation = x.var(-1, keepdim=True, unbiased=self.unbiased).sqrt()
        else:
            deviation = x.std(-1, keepdim=True, unbiased=self.unbiased)
        return self.gain * (x - mean) / (deviation + 1e-3) + self.shift


class Around(nn.Module):
    """A norm between two layers."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Linear(8, 16), norm, nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.embed(x)))
        return out


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_variance_alone_in_float32(dtype: torch.dtype) -> None:
    result = normfuse.rewrite(Around(T5()).to(dtype).eval(), "all", inputs=(X.to(dtype),))
    assert result.report.norms_before == {"rms_norm": 1}
    (norm,) = analyze(Program.trace(Around(T5()).to(dtype).eval(), (X.to(dtype),))).norms
    assert (norm.eps, norm.out.meta["val"].dtype, norm.x.meta["val"].dtype) == (1e-6, dtype, dtype)
    assert any("folded into the layers that read" in each.because for each in result.report.plan.rewrites)


@pytest.mark.parametrize("wrong", ["another value", "bound"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_looks_like_it_is_none(wrong: str, dtype: torch.dtype) -> None:
    program = Program.trace(Around(T5(wrong)).to(dtype).eval(), (X.to(dtype),))
    assert not analyze(program).norms


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("by_root", [True, False])
def test_eps_beside_the_deviation(unbiased: bool, by_root: bool) -> None:
    model = Around(Annotated(unbiased=unbiased, by_root=by_root)).eval()
    result = normfuse.rewrite(model, "all", inputs=(X,))
    assert result.report.norms_before == result.report.norms_after == {"std_norm": 1}
    alone = normfuse.rewrite(model, "pre_rmsnorm", inputs=(X,), verify="structure")
    assert [each.code for each in alone.report.plan.refusals] == ["NF210"]
    left = {name for name, _ in model.named_parameters()} - {"norm.gain", "norm.shift"}
    read = {name for node, name in result.program.stored.items() if result.program.nodes[node].users}
    assert read == left, "gain and shift are in the head"


def test_instance_norm_with_stored_statistics_is_folded_like_a_batch_norm() -> None:
    torch.manual_seed(0)
    norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU()).eval()
    for name in ("conv_bn", "offline_norm"):
        result = normfuse.rewrite(model, name, inputs=(torch.randn(2, 3, 9, 9),))
        assert result.report.norms_after == {}, name
    adaptive = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.ReLU()).eval()
    assert normfuse.rewrite(adaptive, "conv_bn", inputs=(torch.randn(2, 3, 9, 9),)).report.norms_after == {"instance_norm": 1}
