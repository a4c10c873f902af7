"""Torch's random numbers from a seed, for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def torch_seeded(seed: int) -> Iterator[None]:
    """Torch's random numbers start from a seed inside, and go on outside as if nothing had been drawn."""
    with torch.random.fork_rng():
        if torch.accelerator.is_available():
            torch.manual_seed(seed)
        else:  # torch.manual_seed would write down the stack for each kind of device that might still come
            torch.default_generator.manual_seed(seed)
        yield
