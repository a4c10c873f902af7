"""PowerNorm, and what its GroupScaling costs at inference.

Reference
    Shen et al., "PowerNorm: Rethinking Batch Normalization in Transformers", ICML 2020, PMLR 119. The formulas are those of
    its published code, and so are names and shapes of the buffers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normfuse.nn.counting import IterationEnd
from normfuse.nn.second_moment import ForwardCall, Iteration, SecondMomentNorm, State


class GroupScaling(nn.Module):
    """x / √(mean of x² over each group of channels + ε), token by token.

    It depends on the token, in training and at inference: it is an RMSNorm over groups and cannot be folded away.

    Args:
        num_groups: groups that the last axis is cut into.
        eps: added to the mean of squares.

    Shape:
        (..., C) with C divisible by ``num_groups``; the result is like the input.

    Raises:
        ValueError: at the first forward, if C is not divisible.
    """

    def __init__(self, num_groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_groups, self.eps = num_groups, eps

    def forward(self, x: Tensor) -> Tensor:
        """Scale ``x``."""
        if x.shape[-1] % self.num_groups:
            raise ValueError(f"{x.shape[-1]} channels cannot be cut into {self.num_groups} groups")
        groups = x.reshape(*x.shape[:-1], self.num_groups, x.shape[-1] // self.num_groups)
        wide = groups.float() if x.dtype in (torch.float16, torch.bfloat16) else groups
        y: Tensor = (wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + self.eps)).flatten(-2)
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def extra_repr(self) -> str:
        """The hyper-parameters."""
        return f"{self.num_groups}, eps={self.eps}"


class PowerNorm(SecondMomentNorm):
    """y = w GS(x) / √(φ + ε) + b per channel, with φ a running mean of x².

    With ``group_scaling=True``, as published, the input is first divided by its own group's root mean square, also at
    inference: the published PowerNorm is a token-wise norm and only its gain and shift can be folded. Only with
    ``group_scaling=False`` is it a constant at inference; the authors added GroupScaling because training is unstable
    without it, and users report lower scores or nan.

    Args:
        num_features: channels C.
        eps: added to the mean of squares, here and in GroupScaling.
        alpha_forward: share of the OLD value that φ keeps.
        alpha_backward: the same for the gradient estimate.
        warmup_iters: iterations with the batch's own statistics.
        group_scaling: whether GroupScaling comes first.
        num_groups: its groups; the authors take the number of attention heads.
        affine: whether it has ``weight`` and ``bias``.
        schedule: what an iteration is, see `UnifiedNorm`.
        device: where its tensors are.
        dtype: of its parameters and running statistics.

    Shape:
        x of (..., C), pad_mask of (...) with True at padding; the result is like x. The published code takes
        (tokens, batch, C) and a mask of (batch, tokens); here the mask has the axes of x.

    Buffers:
        running_phi (1, C, 1, 1), ema_gz (1, C, 1, 1), iters (1).

    Training
        As in `UnifiedNorm`: checkpointing, mixed precision, inf and nan, several backwards. After the warm-up the gradient is
        scaled with the batch's own moment while the forward used φ, as published: it is not the gradient of that forward.

    Raises:
        ValueError: a size or factor is out of its range.
    """

    _forward_state = ("running_phi",)
    _backward_state = ("ema_gz",)
    running_phi: Tensor
    ema_gz: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        alpha_forward: float = 0.9,
        alpha_backward: float = 0.9,
        warmup_iters: int = 10000,
        group_scaling: bool = True,
        num_groups: int = 1,
        affine: bool = True,
        *,
        schedule: IterationEnd = "forward",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, schedule, device, dtype)
        if warmup_iters < 0 or not 0 <= alpha_forward < 1 or not 0 <= alpha_backward < 1 or num_features % num_groups:
            raise ValueError(
                "warmup_iters is not negative, the alphas are in [0, 1) and the channels divide into the groups: "
                f"warmup_iters={warmup_iters}, alphas {alpha_forward} and {alpha_backward}, {num_features} channels in "
                f"{num_groups} groups"
            )
        self.alpha_forward, self.alpha_backward, self.warmup_iters = alpha_forward, alpha_backward, warmup_iters
        self.group_scaling = GroupScaling(num_groups, eps) if group_scaling else None
        self.register_buffer("running_phi", torch.ones(1, num_features, 1, 1, device=device, dtype=dtype))
        self.register_buffer("ema_gz", torch.zeros(1, num_features, 1, 1, device=device, dtype=dtype))

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """Normalize ``x``; see `SecondMomentNorm.forward`."""
        self._check(x, pad_mask)
        return super().forward(x if self.group_scaling is None else self.group_scaling(x), pad_mask)

    def extra_repr(self) -> str:
        """The hyper-parameters."""
        return (
            f"{self.num_features}, eps={self.eps}, alpha_forward={self.alpha_forward}, alpha_backward={self.alpha_backward}, "
            f"warmup_iters={self.warmup_iters}, affine={self.weight is not None}, schedule={self.schedule}"
        )

    def _moment(self) -> Tensor:
        return self.running_phi.flatten()

    def _measured(self, iteration: Iteration, second_moment: Tensor, before: State) -> tuple[ForwardCall, State]:
        t, phi = iteration.number, before["running_phi"].flatten()
        divisor = torch.where(t <= self.warmup_iters, second_moment, phi)
        warm = torch.where(t < self.warmup_iters, phi * (t - 1) / t + second_moment / t, phi)
        after = self.alpha_forward * warm + (1 - self.alpha_forward) * second_moment
        call = ForwardCall(
            iteration,
            scale=(divisor + self.eps).rsqrt(),
            gradient_scale=(second_moment + self.eps).rsqrt(),
            ratio=torch.ones_like(phi),
            skip=torch.zeros_like(t, dtype=torch.bool),
        )
        return call, {"running_phi": after.reshape(1, -1, 1, 1)}

    def _estimated(self, call: ForwardCall, projection: Tensor, z: Tensor) -> Tensor:
        iteration = call.iteration
        finite = torch.isfinite(projection).all()
        if call.counted:  # a further gradient of the same forward: the history has been subtracted already
            part = torch.where(finite, projection / iteration.backwards, 0.0)
            self.ema_gz.add_(part.reshape(1, -1, 1, 1))
            return torch.zeros_like(projection)
        before = self._before(iteration, self._backward_state)
        old = before["ema_gz"].flatten().to(projection.dtype)
        share = (1 - self.alpha_backward) * old
        after = old + projection - share * z.square().mean(0)
        iteration.backwards += 1
        call.counted = True
        self._settle({"ema_gz": after.reshape(1, -1, 1, 1)}, iteration.backwards, finite)
        return share
