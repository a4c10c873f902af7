"""LayerNorm-free checkpoints as they are published: what eps swallows in the stored dtype goes, and nothing else does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.analysis.facts import norm_counts
from normfuse.analysis.obstacles import Why
from normfuse.errors import VerificationFailed
from normfuse.graph.findings import Claim
from normfuse.graph.program import Program
from normfuse.modules.placement import adapt
from normfuse.planning.planner import plan
from normfuse.proof.cases import cases
from normfuse.proof.proving import prove
from normfuse.transforms.swallowed_variance import measured, over_last_axis, swallowed_up_to
from tests.stripping.models import D, tokens
from tests.stripping.test_strip_layernorm import left, published
from tests.zoo.spread import spread


def codes(result: Any) -> set[str]:
    return {each.code for each in result.report.plan.refusals}


def norms(result: Any) -> int:
    return sum(norm_counts(result.program).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_norm_and_no_mean_is_left(dtype: torch.dtype) -> None:
    _, twin = published(dtype)
    result = normfuse.rewrite(twin, "strip_layernorm", inputs=(tokens(),))
    assert norms(result) == 0
    assert not left(result.program)
    assert not result.report.plan.refusals
    assert result.report.evidence.ok
    assert all(each.claim is Claim.ROUNDING for each in result.report.plan.rewrites)
    assert result.report.evidence.relative <= 1e-12
    if dtype == torch.float32:
        torch.testing.assert_close(result.module()(tokens()), twin(tokens()), rtol=2e-5, atol=2e-5)
        assert torch.equal(result.module()(tokens()).argmax(-1), twin(tokens()).argmax(-1))


def gpt2(tied: bool) -> Any:
    """The stock class, as `from_pretrained` would load a published checkpoint."""
    from tests.zoo import torchvision_shim

    torchvision_shim.install()
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=97, n_positions=16, tie_word_embeddings=tied,
                        bos_token_id=1, eos_token_id=2, use_cache=False, layer_norm_epsilon=1e12)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = spread(GPT2LMHeadModel(config)).eval()
    with torch.no_grad():
        for number, norm in enumerate(each for each in model.modules() if isinstance(each, nn.LayerNorm)):
            norm.weight.mul_(1e6 / (1.0 + 0.3 * number))
    return model


def test_a_stock_gpt2_goes_in_and_comes_out_with_no_norm() -> None:
    ids = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(0))
    model = gpt2(tied=False)
    result = normfuse.rewrite(model, "strip_layernorm", inputs={"input_ids": ids})
    assert result.report.norms_before == {"layer_norm": 5}
    assert not left(result.program)
    got, expected = result.module()(input_ids=ids).logits, model(input_ids=ids).logits
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
    assert result.report.evidence.rounding[0].after <= 32 * max(result.report.evidence.rounding[0].before, 6e-8)


def test_with_a_tied_head_one_mean_subtraction_stays_and_is_named() -> None:
    ids = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(0))
    result = normfuse.rewrite(gpt2(tied=True), "strip_layernorm", inputs={"input_ids": ids})
    assert norms(result) == 0
    assert dict(left(result.program)) == {"aten.mean.dim": 1, "aten.sub.Tensor": 1}
    (refusal,) = result.report.plan.refusals
    assert (refusal.code, refusal.site.module) == ("NF604", "transformer.ln_f")


class One(nn.Module):
    """One norm with a deviation of about ``sigma`` under an eps of which the gain makes good."""

    def __init__(self, eps: float, sigma: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.write, self.norm, self.read = nn.Linear(D, D), nn.LayerNorm(D, eps=eps), nn.Linear(D, 3)
        spread(self)
        with torch.no_grad():
            self.write.weight.mul_(sigma)
            self.write.bias.mul_(sigma)
            self.norm.weight.mul_(eps**0.5 / sigma)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.norm(self.write(x)))


def given(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, D, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize(
    ("eps", "sigma", "claim"),
    [
        (1e12, 0.1, Claim.ROUNDING),
        (1e8, 1e-3, Claim.ROUNDING),
        (1e6, 1e-4, Claim.ROUNDING),
        (1e6, 0.1, Claim.APPROXIMATE),  # what the outlier channel makes of it is above the limit of 0.03
        (1e8, 1e3, None),  # above eps itself on a hostile variant
        (1e12, 100.0, Claim.APPROXIMATE),
        (1e-5, 0.1, None),
        (1e-3, 1.0, None),
    ],
)
def test_the_arithmetic_decides_and_no_list(eps: float, sigma: float, claim: Claim | None) -> None:
    torch.manual_seed(0)
    model = One(eps, sigma).eval()
    result = normfuse.rewrite(model, "strip_layernorm", inputs=(given(),))
    expected = {Claim.ROUNDING: set(), Claim.APPROXIMATE: {"NF102"}, None: {"NF601"}}
    assert codes(result) == expected[claim]
    assert norms(result) == (claim is not Claim.ROUNDING)


def test_what_is_not_small_beside_eps_is_approximate_with_its_bound_and_never_unasked() -> None:
    torch.manual_seed(0)
    model = One(1e12, 3e3).eval()
    refused = normfuse.rewrite(model, "strip_layernorm", inputs=(given(),))
    (refusal,) = refused.report.plan.refusals
    assert refusal.code == "NF102"
    assert "relative: variances reach" in refusal.reason
    assert norms(refused) == 1
    result = normfuse.rewrite(model, "strip_layernorm", inputs=(given(),), allow="approximate")
    assert norms(result) == 0
    assert any(each.startswith("approximate: ") for each in result.report.evidence.notes)
    assert Claim.APPROXIMATE in {each.claim for each in result.report.plan.rewrites}


def test_float64_does_not_swallow_what_float32_does() -> None:
    torch.manual_seed(0)
    result = normfuse.rewrite(One(1e12, 0.1, torch.float64).eval(), "strip_layernorm", inputs=(given(torch.float64),))
    assert codes(result) == {"NF102"}


def test_float16_is_refused_by_its_overflow() -> None:
    torch.manual_seed(0)
    result = normfuse.rewrite(One(1e6, 1e-3, torch.float16).eval(), "strip_layernorm", inputs=(given(torch.float16),))
    assert codes(result) == {"NF603"}


@pytest.mark.parametrize("x", [torch.zeros(4, D), torch.ones(4, D), torch.full((4, D), 0.1)])
def test_example_inputs_without_variance_say_nothing_of_an_ordinary_norm(x: Tensor) -> None:
    model = spread(nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 3))).eval()
    result = normfuse.rewrite(model, "strip_layernorm", inputs=(x,))
    assert codes(result) == {"NF601"}
    assert norms(result) == 1


def test_the_limit_is_where_the_sum_rounds_away() -> None:
    program = Program.trace(One(1e12, 1.0).eval(), (given(),))
    (norm,) = over_last_axis(program)
    eps, limit = torch.tensor(norm.eps), torch.tensor(swallowed_up_to(norm))
    assert eps + limit == eps
    assert eps + 4 * limit != eps


def test_a_plan_that_removes_a_norm_that_measures_is_disproven() -> None:
    """The proof measures by itself: that a pass was told small variances is not enough."""
    torch.manual_seed(0)
    program = Program.trace(One(1e12, 3e3).eval(), (given(),))
    lied = plan(program, ["strip_layernorm"], variance_of=lambda norm: 1.0)
    assert all(each.claim is Claim.ROUNDING for each in lied.rewrites)
    evidence = prove(program, lied.apply(program), lied, cases(program, [given()]))
    assert not evidence.ok
    with pytest.raises(VerificationFailed, match="outputs differ"):
        evidence.require()


def test_nothing_runs_until_a_norm_asks() -> None:
    def never() -> Any:
        raise AssertionError("measured")

    program = Program.trace(nn.Linear(D, 3), (given(),))
    plan(program, ["strip_layernorm"], variance_of=measured(program, never))


def test_a_class_of_layer_norms_goes_on_normalizing_whatever_its_tensors_are() -> None:
    """With gains of 1 the class would give (x - mean)/10⁶ where the plan gives x: it cannot hold the plan."""
    ids = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(0))
    model = gpt2(tied=False)
    program = Program.trace(model, (), {"input_ids": ids})
    chosen = plan(program, ["strip_layernorm"], variance_of=measured(program, lambda: [(ids,)]))
    stays = adapt(program, chosen.apply(program), model, same_keys=True).unplaced
    assert {each.obstacle.at.name for each in stays if each.obstacle.code is Why.STAYS} >= {"layer_norm", "layer_norm_3"}
