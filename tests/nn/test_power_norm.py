"""PowerNorm against §5.1 of the reference, and what GroupScaling means."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from normfuse.nn import GroupScaling, PowerNorm

C = 4


def scaled(x: np.ndarray, groups: int) -> np.ndarray:
    parts = x.reshape(*x.shape[:-1], groups, -1)
    return np.asarray((parts / np.sqrt((parts**2).mean(-1, keepdims=True) + 1e-5)).reshape(x.shape))


@pytest.mark.parametrize("warmup", [0, 1, 4, 100])
@pytest.mark.parametrize("pad", [False, True])
def test_trace(warmup: int, pad: bool) -> None:
    """Step by step, without GroupScaling, which has a gradient of torch's own."""
    norm = PowerNorm(C, warmup_iters=warmup, group_scaling=False, dtype=torch.float64)
    assert norm.weight is not None
    assert norm.bias is not None
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    w, b = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    phi, memory, eps = np.ones(C), np.zeros(C), 1e-5
    for t in range(1, 10):
        x = torch.randn(3, 5, C, dtype=torch.float64, requires_grad=True)
        mask = torch.rand(3, 5) < 0.4 if pad else None
        y = norm(x, mask)
        gradient = torch.randn_like(y)
        y.backward(gradient)

        values = x.detach().numpy()
        real = values.reshape(-1, C) if mask is None else values[~mask.numpy()]
        q = (real**2).mean(0)
        z = values / np.sqrt((q if t <= warmup else phi) + eps)
        if t < warmup:
            phi = phi * (t - 1) / t + q / t
        phi = 0.9 * phi + 0.1 * q
        g = gradient.numpy() * w - (1 - 0.9) * memory * z
        memory = memory + (g * z).reshape(-1, C).mean(0)

        close = {
            "y": (y, w * z + b),
            "x": (x.grad, g / np.sqrt(q + eps)),
            "w": (norm.weight.grad, (gradient.numpy() * z).sum((0, 1))),
            "b": (norm.bias.grad, gradient.numpy().sum((0, 1))),
            "phi": (norm.running_phi.flatten(), phi),
            "ema_gz": (norm.ema_gz.flatten(), memory),
        }
        for name, (ours, theirs) in close.items():
            assert ours is not None
            torch.testing.assert_close(ours.detach(), torch.as_tensor(theirs), rtol=1e-12, atol=1e-12, msg=f"{name} at {t}")
        norm.zero_grad()
    assert int(norm.iters) == 9


def test_group_scaling_comes_first_also_at_inference() -> None:
    norm = PowerNorm(C, num_groups=2, warmup_iters=2, dtype=torch.float64)
    plain = PowerNorm(C, group_scaling=False, warmup_iters=2, dtype=torch.float64)
    for mode in (True, False):
        for _ in range(4):
            x = torch.randn(3, 5, C, dtype=torch.float64)
            before = torch.as_tensor(scaled(x.numpy(), 2))
            torch.testing.assert_close(norm.train(mode)(x), plain.train(mode)(before), rtol=1e-13, atol=1e-13)
    assert torch.equal(norm.running_phi, plain.running_phi)


def test_only_without_it_inference_is_a_constant_scale() -> None:
    x = torch.randn(3, 5, C)
    for group_scaling in (True, False):
        norm = PowerNorm(C, group_scaling=group_scaling)
        norm(x)
        linear = torch.allclose(norm.eval()(3 * x), 3 * norm(x), rtol=1e-5)
        assert linear is not group_scaling


def test_gradient_of_group_scaling_is_torch_s() -> None:
    x = torch.randn(2, 3, C, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(GroupScaling(2), (x,))


def test_two_losses_one_after_the_other_are_their_sum() -> None:
    twin = PowerNorm(C, warmup_iters=2, dtype=torch.float64)
    for _ in range(4):
        twin(torch.randn(3, C, dtype=torch.float64)).pow(3).sum().backward()
    norm = copy.deepcopy(twin)
    x, first, second = torch.randn(3, 3, C, dtype=torch.float64)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    y = norm(inputs[0])
    y.backward(first, retain_graph=True)
    y.backward(second)
    twin(inputs[1]).backward(first + second)
    torch.testing.assert_close(norm.ema_gz, twin.ema_gz, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_once(reentrant: bool) -> None:
    plain = PowerNorm(C, warmup_iters=2, num_groups=2, dtype=torch.float64)
    saving = copy.deepcopy(plain)
    for batch in torch.randn(6, 2, 3, C, dtype=torch.float64):
        for norm in (plain, saving):
            parts = [part.clone().requires_grad_() for part in batch]
            outputs = [norm(x) if norm is plain else checkpoint(norm, x, use_reentrant=reentrant) for x in parts]
            torch.stack(outputs).pow(3).sum().backward()
    for (name, ours), theirs in zip(saving.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13, msg=name)


def test_names_and_shapes_of_published_checkpoints() -> None:
    published = {"weight": (8,), "bias": (8,), "running_phi": (1, 8, 1, 1), "ema_gz": (1, 8, 1, 1), "iters": (1,)}
    assert {name: tuple(value.shape) for name, value in PowerNorm(8).state_dict().items()} == published


@pytest.mark.parametrize("options", [{"num_groups": 3}, {"warmup_iters": -1}, {"alpha_forward": 1.0}, {"alpha_backward": -0.1}])
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        PowerNorm(C, **options)


def test_wrong_shapes() -> None:
    with pytest.raises(ValueError, match="channels last"):
        PowerNorm(C)(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="groups"):
        GroupScaling(3)(torch.zeros(2, 4))
