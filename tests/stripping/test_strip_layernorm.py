"""The pass: stored deviations fold until no norm and no mean-subtraction is left, or the report says why one stays."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.errors import NormfuseError
from normfuse.exporters.onnxruntime import fused_ops
from normfuse.graph.findings import Claim
from normfuse.graph.program import Program
from normfuse.nn.fake_layer_norm import FakeLayerNorm
from normfuse.passes.strip_layernorm import with_sigmas
from normfuse.planning.planner import plan
from normfuse.planning.registry import Pass
from normfuse.stripping.removal import TooCostly
from tests.float64 import error_in_float64
from tests.stripping.models import KINDS, D, gpt, removed, tokens
from tests.zoo.spread import spread


def operators(program: Program) -> Counter[str]:
    """The operators that give floats; masks and positions are integers."""
    calls = (node for node in program.graph.nodes if node.op == "call_function" and "val" in node.meta)
    return Counter(str(node.target) for node in calls if getattr(node.meta["val"], "is_floating_point", lambda: False)())


def left(program: Program) -> Counter[str]:
    """Norms, means and subtractions that are left."""
    words = ("norm", "mean", "sub.", "var", "sqrt", "div")
    return Counter({name: count for name, count in operators(program).items() if any(word in name for word in words)})


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left(kind: str) -> None:
    model = removed(gpt(kind, bias=kind != "three"), tokens())
    result = normfuse.rewrite(model, "strip_layernorm", inputs=(tokens(),))
    found = left(result.program)
    found.pop("aten.div.Tensor", None)  # of the attention's own
    assert not found
    assert not result.report.plan.refusals
    torch.testing.assert_close(result.module()(tokens()), model(tokens()), rtol=1e-4, atol=1e-4)
    assert error_in_float64(model, (tokens(),), "strip_layernorm") <= 1e-14


def test_it_becomes_plain_layers_with_biases_where_there_were_none() -> None:
    model = removed(gpt(), tokens())
    model.blocks[0].up = nn.Linear(D, 2 * D, bias=False)
    spread(model.blocks[0].up)
    result = normfuse.rewrite(model, "strip_layernorm", inputs=(tokens(),))
    state = result.program.exported.state_dict
    weight, norm = model.blocks[0].up.weight.double(), model.blocks[0].ln_2
    folded = weight * (norm.weight.double() / norm.sigma.double())
    folded = folded - folded.mean(1, keepdim=True)
    torch.testing.assert_close(state["blocks.0.up.weight"], folded.float())
    torch.testing.assert_close(state["blocks.0.up.bias"], (weight @ norm.bias.double()).float())


def test_a_tied_head_keeps_its_norm_as_arithmetic_and_says_so() -> None:
    model = removed(gpt(tied=True), tokens())
    result = normfuse.rewrite(model, "strip_layernorm", inputs=(tokens(),))
    assert left(result.program) == Counter({"aten.mean.dim": 1, "aten.sub.Tensor": 1})
    (refusal,) = result.report.plan.refusals
    assert (refusal.code, refusal.site.module) == ("NF604", "final")
    assert result.report.evidence.ok


class Gated(nn.Module):
    """Readers that are no layers: the norms cannot be folded into them, but what writes the stream can be centred."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.one, self.two = nn.Linear(D, D), nn.LayerNorm(D), nn.LayerNorm(D)
        self.more, self.head = nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.write(x)
        x = x + self.more(torch.tanh(self.one(x)))
        return self.head(torch.tanh(self.two(x)))


