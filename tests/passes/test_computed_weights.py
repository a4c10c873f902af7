"""Weights computed from integers, masks, codebooks and quantizers: folded where a factor takes the scale, kept as they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse.graph.views import aten

X = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(1))


class Computed(nn.Module):
    """A convolution whose weight is computed from what it stores, and a BatchNorm behind or before it."""

    def __init__(self, how: str, *, before: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.before = how, before
        self.w = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.q: Tensor
        self.each: Tensor
        self.all: Tensor
        self.mask: Tensor
        self.scales: Tensor
        self.register_buffer("q", (self.w.detach() * 40).round().clamp(-128, 127).to(torch.int8))
        self.register_buffer("each", torch.rand(8, 1, 1, 1) * 0.03 + 0.01)
        self.register_buffer("all", torch.tensor(0.02))
        self.register_buffer("groups", torch.rand(8, 4, 1) * 0.03 + 0.01)
        self.register_buffer("mask", torch.rand(8, 8, 3, 3) > 0.5)
        self.register_buffer("points", torch.zeros(8, dtype=torch.int32))
        self.register_buffer("scales", torch.rand(8) * 0.1 + 0.05)
        self.norm = nn.BatchNorm2d(8)
        for tensor, low in ((self.norm.running_mean, -1.0), (self.norm.running_var, 0.5)):
            assert tensor is not None
            nn.init.uniform_(tensor, low, 2.0)
        nn.init.uniform_(self.norm.weight, -2, 2)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        weight = HOW[self.how](self)
        return F.conv2d(self.norm(x), weight) if self.before else self.norm(F.conv2d(x, weight)).relu()


HOW: dict[str, Callable[..., Tensor]] = {
    "int8, a scale per channel": lambda m: m.q.float() * m.each,
    "a scale per channel, int8": lambda m: m.each * m.q.float(),
    "int8, one scale": lambda m: m.q.float() * m.all,
    "int8 less a zero point": lambda m: (m.q.float() - 3.0) * m.each,
    "int8 in groups": lambda m: (m.q.float().view(8, 4, 18) * m.groups).view(8, 8, 3, 3),
    "mask": lambda m: m.w * m.mask,
    "mask of floats": lambda m: m.mask * m.w,
    "mask and scale": lambda m: m.w * m.mask * m.each,
    "quantized, and a gain behind": lambda m: torch.fake_quantize_per_tensor_affine(m.w, 0.02, 0, -8, 7) * m.each,
    "mask that chooses": lambda m: torch.where(m.mask, m.w, 0.0),
    "mask that chooses the other": lambda m: torch.where(m.mask, torch.zeros_like(m.w), m.w),
    "mask that fills": lambda m: m.w.masked_fill(m.mask, 0.0),
    "mask in another dtype": lambda m: m.w * (1 - m.mask.float()),
    "rounded by hand": lambda m: (m.w / m.all).round().clamp(-8, 7) * m.all,
    "rounded by hand, per channel": lambda m: (m.w / m.each).round().clamp(-8, 7) * m.each,
    "int8 over a scale": lambda m: m.q.float() / (1 / m.each),
    "mask that fills ones": lambda m: m.w.masked_fill(m.mask, 1.0),
    "codebook": lambda m: m.w.flatten()[m.q.long().abs()],
    "quantized": lambda m: torch.fake_quantize_per_tensor_affine(m.w, 0.02, 0, -8, 7),
    "quantized per channel": lambda m: torch.fake_quantize_per_channel_affine(m.w, m.scales, m.points, 0, -8, 7),
}  # fmt: skip
FOLDED = [*HOW][:15]
KEPT = {
    "int8 over a scale": "'q' is stored as int8",
    "mask that fills ones": "'mask' is stored as bool",
    "codebook": "'w' is a codebook that all channels pick from",
    "quantized": "'w' is quantized by fake_quantize_per_tensor_affine",
    "quantized per channel": "'w' is quantized by fake_quantize_per_channel_affine",
}


LEVEL = {"quantized per channel": "structure"}  # torch quantizes per channel in float32 alone


def targets(result: normfuse.Result) -> list[object]:
    return [node.target for node in result.program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("passes", ["conv_bn", "all"])
@pytest.mark.parametrize("how", FOLDED)
def test_one_factor_takes_the_scale(how: str, passes: str) -> None:
    model = Computed(how).eval()
    result = normfuse.rewrite(model, passes, inputs=(X,))
    assert result.report.norms_after == {}
    assert targets(result)[-2:] == [aten.conv2d.default, aten.relu.default]
    torch.testing.assert_close(result.module()(X), model(X), rtol=1e-4, atol=1e-4)
    for name in ("q", "mask"):
        if {"q": "int8", "mask": "mask"}[name] in how:
            kept = result.program.tensor(name)
            assert kept.dtype == getattr(model, name).dtype
            assert torch.equal(kept, getattr(model, name))
    assert ("rounded" in how) == (aten.round.default in targets(result)), "the quantizer stays"
    assert ("quantized" in how) == (aten.fake_quantize_per_tensor_affine.default in targets(result))


@pytest.mark.parametrize("passes", ["conv_bn", "all"])
@pytest.mark.parametrize("how", KEPT)
def test_what_cannot_be_scaled_stays_and_says_why(how: str, passes: str) -> None:
    model = Computed(how).eval()
    before = normfuse.rewrite(model, "conv_bn", inputs=(X,), verify="structure", allow="exact")
    result = normfuse.rewrite(model, passes, inputs=(X,), verify=LEVEL.get(how, "full"))
    said = " ".join(each.because for each in result.report.plan.rewrites)
    assert KEPT[how] in said, said
    for op in (aten.fake_quantize_per_tensor_affine.default, aten.fake_quantize_per_channel_affine.default, aten.round.default):
        assert targets(result).count(op) == targets(before).count(op)


@pytest.mark.parametrize("how", HOW)
def test_a_norm_before_it_is_never_wrong(how: str) -> None:
    model = Computed(how, before=True).eval()
    result = normfuse.rewrite(model, "all", inputs=(X,), verify=LEVEL.get(how, "full"))
    torch.testing.assert_close(result.module()(X), model(X), rtol=1e-4, atol=1e-4)


class Stream(nn.Module):
    """Two norms whose stream is written by a product with a computed weight."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.w = nn.Parameter(torch.randn(16, 16))
        self.q: Tensor
        self.each: Tensor
        self.register_buffer("q", (self.w.detach() * 40).round().clamp(-128, 127).to(torch.int8))
        self.register_buffer("each", torch.rand(16, 1) * 0.03 + 0.01)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.q.float() * self.each
        if self.how == "quantized":
            weight = torch.fake_quantize_per_tensor_affine(self.w, 0.02, 0, -8, 7)
        out: Tensor = self.head(self.norm(F.linear(x, weight)))
        return out


