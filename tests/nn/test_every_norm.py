"""What holds for every module of `normfuse.nn`: export, copies, precision, checkpointing, documentation."""

from __future__ import annotations

import copy
import inspect
import io
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normfuse.nn

C = 8


def removed() -> nn.Module:
    norm = normfuse.nn.FakeLayerNorm(C)
    norm.running_sigma.fill_(1.3)
    norm.remove()
    return norm


MODULES: dict[str, Callable[[], nn.Module]] = {
    "UnifiedNorm": lambda: normfuse.nn.UnifiedNorm(C, warmup_iters=2),
    "UnifiedNorm without affine": lambda: normfuse.nn.UnifiedNorm(C, affine=False),
    "RepBN": lambda: normfuse.nn.RepBN(C),
    "PRepBN": lambda: normfuse.nn.PRepBN(C, warmup=1, total=2),
    "PowerNorm": lambda: normfuse.nn.PowerNorm(C, num_groups=2, warmup_iters=2),
    "PowerNorm without groups": lambda: normfuse.nn.PowerNorm(C, group_scaling=False),
    "GroupScaling": lambda: normfuse.nn.GroupScaling(2),
    "RMSNorm": lambda: normfuse.nn.RMSNorm(C),
    "CRMSNorm": lambda: normfuse.nn.CRMSNorm(C),
    "FakeLayerNorm": lambda: normfuse.nn.FakeLayerNorm(C),
    "FakeLayerNorm removed": removed,
    "ScaledLayerNorm": lambda: normfuse.nn.ScaledLayerNorm(C, 3),
    "ScaledRMSNorm": lambda: normfuse.nn.ScaledRMSNorm(C, 3),
    "SimplifiedLinearAttention": lambda: normfuse.nn.SimplifiedLinearAttention(C, 2, (2, 3)),
    "BatchChannelNorm": lambda: normfuse.nn.BatchChannelNorm(C, 2),
    "BatchChannelNorm, estimated": lambda: normfuse.nn.BatchChannelNorm(C, 2, moving_speed=0.1),
    "EstimatedBatchNorm": lambda: normfuse.nn.EstimatedBatchNorm(C, 0.1),
    "EvoNormB0": lambda: normfuse.nn.EvoNormB0(C),
    "EvoNormS0": lambda: normfuse.nn.EvoNormS0(C, 2),
    "IBN": lambda: normfuse.nn.IBN(C),
    "StdConv1d": lambda: normfuse.nn.StdConv1d(C, C, 3),
    "StdConv2d": lambda: normfuse.nn.StdConv2d(C, C, 3, variant="timm"),
    "ScaledStdConv1d": lambda: normfuse.nn.ScaledStdConv1d(C, C, 3),
    "ScaledStdConv2d": lambda: normfuse.nn.ScaledStdConv2d(C, C, 3),
}
CHANNELS_LAST = {
    "UnifiedNorm", "RepBN", "PRepBN", "PowerNorm", "GroupScaling", "RMSNorm", "CRMSNorm", "FakeLayerNorm", "ScaledLayerNorm",
    "ScaledRMSNorm",
}  # fmt: skip
RESPELLED = {"RMSNorm", "CRMSNorm"}  # exported they are other operators than in eager mode: equal to rounding

every = pytest.mark.parametrize("name", MODULES)


def given(name: str) -> Tensor:
    kind = name.split()[0].rstrip(",")
    if kind in CHANNELS_LAST or kind == "SimplifiedLinearAttention":
        return torch.randn(3, 6, C)
    return torch.randn(3, C, 6) if kind.endswith("1d") else torch.randn(3, C, 5, 6)


def trained(name: str) -> nn.Module:
    """After a few steps, with gains and statistics that matter."""
    module = MODULES[name]()
    for _ in range(4):
        module(given(name).requires_grad_()).square().sum().backward()
    for parameter in module.parameters():
        parameter.grad = None
        nn.init.uniform_(parameter, 0.5, 1.5)
    return module