def test_where_readers_cannot_the_writers_are_centred() -> None:
    x = torch.randn(3, 5, D)
    model = removed(spread(Gated()), x)
    result = normfuse.rewrite(model, "strip_layernorm", inputs=(x,))
    assert not left(result.program)
    assert result.report.evidence.relative <= 1e-12
    assert "what writes its input is centred" in str([each.because for each in result.report.plan.rewrites])
    torch.testing.assert_close(result.module()(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_shared_weight_is_not_changed() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.norm(x)) + self.layer(x)

    x = torch.randn(3, 5, D)
    model = removed(spread(Twice()), x)
    result = normfuse.rewrite(model, "strip_layernorm", inputs=(x,))
    assert torch.equal(result.program.exported.state_dict["layer.weight"], model.layer.weight)
    assert [each.code for each in result.report.plan.refusals] == ["NF604"]
    torch.testing.assert_close(result.module()(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_first_token_of_its_own_is_no_weight_fold() -> None:
    model = removed(gpt(), tokens(), first_token=True)
    result = normfuse.rewrite(model, "strip_layernorm", inputs=(tokens(),))
    torch.testing.assert_close(result.module()(tokens()), model(tokens()), rtol=1e-4, atol=1e-4)
    assert operators(result.program)["aten.mean.dim"] == 5
    for norm in model.modules():
        if isinstance(norm, FakeLayerNorm):
            norm.remove_first()
    assert not left(normfuse.rewrite(model, "strip_layernorm", inputs=(tokens(),)).program)


def test_a_norm_that_measures_is_refused() -> None:
    result = normfuse.rewrite(gpt(), "strip_layernorm", inputs=(tokens(),))
    assert {each.code for each in result.report.plan.refusals} == {"NF601"}
    assert not list(result.report.plan.rewrites)


def test_a_norm_without_gain_folds() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(D, elementwise_affine=False), nn.Linear(D, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(x))

    x = torch.randn(3, 5, D) + 1.0
    model = removed(spread(Plain()), x)
    assert not left(normfuse.rewrite(model, "strip_layernorm", inputs=(x,)).program)


def test_hugging_face_gpt2_folds_into_its_conv1d() -> None:
    from tests.zoo import torchvision_shim

    torchvision_shim.install()
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=97, n_positions=16, tie_word_embeddings=False,
                        bos_token_id=1, eos_token_id=2, use_cache=False)  # fmt: skip
    ids = torch.randint(0, 97, (2, 16))
    model = removed(spread(GPT2LMHeadModel(config)), ids)
    result = normfuse.rewrite(model, "strip_layernorm", inputs={"input_ids": ids})
    assert not left(result.program)
    assert result.report.evidence.relative <= 1e-12


class Image(nn.Module):
    """A norm over the channels before a padding convolution: the mean goes through the zeros, the shift does not."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.norm, self.conv, self.head = nn.LayerNorm(D), nn.Conv2d(D, D, 3, padding=1, groups=groups), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize(("groups", "means"), [(1, 0), (4, 1)])
def test_convolutions_take_the_mean_unless_they_are_grouped(groups: int, means: int) -> None:
    x = torch.randn(2, D, 12, 12) + 1.0
    model = removed(spread(Image(groups)), x)
    result = normfuse.rewrite(model, "strip_layernorm", inputs=(x,))
    over_channels = [each for each in result.program.graph.nodes if "mean.dim" in str(each.target) and each.args[1] != [2, 3]]
    assert len(over_channels) == means
    assert result.report.evidence.ok
    torch.testing.assert_close(result.module()(x), model(x), rtol=1e-4, atol=1e-4)


class Squared(nn.Module):
    """As many tokens as features, so that v @ v reads v along both axes, and a residual stream that is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.read = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.write(x)
        v = x - x.mean(-1, keepdim=True)
        return self.read(v @ v), x


def test_a_value_that_is_read_in_two_ways_keeps_its_mean_subtraction() -> None:
    x = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1))
    program = Program.trace(Squared().eval(), (x,))
    assert not list(plan(program, ["strip_layernorm"]).rewrites)