@pytest.mark.parametrize(("how", "name"), [("int8", "'q'"), ("quantized", "'w'")])
def test_centring_would_leave_the_grid(how: str, name: str) -> None:
    result = normfuse.rewrite(Stream(how).eval(), "pre_rmsnorm", inputs=(torch.randn(2, 3, 16),))
    (refusal,) = result.report.plan.refusals
    assert refusal.code == "NF202"
    assert name in refusal.reason


@pytest.mark.parametrize("how", ["int8", "quantized"])
def test_readers_with_computed_weights_keep_them(how: str) -> None:
    class Reader(Stream):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.q.float() * self.each
            if self.how == "quantized":
                weight = torch.fake_quantize_per_tensor_affine(self.w, 0.02, 0, -8, 7)
            return F.linear(self.norm(x), weight)

    model = Reader(how).eval()
    nn.init.uniform_(model.norm.weight, 0.5, 2)
    nn.init.normal_(model.norm.bias)
    result = normfuse.rewrite(model, ["fold_affine", "offline_norm"], inputs=(torch.randn(2, 3, 16),))
    assert result.report.norms_after == {"layer_norm": 1}
    refused = [each for each in result.report.plan.refusals if each.code == "NF501"]
    assert [("'q'" if how == "int8" else "'w'") in each.reason for each in refused] == [True]
    assert (aten.fake_quantize_per_tensor_affine.default in targets(result)) == (how == "quantized")
