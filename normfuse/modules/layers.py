"""Linear layers and convolutions as torch's functions call them: what they compute, and their gradients.

    layer           forward          backward, with G = ∂L/∂Y
    linear, addmm   Y = XWᵀ + b      ∂X = GW, ∂W = GᵀX, ∂b = Σ G
    convolutions    aten.convolution aten.convolution_backward

How they are called is read from the arguments of torch's functions, so that any module's code around them works.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

Mask: TypeAlias = tuple[bool, bool, bool]
Gradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]


class LayerOperator(ABC):
    """What a layer computes of an input, a weight and a bias, and its gradients.

    Attributes:
        out_axis: the axis of the weight that is the output's channels; None where there is no such axis (groups).
    """

    out_axis: int | None

    @abstractmethod
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Y, for a batch."""

    @abstractmethod
    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, mask: Mask) -> Gradients:
        """∂X, ∂W and ∂b, where the mask asks for them; the gradients are nobody else's memory."""

    @abstractmethod
    def positions(self, x: Tensor) -> int:
        """About how many entries each channel of the output has."""

    @abstractmethod
    def by_channel(self, entries: Tensor) -> Tensor:
        """One entry per channel, in a shape that goes with the output's."""

    def forward_scaled(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """What the weight a⊙W would give: a⊙Y + b."""
        y, a = self.forward(x, weight, None), self.by_channel(scale)
        return y.mul_(a) if bias is None else torch.addcmul(self.by_channel(bias), y, a, out=y)

    def backward_scaled(self, grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, mask: Mask) -> Gradients:
        """∂X, ∂L/∂(a⊙W), which reads neither a nor W, and ∂b."""
        of_input = of_weight = of_bias = None
        if mask[0]:
            of_input, _, _ = self.backward(grad * self.by_channel(scale), x, weight, (True, False, False))
        if mask[1] or mask[2]:
            _, of_weight, of_bias = self.backward(grad, x, weight, (False, *mask[1:]))
        return of_input, of_weight, of_bias


class Linear(LayerOperator):
    """Y = XWᵀ + b, or XW + b with the weight transposed (GPT-2's Conv1D), for rows of any number of leading axes."""

    def __init__(self, *, transposed: bool) -> None:
        self.transposed, self.out_axis = transposed, int(transposed)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """XWᵀ + b or XW + b."""
        if not self.transposed:
            return F.linear(x, weight, bias)
        return x @ weight if bias is None else torch.addmm(bias, x, weight)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, mask: Mask) -> Gradients:
        """GW, GᵀX and Σ G, or with the weight transposed GWᵀ, XᵀG and Σ G."""
        rows = grad.reshape(-1, grad.shape[-1])
        into = of_weight = None
        if mask[0]:
            into = grad @ (weight.T if self.transposed else weight)
        if mask[1]:
            flat = x.reshape(-1, x.shape[-1])
            of_weight = flat.T @ rows if self.transposed else rows.T @ flat
        return into, of_weight, rows.sum(0) if mask[2] else None

    def positions(self, x: Tensor) -> int:
        """The rows."""
        return x.numel() // max(x.shape[-1], 1)

    def by_channel(self, entries: Tensor) -> Tensor:
        """Channels are the last axis."""
        return entries


class Convolution(LayerOperator):
    """A convolution or a transposed one, in one, two or three dimensions; the settings of ``aten.convolution``."""

    def __init__(self, *settings: Any) -> None:
        self.settings = settings
        stride, _, _, transposed, _, _ = settings
        self.out_axis = None if transposed else 0
        self._strides: int = math.prod(stride)
        self._sizes = (-1, *[1] * len(stride))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``aten.convolution``."""
        y: Tensor = torch.convolution(x, weight, bias, *self.settings)
        return y

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, mask: Mask) -> Gradients:
        """``aten.convolution_backward``."""
        channels = [grad.shape[1]] if mask[2] else None
        found: Gradients = aten.convolution_backward.default(grad, x, weight, channels, *self.settings, mask)
        return found

    def positions(self, x: Tensor) -> int:
        """The batch times the places where the kernel is put, borders left out."""
        return x.numel() // max(x.shape[1] * self._strides, 1)

    def by_channel(self, entries: Tensor) -> Tensor:
        """Channels are the axis in front of the spatial ones."""
        return entries.reshape(self._sizes)


@dataclass(frozen=True, slots=True)
class LayerCall:
    """A call of a layer: what it computes, and of what. Without ``batched`` the input is one example."""

    layer: LayerOperator
    x: Tensor
    weight: Any
    bias: Any
    batched: bool = True


def _linear(input: Tensor, weight: Any, bias: Any = None) -> LayerCall:  # the names that callers use as keywords
    return LayerCall(_ROWS, input, weight, bias)


def _addmm(input: Any, mat1: Tensor, mat2: Any, *, beta: Any = 1, alpha: Any = 1, out: Any = None) -> LayerCall | None:
    usual = beta == 1 and alpha == 1 and out is None and tuple(input.shape) == (mat2.shape[1],)
    return LayerCall(_COLUMNS, mat1, mat2, input) if usual else None


def _convolution(
    n: int, input: Tensor, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> LayerCall:
    if isinstance(padding, str):
        input, padding = _padded(input, padding, weight.shape[2:], _each(dilation, n))
    layer = _layer(n, _hashable(stride), _hashable(padding), _hashable(dilation), False, 0, groups)
    return LayerCall(layer, input, weight, bias, input.dim() == n + 2)


def _padded(x: Tensor, padding: str, sizes: Any, dilation: tuple[int, ...]) -> tuple[Tensor, Any]:
    """The input and the padding in numbers; where the sides differ there is one more on the right, as aten does."""
    if padding == "valid":
        return x, 0
    totals = [d * (size - 1) for d, size in zip(dilation, sizes, strict=True)]
    if any(total % 2 for total in totals):
        x = F.pad(x, [each for total in reversed(totals) for each in (0, total % 2)])
    return x, tuple(total // 2 for total in totals)


def _transposed_convolution(
    n: int,
    input: Tensor,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> LayerCall:
    layer = _layer(n, *map(_hashable, (stride, padding, dilation)), True, _hashable(output_padding), groups)
    return LayerCall(layer, input, weight, bias, input.dim() == n + 2)


@cache
def _layer(n: int, stride: Any, padding: Any, dilation: Any, transposed: bool, more: Any, groups: int) -> Convolution:
    return Convolution(_each(stride, n), _each(padding, n), _each(dilation, n), transposed, _each(more, n), groups)


def _hashable(setting: Any) -> Any:
    return tuple(setting) if isinstance(setting, list) else setting


def _each(value: Any, n: int) -> tuple[int, ...]:
    """A setting for each spatial axis."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values


_ROWS, _COLUMNS = Linear(transposed=False), Linear(transposed=True)
_PLAIN = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

CALLS: dict[Any, Callable[..., LayerCall | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    **{each: partial(_convolution, n) for n, each in enumerate(_PLAIN, 1)},
    **{each: partial(_transposed_convolution, n) for n, each in enumerate(_TRANSPOSED, 1)},
}
"""Function of torch → what its arguments say; None where it is called in another way than as a layer."""
