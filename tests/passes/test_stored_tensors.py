"""What leaves holds the tensors that are read, and shares nothing that changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import normfuse
from normfuse.errors import NormfuseError, TraceError
from tests.models import noise
from tests.zoo.spread import spread

X = noise(2, 16, 7, 7)


def conv_net(conv: nn.Module | None = None) -> Any:
    return spread(nn.Sequential(conv or nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32))).eval()


class Packed(nn.Module):
    """Two weights in one piece of memory: one of them is folded into, the other is gone."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.randn(2 * 32 * 16 * 9, generator=torch.Generator().manual_seed(0)) / 9
        self.one, self.other = (nn.Parameter(part.view(32, 16, 3, 3)) for part in flat.chunk(2))
        self.norm, self.norm_of_other = nn.BatchNorm2d(32), nn.BatchNorm2d(32)

    def forward(self, x: Tensor) -> Tensor:
        one = self.norm(nn.functional.conv2d(x, self.one))
        return one + self.norm_of_other(nn.functional.conv2d(x, self.other))


class Counts(nn.Module):
    """Counts its calls, and overwrites another one that it never reads."""

    seen: Tensor
    last: Tensor

    def __init__(self, persistent: bool = True) -> None:
        super().__init__()
        self.net = conv_net()
        self.register_buffer("seen", torch.zeros(()), persistent=persistent)
        self.register_buffer("last", torch.zeros(2, 16, 7, 7), persistent=persistent)
        self.register_buffer("idle", torch.ones(1000))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.last.copy_(x)
        return self.net(x) + self.seen


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.norm = nn.Embedding(11, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.up(self.table(ids))))


IDS = torch.arange(8).view(2, 4)
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "conv": (conv_net, X, "conv_bn"),
    "weight_norm": (lambda: conv_net(weight_norm(nn.Conv2d(16, 32, 3))), X, "conv_bn"),
    "packed": (Packed, X, "conv_bn"),
    "counts": (Counts, X, "conv_bn"),
    "counts in buffers that are not saved": (lambda: Counts(persistent=False), X, "conv_bn"),
    "tied": (Tied, IDS, "pre_rmsnorm"),
}


def saved(exported: torch.export.ExportedProgram, path: Path) -> int:
    torch.export.save(exported, path)
    return path.stat().st_size


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_file_holds_what_is_read_and_is_not_larger(name: str, tmp_path: Path) -> None:
    build, x, chosen = MODELS[name]
    model = spread(build()).eval()
    before = saved(torch.export.export(model, (x,)), tmp_path / "a.pt2")
    expected = copy.deepcopy(model)(x)
    result = normfuse.rewrite(model, chosen, inputs=(x,))
    assert list(result.report.plan.rewrites)
    loaded = torch.export.load(result.save(tmp_path / "b.pt2"))
    spec = loaded.graph_signature
    nodes = {node.name: node for node in loaded.graph.nodes}
    updated = {*spec.buffers_to_mutate.values()}
    stored = {each.target: nodes[each.arg.name].users for each in spec.input_specs if each.target}
    unread = {target for target, users in stored.items() if not users} | (loaded.state_dict.keys() - stored.keys())
    assert unread <= updated | {"head.weight", "table.weight"}  # one tensor with two names
    assert (tmp_path / "b.pt2").stat().st_size <= before + 4096  # the text of the graph
    unflat = [] if updated else [torch.export.unflatten(loaded)]  # torch cannot unflatten a program that updates a buffer
    for call in (loaded.module(), result.module(), *unflat):
        torch.testing.assert_close(call(x), expected, rtol=1e-3, atol=1e-4)


def test_memory_that_was_shared_with_what_is_gone_is_not_saved(tmp_path: Path) -> None:
    flat = torch.randn(100_000)
    model = conv_net()
    model[0].weight.data = flat[: 32 * 16 * 9].view(32, 16, 3, 3)
    model.append(nn.Conv2d(32, 4, 1))
    model[2].weight.data = flat[-128:].view(4, 32, 1, 1)
    path = normfuse.rewrite(model, "conv_bn", inputs=(X,)).save(tmp_path / "a.pt2")
    assert path.stat().st_size < 4 * 32 * 16 * 9 + 60_000


def test_unread_tensors_stay_if_asked(tmp_path: Path) -> None:
    model = conv_net()
    result = normfuse.rewrite(model, "conv_bn", inputs=(X,), keep_unread=True)
    assert set(result.program.exported.state_dict) >= set(model.state_dict())
    assert set(normfuse.rewrite(model, "conv_bn", inputs=(X,)).program.exported.state_dict) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("persistent", [True, False])
def test_nothing_that_changes_is_shared(persistent: bool, tmp_path: Path) -> None:
    model = Counts(persistent).eval()
    result = normfuse.rewrite(model, "conv_bn", inputs=(X,))
    one, other = result.module(), result.module()
    first = one(X)
    assert not torch.equal(one(X), first)
    model(X)
    torch.testing.assert_close(other(X), first)
    assert model.seen == 1
    again = torch.export.load(result.save(tmp_path / "a.pt2")).module()
    torch.testing.assert_close(again(X), first, rtol=1e-4, atol=1e-4)
    assert model.seen == 1


def test_a_module_tells_in_which_mode_it_is() -> None:
    result = normfuse.rewrite(spread(Tied()).eval(), "pre_rmsnorm", inputs=(IDS,))
    module = result.module()
    assert module.eval() is module
    assert module.train(False) is module
    assert not module.training
    with pytest.raises(NormfuseError, match="in evaluation mode; it cannot be set to training mode"):
        module.train()
    twin = copy.deepcopy(module)
    assert twin.eval() is twin
    torch.testing.assert_close(twin(IDS), module(IDS))
    live = normfuse.rewrite(spread(Tied()).train(), "pre_rmsnorm", inputs=(IDS,), mode="live").module()
    assert live.train() is live
    with pytest.raises(NormfuseError, match="in training mode; it cannot be set to evaluation mode"):
        live.eval()


class TwoNames(Counts):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("same", self.seen)


def test_an_updated_buffer_of_two_names_is_refused_in_a_line() -> None:
    with pytest.raises(TraceError, match="could not make this program functional"):
        normfuse.rewrite(TwoNames().eval(), "conv_bn", inputs=(X,))


class InFloat32(nn.Module):
    """A norm in float32 in a model that stores no float32."""

    def __init__(self, gain: bool) -> None:
        super().__init__()
        self.up, self.down, self.gain = nn.Linear(8, 16), nn.Linear(16, 4), nn.Parameter(torch.ones(16)) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).float()
        h = nn.functional.layer_norm(h, (16,), None if self.gain is None else self.gain.float(), None)
        return self.down(h.to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("gain", [True, False])
def test_modules_of_any_dtype(gain: bool, dtype: torch.dtype) -> None:
    model: Any = spread(InFloat32(gain)).eval().to(dtype)
    x = noise(2, 3, 8).to(dtype)
    for chosen in ("pre_rmsnorm", "fold_affine"):
        result = normfuse.rewrite(model, chosen, inputs=(x,))
        tolerance = 20 * torch.finfo(dtype if dtype != torch.float64 else torch.float32).eps
        torch.testing.assert_close(result.module().eval()(x), model(x), rtol=tolerance, atol=tolerance)
