"""fold_affine: gains and shifts go into every reader, or the report says who cannot take them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse.graph.views import arguments, aten
from tests.models import TRAPS, noise
from tests.zoo.spread import spread

TOKENS = (noise(2, 5, 8),)


def rewritten(model: nn.Module, *inputs: Any, passes: Any = "fold_affine") -> normfuse.Result:
    torch.manual_seed(0)
    return normfuse.rewrite(spread(model).eval(), passes, inputs=inputs)


def affine_norms(result: normfuse.Result) -> list[tuple[bool, bool]]:
    """(has a gain, has a shift) of every norm operator that is left."""
    norms = [node for node in result.program.graph.nodes if "_norm.default" in str(node.target)]
    named = [dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) for node in norms]
    return [(each.get("weight") is not None, each.get("bias") is not None) for each in named]


class Windows(nn.Module):
    """Swin's order: the normalized map is padded with zeros before its readers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.qkv(F.pad(self.norm(x), (0, 0, 0, 3))))


class Parallel(nn.Module):
    """GPT-NeoX: two norms of one value, each with its readers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.LayerNorm(8), nn.LayerNorm(8)
        self.mix, self.up = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.mix(self.one(x))) + torch.relu(self.up(self.two(x)))


class OnePlus(nn.Module):
    """Gemma's RMSNorm, whose gain is one plus the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.read = nn.Parameter(torch.zeros(8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return torch.tanh(self.read(y * (1.0 + self.weight)))


class Wide(nn.Module):
    """LLaMA's RMSNorm: computed in float32 and cast back before its gain."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.gate, self.up = nn.Linear(8, 16, bias=False), nn.Linear(8, 16, bias=False)
        self.down = nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Experts(nn.Module):
    """A router and experts whose weights are one stored tensor, which all read one norm."""

    def __init__(self, stacked: bool) -> None:
        super().__init__()
        self.norm, self.router, self.stacked = nn.LayerNorm(8), nn.Linear(8, 3, bias=False), stacked
        self.experts = nn.ModuleList(nn.Linear(8, 6, bias=i > 0) for i in range(3))
        self.weight = nn.Parameter(torch.randn(3, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        shares = torch.softmax(self.router(y), -1)
        if self.stacked:
            given = torch.bmm(y.reshape(1, -1, 8).expand(3, -1, -1), self.weight).unbind(0)
            each = [torch.relu(part).view(*y.shape[:-1], 6) for part in given]
        else:
            each = [torch.relu(expert(y)) for expert in self.experts]
        return torch.stack([shares[..., i : i + 1] * part for i, part in enumerate(each)]).sum(0)


class Between(nn.Module):
    """Between the norm and its reader: a mask of tokens, of channels, or dropout."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.norm, self.read, self.what = nn.LayerNorm(8), nn.Linear(8, 6), what

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.what == "tokens":
            y = y.masked_fill(x[..., :1] > 0, 0.0)
        elif self.what == "product":
            y = y * (x[..., :1] > 0)
        elif self.what == "channels":
            y = y.masked_fill(x > 0, 0.0)
        else:
            y = F.dropout(y, 0.5, training=self.what == "dropout in training")
        return torch.tanh(self.read(y))


class Groups(nn.Module):
    """A GroupNorm read by convolutions, with and without padding."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 3, padding=padding, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(self.norm(x)))


class Crossed(nn.Module):
    """An encoder's final norm, read by keys and values of every decoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.keys, self.values = (nn.ModuleList(nn.Linear(8, 8, bias=i > 0) for i in range(3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        memory, y = self.norm(x), x
        for key, value in zip(self.keys, self.values, strict=True):
            y = y + F.scaled_dot_product_attention(torch.tanh(y), key(memory), value(memory))
        return y


