"""What the tests of live models share: losses, gradients, and networks with what publishing code has in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import noise
from tests.zoo.spread import spread


class Block(nn.Module):
    """Convolutions with BatchNorms, an in-place ReLU and a residual."""

    def __init__(self, width: int, groups: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width, affine=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


class Net(nn.Module):
    """A small ResNet."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width), Block(width, groups=2))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


IMAGES = (noise(4, 3, 12, 12),)


def net(width: int = 8) -> Any:
    """The network with weights that hide nothing, in evaluation mode."""
    torch.manual_seed(0)
    return spread(Net(width)).eval()


def loss(outputs: Any) -> Tensor:
    """A number in which every entry of the outputs has a weight of its own."""
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = (torch.arange(each.numel()).sin().to(each).reshape(each.shape) for each in tensors)
    return torch.stack([(each * weight).sum() for each, weight in zip(tensors, weights, strict=True)]).sum()


def gradients(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Tensor | None]:
    """Gradients of all parameters and of floating inputs, by name."""
    model.zero_grad()
    given = [each.detach().clone().requires_grad_() if each.is_floating_point() else each for each in inputs]
    loss(model(*given)).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return found | {f"input {place}": each.grad for place, each in enumerate(given) if each.requires_grad}


def distance(found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> float:
    """The largest relative difference of two sets of gradients; a missing one is zero.

    What is a thousand times smaller than the largest gradient (a bias in front of a norm that trains) counts as that large.
    """
    assert found.keys() == expected.keys()
    worst, floor = 0.0, 1e-3 * max(each.abs().max().item() for each in expected.values() if each is not None)
    for name, wanted in expected.items():
        got = found[name]
        size = 0.0 if wanted is None else wanted.abs().max().item()
        if wanted is None or got is None:
            assert size == 0.0, name
            assert got is None or not got.any(), name
        else:
            worst = max(worst, (got - wanted).abs().max().item() / max(size, floor, 1e-300))
    return worst
