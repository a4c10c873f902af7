"""IBN: InstanceNorm on some channels, BatchNorm on the others.

Reference
    Pan et al., "Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net", ECCV 2018, arXiv
    1807.09441. The formulas are those of its published code, and so are the names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normfuse.nn.counting import batch_norm


class IBN(nn.Module):
    """InstanceNorm of the first int(ratio · C) channels beside BatchNorm of the rest.

    IBN-a is this in place of a bottleneck's first norm, in all but the last stage. IBN-b needs no class: it is
    ``torch.nn.InstanceNorm2d(C, affine=True)`` after the residual addition. The BatchNorm half folds into the last rows of a
    convolution in front; the InstanceNorm half depends on the sample and stays.

    Args:
        num_features: channels C.
        ratio: share of InstanceNorm.
        eps: of both.
        momentum: of the BatchNorm, share of the NEW value.
        device: where its tensors are.
        dtype: of its parameters and running statistics.

    Shape:
        (B, C, H, W); the result is like the input.

    Training
        As `RepBN`.

    Raises:
        ValueError: a half would be empty, or wrong shapes.
    """

    def __init__(
        self,
        num_features: int,
        ratio: float = 0.5,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        half = int(num_features * ratio)
        if not 0 < half < num_features:
            raise ValueError(f"ratio={ratio} leaves no channel of {num_features} to one of the norms")
        self.sizes = [half, num_features - half]  # not `half`, as published: that name is a method of every module
        self.IN = nn.InstanceNorm2d(half, eps=eps, affine=True, device=device, dtype=dtype)
        self.BN = nn.BatchNorm2d(num_features - half, eps=eps, momentum=momentum, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``."""
        if x.ndim != 4 or x.shape[1] != sum(self.sizes):
            raise ValueError(f"expected (batch, {sum(self.sizes)}, height, width), not {tuple(x.shape)}")
        instance, batch = torch.split(x, self.sizes, 1)  # type: ignore[no-untyped-call]
        return torch.cat((self.IN(instance), batch_norm(self.BN, batch)), 1)
