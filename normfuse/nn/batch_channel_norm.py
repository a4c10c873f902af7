"""Batch-Channel Normalization: a BatchNorm that can be folded, then a GroupNorm that cannot.

Reference
    Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization", arXiv 1903.10520. The
    formulas are those of its published code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.nn.counting import Calls, batch_norm, recomputing


class EstimatedBatchNorm(nn.Module):
    """BatchNorm for batches of one or two: running statistics in training and in eval.

    In training the statistics first move by ``estbn_moving_speed`` towards the batch's, the variance being taken around the
    OLD running mean, and then they normalize. No gradient goes through them.

    Args:
        num_features: channels C.
        moving_speed: share of the NEW value. The authors' schedule is not published: their code starts at 0, where nothing
            moves, and leaves it to the trainer to write ``estbn_moving_speed``.
        eps: added to the variance.
        device: where its tensors are.
        dtype: of its parameters and running statistics.

    Shape:
        (B, C, ...) with at least two axes, channels second; the result is like the input.

    Training
        Statistics move once per forward call, and not in the recomputation of activation checkpointing, which uses what
        the first run used. A batch with inf or nan in it leaves them as they were.

    Raises:
        ValueError: wrong shapes, an empty batch in training, or a speed out of [0, 1].
    """

    running_mean: Tensor
    running_var: Tensor
    estbn_moving_speed: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        moving_speed: float,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= moving_speed <= 1:
            raise ValueError(f"moving_speed is a share in [0, 1], not {moving_speed}")
        self.num_features, self.eps = num_features, eps
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(num_features, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device))  # published, and never counted
        self.register_buffer(
            "estbn_moving_speed", torch.full((1,), moving_speed, device=device, dtype=dtype or torch.get_default_dtype())
        )
        self._calls: Calls[tuple[Tensor, Tensor]] = Calls()

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``."""
        if x.ndim < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"expected (batch, {self.num_features}, ...), not {tuple(x.shape)}")
        mean, variance = self._statistics(x) if self.training else (self.running_mean, self.running_var)
        return F.batch_norm(x, mean, variance, self.weight, self.bias, False, 0.0, self.eps)

    @torch.no_grad()
    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.numel() == 0:
            raise ValueError("no value to take statistics of: the batch is empty")
        if recomputing():
            return self._calls.recall(x)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        mean = wide.mean(axes)
        around_old = wide.var(axes, correction=0) + (mean - self.running_mean).square()
        speed = torch.where(torch.isfinite(mean + around_old).all(), self.estbn_moving_speed, 0).to(mean.dtype)
        for running, new in ((self.running_mean, mean), (self.running_var, around_old)):
            running.copy_(torch.where(speed > 0, (1 - speed) * running + speed * new, running))
        return self._calls.remember(x, (self.running_mean.clone(), self.running_var.clone()))

    def extra_repr(self) -> str:
        """The hyper-parameters."""
        return f"{self.num_features}, eps={self.eps}"


class BatchChannelNorm(nn.Module):
    """w_g GN(BN(x)) + b_g: BatchNorm with gain and shift per channel, then groups normalized per sample.

    The BatchNorm folds into a convolution in front. The GroupNorm depends on the sample and stays; it has one gain and one
    shift per group, not per channel.

    Args:
        num_features: channels C.
        num_groups: groups of the GroupNorm.
        eps: of both.
        momentum: of the BatchNorm, share of the NEW value.
        moving_speed: given: an `EstimatedBatchNorm` with this speed in place of the BatchNorm, for batches of one or two.
        device: where its tensors are.
        dtype: of its parameters and running statistics.

    Shape:
        (B, C, ...) with at least three axes, channels second; the result is like the input.

    State dict:
        weight and bias of (1, groups, 1), and ``bn``, as in the README of the published code (its ImageNet code says ``pbn``).

    Training
        As `RepBN`.

    Raises:
        ValueError: C does not divide into the groups, or wrong shapes.
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int = 32,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        moving_speed: float | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_features % num_groups:
            raise ValueError(f"{num_features} channels do not divide into {num_groups} groups")
        self.num_features, self.num_groups, self.eps = num_features, num_groups, eps
        self.weight = nn.Parameter(torch.ones(1, num_groups, 1, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(1, num_groups, 1, device=device, dtype=dtype))
        self.bn: nn.Module
        if moving_speed is None:
            self.bn = _BatchNorm(num_features, eps=eps, momentum=momentum, device=device, dtype=dtype)
        else:
            self.bn = EstimatedBatchNorm(num_features, moving_speed, eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``."""
        if x.ndim < 3 or x.shape[1] != self.num_features:
            raise ValueError(f"expected (batch, {self.num_features}, ...), not {tuple(x.shape)}")
        y = F.group_norm(batch_norm(self.bn, x), self.num_groups, eps=self.eps)
        y = y.reshape(x.shape[0], self.num_groups, -1)
        weight, bias = (self.weight, self.bias) if self.weight.dtype == x.dtype else (self.weight.to(x), self.bias.to(x))
        return (y * weight + bias).reshape(x.shape)

    def extra_repr(self) -> str:
        """The hyper-parameters."""
        return f"{self.num_features}, num_groups={self.num_groups}, eps={self.eps}"


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """For any number of axes."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Checked by the caller."""
