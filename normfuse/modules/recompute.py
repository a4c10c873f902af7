"""Weights that are computed from parameters on the fly, and never kept: live mode's arithmetic.

A `Formed` weight stands for W' = f(W, γ, …). Where a linear layer or a convolution reads it, the layer and the formulas of its
weight and bias run as one autograd function. It keeps its input and the parameters, not W', and forms W' again when gradients
want it: what is saved for backward is what a layer with a stored weight saves, without that weight. Any other reader gets W' as
an ordinary tensor.

The gradients go through the layer (`layers`), then through the formulas (∂W = a⊙∂W', …; ConvBN paper, §3), in `codegen`.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normfuse.errors import NormfuseError
from normfuse.graph.sharded import is_shard
from normfuse.modules.layers import CALLS, LayerCall, LayerOperator
from normfuse.modules.record import Forming, Rewritten, own


class Formed(Tensor):
    """A tensor that a module reads in place of its own; it is computed when it is used, so it is not written to.

    Attributes:
        record: how.
        module: the module that reads it.
        attribute: in place of what.
    """

    record: Rewritten
    module: nn.Module
    attribute: str

    @staticmethod
    def of(record: Rewritten, module: nn.Module, attribute: str) -> Formed:
        """What a rewritten module reads under a name."""
        self = _NOTHING.as_subclass(Formed)
        self.record, self.module, self.attribute = record, module, attribute
        return self

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """That of the module's own tensor, where it has one."""
        mine = own(self.module, self.attribute)
        found: torch.Size = (self.plain if mine is None else mine).shape
        return found

    @property
    def on_shards(self) -> bool:
        """Whether its module runs on shards."""
        return is_shard(own(self.module, self.attribute))

    @property
    def plain(self) -> Tensor:
        """The value as an ordinary tensor; gradients reach the parameters, and nothing but these is kept for them."""
        forming = self.record.forming(self.attribute)
        leaves = forming.leaves(self.module)
        if any(is_shard(each) for each in leaves):  # the autograd of DTensor knows where gradients go
            return forming.by_autograd(*leaves)[0]
        value: Tensor = _Value.apply(forming, *leaves)  # type: ignore[no-untyped-call]
        return value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Layers run without keeping the weight; everything else sees an ordinary tensor."""
        layer = CALLS.get(func)
        call = layer(*args, **(kwargs or {})) if layer is not None else None
        if call is not None and isinstance(call.weight, Formed) and not call.weight.on_shards:
            return _run(call)
        if args and isinstance(args[0], Formed) and _writes(func):
            raise NormfuseError(
                "this weight is computed from the model's parameters at every read, so writing to it has no effect",
                hint="write to the parameter, dict(model.named_parameters())[name], or call normfuse.restore(model) first",
            )
        args, kwargs = pytree.tree_map_only(Formed, lambda each: each.plain, (args, kwargs or {}))
        return func(*args, **kwargs)


_NOTHING = torch.empty(0, device="meta", requires_grad=True)
"""What code sees that reads a formed tensor's memory past torch's functions: an error, in backward too, not another value."""


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in ("__set__", "__setitem__", "__iadd__", "__imul__")


def _autocasts(like: Tensor) -> bool:
    kind = like.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _without_autocast(like: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(like.device.type, enabled=False) if _autocasts(like) else contextlib.nullcontext()


# -- as an ordinary tensor -----------------------------------------------------------------------------------------------


class _Value(torch.autograd.Function):
    """The value of a formula, which keeps the tensors that it reads and no part of itself."""

    @staticmethod
    def forward(ctx: Any, forming: Forming, *leaves: Tensor) -> Tensor:
        ctx.forming = forming
        ctx.save_for_backward(*leaves)
        with _without_autocast(leaves[0]):
            values: Any = forming.code(leaves)(*leaves)
            return values[0]  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        mask = (False, False, *ctx.needs_input_grad[1:])
        _, _, *found = _gradients(ctx.forming, ctx.saved_tensors, mask, lambda weight, scale, mask: (None, grad.clone(), None))
        return None, *found


# -- in a layer ----------------------------------------------------------------------------------------------------------


def _run(call: LayerCall) -> Tensor:
    x, weight, bias = call.x, call.weight, call.bias
    forming = weight.record.forming(weight.attribute)
    if isinstance(bias, Formed):
        together = bias.module is weight.module
        forming = weight.record.forming(weight.attribute, bias.attribute) if together else forming
        bias = None if together else bias.plain
    x = x.plain if isinstance(x, Formed) else x
    x = x if call.batched else x.unsqueeze(0)
    autocasts = _autocasts(x)
    if autocasts and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    leaves = forming.leaves(weight.module)
    outside = not autocasts and _goes_outside(call.layer, forming, x, leaves)
    y: Tensor = _WithoutWeight.apply(call.layer, forming, (autocasts, outside), x, bias, *leaves)  # type: ignore[no-untyped-call]
    return y if call.batched else y.squeeze(0)


def _goes_outside(layer: LayerOperator, forming: Forming, x: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Whether a scale of output channels is better applied to the output, being smaller than the weight (late layers)."""
    if layer.out_axis is None or forming.scaled_axis != layer.out_axis or any(each.dtype != x.dtype for each in leaves):
        return False
    weight = leaves[0]
    return weight.numel() > SCALE_OUTSIDE_FROM * weight.shape[layer.out_axis] * layer.positions(x) and x.dtype in (
        torch.float32,
        torch.float64,
    )


