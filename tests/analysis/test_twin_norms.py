"""Norms that are, or have become, one function of one value are one: GPT-NeoX's parallel residual."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from tests.models import noise, tokens
from tests.zoo.spread import spread

D, BLOCKS = 8, 3
Make = Callable[[], nn.Module]


class HandWritten(nn.Module):
    """An RMSNorm in arithmetic, in float32 as LLaMA's."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(D)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.type_as(x)


class Parallel(nn.Module):
    """x + attention(norm(x)) + mlp(other norm(x))."""

    def __init__(self, one: Make, two: Make) -> None:
        super().__init__()
        self.one, self.two = one(), two()
        self.qkv, self.mix = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 2 * D, bias=False), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.one(x)).chunk(3, -1)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.mix(attended) + self.down(F.gelu(self.up(self.two(x))))


class NeoX(nn.Module):
    """Parallel blocks, a final norm and a head of its own."""

    def __init__(self, one: Make = lambda: nn.LayerNorm(D), two: Make | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, D)
        self.blocks = nn.ModuleList(Parallel(one, two or one) for _ in range(BLOCKS))
        self.final, self.head = one(), nn.Linear(D, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.final(x))


def rewritten(model: nn.Module, passes: str | tuple[str, ...] = "fold_affine") -> normfuse.Result:
    result = normfuse.rewrite(spread(model).eval(), passes, inputs=(tokens(),))
    assert result.report.evidence.relative <= 1e-11
    return result


def counts(result: normfuse.Result) -> tuple[dict[str, int], dict[str, int]]:
    norms = result.report.to_dict()["norms"]
    return norms["before"], norms["after"]


@pytest.mark.parametrize(
    ("make", "kind"),
    [(lambda: nn.LayerNorm(D), "layer_norm"), (lambda: nn.RMSNorm(D, 1e-5), "rms_norm"), (HandWritten, "rms_norm")],
    ids=["LayerNorm", "RMSNorm", "by hand"],
)
def test_two_norms_of_a_parallel_block_become_one(make: Make, kind: str) -> None:
    """Two in each of three blocks and a final one are seven; one in each and a final one are four."""
    result = rewritten(NeoX(make))
    assert counts(result) == ({kind: 7}, {kind: 4})
    rewrites = result.report.to_dict()["rewrites"]
    gone = [each for each in rewrites if each["becomes"] == "no norm"]
    assert [each["module"] for each in gone] == [f"blocks.{i}.two" for i in range(BLOCKS)]
    assert len(rewrites) == 7 + BLOCKS, "and all seven gains were folded"


@pytest.mark.parametrize("order", [("fold_affine", "pre_rmsnorm"), ("pre_rmsnorm", "fold_affine")])
def test_with_pre_rmsnorm_in_any_order(order: tuple[str, str]) -> None:
    assert counts(rewritten(NeoX(), order)) == ({"layer_norm": 7}, {"rms_norm": 4})


@pytest.mark.parametrize(
    "other",
    [lambda: nn.LayerNorm(D, 1e-3), lambda: nn.RMSNorm(D, 1e-5), lambda: HandWritten(1e-5)],
    ids=["another eps", "another kind", "another kind by hand"],
)
def test_other_functions_of_one_value_stay(other: Make) -> None:
    result = rewritten(NeoX(two=other))
    before, after = counts(result)
    assert sum(before.values()) == sum(after.values()) == 7


def test_norms_by_hand_of_another_eps_stay() -> None:
    assert counts(rewritten(NeoX(HandWritten, lambda: HandWritten(1e-4))))[1] == {"rms_norm": 7}


def test_one_module_called_twice_is_one_although_nobody_can_take_its_gain() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.head(self.norm(x)), self.norm(x)

    result = normfuse.rewrite(spread(Twice()).eval(), "fold_affine", inputs=(noise(2, D),))
    assert counts(result) == ({"layer_norm": 2}, {"layer_norm": 1})
    assert [each["code"] for each in result.report.to_dict()["refusals"]] == ["NF501"]


def test_norms_whose_gains_are_other_ones_stay_where_the_gains_do() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.LayerNorm(D), nn.LayerNorm(D)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(x), self.two(x)

    result = normfuse.rewrite(spread(Both()).eval(), "fold_affine", inputs=(noise(2, D),))
    assert counts(result) == ({"layer_norm": 2}, {"layer_norm": 2})


def test_groups_are_part_of_the_function() -> None:
    class Groups(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.GroupNorm(2, 4), nn.GroupNorm(4, 4), nn.GroupNorm(2, 4)
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.a(self.one(x))) + torch.relu(self.b(self.two(x))) + F.gelu(self.c(self.three(x)))

    result = normfuse.rewrite(spread(Groups()).eval(), "fold_affine", inputs=(noise(2, 4, 5, 5),))
    assert counts(result) == ({"group_norm": 3}, {"group_norm": 2})
