"""RMSNorm for eager mode: torch's numbers and state dicts, on a CPU faster than torch's own from two rows on.

On a CPU torch computes ``rms_norm`` by six operators that make up to three temporaries of the size of the input. A large
temporary beside the result costs more than the arithmetic: the C library gives it back to the system and its pages are
faulted in again at every call. Here one kernel reads the input (``vector_norm``), one writes the result and the gain is
multiplied in place. The gradient comes from the kernel behind LayerNorm's. Compiled, exported, on other devices, on tensor
subclasses and under `torch.func` the module is ``torch.rms_norm`` itself, which compilers and exporters know by name.

Reference
    Zhang, Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019, arXiv 1910.07467, equation 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WIDER = {
    torch.float16: torch.float32, torch.bfloat16: torch.float32,
    torch.float32: torch.float32, torch.float64: torch.float64,
}  # fmt: skip
"""What a statistic of each dtype is accumulated in; other dtypes are torch's business."""

LONGEST = 16384
"""Entries of a row up to which the sum of squares is right to three roundings; ``vector_norm`` adds without cascading."""


class RMSNorm(nn.RMSNorm):
    """y = x / √(mean(x²) + ε) ⊙ w over the last axes; `torch.nn.RMSNorm`, faster on a CPU in eager mode.

    Half precisions accumulate in float32, as torch's do. Gradients of any order, forward-mode gradients, `torch.func`,
    autocast, torch.compile, torch.export and ONNX work as with torch's module; exported it is one ``rms_norm`` operator.
    Over more than one axis, over columns and over very long rows it is torch's module. A few rows at a time are bound by the
    number of operators, which is five here and one in LayerNorm: ``docs/rms_norm.md`` has the table.

    Args:
        normalized_shape: sizes of the last axes, as of `torch.nn.RMSNorm`.
        eps: ε, added to the mean of squares; None for the machine epsilon of the dtype that is accumulated in.
        elementwise_affine: whether it has a gain ``weight`` of ``normalized_shape``, initialised to ones.
        device: where the gain is.
        dtype: of the gain.

    Shape:
        x of (..., *normalized_shape); the result is like x.

    Raises:
        RuntimeError: the last axes of x are not ``normalized_shape``.

    Example:
        >>> RMSNorm(8)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``."""
        if not is_fast_on(x) or (x.shape[-1],) != self.normalized_shape:
            return super().forward(x)
        weight, kind = self.weight, WIDER[x.dtype]
        wide = x if x.dtype == kind else x.to(kind)
        eps = torch.finfo(kind).eps if self.eps is None else self.eps
        if torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad)):
            y: Tensor = _Differentiable.apply(wide, None if weight is None else weight.to(kind), eps)  # type: ignore[no-untyped-call]
        else:
            scale = inverse_rms(wide, eps)
            y = wide * scale if wide is x else wide.mul_(scale)
            if weight is not None:
                y.mul_(weight)
        return y if wide is x else y.to(x.dtype)


def is_fast_on(x: Tensor) -> bool:
    """Whether ``x`` is a plain tensor on a CPU, rows in one piece, that nobody traces, compiles or maps over."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and x.ndim > 0
        and x.dtype in WIDER
        and 0 < x.shape[-1] <= LONGEST
        and x.stride(-1) == 1  # across columns it is neither faster nor as exact
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()  # an operand may be mapped over: nothing in place
    )


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / √(mean(x²) + ε) of every row, with a last axis of size one."""
    return inverse_root([torch.linalg.vector_norm(x, 2, -1, True)], x.shape[-1], eps)


def inverse_root(sums: list[Tensor], size: int, eps: float) -> Tensor:
    """1 / √(Σ s² / size + ε) over tensors s of one shape, which are kept, in as few operators as there are."""
    total = _scalar(eps, sums[0].dtype)
    for each in sums:
        total = torch.addcmul(total, each, each, value=1 / size)
    return total.rsqrt_()


_SCALARS: dict[tuple[float, torch.dtype], Tensor] = {}


def _scalar(value: float, dtype: torch.dtype) -> Tensor:
    """A tensor of no axes, made once: ``add`` of a Python number costs as much again as the addition."""
    kept = _SCALARS.get((value, dtype))
    if kept is None:
        kept = torch.tensor(value, dtype=dtype, device="cpu")
        if type(kept) is Tensor:  # and not a fake one of somebody's mode
            _SCALARS[value, dtype] = kept
    return kept


class _Differentiable(torch.autograd.Function):
    """x / RMS ⊙ weight and its gradients.

    With r = 1 / RMS and h = g ⊙ w:  ∂x = r h - r³ x mean(h x),  ∂w = Σ g x r  (Zhang & Sennrich, §4.1). LayerNorm's backward
    kernel takes its mean and r as arguments: for a mean of zero it gives ∂w, and ∂x less the r mean(h) that is added here.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        scale = inverse_rms(x, eps)
        y = x * scale
        ctx.save_for_backward(x, weight, scale)
        ctx.save_for_forward(x, weight, scale)
        ctx.eps = eps
        return y if weight is None else y.mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, scale = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            return *_differentiable_gradients(x, weight, ctx.eps, grad, wanted), None
        scale = scale.contiguous()  # the kernel takes it for a list of rows
        shape = [x.shape[-1]]
        by_x, by_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, shape, torch.zeros_like(scale), scale, weight, None, [*wanted, False]
        )
        if wanted[0]:
            # `mv` and not `@`: autocast would round that
            total = grad.sum(-1) if weight is None else grad.reshape(-1, *shape).mv(weight)
            by_x.add_(total.view_as(scale).mul_(scale), alpha=1 / x.shape[-1])
        return by_x if wanted[0] else None, by_weight if wanted[1] else None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        by_x, by_weight, _ = tangents
        x, weight, scale = ctx.saved_tensors
        unscaled, y = x * scale, torch.zeros_like(x)
        if by_x is not None:
            moved = (by_x - unscaled * (unscaled * by_x).mean(-1, keepdim=True)) * scale
            y = moved if weight is None else moved * weight
        return y if by_weight is None else y + unscaled * by_weight


def _differentiable_gradients(
    x: Tensor, weight: Tensor | None, eps: float, grad: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients by operators that have gradients themselves."""
    y = nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)
    asked = [each for each, want in zip((x, weight), wanted, strict=True) if want and each is not None]
    given = iter(torch.autograd.grad(y, asked, grad, create_graph=True))
    return next(given) if wanted[0] else None, next(given) if wanted[1] else None
