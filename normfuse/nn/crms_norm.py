"""Compressed RMSNorm: the RMSNorm of a zero-mean vector of which all but the last entry is stored.

Reference
    Jiang, Gu, Zhu, Pan, "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers", NeurIPS
    2023, arXiv 2305.14858, §3.3. Its code has no gain: one for the entry that is not stored would have no place, so
    gains are folded into the readers first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normfuse.nn.rms_norm import WIDER, inverse_root, is_fast_on


class CRMSNorm(nn.Module):
    """y = x / √((Σx² + (Σx)²) / d + ε) over the last axis, of size d - 1.

    With z = (x, -Σx), a vector of d entries and mean zero, y is all but the last entry of RMS(z), which is LN(z).

    Args:
        normalized_shape: d - 1, the size of the last axis of x.
        eps: ε, that of the LayerNorm or RMSNorm over d entries.

    Shape:
        x of (..., d - 1); the result is like x. Half precisions accumulate in float32.

    Raises:
        ValueError: ``normalized_shape`` is not one positive size, or x does not end in it.

    Example:
        >>> CRMSNorm(7)(torch.randn(2, 5, 7)).shape
        torch.Size([2, 5, 7])
    """

    def __init__(self, normalized_shape: int | tuple[int] | list[int], eps: float = 1e-5) -> None:
        super().__init__()
        self.normalized_shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if len(self.normalized_shape) != 1 or self.normalized_shape[0] < 1:
            raise ValueError(f"it is over one axis of at least one entry, not {normalized_shape}")
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``."""
        if x.ndim == 0 or (x.shape[-1],) != self.normalized_shape:
            raise ValueError(f"expected (..., {self.normalized_shape[0]}), not {tuple(x.shape)}")
        wide = x.to(WIDER.get(x.dtype, x.dtype))
        if is_fast_on(x) and not (torch.is_grad_enabled() and x.requires_grad):
            sums = [torch.linalg.vector_norm(wide, 2, -1, True), wide.sum(-1, True)]
            scale = inverse_root(sums, x.shape[-1] + 1, self.eps)
        else:
            squares = wide.square().sum(-1, keepdim=True) + wide.sum(-1, keepdim=True).square()
            scale = torch.rsqrt(squares / (x.shape[-1] + 1) + self.eps)
        return (wide * scale).to(x.dtype)

    def extra_repr(self) -> str:
        """The hyper-parameters."""
        return f"{self.normalized_shape[0]}, eps={self.eps}"
