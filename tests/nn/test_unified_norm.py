"""UnifiedNorm against §3.1 of the reference, written out below in the plainest way, in every phase."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normfuse.nn import UnifiedNorm, second_moment, step

C = 3
STATE = ("running_var", "ema_gz", "iters", "buffer_x2", "buffer_gz", "skip_counter")


@dataclass
class Reference:
    """UN with loops over channels and plain numbers, in float64."""

    forward_window: int = 4
    backward_window: int = 4
    warmup: int = 4000
    filtration: bool = False
    eps: float = 1e-5
    keep: float = 0.9
    state: dict[str, Any] = field(default_factory=dict)
    seen: dict[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = {
            "running_var": np.ones(C),
            "ema_gz": np.zeros(C),
            "iters": np.zeros(1, dtype=np.int64),
            "buffer_x2": np.zeros((self.forward_window, C)),
            "buffer_gz": np.zeros((self.backward_window, C)),
            "skip_counter": np.zeros(1, dtype=np.int64),
        }

    def forward(self, x: np.ndarray, w: np.ndarray, b: np.ndarray, padding: np.ndarray | None) -> np.ndarray:
        state = self.state
        state["iters"] = state["iters"] + 1
        t = int(state["iters"][0])
        tokens = x.reshape(-1, C)
        real = tokens if padding is None else tokens[~padding.reshape(-1)]
        q = np.array([sum(token[c] ** 2 for token in real) / len(real) for c in range(C)])
        spread = np.var(np.sqrt(state["buffer_x2"]), ddof=1) if state["buffer_x2"].size > 1 else 0.0
        window = state["buffer_x2"].copy()
        window[t % self.forward_window] = q
        state["buffer_x2"] = window
        skip = self.forward_window == 1
        with np.errstate(divide="ignore"):
            geometric = np.exp(np.log(window).mean(0))
        if self.filtration and t >= self.warmup and not skip:
            for c in range(C):
                if window[:, c].mean() - geometric[c] > spread * self.forward_window:
                    skip = True
            if skip:
                state["buffer_x2"] = window.copy()
                state["buffer_x2"][t % self.forward_window] = state["running_var"]
                state["skip_counter"] = state["skip_counter"] + 1
        own = t <= self.forward_window or t < self.warmup or skip
        v = q if own else geometric
        old = state["running_var"]
        r = np.ones(C)
        if t > max(1000, self.warmup) and not skip:
            for c in range(C):
                r[c] = min(5.0, max(0.2, math.sqrt(v[c] + self.eps) / math.sqrt(old[c] + self.eps)))
        state["running_var"] = self.keep * old + (1 - self.keep) * v
        z = x / np.sqrt(v + self.eps)
        self.kept = (t, skip, v, r, z, w)
        for name, true in {
            "own statistics": own and not skip,
            "geometric mean": not own,
            "skip": skip,
            "r": bool((r != 1).any()),
            "clamped below": bool((r == 0.2).any()),
            "clamped above": bool((r == 5).any()),
            "padding": padding is not None,
        }.items():
            self.seen[name] = self.seen.get(name, False) or true
        return w * z + b

    def backward(self, gradient: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        t, skip, v, r, z, w = self.kept
        state = self.state
        g = gradient * w * r
        h = (g * z).reshape(-1, C).mean(0)
        window = state["buffer_gz"].copy()
        window[t % self.backward_window] = state["ema_gz"] if skip else h
        state["buffer_gz"] = window
        own = t <= self.backward_window or t < self.warmup or skip
        estimate = h if own else window.mean(0)
        state["ema_gz"] = self.keep * state["ema_gz"] + (1 - self.keep) * estimate
        taken = h if skip else state["ema_gz"]
        to_x = (g - taken * z) / np.sqrt(v + self.eps)
        return to_x, (gradient * r * z).reshape(-1, C).sum(0), gradient.reshape(-1, C).sum(0)


def make(reference: Reference, affine: bool = True, **options: Any) -> UnifiedNorm:
    """Our norm with the reference's settings and its state."""
    norm = UnifiedNorm(
        C,
        window_size=(reference.forward_window, reference.backward_window),
        warmup_iters=reference.warmup,
        outlier_filtration=reference.filtration,
        affine=affine,
        dtype=torch.float64,
        **options,
    )
    if norm.weight is not None and norm.bias is not None:
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    return norm


