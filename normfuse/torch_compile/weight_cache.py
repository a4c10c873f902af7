"""Weights that formulas give, kept for as long as the tensors that they read stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from normfuse.graph.blocks import rounded
from normfuse.graph.expressions import Formula, reads


class WeightCache:
    """The values of formulas, for every model that a graph is called with: dynamo lets layers of one class share a graph.

    Tensors are known by identity, address and version counter, which counts every write in place but those through ``.data``.
    Only weak references to them are held.
    """

    def __init__(self, formulas: Mapping[str, tuple[Formula, torch.dtype]], positions: Mapping[str, int]) -> None:
        """Take formulas, each with the dtype of its value, and where among a call's inputs the tensors are that they read."""
        self.formulas, self.positions = formulas, positions
        names = dict.fromkeys(name for formula, _ in formulas.values() for name in reads(formula))
        self._read = [positions[name] for name in names]
        self._kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def of(self, inputs: Sequence[Any]) -> Mapping[str, Tensor]:
        """The values for these inputs, computed when they are new or were written to."""
        if not self._read:
            return {}
        tensors = [inputs[position] for position in self._read]
        kept: _Entry | None = self._kept.get(tensors[0])  # type: ignore[no-untyped-call]
        if kept is None or not kept.fits(tensors):
            kept = self._kept[tensors[0]] = _Entry(tensors, self._computed(inputs))
        return kept.values

    def _computed(self, inputs: Sequence[Any]) -> dict[str, Tensor]:
        counters["normfuse"]["weights computed"] += 1
        with torch.inference_mode(False), torch.no_grad():
            return {
                name: rounded(formula, lambda each: inputs[self.positions[each]], dtype)
                for name, (formula, dtype) in self.formulas.items()
            }


class _Entry:
    """Values, and what the tensors were when they were computed."""

    def __init__(self, tensors: Sequence[Tensor], values: dict[str, Tensor]) -> None:
        self.values = values
        self._marks = [(TensorWeakRef(each), each._version, each.data_ptr()) for each in tensors]

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, and nobody has written to them."""
        return all(
            ref() is tensor and tensor._version == version and tensor.data_ptr() == address
            for tensor, (ref, version, address) in zip(tensors, self._marks, strict=True)
        )
