"""Weights that are computed from parameters on the fly, and never kept: live mode's arithmetic.

A `Formed` weight stands for W' = f(W, γ, …). Where a linear layer or a convolution reads it, the layer runs as one autograd
function that keeps its input and the parameters, not W', and forms W' again when gradients want it: what is saved for
backward is what a layer with a stored weight saves. Any other reader gets W' as an ordinary tensor.

    layer           forward          backward, with G = ∂L/∂Y
    linear, addmm   Y = XWᵀ + b      ∂X = GW, ∂W = GᵀX, ∂b = Σ G
    convolutions    aten.convolution aten.convolution_backward

The formula's own gradients (∂W = a⊙∂W', …; ConvBN paper, §3) are autograd's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from normfuse.errors import NormfuseError
from normfuse.formula import Formula, formed

aten = torch.ops.aten


@dataclass(frozen=True)
class Recipe:
    """How a tensor is formed.

    Attributes:
        formula: what to compute.
        names: the tensors that it reads, in the order in which they are given.
        like: the attribute, of the module that reads the result, whose dtype the result takes.
    """

    formula: Formula
    names: tuple[str, ...]
    like: str

    def form(self, leaves: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The value, computed in float32 at least and rounded once to the dtype."""
        with _without_autocast(leaves[0]):
            return formed(self.formula, dict(zip(self.names, leaves, strict=True)).__getitem__, _wide(leaves)).to(dtype)

    def differentiable(self, leaves: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The value; gradients reach the leaves, and nothing but the leaves is kept for them."""
        if all(each.dtype == _wide(leaves) for each in leaves) or not torch.is_grad_enabled():
            return self.form(leaves, dtype)  # products keep their operands, which are the leaves themselves
        value: Tensor = _Form.apply(self, dtype, *leaves)  # type: ignore[no-untyped-call]
        return value


def _without_autocast(like: Tensor) -> contextlib.AbstractContextManager[Any]:
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()


def _autocasts(like: Tensor) -> bool:
    kind = like.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _wide(leaves: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(each.dtype == torch.float64 for each in leaves) else torch.float32


class _Form(torch.autograd.Function):
    """A formula of tensors in half precision: its wide copies of them are made again rather than kept."""

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, dtype: torch.dtype, *leaves: Tensor) -> Tensor:
        ctx.recipe, ctx.dtype = recipe, dtype
        ctx.save_for_backward(*leaves)
        return recipe.form(leaves, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        leaves, again = ctx.saved_tensors, torch.is_grad_enabled()
        needed = ctx.needs_input_grad[2:]
        wanted = [leaf for leaf, each in zip(leaves, needed, strict=True) if each]
        with torch.enable_grad():
            value = ctx.recipe.form(leaves, ctx.dtype)
        found = iter(torch.autograd.grad(value, wanted, gradient, create_graph=again))
        return None, None, *(next(found) if each else None for each in needed)


class Formed(Tensor):
    """A tensor that a module reads in place of its parameter; it is computed anew at every read, so it is not written to.

    Attributes:
        plain: the value as an ordinary tensor.
        recipe: how it was formed.
        leaves: from what it was formed.
    """

    plain: Tensor
    recipe: Recipe
    leaves: tuple[Tensor, ...]

    @staticmethod
    def of(recipe: Recipe, leaves: Sequence[Tensor], dtype: torch.dtype) -> Formed:
        """The tensor that a recipe gives."""
        plain = recipe.differentiable(leaves, dtype)
        self = plain.detach().as_subclass(Formed)
        self.plain, self.recipe, self.leaves = plain, recipe, tuple(leaves)
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Layers run without keeping the weight; everything else sees an ordinary tensor."""
        kwargs = kwargs or {}
        if func in _CALLS and torch.is_grad_enabled():
            found = _CALLS[func](*args, **kwargs)
            if found is not None and isinstance(found.weight, Formed):
                return found.run()
        if _writes(func) and args and isinstance(args[0], Formed):
            raise NormfuseError(
                "this weight is computed from the model's parameters at every read, so writing to it has no effect",
                hint="write to the parameter, dict(model.named_parameters())[name], or call normfuse.restore(model) first",
            )
        args, kwargs = pytree.tree_map_only(Formed, lambda each: each.plain, (args, kwargs))
        return func(*args, **kwargs)


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in ("__set__", "__setitem__", "__iadd__", "__imul__")


# -- layers that keep no weight ----------------------------------------------------------------------------------------

Mask: TypeAlias = tuple[bool, bool, bool]
Gradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class _Linear:
    """Y = XWᵀ + b, or XW + b with the weight transposed (GPT-2's Conv1D)."""

    transposed: bool

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.transposed and bias is not None:
            return torch.addmm(bias, x, weight)
        return F.linear(x, weight, bias)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, mask: Mask) -> Gradients:
        rows = grad.reshape(-1, grad.shape[-1])
        into = None
        if mask[0]:
            into = grad @ (weight.T if self.transposed else weight)
        if not mask[1]:
            of_weight = None
        else:
            flat = x.reshape(-1, x.shape[-1])
            of_weight = flat.T @ rows if self.transposed else rows.T @ flat
        return into, of_weight, rows.sum(0) if mask[2] else None