def close(ours: Tensor, theirs: np.ndarray, what: str) -> None:
    torch.testing.assert_close(
        ours.detach().to(torch.float64), torch.as_tensor(theirs).double(), rtol=1e-12, atol=1e-12, msg=what
    )


def run(
    reference: Reference,
    iterations: int,
    *,
    start: int = 0,
    sizes: dict[int, float] | None = None,
    pad: bool = False,
    affine: bool = True,
) -> Reference:
    """Train both for some iterations and compare everything after each."""
    norm = make(reference, affine)
    norm.iters.fill_(start)
    reference.state["iters"] = np.full(1, start)
    w = np.ones(C) if norm.weight is None else norm.weight.detach().numpy()
    b = np.zeros(C) if norm.bias is None else norm.bias.detach().numpy()
    for i in range(iterations):
        x = (torch.randn(2, 5, C, dtype=torch.float64) * (sizes or {}).get(i, 1.0)).requires_grad_()
        mask = torch.rand(2, 5) < 0.4 if pad else None
        y = norm(x, mask)
        close(y, reference.forward(x.detach().numpy(), w, b, None if mask is None else mask.numpy()), f"y at {i}")
        gradient = torch.randn_like(y)
        y.backward(gradient)
        assert x.grad is not None
        to_x, to_w, to_b = reference.backward(gradient.numpy())
        close(x.grad, to_x, f"gradient of x at {i}")
        if norm.weight is not None and norm.bias is not None:
            assert norm.weight.grad is not None
            assert norm.bias.grad is not None
            close(norm.weight.grad, to_w, f"gradient of w at {i}")
            close(norm.bias.grad, to_b, f"gradient of b at {i}")
            norm.zero_grad()
        for name in STATE:
            close(getattr(norm, name), reference.state[name], f"{name} at {i}")
    return reference


TRACES: dict[str, tuple[Reference, dict[str, Any], set[str]]] = {
    "before the warm-up ends": (Reference(warmup=100), {"iterations": 8}, {"own statistics"}),
    "until the window is full, then its geometric mean": (
        Reference(warmup=0),
        {"iterations": 9},
        {"own statistics", "geometric mean"},
    ),
    "warm-up longer than the window": (Reference(warmup=6), {"iterations": 12}, {"own statistics", "geometric mean"}),
    "windows of different sizes": (Reference(4, 2, warmup=3), {"iterations": 10}, {"geometric mean"}),
    "a longer backward window": (Reference(2, 5, warmup=3), {"iterations": 10}, {"geometric mean"}),
    "r": (Reference(warmup=3), {"iterations": 8, "start": 2000}, {"r", "geometric mean"}),
    "r is 1 until iteration 1000": (Reference(warmup=3), {"iterations": 8, "start": 992}, {"geometric mean"}),
    "r is 1 until a long warm-up ends": (Reference(warmup=2000), {"iterations": 9, "start": 1994}, {"geometric mean", "r"}),
    "r clamped above": (
        Reference(warmup=3),
        {"iterations": 9, "start": 2000, "sizes": dict.fromkeys(range(9), 90.0)},
        {"clamped above"},
    ),
    "r clamped below": (
        Reference(warmup=3),
        {"iterations": 9, "start": 2000, "sizes": dict.fromkeys(range(9), 0.01)},
        {"clamped below"},
    ),
    "outliers are taken out of the window": (
        Reference(warmup=5, filtration=True),
        {"iterations": 16, "start": 2000, "sizes": {9: 40.0, 10: 40.0, 13: 0.01}},
        {"skip", "geometric mean", "r"},
    ),
    "filtration before the window is full": (Reference(warmup=0, filtration=True), {"iterations": 9}, {"skip"}),
    "a window of one": (Reference(1, 1, warmup=2), {"iterations": 6, "start": 1500}, {"skip"}),
    "a window of one, with filtration": (Reference(1, 4, warmup=2, filtration=True), {"iterations": 6}, {"skip"}),
    "padding": (Reference(warmup=4), {"iterations": 9, "start": 1500, "pad": True}, {"padding", "r"}),
    "without gain and shift": (Reference(warmup=4), {"iterations": 9, "affine": False}, {"geometric mean"}),
}


