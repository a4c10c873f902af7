"""RepBN and PRepBN against §3.2 of the reference."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normfuse.nn import PRepBN, RepBN, step

C = 4


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, C, dtype=torch.float64) * 2 + 1


def ready(norm: RepBN) -> RepBN:
    """With a gain, a shift, an α and statistics that all matter."""
    nn.init.uniform_(norm.bn.weight, 0.5, 2)
    nn.init.normal_(norm.bn.bias)
    nn.init.constant_(norm.alpha, 0.7)
    for _ in range(3):
        norm.train()(tokens(3, 5))
    return norm


# ---- RepBN


@pytest.mark.parametrize("shape", [(6,), (3, 5), (2, 3, 4)])
def test_formula(shape: tuple[int, ...]) -> None:
    norm = ready(RepBN(C, dtype=torch.float64))
    x = tokens(*shape)
    flat = x.reshape(-1, C)
    expected = (flat - flat.mean(0)) / torch.sqrt(flat.var(0, correction=0) + 1e-5) * norm.bn.weight + norm.bn.bias
    torch.testing.assert_close(norm(x), expected.reshape(x.shape) + 0.7 * x, rtol=1e-12, atol=1e-12)

    norm.eval()
    mean, variance = norm.bn.get_buffer("running_mean"), norm.bn.get_buffer("running_var")
    deviation = torch.sqrt(variance + 1e-5)
    scale = norm.bn.weight / deviation + norm.alpha
    shift = norm.bn.bias - norm.bn.weight * mean / deviation
    torch.testing.assert_close(norm(x), x * scale + shift, rtol=1e-12, atol=1e-12)


def test_statistics_are_batch_norm_s() -> None:
    norm, plain = RepBN(C, dtype=torch.float64), nn.BatchNorm1d(C, dtype=torch.float64)
    for _ in range(3):
        x = tokens(3, 5)
        norm(x)
        plain(x.transpose(1, 2))
    for name, value in plain.named_buffers():
        assert torch.equal(getattr(norm.bn, name), value)


def test_padding_counts_for_nothing() -> None:
    norm, plain = RepBN(C, alpha=0.5, dtype=torch.float64), nn.BatchNorm1d(C, dtype=torch.float64)
    x = tokens(2, 5)
    mask = torch.tensor([[False] * 5, [False, False, True, True, True]])
    y = norm(x, mask)
    torch.testing.assert_close(y[~mask], plain(x[~mask]) + 0.5 * x[~mask])
    torch.testing.assert_close(y[mask], 1.5 * x[mask])
    assert torch.equal(norm.bn.get_buffer("running_var"), plain.get_buffer("running_var"))
    assert torch.equal(norm.eval()(x, mask), norm(x))
    with pytest.raises(ValueError, match="pad_mask"):
        norm.train()(x, mask[:1])


def test_zero_init_starts_as_nothing() -> None:
    assert torch.equal(RepBN(C, alpha=0.0, zero_init=True)(torch.randn(3, 5, C)), torch.zeros(3, 5, C))


def test_names_of_published_checkpoints() -> None:
    assert RepBN(C).alpha.shape == (1,)
    inner = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    rep = {"alpha", *(f"bn.{name}" for name in inner)}
    assert set(RepBN(C).state_dict()) == rep
    whole = {"warm", "iter", "total_step", "norm1.weight", "norm1.bias", *(f"norm2.{name}" for name in rep)}
    state = PRepBN(C).state_dict()
    assert set(state) == whole
    assert all(state[name].shape == () and state[name].dtype == torch.long for name in ("warm", "iter", "total_step"))


@pytest.mark.parametrize("x", [torch.zeros(3, 5), torch.zeros(3, C, 5), torch.zeros(C)])
def test_wrong_shapes(x: Tensor) -> None:
    with pytest.raises(ValueError, match="channels last"):
        RepBN(C)(x)


def test_a_single_value_has_no_variance() -> None:
    with pytest.raises(ValueError, match="more than 1 value"):
        RepBN(C)(torch.randn(1, C))


# ---- PRepBN


def shares(norm: PRepBN, calls: int, x: Tensor, after: Callable[[], None] = lambda: None) -> list[float]:
    """λ of some calls, solved from their outputs; 1 where the output is LN's own and BN did not run."""
    found = []
    for _ in range(calls):
        before, seen = norm.norm1(x), int(norm.norm2.bn.num_batches_tracked or 0)
        y = norm(x)
        rep = copy.deepcopy(norm.norm2)(x)
        found.append(float(((y - rep) / (before - rep)).mean().detach()))
        torch.testing.assert_close(y, found[-1] * before + (1 - found[-1]) * rep, rtol=1e-9, atol=1e-9)
        ran = int(norm.norm2.bn.num_batches_tracked or 0) > seen
        assert ran or found[-1] == pytest.approx(1)
        after()
    return found


