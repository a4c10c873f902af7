"""Running statistics from data: exact where they can be, mixed when asked, and nothing else moves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.nn import (
    IBN,
    BatchChannelNorm,
    EstimatedBatchNorm,
    EvoNormB0,
    PowerNorm,
    PRepBN,
    RepBN,
    UnifiedNorm,
    recalibrate,
)

C = 4


def batches(*shape: int) -> list[Tensor]:
    """Of different sizes and means."""
    return [torch.randn(n, *shape, dtype=torch.float64) * (i + 1) + i for i, n in enumerate((5, 2, 9))]


def whole(data: list[Tensor], axis: int) -> Tensor:
    """All tokens of all batches, as (tokens, channels)."""
    return torch.cat([x.movedim(axis, -1).flatten(0, -2) for x in data])


def test_statistics_are_those_of_all_data() -> None:
    last, second = batches(3, C), batches(C, 3, 3)
    f64: dict[str, Any] = {"dtype": torch.float64}
    tokens, pixels = whole(last, -1), whole(second, 1)
    scaled = (tokens.reshape(-1, 2, 2) / (tokens.reshape(-1, 2, 2).square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(1)
    rep, un, power = RepBN(C, **f64), UnifiedNorm(C, **f64), PowerNorm(C, num_groups=2, **f64)
    plain, bcn, evo = nn.BatchNorm2d(C, **f64), BatchChannelNorm(C, 2, **f64), EvoNormB0(C, **f64)
    estimated, ibn = EstimatedBatchNorm(C, 0.1, **f64), IBN(C, **f64)
    cases: list[tuple[nn.Module, list[Tensor], Any, Tensor]] = [
        (rep, last, rep.bn.running_mean, tokens.mean(0)),
        (rep, last, rep.bn.running_var, tokens.var(0)),
        (un, last, un.running_var, tokens.square().mean(0)),
        (power, last, power.running_phi.flatten(), scaled.square().mean(0)),
        (plain, second, plain.running_mean, pixels.mean(0)),
        (plain, second, plain.running_var, pixels.var(0)),
        (bcn, second, bcn.bn.running_var, pixels.var(0)),
        (evo, second, evo.running_var, pixels.var(0)),
        (estimated, second, estimated.running_var, pixels.var(0)),
        (ibn, second, ibn.BN.running_mean, pixels.mean(0)[2:]),
    ]
    for module, data, ours, exact in cases:
        assert recalibrate(module, data) is module
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def test_alpha_mixes_source_and_target() -> None:
    norm = nn.BatchNorm1d(C, dtype=torch.float64)
    source = [nn.init.uniform_(buffer) for buffer in (norm.running_mean, norm.running_var) if buffer is not None]
    old_mean, old_variance = (buffer.clone() for buffer in source)
    data = batches(C)
    recalibrate(norm, data, alpha=0.1)
    tokens = whole(data, 1)
    torch.testing.assert_close(norm.running_mean, 0.9 * old_mean + 0.1 * tokens.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.running_var, 0.9 * old_variance + 0.1 * tokens.var(0), rtol=1e-12, atol=1e-12)
    recalibrate(norm, data, alpha=0.0)
    torch.testing.assert_close(norm.running_mean, 0.9 * old_mean + 0.1 * tokens.mean(0), rtol=1e-12, atol=1e-12)


def test_one_batch_makes_eval_what_training_saw() -> None:
    """SLAB's phase, deep: every BatchNorm works with the batch, so with a single batch all of them agree in the end."""
    parts = [nn.Linear(C, C), RepBN(C), nn.ReLU(), nn.Linear(C, C), PRepBN(C, total=0), nn.Linear(C, C), nn.BatchNorm1d(C)]
    model = nn.Sequential(*parts).double()
    x = torch.randn(4000, C, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
    recalibrate(model, [x])
    torch.testing.assert_close(model.eval()(x), expected, rtol=2e-3, atol=2e-3)  # the stored variance is the unbiased one


def test_nothing_else_moves() -> None:
    model = nn.Sequential(nn.Linear(C, C), UnifiedNorm(C), nn.Dropout(), nn.BatchNorm1d(C), nn.LayerNorm(C), PRepBN(C)).double()
    model[3].eval()
    moving = {"1.running_var", "3.running_mean", "3.running_var", "5.norm2.bn.running_mean", "5.norm2.bn.running_var"}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    recalibrate(model, batches(C))
    assert [module.training for module in model] == [True, True, True, False, True, True]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}
    assert changed == moving
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_shared_norms_and_unreached_ones() -> None:
    shared, unreached = nn.BatchNorm1d(C, dtype=torch.float64), nn.BatchNorm1d(C)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unreached = shared, shared, unreached

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.cat([self.a(x), self.b(y)])

    one, two = torch.randn(2, 6, C, dtype=torch.float64)
    recalibrate(Twice(), [{"x": one, "y": two}])
    torch.testing.assert_close(shared.running_mean, torch.cat([one, two]).mean(0), rtol=1e-12, atol=1e-12)
    assert torch.equal(unreached.running_var if unreached.running_var is not None else torch.zeros(C), torch.ones(C))


def test_batches_come_in_every_form() -> None:
    x = torch.randn(6, C)
    for batch in (x, (x, torch.zeros(6)), [x], {"input": x}):
        norm = recalibrate(nn.BatchNorm1d(C), iter([batch]))
        torch.testing.assert_close(norm.running_mean, x.mean(0))
    norm = recalibrate(nn.BatchNorm1d(C), [("id", x)], call=lambda model, batch: model(batch[1]))
    torch.testing.assert_close(norm.running_mean, x.mean(0))


def test_padding_is_left_out() -> None:
    norm, x = UnifiedNorm(C), torch.randn(2, 5, C)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 2:] = True
    recalibrate(norm, [{"x": x, "pad_mask": mask}])
    torch.testing.assert_close(norm.running_var, x[~mask].square().mean(0))


def fails() -> Iterator[Tensor]:
    yield torch.randn(4, C)
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "empty"),
        ([torch.randn(1, C)], ValueError, "single value"),
        ([torch.full((3, C), torch.nan)], ValueError, "'1' saw an inf or nan"),
        (fails(), OSError, "disk"),
    ],
)
def test_what_goes_wrong_leaves_the_model_as_it_was(data: Any, error: type[Exception], message: str) -> None:
    model = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        recalibrate(model, data)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_measured_is_said() -> None:
    for model in (nn.LayerNorm(C), nn.BatchNorm1d(C, track_running_stats=False)):
        with pytest.raises(ValueError, match="no module"):
            recalibrate(model, [torch.randn(3, C)])
    with pytest.raises(ValueError, match="share"):
        recalibrate(nn.BatchNorm1d(C), [], alpha=1.5)
