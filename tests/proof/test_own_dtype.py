"""Operators without a float64 kernel, and operators that jump: proven all the same, and never excused by their own steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse.graph.edits import SetTensor
from normfuse.graph.interpreter import run
from normfuse.graph.program import Program
from normfuse.planning.planner import plan
from normfuse.proof.cases import Case
from normfuse.proof.proving import prove
from tests.zoo.spread import spread

X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


@torch.library.custom_op("normfuse_tests::sin32", mutates_args=())
def sin32(x: Tensor) -> Tensor:
    """A kernel for float32 alone."""
    if x.dtype != torch.float32:
        raise RuntimeError(f"expected float32, found {x.dtype}")
    return x.sin()


@torch.library.custom_op("normfuse_tests::narrowing", mutates_args=())
def narrowing(x: Tensor) -> Tensor:
    """A kernel that takes everything and answers in float32."""
    return x.float().cos()


@sin32.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@narrowing.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32)


def _per_channel(x: Tensor) -> Tensor:
    return torch.fake_quantize_per_channel_affine(x, torch.full((8,), 0.05), torch.zeros(8, dtype=torch.int32), 1, -128, 127)


def _quantized(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x, 0.05, 3, torch.qint8).dequantize()


def _bits(x: Tensor) -> Tensor:
    return x * (x.contiguous().view(torch.int32) >= 0)  # the sign bit


TAILS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "fake quantization per channel": (_per_channel, "fake_quantize_per_channel_affine"),
    "quantization": (_quantized, "quantize_per_tensor"),
    "custom operator": (sin32, "sin32"),
    "custom operator that narrows": (narrowing, "narrowing"),
    "bits": (_bits, "view.dtype"),
}
JUMPING: dict[str, Callable[[Tensor], Tensor]] = {
    "round": lambda x: (4 * x).round() / 4,
    "comparison": lambda x: x * (x > 0.3),
    "cast": lambda x: (8 * x).to(torch.int32).to(torch.float32),
    "argmax": lambda x: F.one_hot(x.argmax(1), 8).float().permute(0, 3, 1, 2) + x,
    "sorted": lambda x: x.topk(3, 1).values,
}


class Tailed(nn.Module):
    """A convolution and its BatchNorm before any function, and a linear layer behind."""

    def __init__(self, tail: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.tail = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), tail

    def forward(self, x: Tensor) -> Any:
        return self.tail(self.norm(self.conv(x))) * 1.5


class Weighted(nn.Module):
    """A weight in fake quantization per channel, as training for quantization has it."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.front, self.norm = nn.Conv2d(8, 4, 1), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.register_buffer("scale", self.conv.weight.detach().abs().amax((1, 2, 3)) / 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.front(x)).relu()
        zero = torch.zeros(4, dtype=torch.int32)
        return F.conv2d(x, torch.fake_quantize_per_channel_affine(self.conv.weight, self.scale, zero, 0, -8, 7))


def rewritten(model: nn.Module) -> dict[str, Any]:
    result = normfuse.rewrite(model, "conv_bn", inputs=(X,))
    data = result.report.to_dict()
    assert data["norms"] == {"before": {"batch_norm": 1}, "after": {}}
    assert data["evidence"]["ok"]
    return data


@pytest.mark.parametrize("name", TAILS)
def test_an_operator_without_float64_is_proven_and_named(name: str) -> None:
    tail, operator = TAILS[name]
    data = rewritten(spread(Tailed(tail)).eval())
    assert any(operator in note and "own dtype" in note for note in data["evidence"]["notes"])
    assert max(row["error"] for row in data["evidence"]["algebra"]) < 1e-9


def test_a_weight_in_fake_quantization_stays_in_it() -> None:
    model = spread(Weighted()).eval()
    rewritten(model)
    result = normfuse.rewrite(model, "conv_bn", inputs=(X,))
    assert torch.allclose(result.module()(X), model(X), atol=1e-4)


def test_models_prepared_for_quantization_are_proven() -> None:
    """torch.ao's own modules: observers and fake quantization of weights and activations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)).train()
        model[0].qconfig = get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
        prepared = prepare_qat(model)
        prepared(X)
        spread(prepared.eval())
        prepared.apply(torch.ao.quantization.disable_observer)
    rewritten(prepared)


@pytest.mark.parametrize("name", JUMPING)
def test_an_operator_that_jumps_is_no_false_alarm(name: str) -> None:
    assert "own dtype" not in str(rewritten(spread(Tailed(JUMPING[name])).eval())["evidence"]["notes"])


class Ties(nn.Module):
    """Every value lies on a tie of the rounding, or a rounding beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(self.layer(x)) * 10).round()


def tied() -> tuple[Ties, Tensor]:
    model = Ties().eval().double()
    with torch.no_grad():
        model.layer.weight.copy_(torch.eye(4))
        model.layer.bias.zero_()
        model.norm.running_var.fill_(0.37)  # type: ignore[union-attr]
        model.norm.weight.fill_((0.37 + model.norm.eps) ** 0.5)
    return model, torch.arange(-200, 200, dtype=torch.float64).reshape(100, 4) / 20


def test_a_tie_excuses_no_more_than_itself() -> None:
    """Both sides of a tie are right; all else has to agree to rounding."""
    model, x = tied()
    program = Program.trace(model, (x,))
    planned = plan(program, ["conv_bn"])
    evidence = prove(program, planned.apply(program), planned, [Case("as given", (x,))])
    assert all(row.ok for row in evidence.algebra)
    assert all(row.allowed < 1e-9 for row in evidence.algebra), "a whole step would be excused"


@pytest.mark.parametrize("tail", [*TAILS, *JUMPING])
def test_a_wrong_weight_shows_behind_any_of_them(tail: str) -> None:
    model = spread(Tailed(TAILS[tail][0] if tail in TAILS else JUMPING[tail])).eval()
    program = Program.trace(model, (X,))
    planned = plan(program, ["conv_bn"])
    (edit,) = [
        each for rewrite in planned.rewrites for each in rewrite.edits if isinstance(each, SetTensor) and "bias" in each.name
    ]
    broken = planned.without(edit)
    assert not prove(program, broken.apply(program), broken, [Case("as given", (X,))]).ok


def test_random_numbers_are_the_same_in_float64() -> None:
    class Drawing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            drawn = torch.randn_like(x) + torch.rand(x.shape) + torch.bernoulli(torch.full_like(x, 0.3))
            return F.dropout(x, 0.4, training=True) + drawn

    program = Program.trace(Drawing(), (X,))
    narrow, wide = (run(program, (X,), wide=wide)[0] for wide in (False, True))
    assert wide.dtype == torch.float64
    assert torch.allclose(narrow.double(), wide, atol=1e-5)
    assert not torch.allclose(run(program, (X,), seed=1)[0], narrow)


def test_an_error_of_the_model_is_its_own() -> None:
    table = nn.Embedding(4, 8)
    program = Program.trace(table, (torch.tensor([1, 2]),))
    with pytest.raises(IndexError):
        run(program, (torch.tensor([1, 9]),), wide=True)
