"""What a model is called with, and what a user may give for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normfuse.errors import InputError

EXAMPLES = 16  # of a loader: a proof on a whole data set would take days

InputKey = int | str  # which input: its position, or its keyword


@dataclass(frozen=True)
class Inputs:
    """What a model is called with, as torch.export takes it.

    ``dynamic_shapes`` is a tuple (positional inputs), a dict (keyword inputs), or a `torch.export.ShapesCollection` on
    these very tensors (both kinds: the names of positional inputs are the model's, not ours). None: all sizes are fixed.
    ``more`` are further examples, of a loader: models are compared on them too. ``left_out`` tells what of a loader's batches
    is no input (`normfuse.sources.batches`).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any | None = None
    more: tuple[Inputs, ...] = ()
    left_out: str | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be told of them."""
        return (self.left_out,) if self.left_out else ()


def as_inputs(inputs: Any, kwargs: Mapping[str, Any] | None = None) -> Inputs | None:
    """What a user passes as ``inputs`` and ``kwargs``; None where that is nothing.

    Args:
        inputs: a tensor, a tuple or list of positional inputs, a dict of keyword inputs, `Inputs`, or a loader of any of these.
        kwargs: further keyword inputs.

    Raises:
        InputError: it is none of these.
    """
    if inputs is None and not kwargs:
        return None
    if is_loader(inputs):
        inputs = from_loader(inputs)
    if not isinstance(inputs, Inputs | Tensor | tuple | list | Mapping | None):
        raise InputError(f"inputs must be a tuple of tensors, not a {type(inputs).__name__}", hint="inputs=(x,)")
    if isinstance(inputs, Inputs):
        given = inputs
    elif isinstance(inputs, Mapping):
        given = Inputs((), dict(inputs))
    else:
        given = Inputs((inputs,) if isinstance(inputs, Tensor) else tuple(inputs or ()), {})
    return replace(given, kwargs={**given.kwargs, **(kwargs or {})})


def is_loader(inputs: Any) -> bool:
    """Whether a user's inputs are a loader of batches, and not inputs themselves."""
    return isinstance(inputs, Iterable) and not isinstance(inputs, Tensor | np.ndarray | tuple | list | str | Mapping)


# ---- from specs

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


def from_loader(loader: Iterable[Any]) -> Inputs:
    """The first examples that a loader gives, such as a `torch.utils.data.DataLoader`; no more than `EXAMPLES`.

    Each is a tensor, a tuple or list of positional inputs, or a dict of keyword inputs, as in `from_file`, or `Inputs`. What of
    a tuple is taken `normfuse.sources.batches` says.

    Raises:
        InputError: it gives nothing, or something else; what it raises itself goes through.
    """
    examples = []
    for content in islice(loader, EXAMPLES):
        if not isinstance(content, Inputs | Tensor | tuple | list | Mapping):
            raise InputError(f"the loader gives a {type(content).__name__}", hint="give tensors, or tuples or dicts of tensors")
        examples.append(content if isinstance(content, Inputs) else Inputs(*call_of(content)))
    if not examples:
        raise InputError("the loader gives nothing", hint="give at least one example")
    return replace(examples[0], more=tuple(examples[1:]))


def call_of(content: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs of a tensor, a sequence, or a mapping as in `from_file`."""
    if isinstance(content, Tensor):
        return (content,), {}
    if not isinstance(content, Mapping):
        return tuple(content), {}
    if content and set(content) <= {"args", "kwargs"}:
        return tuple(content.get("args", ())), dict(content.get("kwargs", {}))
    numbered = [name for name in content if re.fullmatch(r"arg\d+", str(name))]
    names = [f"arg{position}" for position in range(len(numbered))]
    if set(names) != set(numbered):
        raise ValueError(f"positional inputs are {', '.join(names)} in that case, not {', '.join(numbered)}")
    if strange := [name for name in content if not isinstance(name, str)]:
        raise ValueError(f"{strange[0]!r} is no name of an input")
    return tuple(content[name] for name in names), {name: content[name] for name in content if name not in names}
