"""An exported model in its own runtime, seen from outside: what it is called with, and how to call it.

Every module of `normfuse.exporters` that writes a format also opens it as an `Artifact`; nothing else runs a runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Run = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Port:
    """An input of an artifact.

    Attributes:
        name: as the file has it.
        dtype: of the tensor that it takes.
        shape: sizes; a name or None stands for a dynamic one. None where the file does not tell.
        limit: an input of integers that is looked up in a table: the rows of the smallest one; None otherwise.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str | None, ...] | None
    limit: int | None = None


@dataclass(frozen=True)
class Artifact:
    """An exported model.

    Attributes:
        name: the file's name, for messages.
        runtime: what runs it, with its version and where it really runs, such as ``ONNX Runtime 1.31 (CPU)``.
        inputs: in the order of the file; None where the file does not tell, and the other model must.
        runs: how it is run -> a call on inputs in that order. The first is how a user would run it; further ones are
            the same model otherwise, such as ``without graph optimizations``.
        widened: the same model in the widest dtype that the runtime computes it in, from the same weights; None where
            it cannot be had. Rounding hides less there.
        nudged: the same model after its weights are nudged by one rounding of their dtype; None where it cannot be had.
        inner: names of its inner values, and a run that gives those and then its outputs; None where a file shows none.
        notes: what a reader of the evidence should know, such as which norms became which kernel.
    """

    name: str
    runtime: str
    inputs: tuple[Port, ...] | None
    runs: dict[str, Run]
    widened: Run | None = None
    nudged: Run | None = None
    notes: tuple[str, ...] = field(default=())
    inner: Callable[[], tuple[tuple[str, ...], Run]] | None = None
