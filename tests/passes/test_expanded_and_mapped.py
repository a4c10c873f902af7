"""Values expanded along the features of a stream, and norms under `torch.vmap`: rewritten right, or left with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

import normfuse
from normfuse.graph.edits import Reroute
from normfuse.graph.expressions import Call, Ref
from normfuse.graph.findings import Claim, Rewrite
from normfuse.graph.program import Program
from normfuse.planning.planner import plan
from normfuse.planning.registry import Pass, find
from tests.models import noise, tokens
from tests.zoo.spread import spread

Meets = Callable[[Tensor, Tensor], Tensor]
EXPANDED: dict[str, Meets] = {
    "mul": lambda x, wide: x * wide,
    "mul, the other way": lambda x, wide: wide * x,
    "div": lambda x, wide: x / wide,
    "add": lambda x, wide: x + wide,
    "sub": lambda x, wide: wide - x,
    "where": lambda x, wide: torch.where(wide > 0.5, x, 0.0),
    "where of two": lambda x, wide: torch.where(wide > 0.5, x, 2.0 * x),
    "masked_fill": lambda x, wide: x.masked_fill(wide > 0.5, 0.0),
    "addcmul": lambda x, wide: torch.addcmul(x, x, wide),
    "lerp": lambda x, wide: torch.lerp(x, -x, wide),
    "clamp": lambda x, wide: torch.clamp(x, max=wide),
    "maximum": lambda x, wide: torch.maximum(x, wide.tanh() - 1.0),
    "pow": lambda x, wide: x.abs() ** wide,
    "comparison": lambda x, wide: x * (x < wide),
    "stored": lambda x, wide: x * torch.full_like(x, 0.5),
}


class Gated(nn.Module):
    def __init__(self, meets: Meets, d: int = 8) -> None:
        super().__init__()
        self.embed, self.head, self.meets = nn.Embedding(11, d), nn.Linear(d, 11), meets
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(3))
        self.ups = nn.ModuleList(nn.Linear(d, 2 * d) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(2 * d, d) for _ in range(2))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.meets(x, mask.unsqueeze(-1).expand_as(x))
        for norm, up, down in zip(self.norms[:2], self.ups, self.downs, strict=True):
            x = x + down(torch.relu(up(norm(x))))
        return self.head(self.norms[2](x))


@pytest.mark.parametrize("name", ["pre_rmsnorm", "pre_crmsnorm", "pre_crmsnorm_compressed"])
@pytest.mark.parametrize("how", sorted(EXPANDED))
def test_an_expanded_value_meets_a_stream(how: str, name: str) -> None:
    inputs = (tokens(), noise(2, 5).sigmoid() + 0.1)
    report = normfuse.rewrite(spread(Gated(EXPANDED[how])).eval(), name, inputs=inputs).report
    done = sum(len(each.sites) for each in report.plan.rewrites)
    assert done + len(report.plan.refusals) == 3
    assert "NF103" not in {each.code for each in report.plan.refusals}
    assert all(each.reason for each in report.plan.refusals)


Spelling = Callable[[Tensor, Tensor], Tensor]
SPELLINGS: dict[str, Spelling] = {
    "squeezed, then expanded": lambda mask, x: mask.unsqueeze(-1).unsqueeze(0).squeeze(0).expand(x.shape),
    "expanded, then squeezed": lambda mask, x: mask.unsqueeze(-1).expand_as(x).unsqueeze(0).squeeze(0),
    "expanded, then reshaped": lambda mask, x: mask.unsqueeze(-1).expand_as(x).reshape(-1, x.shape[-1]).view(x.shape),
    "expanded, then moved": lambda mask, x: mask.unsqueeze(0).expand(x.shape[-1], *mask.shape).permute(1, 2, 0),
    "expanded, then copied": lambda mask, x: mask.unsqueeze(-1).expand_as(x).clone().double().float(),
    "expanded, then cut": lambda mask, x: mask.unsqueeze(-1).expand(*mask.shape, 16)[..., : x.shape[-1]],
    "repeated": lambda mask, x: mask.unsqueeze(-1).repeat(1, 1, x.shape[-1]),
    "repeated each": lambda mask, x: mask.unsqueeze(-1).repeat_interleave(x.shape[-1], -1),
    "stacked": lambda mask, x: torch.stack([mask] * x.shape[-1], -1),
    "made of ones": lambda mask, x: torch.ones_like(x) * mask.unsqueeze(-1),
    "filled": lambda mask, x: torch.full(x.shape, 0.5),
    "computed": lambda mask, x: torch.sigmoid(-mask.unsqueeze(-1).expand_as(x)),
}


@pytest.mark.parametrize("how", ["mul", "where"])
@pytest.mark.parametrize("spelling", sorted(SPELLINGS))
def test_however_the_expanded_value_is_spelled(spelling: str, how: str) -> None:
    model = Gated(lambda x, wide: EXPANDED[how](x, SPELLINGS[spelling](wide[..., 0], x)))
    program = Program.from_exported(torch.export.export(spread(model).eval(), (tokens(), noise(2, 5).sigmoid() + 0.1)))
    for name in ("pre_crmsnorm", "pre_crmsnorm_compressed"):
        chosen = plan(program, [name])
        assert sum(len(each.sites) for each in chosen.rewrites) + len(chosen.refusals) == 3
        assert all(each.reason and each.code != "NF103" for each in chosen.refusals)
        chosen.apply(program)


class Mapped(nn.Module):
    """One model called for each of a batch."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(4, 5), norm, nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda each: self.head(self.norm(self.layer(each))))(x)


