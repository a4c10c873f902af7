"""Out into the class itself, back in, and restored to the byte: layers that are easy to get wrong, by every way there is."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse.errors import NormfuseWarning
from tests.models import D, noise
from tests.modules.models import IMAGES
from tests.modules.test_unread_tensors import Blocks, Plus1, distance
from tests.zoo.spread import spread

pytestmark = pytest.mark.filterwarnings("ignore::normfuse.errors.NormfuseWarning")


class ByHand(nn.Module):
    """A LayerNorm that multiplies its gain last, in two dtypes (Cohere)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        centred = (y := x.to(torch.float64)) - y.mean(-1, keepdim=True)
        return (self.weight * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5))).to(x.dtype)


class ChannelsFirst(nn.LayerNorm):
    """Of images, whose channels are not last (ConvNeXt)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Activated(nn.BatchNorm2d):
    """A BatchNorm whose forward ends in an activation (timm's networks)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class Sliced(nn.Module):
    """What reads the norm reads all of what it gives, as a slice (GPT-J, Phi)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, D), nn.LayerNorm(D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x))[:, slice(0, None)])


class Tied(nn.Module):
    """A table that is the head as well."""

    def __init__(self, norm: Callable[[], nn.Module] = lambda: nn.LayerNorm(D)) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(11, D), nn.Linear(D, D)
        self.norms = nn.ModuleList(norm() for _ in range(2))
        self.head = nn.Linear(D, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Any:
        x = self.table(ids)
        return self.head(self.norms[1](x + self.body(self.norms[0](x))))


class Rows(nn.Module):
    """A BatchNorm of rows behind a linear layer that has no bias, which it lends its shift to."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, D, bias=False), nn.BatchNorm1d(D, **settings), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Any:
        return self.last(F.relu(self.norm(self.first(x))))


def _conv(*, bias: bool, **settings: Any) -> nn.Module:
    norm = nn.BatchNorm2d(4, **settings)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), norm, nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))


def _transposed() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False), nn.BatchNorm2d(4), nn.ReLU())


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "tied": (Tied, (torch.arange(10).reshape(2, 5),)),
    "gains by hand": (lambda: Tied(ByHand), (torch.arange(10).reshape(2, 5),)),
    "gains less one": (lambda: Tied(lambda: Plus1(D)), (torch.arange(10).reshape(2, 5),)),
    "channels first": (lambda: nn.Sequential(nn.Conv2d(3, 4, 2), ChannelsFirst(4), nn.ReLU()), IMAGES),
    "an activation behind": (lambda: nn.Sequential(nn.Conv2d(3, 4, 2, bias=False), Activated(4), nn.Conv2d(4, 2, 1)), IMAGES),
    "a copy is read": (Sliced, (noise(5, 4),)),
    "rows": (Rows, (noise(5, 4),)),
    "rows, cumulative average": (lambda: Rows(momentum=None), (noise(5, 4),)),
    "no gain": (lambda: _conv(bias=True, affine=False), IMAGES),
    "no gain and no bias": (lambda: _conv(bias=False, affine=False), IMAGES),
    "no statistics": (lambda: _conv(bias=False, track_running_stats=False), IMAGES),
    "transposed in groups": (_transposed, (noise(2, 6, 5, 5),)),
    "norm first": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, bias=False), nn.ReLU()), IMAGES),
    "large eps": (lambda: Blocks(lambda: nn.LayerNorm(D, eps=0.5), bias=False), (noise(2, 3, 4),)),
}
ANOTHER_NAME = {"no gain and no bias", "norm first"}
"""A convolution gets a bias that no norm can hold for it."""


def _deploy(model: nn.Module, inputs: Any) -> None:
    normfuse.deploy(model, "all", inputs=inputs, verify="none", keep=True)


def _tune(model: nn.Module, inputs: Any) -> None:
    normfuse.deploy(normfuse.tune(model, "all", inputs=inputs, verify="none"), keep=True)


def _apply(model: nn.Module, inputs: Any) -> None:
    normfuse.rewrite(model, "all", inputs=inputs, verify="none").apply_to(model, keep=True)


def _cases() -> Iterator[Any]:
    for name, way in itertools.product(LAYERS, (_deploy, _tune, _apply)):
        quick = way is _deploy or name == "tied"
        yield pytest.param(name, way, marks=() if quick else pytest.mark.slow, id=f"{name}, {way.__name__}")


@pytest.mark.parametrize(("name", "way"), [*_cases()])
def test_there_and_back(name: str, way: Callable[[nn.Module, Any], None], tmp_path: Path) -> None:
    build, inputs = LAYERS[name]
    inputs = tuple(each.double() if each.is_floating_point() else each for each in inputs)
    torch.manual_seed(0)
    model = spread(build()).eval().double()
    original = copy.deepcopy(model)
    expected = original(*inputs)
    way(model, inputs)
    assert distance(model(*inputs), expected) <= 1e-12
    if name in ANOTHER_NAME or (way is _apply and name == "large eps"):
        with pytest.raises(RuntimeError, match="bias"):
            copy.deepcopy(original).load_state_dict(model.state_dict())
        with pytest.raises(normfuse.NormfuseError, match="was deployed"):
            copy.deepcopy(model).load_state_dict(original.state_dict(), strict=False)
    else:
        _is_right_elsewhere(model, original, inputs, tmp_path)
    normfuse.restore(model)
    assert [type(each) for each in model.modules()] == [type(each) for each in original.modules()]
    assert [*model.state_dict()] == [*original.state_dict()]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), original.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "name", ["gains by hand", "gains less one", "channels first", "an activation behind", "a copy is read"]
)
def test_every_rewrite_has_a_place(name: str) -> None:
    build, inputs = LAYERS[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NormfuseWarning)  # of what has none
        _deploy(spread(build()).eval(), inputs)


def _is_right_elsewhere(model: nn.Module, original: nn.Module, inputs: Any, folder: Path) -> None:
    """The class itself loads it, also through safetensors, which saves a tied tensor once; so does the model itself."""
    from safetensors.torch import load_model, save_model

    expected = original(*inputs)
    save_model(model, str(folder / "deployed.safetensors"))
    save_model(original, str(folder / "original.safetensors"))
    for target, file in ((original, "deployed"), (model, "deployed"), (model, "original")):
        loaded = copy.deepcopy(target)
        with torch.no_grad():
            for each in loaded.parameters():
                each.mul_(3.0)  # what is not loaded is seen
        load_model(loaded, folder / f"{file}.safetensors", strict=True)
        assert distance(loaded(*inputs), expected) <= 1e-12, file
