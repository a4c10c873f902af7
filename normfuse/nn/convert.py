"""Swap the norms of a model for others, as `torch.nn.SyncBatchNorm.convert_sync_batchnorm` does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from normfuse.nn.batch_channel_norm import BatchChannelNorm, EstimatedBatchNorm
from normfuse.nn.evo_norm import EvoNormB0, EvoNormS0
from normfuse.nn.ibn import IBN
from normfuse.nn.rep_bn import PRepBN, RepBN
from normfuse.nn.unified_norm import UnifiedNorm

_CHANNELS_SECOND = (_NormBase, nn.GroupNorm, BatchChannelNorm, EstimatedBatchNorm, EvoNormB0, EvoNormS0, IBN)


def convert(
    model: nn.Module,
    from_type: type[nn.Module] | tuple[type[nn.Module], ...],
    to: Callable[..., nn.Module] = UnifiedNorm,
    **options: Any,
) -> nn.Module:
    """Replace every norm of exactly the type ``from_type``, in place.

    The model's modules are changed in place; use what is returned, as ``model`` itself may be such a norm. A norm that occurs
    in several places becomes one norm in those places. Gain and shift are handed over as the same parameters, so ties and
    optimizers keep them: to ``weight`` and ``bias``, or to the BatchNorm inside `RepBN` and `BatchChannelNorm`. `PRepBN` keeps
    the old norm as its ``norm1``, so that training starts from the same function, and its BatchNorm gets copies. Running
    statistics are handed over from BatchNorm to BatchNorm; all other norms start from their own: train, or `recalibrate`. Kept
    besides: device, type, training mode.

    Subclasses are not converted, because they may be another function of other axes: name them as well. A warning tells of
    those that were left. A class of somebody else's is taken to have its channels last, like LayerNorm.

    torch's TransformerEncoderLayer has a fast path in eval that computes LayerNorm itself, whatever its norms are. It is
    switched off for layers whose norms are converted.

    Args:
        model: to convert.
        from_type: a class or several, of norms over one channel axis.
        to: a class of `normfuse.nn` or of torch, called with the number of channels and the options; or a function, called
            with the old norm and the options, that returns the new one as it is to be.
        **options: passed on.

    Returns:
        The model, or the new norm if the model is one.

    Raises:
        ValueError: no such norm in the model, or one over several axes.
        TypeError: the two norms have their channels on different axes.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
        >>> convert(model, nn.LayerNorm, to=UnifiedNorm, warmup_iters=100)[1].num_features
        8
    """
    types = from_type if isinstance(from_type, tuple) else (from_type,)
    old = {module for module in model.modules() if type(module) in types}
    left = {type(module) for module in model.modules() if isinstance(module, types)} - set(types)
    names = ", ".join(sorted(f"{each.__module__}.{each.__qualname__}" for each in left))
    if not old:
        wanted = ", ".join(each.__qualname__ for each in types)
        raise ValueError(f"no {wanted} in this model" + (f"; subclasses there are: {names}" if left else ""))
    if left:
        warnings.warn(f"subclasses are left as they are, name them to convert them: {names}", stacklevel=2)
    new = {norm: _replacement(norm, to, options) for norm in old}
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in new and module not in new:
                module._modules[name] = new[child]
    forget_layer_norms(model, set(new.values()))
    return new.get(model, model)


def _replacement(norm: nn.Module, to: Callable[..., nn.Module], options: dict[str, Any]) -> nn.Module:
    if not isinstance(to, type):
        made = to(norm, **options)
    elif isinstance(norm, _CHANNELS_SECOND) != issubclass(to, _CHANNELS_SECOND):
        raise TypeError(f"{type(norm).__name__} and {to.__name__} have their channels on different axes")
    else:
        made = to(_channels(norm), **_place(norm), **options)
        _hand_over(norm, made)
    return made.train(norm.training)


def _channels(norm: nn.Module) -> int:
    for name in ("num_features", "num_channels"):
        if hasattr(norm, name):
            return int(getattr(norm, name))
    shape = getattr(norm, "normalized_shape", None)
    if shape is None and isinstance(weight := getattr(norm, "weight", None), torch.Tensor):
        shape = weight.shape  # a norm of somebody else's: one gain per channel
    if shape is None:
        raise ValueError(f"nothing tells how many channels {type(norm).__name__} has")
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if len(shape) != 1:
        raise ValueError(f"{type(norm).__name__} is over {len(shape)} axes {shape}, not over one of channels")
    return int(shape[0])


def _place(norm: nn.Module) -> dict[str, Any]:
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            return {"device": tensor.device, "dtype": tensor.dtype}
    return {}


def _hand_over(norm: nn.Module, made: nn.Module) -> None:
    """Give gain and shift of ``norm`` to ``made``, where they are of one shape."""
    inner: nn.Module = made
    if isinstance(made, PRepBN):
        made.norm1 = norm
        inner = made.norm2.bn
    elif isinstance(made, RepBN | BatchChannelNorm):
        inner = made.bn
    for name in ("weight", "bias"):
        value, place = getattr(norm, name, None), getattr(inner, name, None)
        if isinstance(value, nn.Parameter) and isinstance(place, nn.Parameter) and value.shape == place.shape:
            setattr(inner, name, nn.Parameter(value.detach().clone()) if isinstance(made, PRepBN) else value)
    for name in ("running_mean", "running_var"):
        if isinstance(norm, _NormBase | EstimatedBatchNorm) and isinstance(inner, _NormBase | EstimatedBatchNorm):
            old, buffer = getattr(norm, name, None), getattr(inner, name, None)
            if old is not None and buffer is not None:
                buffer.copy_(old)


def forget_layer_norms(model: nn.Module, converted: set[nn.Module]) -> None:
    """Switch off torch's fast paths, which read a norm's gain, shift and eps and compute LayerNorm with them."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and converted & set(module.children()):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and converted & set(module.layers[0].children()):
            module.use_nested_tensor = False
