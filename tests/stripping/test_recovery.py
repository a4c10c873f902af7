"""Removal in training: what is switched when, and runs that are interrupted, resumed, too short, or diverge."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normfuse
from normfuse.errors import NormfuseError
from normfuse.nn.fake_layer_norm import PATHS, FakeLayerNorm
from normfuse.stripping import Diverged, Recovery, Schedule, attach, places
from normfuse.stripping.recovery import frozen, uniformity
from tests.stripping.models import KINDS, D, batches, gpt, next_token_loss, tokens

SCHEDULE = Schedule(2, 2, (1, 1, 2))  # mlp 2 3, main 4 5, values 6 8, final 10
STEPS = 14


class Training:
    """A model in training with its optimizer and its recovery."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.model = model.train()
        self.recovery = Recovery(model, SCHEDULE, (tokens(),), steps=STEPS, **options)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def run(self, begin: int, end: int) -> list[float]:
        losses = []
        for step, ids in batches(begin, end):
            self.recovery.begin(step)
            loss = self.recovery.loss(next_token_loss(self.model, ids))
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            self.optimizer.step()
            losses.append(loss.item())
        return losses

    def saved(self) -> bytes:
        file = io.BytesIO()
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


# -- where the norms are -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_values_are_found_whatever_the_spelling(kind: str) -> None:
    found = {place.path: place for place in places(gpt(kind), (tokens(),))}
    assert list(found) == ["blocks.0.ln_1", "blocks.0.ln_2", "blocks.1.ln_1", "blocks.1.ln_2", "final"]
    assert [place.attention for place in found.values()] == [True, False, True, False, False]
    readers = found["blocks.0.ln_1"].readers
    if kind == "functional":
        assert readers == ()
    elif kind == "three":
        assert [(each.path, each.columns) for each in readers] == [("blocks.0.attention.v_proj", None)]
    else:
        width, both = D // 2, range(2 * D, 3 * D)
        columns = [*range(2 * width, 3 * width), *range(5 * width, 6 * width)] if kind == "per head" else list(both)
        assert [(each.path, each.columns) for each in readers] == [("blocks.0.attention.qkv", tuple(columns))]


def test_a_norm_by_hand_is_replaced_if_it_computes_the_same() -> None:
    class Own(nn.Module):
        def __init__(self, wrong: bool) -> None:
            super().__init__()
            self.b, self.a, self.wrong = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.ones(D)), wrong

        def forward(self, x: Tensor) -> Tensor:
            y = (x - x.mean(-1, keepdim=True)) * (x.var(-1, unbiased=False, keepdim=True) + 1e-6).rsqrt() * self.a + self.b
            return y.clamp(max=1.5) if self.wrong else y

    model = gpt()
    model.final, model.blocks[0].ln_2 = Own(False), Own(True)
    found = {place.path: place for place in places(model, (tokens(),))}
    assert (found["final"].gain, found["final"].shift, found["final"].eps) == ("a", "b", 1e-6)
    assert "blocks.0.ln_2" not in found


@pytest.mark.parametrize("kind", KINDS)
def test_attaching_changes_nothing(kind: str) -> None:
    model = gpt(kind).eval()
    expected, parameters = model(tokens()), {id(each) for each in model.parameters()}
    attach(model, places(model, (tokens(),)))
    assert torch.equal(model(tokens()), expected)
    assert {id(each) for each in model.parameters()} == parameters


def test_a_shared_norm_is_one_norm() -> None:
    model = gpt()
    model.blocks[1].ln_2 = model.blocks[0].ln_2
    made = attach(model, places(model, (tokens(),)))
    assert model.blocks[1].ln_2 is model.blocks[0].ln_2 is made["blocks.0.ln_2"]


