"""Weights in a file of `torch.save`: a dictionary of tensors, or what a training keeps around one.

A trainer's checkpoint holds the weights among other things (optimizer, epoch, settings), under a name that everybody chooses
anew; where it holds an average of them beside (EMA), the plain ones are taken. Such files are read as data, and nothing but
tensors and plain containers is taken (`normfuse.sources.loading`). What is written is the same dictionary with other tensors
in it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normfuse.errors import LoadError
from normfuse.sources.loading import LEGACY, first_bytes, load_data

WEIGHTS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "params", "weights", "generator")
"""Under what a checkpoint keeps its weights."""
AVERAGES = ("ema", "ema_state_dict", "model_ema", "state_dict_ema", "ema_model", "params_ema")
"""Under what it keeps an average of them."""
COUNTS = ("n_averaged",)
"""What an average keeps among its weights and no model has."""

ALONE = "save its weights alone where it was made: torch.save(checkpoint['state_dict'], 'weights.pt')"


@dataclass(frozen=True)
class Checkpoint:
    """A file of `torch.save` with weights in it.

    Attributes:
        path: where it is.
        within: the keys that lead from the whole content to the weights.
        keys: names of the tensors.
        notes: what was done to find the weights.
    """

    path: Path
    within: tuple[str, ...]
    keys: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def tensors(self, keys: Collection[str]) -> dict[str, Tensor]:
        """Some of the tensors.

        Raises:
            LoadError: the file cannot be read any more.
        """
        held = self._weights(load_data(self.path))
        return {key: held[key].detach() for key in keys}

    def size(self, key: str) -> int:
        """Bytes of a tensor."""
        return int(self._weights(load_data(self.path))[key].nbytes)

    def write(self, target: Path, changed: Mapping[str, Tensor], dropped: Collection[str] = ()) -> None:
        """The same content with other tensors; those that were one tensor stay one where they are still the same."""
        content = load_data(self.path)
        held = self._weights(content)
        shared: dict[tuple[Any, ...], Tensor] = {}
        for key, value in changed.items():
            old = held[key]
            place = (old.untyped_storage().data_ptr(), old.storage_offset(), old.shape, old.stride())
            made = shared.setdefault(place, value.contiguous().clone())
            new = made if torch.equal(made, value) else value.clone()
            held[key] = torch.nn.Parameter(new, old.requires_grad) if isinstance(old, torch.nn.Parameter) else new
        for key in dropped:
            del held[key]
        with target.open("wb") as file:
            torch.save(content, file, _use_new_zipfile_serialization=not first_bytes(self.path).startswith(LEGACY))
            file.flush()
            os.fsync(file.fileno())

    def _weights(self, content: Any) -> dict[str, Any]:
        for key in self.within:
            content = content[key]
        found: dict[str, Any] = content
        return found


def opened_checkpoint(path: Path) -> Checkpoint:
    """The weights in a file of `torch.save`.

    Raises:
        LoadError: there are none, or the file holds more than tensors and plain data, or is damaged.
    """
    try:
        content = load_data(path)
    except LoadError as error:
        raise LoadError(str(error), hint=ALONE if "; refused" in str(error) else error.hint) from error
    found = next(_places(content), None)
    if found is None:
        held = ", ".join(map(str, list(content)[:6])) if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise LoadError(f"{path} holds no weights, but {held or 'nothing'}", hint=ALONE)
    within, weights = found
    keys = tuple(key for key, value in weights.items() if isinstance(value, Tensor) and key not in COUNTS)
    return Checkpoint(path, within, keys, tuple(_notes(path, content, within)))


def _places(content: Any) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Where weights may be: the content itself, then what plain ones and then averages are called."""
    if not isinstance(content, Mapping):
        return
    if _are_weights(content):
        yield (), content
    for name in (*WEIGHTS, *AVERAGES):
        inner = content.get(name)
        if isinstance(inner, Mapping):
            if _are_weights(inner):
                yield (name,), inner
            else:
                yield from (((name, *within), found) for within, found in _places(inner))


def _are_weights(content: Mapping[Any, Any]) -> bool:
    """Whether a mapping is a state dict: names of tensors, and nothing that is kept apart from them."""
    tensors = [key for key, value in content.items() if isinstance(value, Tensor)]
    others = [value for value in content.values() if not isinstance(value, Tensor)]
    nested = any(isinstance(value, Mapping) and any(isinstance(each, Tensor) for each in value.values()) for value in others)
    return bool(tensors) and all(isinstance(key, str) for key in content) and not nested and len(tensors) >= len(others)


def _notes(path: Path, content: Any, within: tuple[str, ...]) -> Iterator[str]:
    if within:
        held = ", ".join(map(str, itertools.islice(content, 6)))
        yield f"the weights are {'.'.join(within)} of {path.name}, which holds {held}"
    averages = [name for name in AVERAGES if isinstance(content, Mapping) and isinstance(content.get(name), Mapping)]
    if averages and within and within[0] not in AVERAGES:
        yield f"{path.name} has an average of the weights too ({averages[0]}), which was neither read nor changed"
