"""RepBN, and the progressive change from LayerNorm to it.

Reference
    Guo et al., "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch
    Normalization", ICML 2024, arXiv 2405.11582. The formulas are those of its published code, and so are the names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.nn.counting import Calls, Counted, IterationEnd, batch_norm, recomputing, uncompiled


class RepBN(nn.Module):
    """BN(x) + α x over the last axis, with α learned (η in the paper).

    At inference it is the scale γ/√(σ² + ε) + α and the shift β - γ μ/√(σ² + ε).

    Args:
        num_features: channels C.
        alpha: where α starts: 1 for images, 0 in the authors' LLaMA.
        eps: of the BatchNorm.
        momentum: of the BatchNorm, share of the NEW value; None: cumulative average.
        zero_init: start the BatchNorm's gain and shift at 0, as the authors' LLaMA does.
        device: where its tensors are.
        dtype: of its parameters and running statistics.

    Shape:
        x of (B, C) or (B, ..., C), channels last; pad_mask of the same without C, True at padding. The result is like x.
        With a mask, training takes statistics of real tokens only and gives x + α x at padding, as published; eval
        ignores it.

    Training
        Running statistics move once per forward call, as torch's BatchNorm, and not in the recomputation of activation
        checkpointing. Under gradient accumulation they move once per part of the batch: `normfuse.nn.recalibrate` sets them
        right at the end.

    Raises:
        ValueError: wrong shapes, or a single value per channel in training.
    """

    def __init__(
        self,
        num_features: int,
        alpha: float = 1.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        zero_init: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.alpha = nn.Parameter(torch.full((1,), alpha, device=device, dtype=dtype or torch.get_default_dtype()))
        self.bn = nn.BatchNorm1d(num_features, eps=eps, momentum=momentum, device=device, dtype=dtype)
        if zero_init:
            nn.init.zeros_(self.bn.weight)

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """Normalize ``x``."""
        if x.ndim < 2 or x.shape[-1] != self.num_features:
            raise ValueError(f"expected (batch, ..., {self.num_features}), channels last, not {tuple(x.shape)}")
        alpha = self.alpha if self.alpha.dtype == x.dtype else self.alpha.to(x.dtype)
        if pad_mask is None or not self.training:
            return self._normalized(x) + alpha * x
        if pad_mask.dtype != torch.bool or pad_mask.shape != x.shape[:-1]:
            raise ValueError(
                f"pad_mask must be bool of shape {tuple(x.shape[:-1])}, not {pad_mask.dtype} of {tuple(pad_mask.shape)}"
            )
        real = ~pad_mask
        return x.masked_scatter(real[..., None], batch_norm(self.bn, x[real])) + alpha * x

    def _normalized(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return batch_norm(self.bn, x)
        tokens = x if x.ndim == 3 else x.flatten(1, -2)
        y = batch_norm(self.bn, tokens.transpose(1, 2)).transpose(1, 2)
        return y if x.ndim == 3 else y.reshape(x.shape)


class PRepBN(Counted):
    """λ LN(x) + (1 - λ) RepBN(x) in training, with λ going from ``r0`` to 0; RepBN alone in eval.

    For ``warmup`` iterations only LN is used and RepBN is not run. Then λ = r0 · iter / total, where ``iter`` counts down from
    ``total`` and is lowered after λ is taken, and stays 0 from there on. Eval does not know λ: before λ is 0 it shows a
    RepBN that has not been trained to stand alone. Exporting such a model is refused; evaluating it is not.

    Args:
        normalized_shape: channels C, or a sequence of that one number.
        warmup: iterations with LN alone.
        total: iterations from λ = r0 to λ = 0; 0: RepBN from the start. The authors take 60,000 to 300,000 of a training
            four to five times as long. One report of a shorter one ended in nan.
        r0: λ at first.
        schedule: "forward": every forward call in training counts, as published, so that gradient accumulation and double
            forwards burn λ faster. "step": `step` counts; call `normfuse.nn.step(model)` after the optimizer's step.
        alpha: where RepBN's α starts.
        zero_init: whether RepBN's gain and shift start at 0.
        eps: of the BatchNorm.
        momentum: of the BatchNorm, share of the NEW value.
        norm: makes the norm to start from, given C: a LayerNorm with eps 1e-6 as in the authors' DeiT, PVT and Swin; their
            LLaMA takes an RMSNorm.
        device: where its tensors are; ``norm`` makes its own.
        dtype: of its parameters and running statistics; ``norm`` makes its own.

    Shape:
        As `RepBN`.

    Buffers:
        warm, iter and total_step, scalars; norm1 is LN, norm2 is RepBN.

    Training
        A recomputation under activation checkpointing uses the λ of the first run and is not counted. While warming up
        RepBN gets no gradient: DistributedDataParallel needs ``find_unused_parameters=True`` for that long. At λ = 0 LN is
        still computed, so that its parameters have gradients (of 0).

    Raises:
        ValueError: more than one axis, or a negative count.
        RuntimeError: exported, or traced, before λ is 0 or in training mode.
    """

    warm: Tensor
    iter: Tensor
    total_step: Tensor

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        warmup: int = 0,
        total: int = 300_000,
        r0: float = 1.0,
        schedule: IterationEnd = "forward",
        *,
        alpha: float = 1.0,
        zero_init: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        norm: Callable[[int], nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(schedule)
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if len(shape) != 1 or warmup < 0 or total < 0:
            raise ValueError(f"one axis and counts that are not negative, not {shape}, warmup={warmup}, total={total}")
        self.num_features, self.r0 = shape[0], r0
        self.register_buffer("warm", torch.tensor(warmup, device=device))
        self.register_buffer("iter", torch.tensor(total, device=device))
        self.register_buffer("total_step", torch.tensor(total, device=device))
        layer_norm = partial(nn.LayerNorm, eps=1e-6, device=device, dtype=dtype)
        self.norm1 = (norm or layer_norm)(shape[0])
        self.norm2 = RepBN(shape[0], alpha, eps, momentum, zero_init=zero_init, device=device, dtype=dtype)
        self._calls: Calls[tuple[int, Tensor]] = Calls()
        self._known: tuple[int, int, int] = (warmup, total, total)
        self._seen: tuple[Any, ...] = ()

    @property
    def share(self) -> float:
        """λ of the next forward in training: 1 while warming up (and LN is used alone)."""
        warm, left, total = self._counters()
        return 1.0 if warm else self.r0 * left / max(total, 1)

    @property
    def ready_to_deploy(self) -> bool:
        """Whether λ has reached 0, so that eval shows what was trained."""
        warm, left, _ = self._counters()
        return warm == 0 and left == 0

    def check_deployable(self) -> None:
        """Do nothing if λ is 0.

        Raises:
            RuntimeError: it is not.
        """
        self._counters()
        self._refuse_unfinished()

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """Normalize ``x``; see `RepBN.forward`."""
        if torch.compiler.is_exporting() or (not torch.compiler.is_compiling() and torch._C._is_tracing()):
            self._refuse_unfinished()
        if not self.training:
            y: Tensor = self.norm2(x)
            return y
        warming, part = self._used(x)
        before = self.norm1(x)
        mixed: Tensor = before if warming else part * before.to(x.dtype) + (1 - part) * self.norm2(x, pad_mask)
        return mixed

    @uncompiled
    def _used(self, x: Tensor) -> tuple[int, Tensor]:
        """Whether this call is warm-up, and λ; counts it."""
        if self.schedule == "forward" and recomputing():
            return self._calls.recall(x)
        warm, left, total = self._counters()
        used = (warm, torch.tensor(self.r0 * left / max(total, 1), dtype=torch.promote_types(x.dtype, torch.float32)))
        if self.schedule == "forward":
            self._count()
            self._calls.remember(x, used)
        return used

    def _end_iteration(self) -> None:
        self._count()

    def _count(self) -> None:
        warm, left, total = self._counters()
        if warm:
            self.warm.sub_(1)
            warm -= 1
        elif left:
            self.iter.sub_(1)
            left -= 1
        self._known, self._seen = (warm, left, total), self._stamp()

    def _counters(self) -> tuple[int, int, int]:
        """Warm, iter and total as numbers; read from the device only if somebody else has written them."""
        if self._seen != self._stamp():
            self._known, self._seen = (int(self.warm), int(self.iter), int(self.total_step)), self._stamp()
        return self._known

    def _stamp(self) -> tuple[Any, ...]:
        return tuple((id(each), each._version) for each in (self.warm, self.iter, self.total_step))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if not self.iter.is_meta:
            self._seen = ()
            self._counters()

    def _refuse_unfinished(self) -> None:
        """Raise unless λ is 0, by the numbers last read: an exporter hides the tensors."""
        warm, left, total = self._known
        if warm or left:
            raise RuntimeError(
                f"this PRepBN is not ready to deploy: {warm} iterations of warm-up are left, and then {left} of {total} "
                "until λ is 0. In eval it is RepBN alone, which has not been trained to stand alone yet. Train on; or, if warm "
                "and iter were set by hand, call check_deployable() first"
            )
        if self.training:
            raise RuntimeError("this PRepBN is in training mode: call model.eval() before exporting")

    def extra_repr(self) -> str:
        """The hyper-parameters."""
        return f"{self.num_features}, total={self._known[2]}, r0={self.r0}, schedule={self.schedule}"