class Ensemble(nn.Module):
    """Several models in one, their tensors stacked."""

    def __init__(self, norm: Callable[[int], nn.Module], k: int = 3) -> None:
        super().__init__()
        models = [spread(nn.Sequential(nn.Linear(4, 6), norm(6), nn.Linear(6, 2))).eval() for _ in range(k)]
        params, buffers = stack_module_state(models)  # type: ignore[arg-type]
        self.base, self.names = [models[0].to("meta")], [list(params), list(buffers)]
        for place, value in enumerate(params.values()):
            self.register_parameter(f"p{place}", nn.Parameter(value.detach()))
        for place, value in enumerate(buffers.values()):
            self.register_buffer(f"b{place}", value)

    def forward(self, x: Tensor) -> Tensor:
        p, b = ({name: getattr(self, f"{kind}{at}") for at, name in enumerate(each)} for kind, each in zip("pb", self.names))  # noqa: B905
        return torch.vmap(lambda p, b: functional_call(self.base[0], (p, b), (x,)))(p, b)


MAPPED: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "batch norm": (lambda: Mapped(nn.BatchNorm1d(5)), noise(3, 2, 4)),
    "batch norm without affine": (lambda: Mapped(nn.BatchNorm1d(5, affine=False)), noise(3, 2, 4)),
    "layer norm": (lambda: Mapped(nn.LayerNorm(5)), noise(3, 2, 4)),
    "rms norm": (lambda: Mapped(nn.RMSNorm(5)), noise(3, 2, 4)),
    "ensemble of batch norms": (lambda: Ensemble(nn.BatchNorm1d), noise(5, 4)),
    "ensemble of layer norms": (lambda: Ensemble(nn.LayerNorm), noise(5, 4)),
}


@pytest.mark.parametrize("name", sorted(MAPPED))
def test_norms_under_vmap(name: str) -> None:
    build, x = MAPPED[name]
    model: Any = spread(build()).eval()
    result = normfuse.rewrite(model, "all", inputs=(x,))
    torch.testing.assert_close(result.module()(x), model(x), rtol=1e-4, atol=1e-5)
    before, after = result.report.norms_before, result.report.norms_after
    assert before != after or result.report.plan.refusals
    assert len(normfuse.inspect(model, inputs=(x,)).norms) == sum(before.values())


def test_a_rewrite_that_cannot_be_made_is_refused_and_the_others_are_made() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    program = Program.trace(spread(model).eval(), (noise(2, 3, 5, 5),))

    def propose(program: Program, facts: Any) -> Any:
        for each in find("conv_bn").propose(program, facts):
            if isinstance(each, Rewrite) and each.sites[0].module == "1":
                wrong = Reroute(each.sites[0].node, Call("mm.default", (Ref("conv2d"), Ref("conv2d"))))
                yield Rewrite(each.pass_name, each.sites, each.was, each.becomes, (wrong,), each.region, Claim.ROUNDING, "")
            else:
                yield each

    chosen = plan(program, [Pass("conv_bn", propose, find("conv_bn").manual)])
    assert [site.module for each in chosen.rewrites for site in each.sites] == ["4"]
    (refusal,) = chosen.refusals
    assert (refusal.site.module, refusal.code) == ("1", "NF103")
    assert "it cannot be made" in refusal.reason