# -- what is switched --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fused", "three", "per head", "eager"])
@pytest.mark.parametrize("path", PATHS)
def test_the_two_paths_of_attention_go_separately(kind: str, path: str) -> None:
    """Against a model whose attention is given two norms by hand."""
    model = gpt(kind).double()
    expected = copy.deepcopy(model)
    made = attach(model, places(model, (tokens(),)))
    model.train()(tokens())
    norm = made["blocks.0.ln_1"]
    norm.remove(path)  # type: ignore[arg-type]
    block = expected.blocks[0]

    def fake(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / norm.sigma * block.ln_1.weight + block.ln_1.bias

    def two_ways(x: Tensor) -> Tensor:
        real, linear = block.ln_1(x), fake(x)
        main, values = (linear, real) if path == "main" else (real, linear)
        attention = block.attention
        (q, k, _), (_, _, v) = attention.made(main), attention.made(values)
        if kind == "eager":
            weights = (q @ k.transpose(-1, -2) / (D // 2) ** 0.5).softmax(-1)
            mixed = weights @ v
        else:
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + attention.out(mixed.transpose(1, 2).flatten(2))
        return x + block.down(torch.nn.functional.gelu(block.up(block.ln_2(x))))

    block.forward = two_ways  # type: ignore[method-assign]
    torch.testing.assert_close(model(tokens()), expected(tokens()), rtol=1e-12, atol=1e-12)


def test_the_schedule_is_followed() -> None:
    training = Training(gpt())
    seen: dict[int, set[tuple[str, str]]] = {}
    before: set[tuple[str, str]] = set()
    for step in range(STEPS):
        training.run(step, step + 1)
        now: set[tuple[str, str]] = {(path, each) for path, norm in training.recovery.norms.items() for each in norm.removed}
        if now - before:
            seen[step] = now - before
        before = now
    whole = {"blocks.0.ln_2", "blocks.1.ln_2", "final"}
    first = {step: {path for path, _ in what} for step, what in seen.items()}
    assert first == {
        2: {"blocks.0.ln_2"}, 3: {"blocks.1.ln_2"}, 4: {"blocks.0.ln_1"}, 5: {"blocks.1.ln_1"},
        6: {"blocks.0.ln_1"}, 8: {"blocks.1.ln_1"}, 10: {"final"},
    }  # fmt: skip
    assert seen[4] == {("blocks.0.ln_1", "main")}
    assert seen[6] == {("blocks.0.ln_1", "values")}
    assert all(len(what) == 2 for step, what in seen.items() if first[step] <= whole)
    assert training.recovery.is_complete
    assert frozen(training.model)


def test_sigma_is_the_running_mean_at_removal_and_then_stays() -> None:
    training = Training(gpt())
    norm, running = training.recovery.norms["final"], 0.0
    seen: list[Tensor] = []
    norm.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    training.run(0, 10)
    for x in seen:
        new = (x.var(-1, correction=0) + norm.eps).sqrt().mean().item()
        running = new if running == 0.0 else 0.9 * running + 0.1 * new
    training.run(10, STEPS)
    assert norm.sigma.item() == pytest.approx(running, rel=1e-5)


def test_evaluation_and_recomputation_do_not_move_sigma() -> None:
    model = gpt()
    made = attach(model, places(model, (tokens(),)))
    model.train()(tokens())
    before = {path: norm.running_sigma.clone() for path, norm in made.items()}
    model.eval()(tokens(5))
    assert all(torch.equal(norm.running_sigma, before[path]) for path, norm in made.items())
    model.train()
    plain, again = copy.deepcopy(model), model
    next_token_loss(plain, tokens(7)).backward()  # type: ignore[no-untyped-call]
    blocks = list(again.blocks)
    again.blocks = nn.ModuleList()
    x = again.table(tokens(7)) + again.positions(torch.arange(8))
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False)
    logits = again.head(again.final(x))
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens(7)[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
    for number, block in enumerate(blocks):
        assert torch.equal(block.ln_1.running_sigma, plain.blocks[number].ln_1.running_sigma)
        torch.testing.assert_close(block.ln_1.weight.grad, plain.blocks[number].ln_1.weight.grad)


def test_a_norm_that_was_never_measured_is_not_removed() -> None:
    with pytest.raises(RuntimeError, match="never measured"):
        FakeLayerNorm(4).remove()


def test_without_a_bias_it_is_centred_and_divided() -> None:
    norm = FakeLayerNorm(D, bias=False).train()
    x = 3.0 * torch.randn(2, 5, D) + 2.0
    norm(x)
    norm.remove()
    expected = (x - x.mean(-1, keepdim=True)) / norm.sigma  # its gain is one
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_centred_in_float32(dtype: torch.dtype) -> None:
    norm = FakeLayerNorm(D).train()
    x = (torch.randn(2, 5, D) + 30.0).to(dtype)
    norm.to(dtype)(x)
    norm.remove()
    wide = x.float()
    expected = (wide - wide.mean(-1, keepdim=True)) / norm.sigma.float()
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x), expected.to(dtype))


def test_the_first_token_has_a_sigma_of_its_own_until_it_is_taken_away() -> None:
    norm = FakeLayerNorm(D, first_token=True).train()
    x = torch.randn(3, 6, D)
    x[:, 0] *= 20.0
    norm(x)
    norm.remove()
    deviation = (x.var(-1, correction=0) + norm.eps).sqrt()
    torch.testing.assert_close(norm.sigma, deviation[:, 1:].mean())
    torch.testing.assert_close(norm.first_sigma, deviation[:, 0].mean())
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(norm(x)[:, 0], centred[:, 0] / norm.first_sigma)
    torch.testing.assert_close(norm(x)[:, 1:], centred[:, 1:] / norm.sigma)
    norm.remove_first()
    torch.testing.assert_close(norm(x), centred / norm.sigma)


def test_the_schedule_takes_the_first_token_away_last() -> None:
    model = gpt().train()
    recovery = Recovery(model, SCHEDULE, (tokens(),), steps=40, first_token=True)
    for step in range(22):
        recovery.begin(step)
        model(tokens(step))
    assert all(norm.first_token for norm in recovery.norms.values())
    assert not recovery.is_complete
    assert [event.kind for event in recovery.begin(22)] == ["first_token"]
    assert recovery.is_complete


# -- the auxiliary loss ------------------------------------------------------------------------------------------------


def test_the_auxiliary_loss_is_the_published_formula() -> None:
    training = Training(gpt(), auxiliary=0.3)
    model, ids = training.model, tokens(3)
    ends = ids == 5
    stream: list[Tensor] = []
    training.recovery.norms["final"].register_forward_pre_hook(lambda _, given: stream.append(given[0]))
    own = next_token_loss(model, ids)
    total = training.recovery.loss(own, ends)
    s = (stream[0].var(-1, correction=0) + 1e-5).sqrt()
    ordinary = ~ends
    ordinary[:, 0] = False
    expected = own + 0.3 * (s - s[ordinary].mean().detach()).square().mean()
    torch.testing.assert_close(total, expected)
    assert ends[:, 1:].any()


def test_the_target_has_no_gradient() -> None:
    x = torch.randn(2, 4, D, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(uniformity(x, 1e-5), x)
    s = (x.detach().var(-1, correction=0) + 1e-5).sqrt()
    target = s[:, 1:].mean()
    centred = x.detach() - x.detach().mean(-1, keepdim=True)
    expected = 2 * (s - target)[..., None] / s.numel() * centred / (D * s[..., None])
    torch.testing.assert_close(gradient, expected)


# -- runs that do not go as planned ------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, *(pytest.param(at, marks=pytest.mark.slow) for at in (3, 5, 9)), 7, 11])
@pytest.mark.parametrize("kind", ["fused", "three"])
def test_a_resumed_run_is_the_same_run(kind: str, at: int) -> None:
    whole = Training(gpt(kind))
    losses = whole.run(0, STEPS)
    first = Training(gpt(kind))
    before = first.run(0, at)
    second = Training(gpt(kind))
    second.load(first.saved())
    after = second.run(at, STEPS)
    assert before + after == losses
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


def test_a_checkpoint_goes_through_safetensors(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    first = Training(gpt())
    first.run(0, 5)
    save_file(first.model.state_dict(), tmp_path / "model.safetensors")
    second = Training(gpt())
    second.model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    for path, norm in first.recovery.norms.items():
        assert second.recovery.norms[path].removed == norm.removed
    assert torch.equal(second.model(tokens()), first.model(tokens()))


def test_a_run_that_diverges_is_stopped() -> None:
    training = Training(gpt())
    training.run(0, 4)
    with torch.no_grad():
        training.model.head.weight[0, 0] = float("nan")
    with pytest.raises(Diverged, match=r"the loss is nan at step 4, 0 steps after 'main' of layer 0") as caught:
        training.run(4, STEPS)
    assert "checkpoint" in str(caught.value.hint)


@pytest.mark.parametrize("steps", [1, 10, 11])
def test_data_shorter_than_the_schedule_are_refused_before_training(steps: int) -> None:
    model = gpt()
    with pytest.raises(NormfuseError, match="too few: the last removal is at step 10"):
        Recovery(model, SCHEDULE, (tokens(),), steps=steps)
    assert not any(isinstance(module, FakeLayerNorm) for module in model.modules())


def test_float16_parameters_are_refused() -> None:
    model = gpt().half()
    with pytest.raises(NormfuseError, match="float16"):
        Recovery(model, SCHEDULE, (tokens(),), steps=STEPS)
    assert not any(isinstance(module, FakeLayerNorm) for module in model.modules())


def test_a_model_without_layer_norm_is_refused() -> None:
    with pytest.raises(NormfuseError, match="no LayerNorm"):
        Recovery(nn.Linear(3, 3), SCHEDULE, (torch.zeros(2, 3),), steps=STEPS)


def test_something_between_norm_and_values_is_told() -> None:
    model = gpt()
    model.blocks[0].attention.qkv.register_forward_pre_hook(lambda _, given: (given[0] * 1.0,))
    found = places(gpt(), (tokens(),))  # as if nothing stood between
    made = attach(model, found)
    model.train()(tokens())
    made["blocks.0.ln_1"].remove("main")
    with pytest.raises(RuntimeError, match="remove both paths at once"):
        model(tokens())


def test_copies_and_torch_compile_follow_the_switches() -> None:
    training = Training(gpt())
    training.run(0, 5)
    twin = copy.deepcopy(training.model)
    assert torch.equal(twin(tokens()), training.model(tokens()))
    twin.blocks[0].ln_1.remove("values")
    assert not torch.equal(twin(tokens()), training.model(tokens()))
    training.run(5, STEPS)
    compiled = torch.compile(training.model.eval(), backend="aot_eager")
    torch.testing.assert_close(compiled(tokens()), training.model(tokens()))


def test_torch_encoders_take_no_fast_path_around_the_new_norms() -> None:
    layer = nn.TransformerEncoderLayer(D, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(D), enable_nested_tensor=False)
    x = torch.randn(3, 5, D)
    made = attach(model, places(model, (x,)))
    model.train()(x)
    for norm in made.values():
        norm.remove()
    with torch.no_grad():
        evaluated, trained = model.eval()(x), model.train()(x)
    torch.testing.assert_close(evaluated, trained)


def test_the_final_model_folds() -> None:
    training = Training(gpt())
    training.run(0, STEPS)
    result = normfuse.rewrite(training.model, "strip_layernorm", inputs=(tokens(),))
    assert sum(result.report.norms_after.values()) == 0
    assert not result.report.plan.refusals