class Returned(nn.Module):
    """The normalized value goes to a head and to the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x)
        return y, self.head(y)


def test_a_zero_padded_window_lets_the_gain_through_and_keeps_the_shift() -> None:
    result = rewritten(Windows(), noise(1, 5, 8))
    assert affine_norms(result) == [(False, True)]
    assert result.report.evidence.relative <= 1e-11


def test_a_zero_gain_cannot_leave_its_shift_behind() -> None:
    model = spread(Windows()).eval()
    with torch.no_grad():
        model.norm.weight[2] = 0.0
    result = normfuse.rewrite(model, "fold_affine", inputs=(noise(1, 5, 8),))
    assert [each["code"] for each in result.report.to_dict()["refusals"]] == ["NF501"]
    assert affine_norms(result) == [(True, True)]


def test_norms_that_became_one_function_of_one_value_are_one() -> None:
    result = rewritten(Parallel(), *TOKENS)
    assert affine_norms(result) == [(False, False)]
    assert result.report.to_dict()["norms"] == {"before": {"layer_norm": 2}, "after": {"layer_norm": 1}}


def test_norms_of_different_eps_stay_two() -> None:
    model = Parallel()
    model.two.eps = 1e-3
    assert affine_norms(rewritten(model, *TOKENS)) == [(False, False), (False, False)]


def test_one_plus_a_weight_is_a_gain() -> None:
    result = rewritten(OnePlus(), *TOKENS)
    assert len(result.report.to_dict()["rewrites"]) == 1
    gains = [node for node in result.program.graph.nodes if node.target is aten.mul.Tensor]
    assert len(gains) == 1, "only the norm's own product is left"


@pytest.mark.parametrize(("padding", "left"), [(0, (False, False)), (1, (False, False))])
def test_group_norm_goes_into_convolutions(padding: int, left: tuple[bool, bool]) -> None:
    result = rewritten(Groups(padding), noise(2, 4, 7, 7))
    assert affine_norms(result) == [left]
    added = [node for node in result.program.graph.nodes if node.target is aten.add.Tensor]
    assert len(added) == padding, "where zeros are padded, β/γ is one addition"


def test_the_memory_of_every_decoder_layer_takes_it() -> None:
    result = rewritten(Crossed(), *TOKENS)
    assert affine_norms(result) == [(False, False)]
    biases = [name for name in result.program.exported.state_dict if name.endswith("bias") and name != "norm.bias"]
    assert len(biases) == 6, "each key and value has one now"


def test_what_the_caller_reads_stays() -> None:
    result = rewritten(Returned(), *TOKENS)
    (refusal,) = result.report.to_dict()["refusals"]
    assert refusal["code"] == "NF501"
    assert "the caller" in refusal["reason"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_and_up_take_a_gain_behind_a_cast(dtype: torch.dtype) -> None:
    result = rewritten(Wide().to(dtype), noise(2, 5, 8).to(dtype))
    (rewrite,) = result.report.to_dict()["rewrites"]
    assert rewrite["because"] == "gain and shift are folded into all layers that read it"
    products = result.program.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    assert len(products) == 2, "the norm's own product and the gate's are left"


@pytest.mark.parametrize("stacked", [False, True], ids=["a layer each", "one stored tensor"])
def test_experts_and_their_router_take_it(stacked: bool) -> None:
    result = rewritten(Experts(stacked), *TOKENS)
    assert affine_norms(result) == [(False, False)]
    if not stacked:
        layers = result.program.graph.find_nodes(op="call_function", target=aten.linear.default)
        assert all(arguments(node)["bias"] is not None for node in layers)


@pytest.mark.parametrize(
    ("what", "left"),
    [
        ("tokens", (False, True)),
        ("product", (False, True)),
        ("channels", (True, True)),
        ("dropout", (False, False)),
        ("dropout in training", (False, True)),
    ],
)
def test_what_stands_between_lets_the_gain_through_and_keeps_the_shift(what: str, left: tuple[bool, bool]) -> None:
    """A mask that differs from channel to channel lets neither through."""
    result = rewritten(Between(what), *TOKENS)
    assert affine_norms(result) == [left]


@pytest.mark.parametrize("order", [("fold_affine", "pre_rmsnorm"), ("pre_rmsnorm", "fold_affine")])
@pytest.mark.parametrize("name", ["plain", "eps 1e-3", "layer scale", "missing biases"])
def test_it_goes_with_pre_rmsnorm_in_any_order(name: str, order: tuple[str, str]) -> None:
    trap = TRAPS[name]
    together = normfuse.rewrite(trap.module(), order, inputs=trap.inputs)
    first = normfuse.rewrite(trap.module(), order[0], inputs=trap.inputs)
    second = normfuse.rewrite(first, order[1])
    for result in (together, second):
        assert result.report.to_dict()["norms"]["after"] == {"rms_norm": len(affine_norms(result))}
        assert affine_norms(result) == [(False, False)] * len(affine_norms(result))
    assert normfuse.verify(trap.module(), second, inputs=trap.inputs).ok
