"""Example inputs: from a spec on the command line, from a file, or found on the model.

A spec is `[name:]dtype[dim,…]`, one per input:

    float32[2,3,224,224]          a positional input
    float32[batch,3,224,224]      a name in place of a size is a dynamic dim; the same name is the same dim everywhere
    ids:int64[batch=4,seq=16]     a keyword input; the sizes that the example has (2 if not given)
    int64[batch,seq=16:1-512]     and the range that the dim may have
    float32[]                     a scalar tensor

Floats are drawn from N(0, 1) and integers below a limit, with a generator of our own: nobody else's random state moves.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from normfuse.errors import InputError, LoadError
from normfuse.loading import load_data

DEFAULT_SIZE = 2
DEFAULT_LIMIT = 2  # integers are 0 or 1 where nothing is known of the table that they index
GRAMMAR = "write [name:]dtype[dim,...], such as float32[batch,3,224,224] or ids:int64[batch,seq=16:1-512]"


@dataclass(frozen=True)
class Inputs:
    """What a model is called with, as torch.export takes it.

    ``dynamic_shapes`` is a tuple (positional inputs), a dict (keyword inputs), or a `torch.export.ShapesCollection` on
    these very tensors (both kinds: names of positional inputs are the model's, not ours). None: all sizes are fixed.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any | None = None


@dataclass(frozen=True)
class DynamicDim:
    """A dim whose size may change: its name, and what the specs say of its size in the example and of its range."""

    name: str
    size: int | None = None
    min: int | None = None
    max: int | None = None


@dataclass(frozen=True)
class Spec:
    """One input: positional when ``name`` is None."""

    name: str | None
    dtype: torch.dtype
    dims: tuple[int | DynamicDim, ...]


_HEAD = re.compile(r"\s*(?:(?P<name>[^\W\d]\w*)\s*:)?\s*(?P<dtype>\w+)\s*\[")
_DIM = re.compile(r"\s*(?:(?P<fixed>\d+)|(?P<name>[^\W\d]\w*)(?:=(?P<size>\d+))?(?::(?P<min>\d+)-(?P<max>\d*))?)\s*")


def parse_spec(text: str) -> Spec:
    """Read one spec.

    Raises:
        InputError: with the position of what is not understood.
    """
    head = _HEAD.match(text)
    if head is None:
        raise _unreadable(text, 0, "a dtype and then [")
    dims: list[int | DynamicDim] = []
    at = head.end()
    if re.compile(r"\s*\]\s*$").match(text, at) is None:
        while True:
            dim = _DIM.match(text, at)
            if dim is None:
                raise _unreadable(text, at, "a size or a name")
            dims.append(_dim(text, dim))
            at = dim.end() + 1
            separator = text[at - 1 : at]
            if separator == "]" and not text[at:].strip():
                break
            if separator != ",":
                raise _unreadable(text, at - (separator != "]"), "the end" if separator == "]" else ", or ]")
    return Spec(head["name"], _dtype(text, head), tuple(dims))


def _unreadable(text: str, at: int, expected: str) -> InputError:
    found = repr(text[at]) if at < len(text) else "the end"
    return InputError(f"input spec '{text}': {expected} is expected at position {at + 1}, found {found}", hint=GRAMMAR)


def _dtype(text: str, head: re.Match[str]) -> torch.dtype:
    dtype = getattr(torch, head["dtype"], None)
    if not isinstance(dtype, torch.dtype) or not _can_draw(dtype):
        at = head.start("dtype") + 1
        raise InputError(f"input spec '{text}': unknown dtype {head['dtype']!r} at position {at}", hint=GRAMMAR)
    return dtype


def _can_draw(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex or dtype == torch.bool or dtype in _INTEGERS


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


def _dim(text: str, match: re.Match[str]) -> int | DynamicDim:
    if match["fixed"]:
        return int(match["fixed"])
    size, low, high = (int(match[part]) if match[part] else None for part in ("size", "min", "max"))
    if not (low or 0) <= (high if high is not None else low or 0) or (
        size is not None and not (low or 0) <= size <= (high if high is not None else size)
    ):
        at = match.start("name") + 1
        raise InputError(
            f"input spec '{text}': the range of '{match['name']}' at position {at} is empty or leaves its size out",
            hint=GRAMMAR,
        )
    return DynamicDim(match["name"], size, low, high)
