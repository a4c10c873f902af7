"""What UnifiedNorm and PowerNorm share: division by a second moment, with an estimated gradient.

Both divide every channel by the root of a mean of x² that comes from several batches. The true gradient would need those
batches, so both estimate it: ∂x = (g - k z) · s, where z is the normalized input, g the gradient that reaches it, and k a
running estimate of mean(g z). The norms differ in the forward statistic, in k, and in s.

State moves twice an iteration: in the forward (moments of x) and in the backward (the estimate). A norm says what its state
would be after a call, as a pure function of the state at the start of the iteration; with several calls in one iteration
(``schedule="step"``) the state becomes the mean of what each says. Nothing here waits for the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from normfuse.nn.counting import Calls, Counted, IterationEnd, recomputing, uncompiled

State: TypeAlias = dict[str, Tensor]

FORGOTTEN = 1000  # forward calls without a step, after which somebody is told


@dataclass(eq=False)
class Iteration:
    """The forward and backward calls between two steps.

    Attributes:
        number: t of the papers, from 1, of shape (1).
        forwards: forward calls so far.
        backwards: forward calls whose gradient has arrived so far.
        before: the state at its start, where more than one call may follow.
    """

    number: Tensor
    forwards: int = 0
    backwards: int = 0
    before: State = field(default_factory=dict)


@dataclass(eq=False)
class ForwardCall:
    """What one forward call used. Its backward, and its recomputation, use the same.

    Attributes:
        iteration: the iteration that it belongs to.
        scale: what x is multiplied by, (C).
        gradient_scale: what the estimated gradient is multiplied by, (C).
        ratio: r of UnifiedNorm; 1 elsewhere.
        skip: whether the batch's own statistics are used for both; (1).
        counted: whether its gradient has arrived once.
    """

    iteration: Iteration
    scale: Tensor
    gradient_scale: Tensor
    ratio: Tensor
    skip: Tensor
    counted: bool = False


class SecondMomentNorm(Counted):
    """Abstract: parameters, checks, masks, counting, and the inference form y = w x / √(moment + ε) + b.

    Args:
        num_features: channels C, the last axis of the input.
        eps: added to the moment under the root.
        affine: whether it has a gain ``weight`` and a shift ``bias``.
        schedule: see `normfuse.nn.counting`.
    """

    _forward_state: ClassVar[tuple[str, ...]]
    _backward_state: ClassVar[tuple[str, ...]]
    iters: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float,
        affine: bool,
        schedule: IterationEnd,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(schedule)
        if num_features < 1 or eps <= 0:
            raise ValueError(f"num_features must be positive and so must eps, not {num_features} and {eps}")
        self.num_features, self.eps = num_features, eps
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(num_features, **made)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features, **made)) if affine else None
        self.register_buffer("iters", torch.zeros(1, dtype=torch.long, device=device))
        self._calls: Calls[ForwardCall] = Calls()
        self._open: list[Iteration] = []  # the iteration under way, in schedule="step"

    def _moment(self) -> Tensor:
        """The running second moment that inference divides by, (C)."""
        raise NotImplementedError

    def _measured(self, iteration: Iteration, second_moment: Tensor, before: State) -> tuple[ForwardCall, State]:
        """What a forward call uses, and the state after it, given the batch's own second moment."""
        raise NotImplementedError

    def _estimated(self, call: ForwardCall, projection: Tensor, z: Tensor) -> Tensor:
        """K of the gradient (g - k z) · s, given mean(g z); moves the backward state."""
        raise NotImplementedError

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """Normalize ``x``.

        Args:
            x: (..., C), channels last, at least two axes; any floating type. Statistics are in float32 or better.
            pad_mask: (...), True at padding, which is left out of the forward statistics. Ignored in eval.

        Returns:
            Of the shape and type of ``x``.

        Raises:
            ValueError: wrong shapes, or no token at all in training.
        """
        self._check(x, pad_mask)
        return self._trained(x, pad_mask) if self.training else self._inferred(x)

    @uncompiled
    def _trained(self, x: Tensor, pad_mask: Tensor | None) -> Tensor:
        if recomputing():
            call = self._calls.recall(x)
        else:
            with torch.no_grad():
                call = self._calls.remember(x, self._called(x, pad_mask))
        y: Tensor = _Normalize.apply(x, self.weight, self.bias, self, call)  # type: ignore[no-untyped-call]
        return y

    def _inferred(self, x: Tensor) -> Tensor:
        moment = self._moment()
        if moment.dtype in (torch.float16, torch.bfloat16):
            moment = moment.float()
        deviation = torch.sqrt(moment + self.eps)
        y = x / deviation if self.weight is None or self.bias is None else x * (self.weight / deviation) + self.bias
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def _called(self, x: Tensor, pad_mask: Tensor | None) -> ForwardCall:
        """Measure the batch and move the forward state."""
        iteration = self._iteration()
        before = self._before(iteration, self._forward_state)
        kind = torch.promote_types(torch.promote_types(x.dtype, torch.float32), self._moment().dtype)
        second_moment = _second_moment(x.to(kind), pad_mask, otherwise=self._moment().to(kind))
        call, after = self._measured(iteration, second_moment, {name: value.to(kind) for name, value in before.items()})
        iteration.forwards += 1
        self._settle(after, iteration.forwards, torch.isfinite(second_moment).all())
        return call

    def _iteration(self) -> Iteration:
        if self.schedule == "step" and self._open:
            if self._open[0].forwards == FORGOTTEN:
                warnings.warn(f"{FORGOTTEN} forward calls in one iteration: is normfuse.nn.step(model) called?", stacklevel=4)
            return self._open[0]
        self.iters.add_(1)
        iteration = Iteration(self.iters.clone())
        if self.schedule == "step":
            self._open.append(iteration)
        return iteration

    def _end_iteration(self) -> None:
        for iteration in self._open:
            iteration.before.clear()
        self._open.clear()

    def _before(self, iteration: Iteration, names: Iterable[str]) -> State:
        """The state at the start of the iteration, kept aside if more calls may follow in it."""
        if self.schedule == "forward":
            return {name: getattr(self, name) for name in names}
        return {name: iteration.before.setdefault(name, getattr(self, name).clone()) for name in names}

    def _settle(self, after: State, calls: int, finite: Tensor) -> None:
        """Move the state to the mean of what ``calls`` calls say; a call with inf or nan says nothing."""
        for name, value in after.items():
            state: Tensor = getattr(self, name)
            state.copy_(torch.where(finite, state + (value.to(state.dtype) - state) / calls if calls > 1 else value, state))

    def _check(self, x: Tensor, pad_mask: Tensor | None) -> None:
        if x.ndim < 2 or x.shape[-1] != self.num_features:
            raise ValueError(f"expected (..., {self.num_features}), channels last, not {tuple(x.shape)}")
        if not self.training:
            return
        if x.numel() == 0:
            raise ValueError("no token to take statistics of: the batch is empty")
        if pad_mask is not None and (pad_mask.dtype != torch.bool or pad_mask.shape != x.shape[:-1]):
            raise ValueError(
                f"pad_mask must be bool of shape {tuple(x.shape[:-1])}, not {pad_mask.dtype} of {tuple(pad_mask.shape)}"
            )


