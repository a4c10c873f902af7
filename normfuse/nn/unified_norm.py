"""Unified Normalization: LayerNorm's place, a constant at inference.

Reference
    Yang et al., "Unified Normalization for Accelerating and Stabilizing Transformers", ACM MM 2022, arXiv 2208.01313. The
    formulas are those of its published code, and so are the names of the buffers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normfuse.nn.counting import IterationEnd
from normfuse.nn.second_moment import ForwardCall, Iteration, SecondMomentNorm, State


class UnifiedNorm(SecondMomentNorm):
    r"""y = w x / √(v + ε) + b per channel, with v the mean of x² over several batches; no mean is subtracted.

    In training v is the batch's own until the warm-up is over, then the geometric mean over a window of batches. At inference
    it is ``running_var`` (a second moment, in spite of its published name), so that the norm is a constant scale and shift.

    Args:
        num_features: channels C.
        eps: added to the second moment.
        momentum: share of the OLD value that the running statistics keep: 0.9 here is 0.1 in torch's BatchNorm.
        window_size: batches M that statistics are taken over; an int, or one for the forward and one for the backward.
            With 1 in the forward every batch uses its own statistics.
        warmup_iters: iterations with the batch's own statistics. Before fine-tuning, set ``iters`` to 0 to warm up again.
        outlier_filtration: take a batch out of the window when its statistics are far from the window's. The authors leave
            it off for language and on for images.
        affine: whether it has ``weight`` and ``bias``.
        schedule: what an iteration is. "forward": every forward call in training, as published. "step": all calls between
            two calls of `normfuse.nn.step`, so that gradient accumulation counts once: the state then becomes the mean of
            what each call would have made of it.
        device: where its tensors are.
        dtype: of its parameters and running statistics.

    Shape:
        x of (..., C), pad_mask of (...) with True at padding; the result is like x.

    Buffers:
        running_var (C), ema_gz (C), iters (1), buffer_x2 (M forward, C), buffer_gz (M backward, C), skip_counter (1).

    Training
        * Activation checkpointing counts once: the recomputation uses what the first run used.
        * Mixed precision: statistics and sums are in float32 or better, also for half inputs. A batch whose statistics are
          inf or nan shows it in its output, but leaves all state as it was; so does a backward with inf or nan in it. The
          gradient estimate is as large as the loss is scaled, so after a change of a GradScaler's scale it takes some ten
          iterations to follow; bfloat16 needs no scaler.
        * A second backward through one forward (``retain_graph=True``) adds its part to the estimate: two losses one after
          the other are what their sum is. ``create_graph=True`` raises: the gradient is an estimate, it has no derivative.
        * Statistics are not averaged over processes.
        * torch.compile leaves the forward in training to Python, and compiles what is around it.
        * The module may be cast to a half type for inference; train it in float32, or its running statistics are rounded.

    Raises:
        ValueError: a size or factor is out of its range.

    Example:
        >>> norm = UnifiedNorm(8)
        >>> norm(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    _forward_state = ("buffer_x2", "running_var")
    _backward_state = ("buffer_gz", "ema_gz")
    running_var: Tensor
    ema_gz: Tensor
    buffer_x2: Tensor
    buffer_gz: Tensor
    skip_counter: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.9,
        window_size: int | tuple[int, int] = 4,
        warmup_iters: int = 4000,
        outlier_filtration: bool = False,
        affine: bool = True,
        *,
        schedule: IterationEnd = "forward",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, schedule, device, dtype)
        forward, backward = (window_size, window_size) if isinstance(window_size, int) else window_size
        if forward < 1 or backward < 1 or warmup_iters < 0 or not 0 <= momentum < 1:
            raise ValueError(
                "windows hold at least one batch, warmup_iters is not negative and momentum is in [0, 1): "
                f"window_size={window_size}, warmup_iters={warmup_iters}, momentum={momentum}"
            )
        self.momentum, self.window_size = momentum, (forward, backward)
        self.warmup_iters, self.outlier_filtration = warmup_iters, outlier_filtration
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_buffer("running_var", torch.ones(num_features, **made))
        self.register_buffer("ema_gz", torch.zeros(num_features, **made))
        self.register_buffer("buffer_x2", torch.zeros(forward, num_features, **made))
        self.register_buffer("buffer_gz", torch.zeros(backward, num_features, **made))
        self.register_buffer("skip_counter", torch.zeros(1, dtype=torch.long, device=device))

    def extra_repr(self) -> str:
        """The hyper-parameters."""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, window_size={self.window_size}, "
            f"warmup_iters={self.warmup_iters}, outlier_filtration={self.outlier_filtration}, "
            f"affine={self.weight is not None}, schedule={self.schedule}"
        )

    def _moment(self) -> Tensor:
        return self.running_var

    def _measured(self, iteration: Iteration, second_moment: Tensor, before: State) -> tuple[ForwardCall, State]:
        t, size, old = iteration.number, self.window_size[0], before["running_var"]
        window = _with_row(before["buffer_x2"], t, second_moment)
        smoothed = window.log().mean(0).exp()
        skip, row = torch.full_like(t, size == 1, dtype=torch.bool), second_moment
        if self.outlier_filtration and size > 1:
            spread = before["buffer_x2"].sqrt().var()  # one number: over batches and channels
            far = ((window.mean(0) - smoothed) > spread * size).any()
            skip = far & (t >= self.warmup_iters)
            row = torch.where(skip, old, second_moment)
            self.skip_counter.add_(skip)
        moment = torch.where((t <= size) | (t < self.warmup_iters) | skip, second_moment, smoothed)
        deviation = torch.sqrt(moment + self.eps)
        early = (t <= max(1000, self.warmup_iters)) | skip
        ratio = torch.where(early, 1.0, (deviation / torch.sqrt(old + self.eps)).clamp(1 / 5, 5))
        after = {
            "buffer_x2": _with_row(before["buffer_x2"], t, row),
            "running_var": self.momentum * old + (1 - self.momentum) * moment,
        }
        return ForwardCall(iteration, 1 / deviation, 1 / deviation, ratio, skip), after

    def _estimated(self, call: ForwardCall, projection: Tensor, z: Tensor) -> Tensor:
        t, size, iteration = call.iteration.number, self.window_size[1], call.iteration
        own = (t <= size) | (t < self.warmup_iters) | call.skip
        finite = torch.isfinite(projection).all()
        if call.counted:
            return self._estimated_again(call, projection, own, finite)
        before = self._before(iteration, self._backward_state)
        old = before["ema_gz"].to(projection.dtype)
        window = _with_row(before["buffer_gz"].to(projection.dtype), t, torch.where(call.skip, old, projection))
        average = self.momentum * old + (1 - self.momentum) * torch.where(own, projection, window.mean(0))
        iteration.backwards += 1
        call.counted = True
        self._settle({"buffer_gz": window, "ema_gz": average}, iteration.backwards, finite)
        return torch.where(call.skip, projection, average)

    def _estimated_again(self, call: ForwardCall, projection: Tensor, own: Tensor, finite: Tensor) -> Tensor:
        """A further gradient of the same forward: what it adds, as all of this is linear in the gradient."""
        part = (1 - self.momentum) * torch.where(own, projection, projection / self.window_size[1])
        share = torch.where(finite, 1 / call.iteration.backwards, 0.0)
        row = torch.where(call.skip | ~finite, 0.0, projection * share)
        self.buffer_gz.index_add_(0, call.iteration.number % self.window_size[1], row[None].to(self.buffer_gz.dtype))
        self.ema_gz.add_(torch.where(finite, part * share, 0.0))
        return torch.where(call.skip, projection, part)


def _with_row(window: Tensor, t: Tensor, row: Tensor) -> Tensor:
    """The window with the row of iteration ``t`` replaced."""
    return window.index_copy(0, t % len(window), row[None])