@dataclass(frozen=True)
class _Convolution:
    """A convolution or a transposed one, in one, two or three dimensions."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @property
    def _settings(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = aten.convolution(x, weight, bias, *self._settings)
        return y

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, mask: Mask) -> Gradients:
        channels = [grad.shape[1]] if mask[2] else None
        found: Gradients = aten.convolution_backward(grad, x, weight, channels, *self._settings, list(mask))
        return found


class _WithoutWeight(torch.autograd.Function):
    """A layer that keeps its input and its weight's parameters, and forms the weight again for the input's gradient."""

    @staticmethod
    def forward(
        ctx: Any, layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe, *leaves: Tensor
    ) -> Tensor:
        _, into, of_weight, *_ = ctx.needs_input_grad
        ctx.layer, ctx.recipe, ctx.dtype, ctx.sizes = layer, recipe, weight.dtype, (x.shape, weight.shape)
        ctx.save_for_backward(*((x,) if of_weight else ()), *(leaves if into else ()))
        if _autocasts(x):
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        with _without_autocast(x):
            return layer.forward(x, weight, bias)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        _, into, of_weight, of_bias, *others = ctx.needs_input_grad
        saved = list(ctx.saved_tensors)
        # where a gradient does not need an operand, its shape alone is asked for
        x = saved.pop(0) if of_weight else grad.new_empty(()).expand(ctx.sizes[0])
        weight = grad.new_empty(()).expand(ctx.sizes[1])
        if into:
            weight = ctx.recipe.differentiable(saved, ctx.dtype).to(grad.dtype)
        with _without_autocast(grad):
            found = ctx.layer.backward(grad, x, weight, (into, of_weight, of_bias))
        return None, *found, None, *(None for _ in others[1:])


def _plain(value: Any) -> Any:
    return value.plain if isinstance(value, Formed) else value


@dataclass(frozen=True)
class _Call:
    """A call of a layer whose weight may be a formed one."""

    layer: _Linear | _Convolution
    x: Tensor
    weight: Any
    bias: Any
    batched: bool = True

    def run(self) -> Tensor:
        x, bias = _plain(self.x), _plain(self.bias)
        x = x if self.batched else x.unsqueeze(0)
        if _autocasts(x) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        w = self.weight
        y: Tensor = _WithoutWeight.apply(self.layer, x, w.plain, bias, w.recipe, *w.leaves)  # type: ignore[no-untyped-call]
        return y if self.batched else y.squeeze(0)


def _linear(input: Tensor, weight: Any, bias: Any = None) -> _Call | None:  # the names that callers use as keywords
    return _Call(_Linear(False), input, weight, bias)


def _addmm(input: Any, mat1: Tensor, mat2: Any, *, beta: Any = 1, alpha: Any = 1, out: Any = None) -> _Call | None:
    usual = beta == 1 and alpha == 1 and out is None and input.dim() == 1 and input.shape[0] == _plain(mat2).shape[1]
    return _Call(_Linear(True), mat1, mat2, input) if usual else None


def _conv(
    input: Tensor, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> _Call | None:
    sizes = _plain(weight).shape
    n = len(sizes) - 2
    stride, dilation = _each(stride, n), _each(dilation, n)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        totals = [d * (size - 1) for d, size in zip(dilation, sizes[2:], strict=True)]
        if any(total % 2 for total in totals):  # one more on the right, as aten does
            input = F.pad(input, [each for total in reversed(totals) for each in (0, total % 2)])
        padding = [total // 2 for total in totals]
    layer = _Convolution(stride, _each(padding, n), dilation, False, (0,) * n, groups)
    return _Call(layer, input, weight, bias, input.dim() == len(sizes))


def _conv_transpose(
    input: Tensor,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> _Call | None:
    n = _plain(weight).dim() - 2
    stride, padding, dilation, more = (_each(value, n) for value in (stride, padding, dilation, output_padding))
    return _Call(_Convolution(stride, padding, dilation, True, more, groups), input, weight, bias, input.dim() == n + 2)


def _each(value: Any, n: int) -> tuple[int, ...]:
    """A setting for each spatial axis."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values


_CALLS: dict[Any, Callable[..., _Call | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d), _conv),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _conv_transpose),
}
