r"""LayerNorm on its way out: its deviation σ is first measured, then a stored number, and the norm is a linear map.

Reference
    Baroni, Khara, Schaeffer, Subkhankulov, Heimersheim: "Transformers Don't Need LayerNorm at Inference Time: Scaling LayerNorm
    Removal to GPT-2 XL and the Implications for Mechanistic Interpretability", arXiv 2507.02559, 2025, §3: FakeLN(x) =
    (x - mean x)/σ ⊙ γ + β with a scalar σ, which replaces LN(x) = (x - mean x)/√(var x + ε) ⊙ γ + β.

What the published code gets wrong, and this does not:
    Without a bias its fake branch returns γ ⊙ x, neither centred nor divided. Its running mean of σ moves in evaluation too,
    and two or three times per batch, because the paths of attention each call the norm. Unless two environment variables say
    otherwise, σ stays at a number measured in another way. The first token's σ is, in an earlier version, a vector as long as
    the channels, so that the first channel of every token gets it.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.nn.counting import recomputing

Path: TypeAlias = Literal["main", "values"]
"""Who reads a norm: the values of an attention, or everybody else (its queries and keys, an MLP, a head)."""
PATHS: tuple[Path, ...] = ("main", "values")


class FakeLayerNorm(nn.Module):
    r"""(x - mean x)/σ ⊙ γ + β over the last axis; until a path is removed, LayerNorm for that path.

    It begins as LayerNorm and keeps a running mean of √(var x + ε) while it trains: once per forward call, not in evaluation,
    and not when activation checkpointing repeats a call. `remove` stores that mean as σ, one for both paths, and makes a path
    fake. Once both are, the module is plain arithmetic with stored numbers, and the pass `strip_layernorm` folds it away.

    Which path somebody is on is not the norm's business: while the two differ, `forward` returns the main path's value, and
    `take_values` gives the other one to those that read values (`normfuse.stripping` arranges that).

    Args:
        normalized_shape: channels d, the last axis.
        eps: of the LayerNorm that it replaces; part of σ.
        elementwise_affine: whether it has ``weight`` and ``bias``.
        bias: whether it has ``bias``.
        momentum: share of the OLD value that the running mean keeps per forward call, as published: 0.9.
        first_token: whether the first token (index 0 of the axis before the last) has a σ of its own. Such a norm is no weight
            fold; `remove_first` gives that token the σ of the others.
        device: where its tensors are.
        dtype: of gain and shift. σ is at least float32.

    Shape:
        (..., d), with first_token (..., tokens, d); the result is like the input.

    Buffers:
        sigma, running_sigma, first_sigma, running_first: scalars; zero until they are measured. The state dict has besides an
        ``_extra_state`` of which paths are removed, so that a checkpoint from the middle of a removal goes on as it was.

    Raises:
        ValueError: ``normalized_shape`` is not one positive size, or ``momentum`` not in [0, 1).
        RuntimeError: a path is removed before σ was measured.

    Example:
        >>> norm = FakeLayerNorm(8)
        >>> _ = norm(torch.randn(2, 5, 8))
        >>> norm.remove()
        >>> norm.is_removed
        True
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    sigma: Tensor
    running_sigma: Tensor
    first_sigma: Tensor
    running_first: Tensor

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        momentum: float = 0.9,
        *,
        first_token: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(normalized_shape, int) or normalized_shape < 1 or not 0 <= momentum < 1:
            raise ValueError(f"one positive size and a momentum in [0, 1), not {normalized_shape} and {momentum}")
        self.normalized_shape, self.eps, self.momentum = (normalized_shape,), eps, momentum
        self.first_token = first_token
        self.removed: frozenset[Path] = frozenset()
        self.readers_of_values = 0
        self._pending: tuple[Tensor, Tensor, int] | None = None
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(normalized_shape, **made)) if elementwise_affine else None
        self.bias = nn.Parameter(torch.zeros(normalized_shape, **made)) if elementwise_affine and bias else None
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for name in ("sigma", "running_sigma", "first_sigma", "running_first"):
            self.register_buffer(name, torch.zeros((), device=device, dtype=wide))

    @property
    def is_removed(self) -> bool:
        """Whether nothing of LayerNorm is left: σ is stored for every path."""
        return self.removed == frozenset(PATHS)

    def remove(self, *paths: Path) -> None:
        """Store the running mean as σ and let these paths, or both, divide by it from now on."""
        if not self.running_sigma.is_meta and not bool(self.running_sigma > 0):
            raise RuntimeError("σ was never measured: run the model in training mode, or calibrate, before a norm is removed")
        self.sigma.copy_(self.running_sigma)
        self.first_sigma.copy_(self.running_first)
        self.removed |= frozenset(paths or PATHS)

    def remove_first(self) -> None:
        """Give the first token the σ of all others."""
        self.first_token = False

    def forward(self, x: Tensor) -> Tensor:
        """The main path's value of ``x``."""
        if not self.is_removed and self.training and not recomputing():
            self._measure(x.detach())
        value = self._value(x, "main")
        split = self.readers_of_values > 0 and len(self.removed) == 1
        self._pending = (value, self._value(x, "values"), self.readers_of_values) if split else None
        return value

    def take_values(self, value: Tensor) -> Tensor | None:
        """The values' path of what `forward` returned, for one of its readers; None where the two do not differ.

        Raises:
            RuntimeError: ``value`` is not what the last call returned, so that nothing is known of its other path.
        """
        if len(self.removed) != 1:
            return None
        if self._pending is None or self._pending[0] is not value:
            raise RuntimeError(
                "something stands between the norm and the layer that makes values of it: remove both paths at once"
            )
        main, values, left = self._pending
        self._pending = (main, values, left - 1) if left > 1 else None
        return values

    def _value(self, x: Tensor, path: Path) -> Tensor:
        if path not in self.removed:
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        sigma = self.sigma
        if self.first_token:
            is_first = torch.arange(x.shape[-2], device=x.device) == 0
            sigma = torch.where(is_first, self.first_sigma, self.sigma).unsqueeze(-1)
        y = (wide - wide.mean(-1, keepdim=True)) / sigma
        y = y if self.weight is None else y * self.weight
        y = y if self.bias is None else y + self.bias
        return y if y.dtype == x.dtype or torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)

    @torch.no_grad()
    def _measure(self, x: Tensor) -> None:
        sigma = deviation(x, self.eps)
        first = self.first_token and x.dim() > 1 and x.shape[-2] > 1
        others = sigma[..., 1:] if first else sigma
        for running, new in ((self.running_sigma, others.mean()), (self.running_first, sigma[..., :1].mean())):
            if running is self.running_sigma or first:
                mixed = self.momentum * running + (1 - self.momentum) * new
                running.copy_(torch.where(running > 0, mixed, new))

    def get_extra_state(self) -> Tensor:
        """Which paths are removed, and whether the first token has a σ of its own, as numbers: safetensors knows no others."""
        return torch.tensor([*(path in self.removed for path in PATHS), self.first_token], dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what `get_extra_state` gave."""
        *removed, first = (bool(each) for each in state)
        self.removed = frozenset(path for path, is_removed in zip(PATHS, removed, strict=True) if is_removed)
        self.first_token = first

    def extra_repr(self) -> str:
        """Channels and what is removed."""
        return f"{self.normalized_shape[0]}, eps={self.eps}, removed={sorted(self.removed)}, sigma={self.sigma.item():.4g}"


def deviation(x: Tensor, eps: float) -> Tensor:
    """√(var x + ε) over the last axis, in float32 at least: what LayerNorm divides each token by."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return (wide.var(-1, correction=0) + eps).sqrt()