SCALE_OUTSIDE_FROM = 2
"""How much larger than its output a weight must be for that: two calls of the layer's gradients cost more than one."""


class _WithoutWeight(torch.autograd.Function):
    """A layer and the formulas of its weight, and of its bias where that is one, as one function."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: LayerOperator,
        forming: Forming,
        how: tuple[bool, bool],
        x: Tensor,
        bias: Tensor | None,
        *leaves: Tensor,
    ) -> Tensor:
        autocasts, outside = how
        wants_weight = any(map(operator.and_, ctx.needs_input_grad[5:], forming.of_first))
        with torch.autocast(x.device.type, enabled=False) if autocasts else contextlib.nullcontext():
            values: Any = forming.code(leaves, outside=outside)(*leaves)
            weight, bias, scale = values[0], values[1] if forming.has_bias else bias, values[-1] if outside else None
            ctx.layer, ctx.forming, ctx.outside, ctx.sizes = layer, forming, scale is not None, (x.shape, weight.shape)
            ctx.save_for_backward(*leaves, *((x,) if wants_weight else ()))
            if scale is not None:
                return layer.forward_scaled(x, weight, scale, bias)
            if autocasts:
                weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
            return layer.forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needed, saved = ctx.needs_input_grad[3:], ctx.saved_tensors
        leaves = saved[: len(needed) - 2]

        def layer(weight: Tensor | None, scale: Tensor | None, mask: tuple[bool, bool, bool]) -> Sequence[Tensor | None]:
            # where a gradient does not need an operand, its shape alone is asked for
            x = saved[-1] if len(saved) > len(leaves) else grad.new_empty(()).expand(ctx.sizes[0])
            weight = grad.new_empty(()).expand(ctx.sizes[1]) if weight is None else weight.to(grad.dtype)
            found: Sequence[Tensor | None] = (
                ctx.layer.backward(grad, x, weight, mask)
                if scale is None
                else ctx.layer.backward_scaled(grad, x, weight, scale, mask)
            )
            return found

        return None, None, None, *_gradients(ctx.forming, leaves, needed, layer, outside=ctx.outside)


# -- gradients -----------------------------------------------------------------------------------------------------------

OfLayer: TypeAlias = Callable[[Tensor | None, Tensor | None, tuple[bool, bool, bool]], Sequence[Tensor | None]]


def _gradients(
    forming: Forming, leaves: Sequence[Tensor], mask: tuple[bool, ...], layer: OfLayer, *, outside: bool = False
) -> Sequence[Tensor | None]:
    """Gradients of a layer's input, of its bias where that is no formula, and of the leaves.

    Args:
        forming: the formulas.
        leaves: the tensors that they read.
        mask: which of these gradients are wanted.
        layer: (weight, scale of its output or None, mask) → the layer's gradients of its input, weight and bias, which are
            nobody else's memory.
        outside: whether the layer applies the weight's scale to its output.
    """
    with _without_autocast(leaves[0]):
        code = None if torch.is_grad_enabled() else forming.gradients(leaves, mask, outside=outside)
        return _by_autograd(forming, leaves, mask, layer) if code is None else code(*leaves, layer)


def _by_autograd(forming: Forming, leaves: Sequence[Tensor], mask: tuple[bool, ...], layer: OfLayer) -> Sequence[Tensor | None]:
    """The same where derivatives of them are wanted, or where there is no code for them."""
    again, (into, of_bias, *needed) = torch.is_grad_enabled(), mask
    with torch.enable_grad():
        weight, *more = forming.by_autograd(*leaves)
    of_bias = more[0].requires_grad if more else of_bias
    of_input, *found = layer(weight if again else weight.detach(), None, (into, weight.requires_grad, of_bias))
    pairs = [(value, each) for value, each in zip((weight, *more), found, strict=False) if value.requires_grad]
    wanted = [leaf for leaf, each in zip(leaves, needed, strict=True) if each]
    pulled: Iterator[Tensor | None] = iter(())
    if pairs:
        values, gradients = zip(*((value, each.to(value.dtype)) for value, each in pairs if each is not None), strict=True)
        pulled = iter(torch.autograd.grad(values, wanted, gradients, create_graph=again, allow_unused=True))
    return of_input, None if more else found[1], *(next(pulled, None) if each else None for each in needed)
