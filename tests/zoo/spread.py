"""Random weights that hide nothing.

Fresh initialisation is kind to wrong rewrites: gains are one, shifts and biases are zero, LayerScale is 1e-5, weights
have no mean. An error in any of these does not show. `spread` gives a model weights on which it does.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

# Parameters by their own name, for layers that keep them without a module of their own.
LAYER_SCALE = ("gamma", "lambda", "layer_scale")


def spread(model: M, seed: int = 0) -> M:
    """Fill the parameters and the BatchNorm statistics of `model` in place, and return it.

    Weights get the scale 1/sqrt(fan in), whatever the initialisation was, and a mean that differs per output and per
    input; embedding rows a mean of their own; gains lie in ±[0.5, 1.5], one in eight negative; shifts and biases are
    N(0, 0.4); LayerScale lies in ±[0.2, 1.2]. Left alone: padding rows, one-element parameters and logit scales, and
    every buffer but BatchNorm's, because those are tables that the model computes (masks, frequencies, indices).
    Tied parameters stay tied. The same seed and the same model give the same weights.
    """
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    # Embeddings first: a table that is also the output projection is filled as a table.
    modules = sorted(model.named_modules(), key=lambda item: not isinstance(item[1], nn.Embedding))
    with torch.no_grad():
        for _, module in modules:
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                if parameter.numel() > 1 and "logit_scale" not in name and "temperature" not in name:
                    _fill(module, name, parameter, generator)
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                assert module.running_var is not None
                module.running_mean.copy_(_normal(module.running_mean, generator) * 0.4)
                module.running_var.copy_(_uniform(module.running_var, generator, 0.3, 2.0))
    return model


def _fill(module: nn.Module, name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Draw new values for one parameter, by what it is."""
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        values = _rows(parameter, generator)
        if module.padding_idx is not None:
            values[module.padding_idx] = parameter[module.padding_idx]
        parameter.copy_(values)
    elif "Norm" in kind and name == "weight":
        # Gemma's norms store gain - 1, as their zero initialisation tells; torch's own layers start at zero where a
        # model wants its residual branches silent (Swin v2).
        offset = 0.0 if isinstance(module, (nn.LayerNorm, nn.GroupNorm)) or bool(parameter.any()) else 1.0
        parameter.copy_(_uniform(parameter, generator, 0.5, 1.5) * _signs(parameter, generator, 1 / 8) - offset)
    elif name.startswith(LAYER_SCALE):
        parameter.copy_(_uniform(parameter, generator, 0.2, 1.2) * _signs(parameter, generator, 1 / 4))
    elif parameter.dim() == 1:
        parameter.copy_(_normal(parameter, generator) * 0.4)
    elif name.endswith("weight"):
        parameter.copy_(_matrix(parameter, generator, inputs_first=kind == "Conv1D" or "ConvTranspose" in kind))
    else:  # tokens, positions, bias tables
        parameter.copy_(_rows(parameter, generator))


def _matrix(like: Tensor, generator: torch.Generator, *, inputs_first: bool) -> Tensor:
    """A weight of scale 1/sqrt(fan in), a quarter of its power in the means over outputs, inputs and everything."""
    outputs, inputs = (1, 0) if inputs_first else (0, 1)
    per_output = [size if axis == outputs else 1 for axis, size in enumerate(like.shape)]
    per_input = [size if axis == inputs else 1 for axis, size in enumerate(like.shape)]
    fan_in = like.numel() // like.shape[outputs]
    noise, rows, columns = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (like.shape, per_output, per_input)
    )
    return ((0.87 * noise + 0.35 * rows + 0.30 * columns + 0.20) / math.sqrt(fan_in)).to(like)


def _rows(like: Tensor, generator: torch.Generator) -> Tensor:
    """Vectors along the last axis, N(0, 0.5), each with a mean of its own, N(0.2, 0.4)."""
    means = torch.randn((*like.shape[:-1], 1), generator=generator, dtype=torch.float64)
    return (0.5 * _normal(like, generator) + 0.4 * means.to(like) + 0.2).to(like)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _uniform(like: Tensor, generator: torch.Generator, low: float, high: float) -> Tensor:
    return (torch.rand(like.shape, generator=generator, dtype=torch.float64) * (high - low) + low).to(like)


def _signs(like: Tensor, generator: torch.Generator, negative: float) -> Tensor:
    """+1, or -1 with probability `negative`."""
    return 1 - 2 * (torch.rand(like.shape, generator=generator) < negative).to(like)
