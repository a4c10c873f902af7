"""How far a rewritten model is from the original in float64, by code of its own: over the largest entry of the output.

`Evidence.error` judges each entry at its own neighbourhood's scale, so it is larger where an output has small entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import normfuse


def error_in_float64(model: nn.Module, inputs: Sequence[Any], passes: str | Sequence[str]) -> float:
    """The largest difference of the outputs over the largest entry; both models compute in float64."""
    wide = model.double().eval()  # in place: give one that nobody needs
    given = tuple(each.double() if isinstance(each, Tensor) and each.is_floating_point() else each for each in inputs)
    rewritten = normfuse.rewrite(wide, passes, inputs=given, verify="none").module()
    with torch.no_grad():
        outputs = zip(pytree.tree_leaves(wide(*given)), pytree.tree_leaves(rewritten(*given)), strict=True)
        return max(float((a - b).abs().max() / a.abs().max()) for a, b in outputs if isinstance(a, Tensor))
