"""Convolutions whose weight is standardized per output filter: a constant at inference.

Over the n weights of each filter, Ŵ = (W - mean W) / s. Published code differs in s, and the variants must not be mixed: the
first and the third differ by √(n / (n - 1)).

    "ws"    std(W) + 1e-5           unbiased; Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight
                                    Standardization", arXiv 1903.10520, and the README of its code
    "bcn"   √(var(W) + 1e-5)        unbiased; the code of Batch-Channel Normalization
    "timm"  √(var(W) + 1e-6)        biased; BiT and timm's StdConv2d

The scaled convolutions of NFNets multiply by gain · γ / √n: Brock et al., "Characterizing Signal Propagation to Close the
Performance Gap in Unnormalized ResNets", ICLR 2021, arXiv 2101.08692. They are convolutions of torch otherwise, also with
``groups`` and every ``padding_mode``. Statistics are in float32 or better.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

Variant: TypeAlias = Literal["ws", "bcn", "timm"]

_EPS: dict[str, float] = {"ws": 1e-5, "bcn": 1e-5, "timm": 1e-6}


class _Standardized(nn.modules.conv._ConvNd):
    """What the convolutions share; comes before torch's class."""

    variant: Variant
    eps: float

    def _choose(self, variant: Variant, eps: float | None) -> None:
        if variant not in _EPS:
            raise ValueError(f"variant is one of {', '.join(_EPS)}, not {variant!r}")
        if variant != "timm" and self.weight[0].numel() < 2:
            raise ValueError(f"a filter of one weight has no unbiased variance; variant={variant!r} needs two or more")
        self.variant, self.eps = variant, _EPS[variant] if eps is None else eps

    def standardized_weight(self) -> Tensor:
        """Ŵ, of the shape and type of ``weight``."""
        axes = list(range(1, self.weight.ndim))
        w = self.weight.float() if self.weight.dtype in (torch.float16, torch.bfloat16) else self.weight
        centered = w - w.mean(axes, keepdim=True)
        variance = w.var(axes, correction=0 if self.variant == "timm" else 1, keepdim=True)
        deviation = variance.sqrt() + self.eps if self.variant == "ws" else torch.sqrt(variance + self.eps)
        standardized = centered / deviation
        return standardized if w is self.weight else standardized.to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x`` with the standardized weight."""
        y: Tensor = self._conv_forward(x, self.standardized_weight(), self.bias)  # type: ignore[operator]
        return y

    def extra_repr(self) -> str:
        """As torch's, with the variant."""
        return f"{super().extra_repr()}, variant={self.variant}, eps={self.eps}"  # type: ignore[no-untyped-call]


class StdConv1d(_Standardized, nn.Conv1d):
    """`torch.nn.Conv1d` with a standardized weight.

    Args:
        *args: of `torch.nn.Conv1d`.
        variant: whose formula, see this module.
        eps: None: the variant's own.
        **options: of `torch.nn.Conv1d`.

    Shape:
        As `torch.nn.Conv1d`.

    Raises:
        ValueError: unknown variant, or filters of a single weight with an unbiased one.
    """

    def __init__(self, *args: Any, variant: Variant = "ws", eps: float | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._choose(variant, eps)


class StdConv2d(_Standardized, nn.Conv2d):
    """`torch.nn.Conv2d` with a standardized weight; see `StdConv1d`."""

    def __init__(self, *args: Any, variant: Variant = "ws", eps: float | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._choose(variant, eps)


class _Scaled(_Standardized):
    """Adds a gain per filter; state dicts fit timm's ScaledStdConv2d."""

    gain: nn.Parameter
    scale: float

    def _add_gain(self, gamma: float, gain_init: float) -> None:
        self.scale = gamma * float(self.weight[0].numel()) ** -0.5
        shape = (self.out_channels, *(1 for _ in self.weight.shape[1:]))
        self.gain = nn.Parameter(torch.full(shape, gain_init, device=self.weight.device, dtype=self.weight.dtype))

    def standardized_weight(self) -> Tensor:
        """Gain · γ / √n · Ŵ."""
        return super().standardized_weight() * (self.gain * self.scale)


class ScaledStdConv1d(_Scaled, nn.Conv1d):
    """`torch.nn.Conv1d` with weight gain · γ / √n · Ŵ, n the fan-in.

    Args:
        *args: of `torch.nn.Conv1d`.
        gamma: γ, the constant of the activation in front (1.7139588594436646 for ReLU).
        gain_init: where the learned gain starts.
        eps: under the root, "timm" variant.
        **options: of `torch.nn.Conv1d`.

    Shape:
        As `torch.nn.Conv1d`.
    """

    def __init__(self, *args: Any, gamma: float = 1.0, gain_init: float = 1.0, eps: float = 1e-6, **options: Any) -> None:
        super().__init__(*args, **options)
        self._choose("timm", eps)
        self._add_gain(gamma, gain_init)


class ScaledStdConv2d(_Scaled, nn.Conv2d):
    """`torch.nn.Conv2d` with weight gain · γ / √n · Ŵ; see `ScaledStdConv1d`."""

    def __init__(self, *args: Any, gamma: float = 1.0, gain_init: float = 1.0, eps: float = 1e-6, **options: Any) -> None:
        super().__init__(*args, **options)
        self._choose("timm", eps)
        self._add_gain(gamma, gain_init)
