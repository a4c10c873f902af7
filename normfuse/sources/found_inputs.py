"""Inputs that a model itself tells of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.sources.inputs import Inputs
from normfuse.sources.specs import DEFAULT_LIMIT, _check_memory

# ---- found on the model


def found_on(model: Any) -> Inputs | None:
    """Inputs that the model itself tells of, with fixed sizes; None where it tells of none, or of what can be none.

    An exported program has its example inputs, a timm model ``pretrained_cfg``, a transformers model ``dummy_inputs`` or
    an image size in its config.

    Raises:
        InputError: they would take more than `limits.INPUT_BYTES`.
    """
    if isinstance(model, torch.export.ExportedProgram):
        return Inputs(tuple(model.example_inputs[0]), dict(model.example_inputs[1])) if model.example_inputs else None
    if not isinstance(model, nn.Module):
        return None
    sizes = _timm_sizes(model) or _image_sizes(model)
    if sizes is None:
        return _text_inputs(model)
    if not all(type(size) is int and size > 0 for size in sizes):
        return None
    _check_memory(2 * 4 * math.prod(sizes))
    pixels = torch.randn(2, *sizes, generator=torch.Generator().manual_seed(0))
    name = getattr(model, "main_input_name", None)
    return Inputs((), {name: _for(model, pixels)}) if isinstance(name, str) else Inputs((_for(model, pixels),), {})


def _for(model: nn.Module, tensor: Tensor) -> Tensor:
    """`tensor` on the model's device, and in its dtype where both are floating."""
    weight = next((weight for weight in model.parameters() if weight.is_floating_point()), torch.empty(0))
    return tensor.to(weight.device, weight.dtype if tensor.is_floating_point() else tensor.dtype)


def _timm_sizes(model: nn.Module) -> Sequence[int] | None:
    described = getattr(model, "pretrained_cfg", None) or {}
    sizes = described.get("input_size") if isinstance(described, Mapping) else None
    return sizes if isinstance(sizes, tuple | list) else None


def _image_sizes(model: nn.Module) -> Sequence[int] | None:
    config = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    if not isinstance(size, int | tuple | list) or getattr(model, "main_input_name", None) != "pixel_values":
        return None
    return getattr(config, "num_channels", 3), *((size, size) if isinstance(size, int) else size)


def _text_inputs(model: Any) -> Inputs | None:
    """The dummy inputs of transformers, with token ids drawn from the whole table."""
    try:  # code of the model's class, on settings that can be anything
        dummies = dict(model.dummy_inputs) if hasattr(model, "config") else {}
        rows = getattr(model.get_input_embeddings(), "num_embeddings", None) if dummies else None
    except Exception:
        return None
    known = model.main_input_name in dummies if isinstance(getattr(model, "main_input_name", None), str) else False
    plain = (Tensor, bool, int, float, type(None))
    if not known or not all(isinstance(name, str) and isinstance(value, plain) for name, value in dummies.items()):
        return None
    rows = rows if type(rows) is int and rows > 0 else DEFAULT_LIMIT
    generator = torch.Generator().manual_seed(0)
    kwargs: dict[str, Any] = {}
    for name, value in dummies.items():
        ids = name.endswith("input_ids") and isinstance(value, Tensor)
        drawn = torch.randint(0, rows, value.shape, generator=generator) if ids else value
        kwargs[name] = _for(model, drawn) if isinstance(drawn, Tensor) else drawn
    return Inputs((), kwargs)
