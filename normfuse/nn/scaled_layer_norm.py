"""LayerNorm scaling: the output of a norm is divided by the root of its layer's number.

The factor is a number in Python and not a buffer: elsewhere a buffer of ones was silently lost when a model was built on the
meta device and then given memory.

Reference
    Sun et al., "The Curse of Depth in Large Language Models", arXiv 2502.05795, §4: y = Norm(x) / √ℓ with ℓ from 1, the
    same for both norms of a block; the last norm of the model is not scaled. Not to be combined with scaled initialization.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn


class ScaledLayerNorm(nn.LayerNorm):
    """LN(x) / √ℓ; folds as a LayerNorm does, with gain and shift divided by √ℓ.

    Args:
        normalized_shape: of `torch.nn.LayerNorm`.
        layer: ℓ, the number of the block, from 1.
        **options: of `torch.nn.LayerNorm`.

    Shape:
        As `torch.nn.LayerNorm`.

    Raises:
        ValueError: ``layer`` is less than 1.
    """

    def __init__(self, normalized_shape: Any, layer: int, **options: Any) -> None:
        super().__init__(normalized_shape, **options)
        self.layer, self.factor = layer, _factor(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``."""
        return super().forward(x) * self.factor

    def extra_repr(self) -> str:
        """As torch's, with the layer."""
        return f"{super().extra_repr()}, layer={self.layer}"


class ScaledRMSNorm(nn.RMSNorm):
    """RMS(x) / √ℓ, what the authors train LLaMA with; see `ScaledLayerNorm`.

    Args:
        normalized_shape: of `torch.nn.RMSNorm`.
        layer: ℓ, the number of the block, from 1.
        eps: 1e-6 as the authors take it; torch's own default depends on the type.
        **options: of `torch.nn.RMSNorm`.

    Shape:
        As `torch.nn.RMSNorm`.

    Raises:
        ValueError: ``layer`` is less than 1.
    """

    def __init__(self, normalized_shape: Any, layer: int, eps: float | None = 1e-6, **options: Any) -> None:
        super().__init__(normalized_shape, eps=eps, **options)
        self.layer, self.factor = layer, _factor(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``."""
        return super().forward(x) * self.factor

    def extra_repr(self) -> str:
        """As torch's, with the layer."""
        return f"{super().extra_repr()}, layer={self.layer}"


def _factor(layer: int) -> float:
    if layer < 1:
        raise ValueError(f"layers are counted from 1, not {layer}")
    return 1 / math.sqrt(layer)