@pytest.mark.parametrize("schedule", ["forward", "step"])
@pytest.mark.parametrize("r0", [1.0, 0.5])
def test_shares_and_warm_up(schedule: Any, r0: float) -> None:
    norm = PRepBN(C, warmup=2, total=4, r0=r0, schedule=schedule, dtype=torch.float64)
    found = shares(norm, 8, tokens(3, 5), norm.step if schedule == "step" else lambda: None)
    assert found == pytest.approx([1, 1, r0, r0 * 0.75, r0 * 0.5, r0 * 0.25, 0, 0], abs=1e-9)
    assert int(norm.norm2.bn.num_batches_tracked or 0) == 6  # not run while warming up
    assert (int(norm.warm), int(norm.iter), int(norm.total_step)) == (0, 0, 4)


def test_forward_schedule_counts_calls_and_step_schedule_steps() -> None:
    x = tokens(3, 5)
    by_call, by_step = (PRepBN(C, total=10, schedule=schedule, dtype=torch.float64) for schedule in ("forward", "step"))
    for _ in range(3):
        by_call(x)
        assert len(set(shares(by_step, 2, x))) == 1
        by_step(x)
        step(nn.ModuleList([by_call, by_step]))
    assert int(by_call.iter) == int(by_step.iter) == 7
    assert by_step.share == pytest.approx(0.7)
    with pytest.raises(RuntimeError, match="schedule='step'"):
        by_call.step()


def test_total_zero_is_repbn_from_the_start() -> None:
    norm = PRepBN(C, total=0, dtype=torch.float64)
    x = tokens(3, 5)
    assert torch.equal(norm(x), copy.deepcopy(norm.norm2)(x))
    assert norm.ready_to_deploy


def test_eval_is_repbn_whatever_the_share_and_counts_nothing() -> None:
    norm = PRepBN(C, warmup=1, total=3, dtype=torch.float64)
    x = tokens(3, 5)
    for _ in range(6):
        norm.eval()
        state = {name: value.clone() for name, value in norm.state_dict().items()}
        assert torch.equal(norm(x), norm.norm2(x))
        assert all(torch.equal(value, state[name]) for name, value in norm.state_dict().items())
        norm.train()(x)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("schedule", ["forward", "step"])
def test_checkpointing_counts_once(reentrant: bool, schedule: Any) -> None:
    plain = nn.Sequential(PRepBN(C, warmup=2, total=9, schedule=schedule), nn.Dropout(0.2), nn.Linear(C, C)).double()
    saving = copy.deepcopy(plain)
    for batch in torch.randn(5, 2, 3, 5, C, dtype=torch.float64):
        for model in (plain, saving):
            torch.manual_seed(1)
            parts = [part.clone().requires_grad_() for part in batch]
            outputs = [model(x) if model is plain else checkpoint(model, x, use_reentrant=reentrant) for x in parts]
            torch.stack(outputs).square().sum().backward()
            step(model)
        for (name, ours), theirs in zip(saving.named_buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13, msg=name)
        for (name, mine), yours in zip(saving.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, yours.grad, rtol=1e-12, atol=1e-12, msg=name)