@pytest.mark.parametrize("name", TRACES)
def test_trace(name: str) -> None:
    reference, options, phases = TRACES[name]
    seen = run(copy.deepcopy(reference), **options).seen
    assert {phase for phase in phases if seen.get(phase)} == phases, "the trace misses what it is for"


def test_many_random_settings() -> None:
    rng = np.random.default_rng(0)
    seen: dict[str, bool] = {}
    for _ in range(25):
        forward, backward, warmup = (int(rng.integers(low, high)) for low, high in ((1, 6), (1, 6), (0, 9)))
        reference = Reference(forward, backward, warmup, filtration=bool(rng.random() < 0.5))
        sizes = {i: float(np.exp(rng.normal() * 2)) for i in range(10)}
        run(reference, 10, start=int(rng.choice([0, 996, 3000])), sizes=sizes, pad=bool(rng.random() < 0.3))
        seen = {name: seen.get(name, False) or true for name, true in reference.seen.items()}
    assert all(seen.values()), seen


# ---- gradients


def test_with_skip_the_gradient_is_exact() -> None:
    norm = make(Reference(1, 1))
    x = torch.randn(4, 5, C, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))
    gradient = torch.randn_like(x)
    (ours,) = torch.autograd.grad(norm(x), x, gradient)
    assert norm.weight is not None
    assert norm.bias is not None
    plain = norm.weight * x / torch.sqrt(x.square().mean((0, 1)) + norm.eps) + norm.bias
    (exact,) = torch.autograd.grad(plain, x, gradient)
    assert (ours - exact).abs().max() < 2e-15


@pytest.mark.parametrize(("start", "outlier"), [(0, False), (2000, False), (2000, True)])
def test_two_losses_one_after_the_other_are_their_sum(start: int, outlier: bool) -> None:
    twin = make(Reference(4, 2, warmup=3, filtration=True))
    twin.iters.fill_(start)
    for _ in range(6):
        twin(torch.randn(2, 5, C, dtype=torch.float64)).sum().backward()
    twin.zero_grad()
    norm, skipped = copy.deepcopy(twin), int(twin.skip_counter)
    x = torch.randn(2, 5, C, dtype=torch.float64) * (50 if outlier else 1)
    first, second = torch.randn(2, 2, 5, C, dtype=torch.float64)

    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    y = norm(inputs[0])
    y.backward(first, retain_graph=True)
    y.backward(second)
    twin(inputs[1]).backward(first + second)
    same(norm, twin, 1e-12)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-12, atol=1e-12)
    assert int(norm.skip_counter) == skipped + outlier


def same(one: nn.Module, other: nn.Module, tolerance: float = 0.0) -> None:
    """Equal buffers and gradients."""
    for (name, ours), theirs in zip(one.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=name)
    for (name, mine), yours in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, yours.grad, rtol=tolerance, atol=tolerance, msg=name)


