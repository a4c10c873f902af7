"""What tests make of stored tensors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from normfuse.sources.safetensors_file import Change


def becoming(values: Mapping[str, Tensor]) -> dict[str, Change]:
    """Changes of tensors to these values."""
    return {name: partial(_become, new) for name, new in values.items()}


def _become(new: Tensor, value: Tensor) -> bool:
    before = value.clone()
    value.copy_(new)
    return not torch.equal(before, value)