def export(norm: nn.Module, strict: bool = False) -> Any:
    return torch.export.export(norm.eval(), (torch.randn(3, 5, C),), strict=strict)


@pytest.mark.parametrize("strict", [False, True])
def test_export_is_refused_before_the_share_is_zero(strict: bool) -> None:
    norm = PRepBN(C, warmup=1, total=2)
    x = torch.randn(3, 5, C)
    for _ in range(3):
        assert not norm.ready_to_deploy
        with pytest.raises(Exception) as caught:  # dynamo wraps it in an error of its own
            export(norm, strict)
        assert strict or isinstance(caught.value, RuntimeError)
        assert strict or "not ready to deploy" in str(caught.value)
        with pytest.raises(RuntimeError, match="until λ is 0"):
            norm.check_deployable()
        norm.eval()(x)  # evaluating is allowed
        norm.train()(x)
    assert norm.ready_to_deploy
    norm.eval().check_deployable()
    torch.testing.assert_close(export(norm, strict).module()(x), norm(x), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_exporters_are_refused_as_well() -> None:
    norm = PRepBN(C, total=2).eval()
    with pytest.raises(RuntimeError, match="not ready to deploy"):
        torch.jit.trace(norm, torch.randn(3, 5, C))


def test_export_in_training_mode_is_refused() -> None:
    norm = PRepBN(C, total=0)
    with pytest.raises(RuntimeError, match="training mode"):
        torch.export.export(norm, (torch.randn(3, 5, C),), strict=False)


def finished() -> PRepBN:
    norm = PRepBN(C, total=1)
    norm(torch.randn(3, 5, C))
    return norm


def test_export_knows_what_was_loaded() -> None:
    early = PRepBN(C, total=5)
    late = finished()
    for source, target in ((late, early), (PRepBN(C, total=5), late)):
        target.load_state_dict(source.state_dict())
        assert target.ready_to_deploy is source.ready_to_deploy
        if source.ready_to_deploy:
            export(target)
        else:
            with pytest.raises(RuntimeError, match="5 of 5"):
                export(target)


def test_export_knows_of_copies_moves_and_pickles() -> None:
    buffer = io.BytesIO()
    torch.save(finished(), buffer)
    buffer.seek(0)
    for norm in (copy.deepcopy(finished()), finished().double().float(), torch.load(buffer, weights_only=False)):
        assert norm.ready_to_deploy
        export(norm)
    with torch.device("meta"):
        empty = PRepBN(C, total=5)
    empty.load_state_dict(finished().state_dict(), assign=True)
    export(empty)


def test_counters_written_by_hand_are_seen() -> None:
    norm = PRepBN(C, total=100)
    norm.iter.zero_()
    norm.eval().check_deployable()
    export(norm)
    norm.iter.fill_(50)
    norm.train()(torch.randn(3, 5, C))
    assert int(norm.iter) == 49


def test_another_first_norm() -> None:
    norm = PRepBN([C], norm=nn.RMSNorm, alpha=0.0, zero_init=True)
    assert isinstance(norm.norm1, nn.RMSNorm)
    assert norm(torch.randn(3, 5, C)).shape == (3, 5, C)


def test_autocast_trains_and_shares_are_exact() -> None:
    norm = PRepBN(C, total=4)
    for _ in range(6):
        with torch.autocast("cpu", torch.bfloat16):
            y = norm(nn.Linear(C, C)(torch.randn(3, 5, C)))
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
    assert norm.norm2.bn.running_var is not None
    assert norm.norm2.bn.running_var.dtype == torch.float32
    assert norm.ready_to_deploy


@pytest.mark.parametrize("options", [{"warmup": -1}, {"total": -1}, {"schedule": "epoch"}])
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        PRepBN(C, **options)


def test_one_axis_only() -> None:
    with pytest.raises(ValueError, match="one axis"):
        PRepBN((2, C))
