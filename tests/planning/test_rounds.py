"""Later rounds of a plan know what earlier ones inserted, and speak of the user's model."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.analysis.facts import analyze
from normfuse.graph.program import Program


class Gated(nn.Module):
    """A pre-norm stream: two blocks, a gate that depends on the data, two more blocks."""

    def __init__(self, *, raw_head: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.pre = nn.Linear(8, 16), nn.LayerNorm(16)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(4))
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.gate, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        self.raw_head = raw_head
        for name, parameter in self.named_parameters():
            if "norms" in name or "pre" in name:
                nn.init.normal_(parameter, float(name.endswith("weight")), 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre(self.embed(x))
        x = x + self.blocks[0](self.norms[0](x))
        y = self.norms[1](x)
        x = x + torch.sigmoid(self.gate(y)) * self.blocks[1](y)
        x = x + self.blocks[2](self.norms[2](x))
        out: Tensor = self.head(self.norms[3](x))
        return out + self.head(x) if self.raw_head else out


X = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("passes", [["pre_rmsnorm"], "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_inserted_mean_subtraction_sees_no_mean(passes: str | list[str], dtype: torch.dtype) -> None:
    result = normfuse.rewrite(Gated().to(dtype).eval(), passes, inputs=(X.to(dtype),))
    assert result.report.norms_after == {"rms_norm": 5}


class Shifted(nn.Module):
    """The user's own x - mean x, and a reader of the mean itself where asked for."""

    def __init__(self, *, tells: bool) -> None:
        super().__init__()
        self.tells = tells

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        centred = torch.relu(x - mean)
        return centred + mean.tanh() if self.tells else centred


@pytest.mark.parametrize("tells", [False, True])
def test_a_mean_that_somebody_else_reads_is_seen(tells: bool) -> None:
    program = Program.trace(Shifted(tells=tells), (X,))
    value = program.nodes["x"]
    assert (2 in analyze(program).unseen[value]) is not tells


@pytest.mark.parametrize("raw_head", [False, True])
@pytest.mark.parametrize("passes", ["all", ["pre_rmsnorm", "fold_affine"], ["pre_crmsnorm", "strip_layernorm"]])
def test_refusals_name_nodes_of_the_users_model(passes: str | list[str], raw_head: bool) -> None:
    model = Gated(raw_head=raw_head).eval()
    own = {*Program.trace(model, (X,)).nodes, *dict(model.named_modules()), *dict(model.named_parameters())}
    for refusal in normfuse.rewrite(model, passes, inputs=(X,), verify="structure").report.plan.refusals:
        named = {site.node for site in (refusal.site, refusal.at) if site is not None}
        named |= {each for each in re.findall(r"'([a-z_0-9]+)'", refusal.reason) if "." not in each}
        assert named <= own, refusal