def test_there_is_no_second_derivative() -> None:
    norm = UnifiedNorm(C)
    x = torch.randn(4, C, requires_grad=True)
    (gradient,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_input_may_need_no_gradient() -> None:
    norm = UnifiedNorm(C)
    norm(torch.randn(4, C)).sum().backward()
    assert norm.weight is not None
    assert norm.weight.grad is not None
    with torch.no_grad():
        norm(torch.randn(4, C))
    assert int(norm.iters) == 2


# ---- counting


class Block(nn.Module):
    """A norm that is called twice, and another."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.twice = UnifiedNorm(C, dtype=torch.float64, warmup_iters=4, outlier_filtration=True, **options)
        self.once = UnifiedNorm(C, dtype=torch.float64, warmup_iters=2, **options)
        self.mix = nn.Linear(C, C, dtype=torch.float64)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.once(self.drop(self.twice(self.mix(self.twice(x)).tanh())))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("schedule", ["forward", "step"])
def test_checkpointing_counts_once(reentrant: bool, schedule: str) -> None:
    plain = Block(schedule=schedule)
    saving = copy.deepcopy(plain)
    for part in (plain.twice, plain.once, saving.twice, saving.once):
        part.iters.fill_(1500)
    data = torch.randn(6, 2, 2, 5, C, dtype=torch.float64)
    for batch in data:
        for model in (plain, saving):
            torch.manual_seed(1)
            inputs = [half.clone().requires_grad_() for half in batch]
            outputs = [
                checkpoint(model, x, use_reentrant=reentrant) if model is saving else model(x)  # two before the backward
                for x in inputs
            ]
            torch.stack(outputs).square().sum().backward()
            step(model)
        same(saving, plain, 1e-13)
    assert int(plain.twice.iters) == 1500 + (24 if schedule == "forward" else 6)


def test_checkpointing_the_same_batch_again_and_again() -> None:
    plain = Block()
    saving = copy.deepcopy(plain)
    x = torch.randn(2, 5, C, dtype=torch.float64)
    for _, model in itertools.product(range(6), (plain, saving)):
        torch.manual_seed(1)
        y = model(x) if model is plain else checkpoint(model, x, use_reentrant=False)
        y.square().sum().backward()
    same(saving, plain, 1e-13)


def test_checkpointing_and_two_backwards() -> None:
    plain = Block()
    saving = copy.deepcopy(plain)
    x = torch.randn(2, 5, C, dtype=torch.float64)
    for model in (plain, saving):
        torch.manual_seed(1)
        y = model(x) if model is plain else checkpoint(model, x, use_reentrant=False)
        y.sum().backward(retain_graph=True)
        y.square().sum().backward()
    same(saving, plain, 1e-13)


def test_a_recomputation_of_something_else_is_refused() -> None:
    norm = UnifiedNorm(C)
    shift = torch.zeros(())
    x = torch.randn(4, C, requires_grad=True)
    y = checkpoint(lambda x: norm(x + shift), x, use_reentrant=False)
    shift += 100
    with pytest.raises(RuntimeError, match="preserve_rng_state"):
        y.sum().backward()


def test_step_takes_all_calls_between_as_one_iteration() -> None:
    start = make(Reference(warmup=3, filtration=True), schedule="step")
    for _ in range(5):
        start(torch.randn(2, 5, C, dtype=torch.float64)).square().sum().backward()
        start.step()
    parts = torch.randn(3, 2, 5, C, dtype=torch.float64) * torch.tensor([1.0, 1.5, 0.5]).reshape(3, 1, 1, 1)
    norm = copy.deepcopy(start)
    for part in parts:
        norm(part.requires_grad_()).pow(3).sum().backward()
    norm.step()
    alone = [copy.deepcopy(start) for _ in parts]
    for each, part in zip(alone, parts, strict=True):
        each(part.detach().requires_grad_()).pow(3).sum().backward()
    assert int(norm.iters) == 6
    for name in ("running_var", "ema_gz", "buffer_x2", "buffer_gz"):
        mean = torch.stack([getattr(each, name) for each in alone]).mean(0)
        torch.testing.assert_close(getattr(norm, name), mean, rtol=1e-12, atol=1e-13, msg=name)


def test_accumulated_parts_of_a_warm_up_batch_are_the_batch() -> None:
    parts, whole = (UnifiedNorm(C, schedule=schedule, dtype=torch.float64) for schedule in ("step", "forward"))
    for _ in range(4):
        batch = torch.randn(6, 5, C, dtype=torch.float64)
        for part in batch.chunk(3):
            parts(part)
        parts.step()
        whole(batch)
    for name in ("running_var", "iters", "buffer_x2"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=0)


def test_step_is_refused_where_it_would_do_nothing() -> None:
    with pytest.raises(RuntimeError, match="schedule='step'"):
        UnifiedNorm(C).step()
    step(nn.Sequential(UnifiedNorm(C)))  # the function leaves those alone


def test_a_forgotten_step_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_moment, "FORGOTTEN", 3)
    norm = UnifiedNorm(C, schedule="step")
    for _ in range(3):
        norm(torch.randn(4, C))
    with pytest.warns(UserWarning, match="step"):
        norm(torch.randn(4, C))


# ---- precision, and batches that are no good


def test_half_inputs_have_exact_statistics() -> None:
    norm = UnifiedNorm(C)
    x = (torch.randn(8, 5, C) * 1000).half().requires_grad_()  # its squares overflow
    y = norm(x)
    y.sum().backward()
    assert y.dtype == torch.float16
    assert x.grad is not None
    assert x.grad.dtype == torch.float16
    torch.testing.assert_close(norm.buffer_x2[1], x.detach().float().square().mean((0, 1)))
    assert torch.isfinite(y).all()


def test_autocast() -> None:
    model = nn.Sequential(nn.Linear(4, 8), UnifiedNorm(8, warmup_iters=3), nn.Linear(8, 1))
    twin = copy.deepcopy(model)
    for model_, enabled in ((model, True), (twin, False)):
        torch.manual_seed(0)
        for _ in range(8):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y = model_(torch.randn(64, 4))
            y.float().square().mean().backward()
    ours, exact = model[1], twin[1]
    assert isinstance(ours, UnifiedNorm)
    assert isinstance(exact, UnifiedNorm)
    assert ours.running_var.dtype == torch.float32
    torch.testing.assert_close(ours.running_var, exact.running_var, rtol=1e-2, atol=0)
    torch.testing.assert_close(ours.ema_gz, exact.ema_gz, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_batch_shows_and_leaves_the_state(bad: float) -> None:
    norm = UnifiedNorm(C, warmup_iters=2, outlier_filtration=True)
    for _ in range(6):
        norm(torch.randn(4, C)).sum().backward()
    before = {name: value.clone() for name, value in norm.named_buffers() if name != "iters"}
    x = torch.randn(4, C)
    x[1, 2] = bad
    y = norm(x.requires_grad_())
    y.sum().backward()
    assert not torch.isfinite(y).all()
    assert all(torch.equal(value, getattr(norm, name)) for name, value in before.items())


def test_an_overflowed_gradient_leaves_the_state() -> None:
    norm = UnifiedNorm(C)
    y = norm(torch.randn(4, C))
    y.backward(torch.full_like(y, math.inf))
    assert torch.equal(norm.ema_gz, torch.zeros(C))
    assert torch.equal(norm.buffer_gz, torch.zeros(4, C))


def test_padding_may_hold_anything_and_be_everything() -> None:
    norm = UnifiedNorm(C)
    x = torch.randn(2, 4, C)
    mask = torch.tensor([[False, False, True, True], [False, True, True, True]])
    expected = x[~mask].square().mean(0)
    x[mask] = math.nan
    norm(x, mask)
    torch.testing.assert_close(norm.buffer_x2[1], expected)
    norm(torch.randn(2, 4, C), torch.ones(2, 4, dtype=torch.bool))
    assert torch.isfinite(norm.running_var).all()
    assert torch.isfinite(norm.buffer_x2).all()


def test_constant_and_dead_channels() -> None:
    norm = UnifiedNorm(C, warmup_iters=0, outlier_filtration=True)
    x = torch.ones(4, C)
    x[:, 0] = 0
    for _ in range(12):
        y = norm(x.requires_grad_())
        y.sum().backward()
        assert torch.isfinite(y).all()
    assert all(torch.isfinite(value).all() for value in norm.buffers())
    assert torch.equal(y[:, 0], torch.zeros(4))


def test_one_token() -> None:
    norm = UnifiedNorm(C)
    y = norm(torch.randn(1, C))
    torch.testing.assert_close(y.abs(), torch.ones(1, C), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (torch.zeros(2, C + 1), None, "channels last"),
        (torch.zeros(2, C, 4), None, "channels last"),
        (torch.zeros(C), None, "channels last"),
        (torch.zeros(0, 5, C), None, "empty"),
        (torch.zeros(2, 5, C), torch.zeros(5, 2, dtype=torch.bool), "pad_mask"),
        (torch.zeros(2, 5, C), torch.zeros(2, 5), "pad_mask"),
    ],
)
def test_wrong_shapes(x: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UnifiedNorm(C)(x, mask)


@pytest.mark.parametrize(
    "options",
    [
        {"window_size": 0},
        {"window_size": (4, 0)},
        {"momentum": 1.0},
        {"warmup_iters": -1},
        {"eps": 0.0},
        {"schedule": "epoch"},
    ],
)
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        UnifiedNorm(C, **options)


# ---- what others see


def test_inference_is_a_scale_and_a_shift() -> None:
    norm = make(Reference(warmup=2))
    for _ in range(8):
        norm(torch.randn(4, 5, C, dtype=torch.float64))
    norm.eval()
    before = {name: value.clone() for name, value in norm.named_buffers()}
    x = torch.randn(4, 5, C, dtype=torch.float64)
    assert norm.weight is not None
    assert norm.bias is not None
    scale = norm.weight / torch.sqrt(norm.running_var + 1e-5)
    torch.testing.assert_close(norm(x), x * scale + norm.bias, rtol=1e-14, atol=1e-14)
    assert all(torch.equal(value, before[name]) for name, value in norm.named_buffers())
    graph = torch.export.export(norm, (x,), strict=False).graph
    ops = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert ops == {"aten.add.Tensor", "aten.sqrt.default", "aten.div.Tensor", "aten.mul.Tensor"}


def test_names_and_shapes_of_published_checkpoints() -> None:
    published = {
        "weight": (8,), "bias": (8,), "running_var": (8,), "ema_gz": (8,), "iters": (1,),
        "buffer_x2": (4, 8), "buffer_gz": (2, 8), "skip_counter": (1,),
    }  # fmt: skip
    assert {name: tuple(value.shape) for name, value in UnifiedNorm(8, window_size=(4, 2)).state_dict().items()} == published


def test_training_goes_on_from_a_checkpoint() -> None:
    norm = make(Reference(warmup=3, filtration=True))
    batches = torch.randn(8, 4, C, dtype=torch.float64)
    for batch in batches[:5]:
        norm(batch.requires_grad_()).square().sum().backward()
    again = make(Reference(warmup=3, filtration=True))
    again.load_state_dict(norm.state_dict())
    norm.zero_grad()
    for batch, each in itertools.product(batches[5:].detach(), (norm, again)):
        each(batch.clone().requires_grad_()).square().sum().backward()
    same(norm, again)


def test_it_learns_compiled_as_in_eager() -> None:
    plain = UnifiedNorm(C, warmup_iters=2)
    compiled = copy.deepcopy(plain)
    fast = torch.compile(compiled, backend="eager")
    for batch in torch.randn(5, 4, C):
        for call in (plain, fast):
            call(batch.clone().requires_grad_()).square().sum().backward()
    same(compiled, plain, 1e-6)
