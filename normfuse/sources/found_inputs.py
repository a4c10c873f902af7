"""Inputs that a model itself tells of: from its signature, its configuration and its first layer, and tried on it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.errors import InputError
from normfuse.sources.call_signature import parameters_of, required
from normfuse.sources.index_limits import integer_limits
from normfuse.sources.inputs import Inputs
from normfuse.sources.named_inputs import Wanted, fitted, inputs_by_name
from normfuse.sources.specs import DEFAULT_LIMIT, check_memory

# ---- found on the model


def found_on(model: Any) -> Inputs | None:
    """Inputs that the model itself tells of, with fixed sizes, on which it runs; None where it tells of none.

    An exported program has its example inputs, Lightning's modules an ``example_input_array``, a timm model its
    ``pretrained_cfg``. A transformers model has names in its forward and sizes in its configuration
    (`normfuse.sources.named_inputs`), or ``dummy_inputs``. What begins with a convolution takes images of its channels.

    Raises:
        InputError: they would take more than `limits.INPUT_BYTES`, or the model does not run on them.
    """
    if isinstance(model, torch.export.ExportedProgram):
        return Inputs(tuple(model.example_inputs[0]), dict(model.example_inputs[1])) if model.example_inputs else None
    if not isinstance(model, nn.Module):
        return None
    refused: InputError | None = None
    for wanted in _candidates(model):
        try:
            return _tried(model, wanted)
        except InputError as error:
            refused = refused or error
    if refused is None:
        return None
    raise InputError(f"inputs were found on {type(model).__name__}, but {refused}", hint=refused.hint)


def _candidates(model: nn.Module) -> Iterator[Wanted]:
    """What the model might be called with, the fullest first; all of one kind."""
    for told in (_example_array, inputs_by_name, _pictures, _dummies):
        found = False
        for wanted in told(model):
            found = True
            yield wanted
        if found:
            return


def _tried(model: nn.Module, wanted: Wanted) -> Inputs:
    """The inputs, drawn from the tables that the model turns out to have."""
    inputs = wanted.drawn({})
    if any(weight.is_meta for weight in model.parameters()):
        return inputs
    limits = integer_limits(model, inputs)
    return wanted.drawn(limits) if limits and wanted.tokens else inputs


def _example_array(model: nn.Module) -> Iterator[Wanted]:
    """Lightning's own way to tell: a tensor, a tuple of positional inputs, a dict of keyword inputs."""
    example = getattr(model, "example_input_array", None)
    if isinstance(example, Tensor):
        yield Wanted(Inputs((example,), {}))
    elif isinstance(example, tuple | list) and any(isinstance(each, Tensor) for each in example):
        yield Wanted(Inputs(tuple(example), {}))
    elif isinstance(example, Mapping) and example and all(isinstance(name, str) for name in example):
        yield Wanted(Inputs((), dict(example)))


def _pictures(model: nn.Module) -> Iterator[Wanted]:
    """Images as timm tells of them, or of the channels that the first layer has."""
    for shape in dict.fromkeys(_picture_shapes(model)):
        check_memory(2 * 4 * math.prod(shape))
        yield Wanted(Inputs((fitted(model, torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))),), {}))


def _picture_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    told, layer = _timm_sizes(model), _first_layer(model)
    if told:
        yield told
    if len(required(parameters_of(model))) != 1 or isinstance(getattr(model, "main_input_name", None), str):
        return
    channels = layer.in_channels if isinstance(layer, nn.Conv2d | nn.Conv3d) else 3
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or getattr(model, "image_size", None)
    size = (size, size) if type(size) is int else size
    if isinstance(size, tuple | list) and len(size) == 2 and _counts(size):  # a model whose owner changed what timm told
        yield channels, *size
    elif told and len(told) == 3:
        yield channels, *told[1:]
    elif isinstance(layer, nn.Conv2d):
        yield from ((channels, side, side) for side in (224, 32, 28))
    elif isinstance(layer, nn.Conv3d):
        yield from ((channels, *sizes) for sizes in ((8, 112, 112), (16, 224, 224)))


def _timm_sizes(model: nn.Module) -> tuple[int, ...] | None:
    described = getattr(model, "pretrained_cfg", None)
    sizes = described.get("input_size") if isinstance(described, Mapping) else None
    return tuple(sizes) if isinstance(sizes, tuple | list) and sizes and _counts(sizes) else None


def _counts(sizes: Sequence[Any]) -> bool:
    return all(type(size) is int and size > 0 for size in sizes)


def _first_layer(model: nn.Module) -> nn.Module | None:
    """The first layer that has parameters; what is registered first need not run first, so what it says is tried."""
    layers = (part for part in model.modules() if next(part.children(), None) is None)
    return next((part for part in layers if next(part.parameters(), None) is not None), None)


def _dummies(model: Any) -> Iterator[Wanted]:
    """The dummy inputs of transformers, with token ids drawn from the whole table."""
    try:  # code of the model's class, on settings that can be anything
        dummies = dict(model.dummy_inputs) if hasattr(model, "config") else {}
        rows = getattr(model.get_input_embeddings(), "num_embeddings", None) if dummies else None
    except Exception:
        return
    known = model.main_input_name in dummies if isinstance(getattr(model, "main_input_name", None), str) else False
    plain = (Tensor, bool, int, float, type(None))
    if not known or not all(isinstance(name, str) and isinstance(value, plain) for name, value in dummies.items()):
        return
    table = rows if type(rows) is int and rows > 0 else DEFAULT_LIMIT
    generator = torch.Generator().manual_seed(0)
    kwargs: dict[str, Any] = {}
    for name, value in dummies.items():
        ids = name.endswith("input_ids") and isinstance(value, Tensor)
        drawn = torch.randint(0, table, value.shape, generator=generator) if ids else value
        kwargs[name] = fitted(model, drawn) if isinstance(drawn, Tensor) else drawn
    yield Wanted(Inputs((), kwargs))