def _second_moment(x: Tensor, pad_mask: Tensor | None, otherwise: Tensor) -> Tensor:
    """Mean of x² per channel over real tokens; ``otherwise`` if all is padding."""
    if pad_mask is None:
        return x.square().flatten(0, -2).mean(0)
    real = ~pad_mask.reshape(-1, 1)
    total = torch.where(real, x.reshape(-1, x.shape[-1]), 0).square().sum(0)  # nan in the padding stays there
    count = real.sum()
    return torch.where(count > 0, total / count.clamp(min=1), otherwise)


class _Normalize(torch.autograd.Function):
    """Y = w z + b with z = x · scale; the backward asks the norm for its estimate."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: SecondMomentNorm, call: ForwardCall
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.norm, ctx.call = norm, call
        z = x.to(call.scale.dtype) * call.scale
        return (z if weight is None or bias is None else z * weight + bias).to(x.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        call: ForwardCall = ctx.call
        upstream = gradient.to(call.scale.dtype).reshape(-1, x.shape[-1])
        z = x.to(call.scale.dtype).reshape(-1, x.shape[-1]) * call.scale
        gain = call.ratio if weight is None else call.ratio * weight
        along = (upstream * z).sum(0)
        estimate = ctx.norm._estimated(call, gain * along / len(z), z)
        to_x = ((upstream * gain - estimate * z) * call.gradient_scale).reshape(x.shape).to(x.dtype)
        if weight is None:
            return to_x, None, None, None, None
        return to_x, (call.ratio * along).to(weight.dtype), upstream.sum(0).to(weight.dtype), None, None