def test_one_norm_for_several_readers_and_tokens_that_are_picked() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.one, self.two = nn.LayerNorm(D, bias=False), nn.Linear(D, 3), nn.Linear(D, 5, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.norm(x)
            return self.one(y[:, 0]), self.two(y.mean(1))

    x = torch.randn(3, 5, D) + 2.0
    model = removed(spread(Several()), x)
    result = normfuse.rewrite(model, "strip_layernorm", inputs=(x,))
    assert not result.report.plan.refusals
    assert not [each for each in result.program.graph.nodes if "sub." in str(each.target)]
    assert result.report.evidence.relative <= 1e-12


# -- approximate: never unasked ----------------------------------------------------------------------------------------


def test_a_calibrated_deviation_never_runs_unasked() -> None:
    program = Program.trace(gpt().eval(), (tokens(),))
    (node, *_) = [node.name for node in program.graph.nodes if "layer_norm" in str(node.target)]
    removal = Pass("strip_layernorm", with_sigmas({node: 1.5}, {node: "told"}), "")
    refused = plan(program, [removal])
    assert [each.code for each in refused.refusals] == ["NF102"]
    assert not list(refused.rewrites)
    (rewrite,) = plan(program, [removal], allow=Claim.APPROXIMATE).rewrites
    assert rewrite.claim is Claim.APPROXIMATE


def published(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A LayerNorm-free model and the same one as its authors publish it: an eps of 1e12, gains 1e6/σ times as large."""
    model = removed(gpt(), tokens())
    twin = gpt()
    for path, norm in ((path, each) for path, each in model.named_modules() if isinstance(each, FakeLayerNorm)):
        plain = twin.get_submodule(path)
        plain.eps = 1e12
        with torch.no_grad():
            assert norm.weight is not None
            plain.weight.copy_(norm.weight * 1e6 / norm.sigma)
            plain.bias.copy_(norm.bias)
    return model, twin.to(dtype).eval()


def test_the_published_format_is_read() -> None:
    model, twin = published()
    torch.testing.assert_close(twin(tokens()), model(tokens()), rtol=1e-4, atol=1e-4)
    refused = normfuse.rewrite(twin, "strip_layernorm", inputs=(tokens(),), verify="structure")  # nothing runs
    assert {each.code for each in refused.report.plan.refusals} == {"NF602"}
    stripped = normfuse.strip(twin, [tokens(seed) for seed in range(3)], max_loss_increase=1e-4)
    assert not left(stripped.program)
    assert len(stripped.report.removed) == 5
    assert abs(stripped.report.quality.increase) < 1e-6
    torch.testing.assert_close(stripped.module()(tokens()), model(tokens()), rtol=1e-4, atol=1e-4)


def test_a_published_checkpoint_that_is_worse_than_the_bound_is_told() -> None:
    _, twin = published()
    with pytest.raises(TooCostly, match="the loss rises by") as caught:
        normfuse.strip(twin, [tokens()], max_loss_increase=-1e9, verify="structure")
    assert caught.value.exit_code == 1
    assert caught.value.report.to_dict()["removed"] == 5


def test_the_published_format_in_float16_is_refused() -> None:
    _, twin = published(torch.float16)
    assert not torch.isfinite(twin(tokens())).all()
    result = normfuse.rewrite(twin, "strip_layernorm", inputs=(tokens(),), verify="structure")
    assert {each.code for each in result.report.plan.refusals} == {"NF603"}
    with pytest.raises(NormfuseError, match="overflows float16"):
        normfuse.strip(twin, [tokens()], max_loss_increase=1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_folds_in_float64_and_rounds_once(dtype: torch.dtype) -> None:
    model = removed(gpt(), tokens()).to(dtype)
    result = normfuse.rewrite(model, "strip_layernorm", inputs=(tokens(),))
    assert not left(result.program)
    assert result.report.evidence.ok
    assert result.program.exported.state_dict["head.weight"].dtype == dtype


def test_the_exported_onnx_has_no_norm_and_no_mean(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = removed(gpt(), tokens())
    result = normfuse.rewrite(model, "strip_layernorm", inputs=(tokens(),))
    evidence = normfuse.export(result, tmp_path / "free.onnx")
    assert evidence.ok
    kinds = fused_ops(tmp_path / "free.onnx")  # what really runs: attention's √d is a number by then
    assert not [kind for kind in kinds if "Norm" in kind or "Mean" in kind or kind in ("Sub", "Sqrt")]
    before = normfuse.export(model, tmp_path / "fake.onnx", inputs=(tokens(),))
    assert before.ok
    assert Counter(node.op_type for node in onnx.load(tmp_path / "fake.onnx").graph.node)["ReduceMean"] == 5