@every
def test_export_in_eval_is_eager(name: str) -> None:
    module = trained(name).eval()
    state = {key: value.clone() for key, value in module.state_dict().items()}
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(module, (given(name),), strict=False, dynamic_shapes=({0: batch},))
    assert not exported.graph_signature.buffers_to_mutate
    tolerance = 5e-7 if name in RESPELLED else 0
    for x in (given(name), torch.cat([given(name)] * 3)):
        torch.testing.assert_close(exported.module()(x), module(x), rtol=tolerance, atol=tolerance)
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


@every
def test_eval_compiles_whole(name: str) -> None:
    module = trained(name).eval()
    x = given(name)
    torch.testing.assert_close(torch.compile(module, backend="eager", fullgraph=True)(x), module(x))


@every
def test_copies_state_dicts_and_pickles(name: str) -> None:
    module = trained(name)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    fresh = MODULES[name]()
    fresh.load_state_dict(module.state_dict())
    for again in (copy.deepcopy(module), torch.load(file, weights_only=False), fresh):
        x = given(name)
        for mode in (False, True, True):
            assert torch.equal(copy.deepcopy(module).train(mode)(x), copy.deepcopy(again).train(mode)(x))
    twin = copy.deepcopy(module)
    twin(given(name))
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), fresh.state_dict().values(), strict=True))


@every
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_modules_keep_their_type_and_range(name: str, mode: bool, dtype: torch.dtype) -> None:
    module = trained(name).train(mode).to(dtype)
    x = given(name).to(dtype)
    y = module(x)
    assert y.dtype == dtype
    assert torch.isfinite(y).all()


@every
def test_autocast_trains(name: str) -> None:
    module = MODULES[name]()
    x = given(name).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x * 1.0)
    y.float().square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert all(value.dtype in (torch.float32, torch.long) for value in module.buffers())


@every
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_once(name: str, reentrant: bool) -> None:
    plain = trained(name)
    saving = copy.deepcopy(plain)
    for _ in range(3):
        x = given(name)
        for module in (plain, saving):
            leaf = x.clone().requires_grad_()
            y = module(leaf) if module is plain else checkpoint(module, leaf, use_reentrant=reentrant)
            y.square().sum().backward()
    for (key, ours), theirs in zip(saving.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=key)
    for (key, mine), yours in zip(saving.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, yours[1].grad, rtol=1e-5, atol=1e-5, msg=key)


@every
def test_constant_channels_are_finite(name: str) -> None:
    module = MODULES[name]()
    for value in (0.0, 3.0):
        x = torch.full_like(given(name), value).requires_grad_()
        y = module(x)
        y.sum().backward()
        assert torch.isfinite(y).all()
        assert torch.isfinite(x.grad if x.grad is not None else y).all()
    assert all(torch.isfinite(buffer).all() for buffer in module.buffers())


@every
def test_it_says_what_it_is(name: str) -> None:
    module = MODULES[name]()
    kind = type(module)
    assert kind.__name__ in normfuse.nn.__all__
    assert (kind.__doc__ or "").strip()
    assert kind.__name__ in repr(module)


def test_every_name_is_documented_and_every_class_is_here() -> None:
    for name in normfuse.nn.__all__:
        thing = getattr(normfuse.nn, name)
        assert (thing.__doc__ or "").strip(), name
        if inspect.isclass(thing):
            assert name in MODULES


def test_import_needs_torch_alone() -> None:
    code = (
        "import sys, normfuse.nn\n"
        "ours = {name for name in sys.modules if name.startswith('normfuse.')}\n"
        "assert all(name.startswith('normfuse.nn') for name in ours), ours\n"
        "assert not {'onnx', 'timm', 'networkx', 'torch._dynamo'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "PRepBN"])  # its counters are read as numbers
def test_it_runs_on_the_meta_device(name: str) -> None:
    """Where there are shapes and no numbers: nothing reads a value, or meets a tensor of another device."""
    with torch.device("meta"):
        module, x = MODULES[name](), given(name).requires_grad_()
    for mode in (True, False):
        module.train(mode)(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.is_meta
