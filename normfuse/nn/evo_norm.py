"""EvoNorm B0 and S0: norm and activation in one.

Reference
    Liu et al., "Evolving Normalization-Activation Layers", NeurIPS 2020, arXiv 2004.02967, with the details of timm's
    code, whose state dicts fit: biased variances, and a running variance with the unbiased correction. The other public port
    has unbiased variances and a momentum of the old value: its checkpoints are not interchangeable with these.

With ``apply_act=False`` timm leaves out the division as well, and so does this: what remains is γ x + β, which folds. With it,
both depend on the sample and only γ and β can be folded forward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normfuse.nn.counting import recomputing


class _EvoNorm(nn.Module):
    """What both share: γ, β, v and checks."""

    def __init__(
        self,
        num_features: int,
        apply_act: bool,
        eps: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.num_features, self.apply_act, self.eps = num_features, apply_act, eps
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        self.v = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype)) if apply_act else None

    def _activated(self, x: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Normalize and activate ``x``."""
        if x.ndim < 3 or x.shape[1] != self.num_features:
            raise ValueError(f"expected (batch, {self.num_features}, ...), not {tuple(x.shape)}")
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        y = wide if self.v is None else self._activated(wide, self._per_channel(self.v, x))
        y = y * self._per_channel(self.weight, x) + self._per_channel(self.bias, x)
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def _per_channel(self, values: Tensor, x: Tensor) -> Tensor:
        return values.reshape(1, -1, *(1 for _ in range(x.ndim - 2)))


class EvoNormB0(_EvoNorm):
    """y = γ x / max(√(s² + ε), v x + √(var of the sample and channel + ε)) + β.

    s² is the batch's variance in training, and its running estimate at inference.

    Args:
        num_features: channels C.
        apply_act: False: y = γ x + β.
        momentum: share of the NEW value in the running variance.
        eps: added to both variances.
        device: where its tensors are.
        dtype: of its parameters and running statistics.

    Shape:
        (B, C, ...) with at least three axes, channels second; the result is like the input.

    Training
        The running variance moves once per forward call, and not in the recomputation of activation checkpointing. Statistics
        are in float32 or better. A batch with inf or nan in it leaves it as it was.

    Raises:
        ValueError: wrong shapes, or a single value per channel in training.
    """

    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        apply_act: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-3,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, apply_act, eps, device, dtype)
        self.momentum = momentum
        self.register_buffer("running_var", torch.ones(num_features, device=device, dtype=dtype))

    def _activated(self, x: Tensor, v: Tensor) -> Tensor:
        inner = list(range(2, x.ndim))
        variance = self._batch_variance(x, [0, *inner]) if self.training else self.running_var
        over_batch = torch.sqrt(self._per_channel(variance, x) + self.eps)
        over_sample = torch.sqrt(x.var(inner, correction=0, keepdim=True) + self.eps)
        y: Tensor = x / torch.maximum(over_batch, v * x + over_sample)
        return y

    def _batch_variance(self, x: Tensor, axes: list[int]) -> Tensor:
        count = x.numel() // self.num_features
        if count < 2:
            raise ValueError(f"more than one value per channel is needed in training, not {tuple(x.shape)}")
        variance = x.var(axes, correction=0)
        if not recomputing():
            with torch.no_grad():
                new = (1 - self.momentum) * self.running_var + self.momentum * variance * (count / (count - 1))
                self.running_var.copy_(torch.where(torch.isfinite(variance).all(), new, self.running_var))
        return variance

    def extra_repr(self) -> str:
        """The hyper-parameters."""
        return f"{self.num_features}, apply_act={self.apply_act}, momentum={self.momentum}, eps={self.eps}"


class EvoNormS0(_EvoNorm):
    """y = γ x σ(v x) / √(var of the sample and group + ε) + β; no running statistics.

    Args:
        num_features: channels C.
        num_groups: groups of channels.
        apply_act: False: y = γ x + β.
        eps: added to the variance.
        device: where its tensors are.
        dtype: of its parameters.

    Shape:
        (B, C, ...) with at least three axes, channels second; the result is like the input.

    Raises:
        ValueError: C does not divide into the groups, or wrong shapes.
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int = 32,
        apply_act: bool = True,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_features % num_groups:
            raise ValueError(f"{num_features} channels do not divide into {num_groups} groups")
        super().__init__(num_features, apply_act, eps, device, dtype)
        self.num_groups = num_groups

    def _activated(self, x: Tensor, v: Tensor) -> Tensor:
        groups = x.reshape(x.shape[0], self.num_groups, -1)
        deviation = torch.sqrt(groups.var(-1, correction=0, keepdim=True) + self.eps)
        return (x * torch.sigmoid(v * x)).reshape(groups.shape).div(deviation).reshape(x.shape)

    def extra_repr(self) -> str:
        """The hyper-parameters."""
        return f"{self.num_features}, num_groups={self.num_groups}, apply_act={self.apply_act}, eps={self.eps}"
