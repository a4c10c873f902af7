"""Weights in a file of `torch.save`: a dictionary of tensors, or what a training keeps around one.

A trainer's checkpoint holds the weights among other things (optimizer, epoch, settings), under a name that everybody chooses
anew; where it holds an average of them beside (EMA), the plain ones are taken. Only the weights are built, and nothing but
tensors is taken for them (`normfuse.sources.building`); all else, whatever classes it names, stays a picture and is written as
it stood.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normfuse.errors import LoadError, listed
from normfuse.sources.allowlist import NotAllowed
from normfuse.sources.building import Builder, names_in
from normfuse.sources.loading import told_as_load_error
from normfuse.sources.pickles import Made, Name, Outside
from normfuse.sources.safetensors_file import Change, bytes_of
from normfuse.sources.storages import storage_of
from normfuse.sources.torch_files import TorchFile, opened_torch_file, outsides

WEIGHTS = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "params", "weights", "generator",
)  # fmt: skip
"""Under what a checkpoint keeps its weights."""
AVERAGES = (
    "ema", "ema_state_dict", "model_ema", "state_dict_ema", "ema_model", "params_ema", "ema_model_state_dict",
    "model_ema_state_dict",
)  # fmt: skip
"""Under what it keeps an average of them."""
COUNTS = ("n_averaged",)
"""What an average keeps among its weights and no model has."""

ALONE = "save its weights alone where it was made: torch.save(checkpoint['state_dict'], 'weights.pt')"
_VIEWS = {"torch._utils._rebuild_tensor": 0, "torch._utils._rebuild_tensor_v2": 2, "torch._utils._rebuild_tensor_v3": 3}
"""Calls that make a tensor of a storage, an offset, sizes and strides; and how many arguments then say what else it is."""
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_OF_TYPE = "torch._tensor._rebuild_from_type_v2"


@dataclass(frozen=True)
class Checkpoint:
    """A file of `torch.save` with weights in it.

    Attributes:
        path: where it is.
        within: the keys that lead from the whole content to the weights.
        held: the tensors by their names.
        notes: what was done to find the weights.
    """

    path: Path
    within: tuple[str, ...]
    held: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the tensors, in the file's order."""
        return tuple(self.held)

    def tensors(self, keys: Collection[str]) -> dict[str, Tensor]:
        """Some of the tensors."""
        return {key: self.held[key] for key in keys}

    def size(self, key: str) -> int:
        """Bytes of a tensor."""
        return int(self.held[key].nbytes)

    def write(self, target: Path, changes: Mapping[str, Change], dropped: Collection[str] = ()) -> set[str]:
        """The same content with other tensors; those that were one tensor stay one where they are still the same.

        Returns:
            The tensors of which a bit has changed.

        Raises:
            LoadError: the file cannot be read any more, or keeps one of these tensors in a form that is not dense.
        """
        if odd := next((key for key in changes if self.held[key].layout is not torch.strided), None):
            raise LoadError(f"'{odd}' of {self.path} is sparse, and cannot be changed there", hint="save it as a dense tensor")
        copies = {key: self.held[key].clone(memory_format=torch.contiguous_format) for key in changes}
        changed = {key: copies[key] for key, change in changes.items() if change(copies[key])}
        if not changed and not dropped:
            shutil.copyfile(self.path, target)
            return set()
        with told_as_load_error(self.path):
            file = opened_torch_file(self.path)
            weights = file.root
            for key in self.within:
                weights = _entries(weights)[key]
            new = _Storages()
            values = _entries(weights)
            _set_entries(weights, {key: new.replaced(values[key], changed[key]) for key in changed}, dropped)
            file.written(target, file.root, new.placed(file.root))
        return set(changed)


class _Storages:
    """The storages of changed tensors."""

    def __init__(self) -> None:
        self.made: dict[tuple[Any, ...], list[tuple[Tensor, Outside]]] = {}

    def replaced(self, old: Any, new: Tensor) -> Made:
        """The picture of a tensor with another storage, which is shared with what had the same place and has the same value."""
        if not isinstance(old, Made) or not isinstance(old.by, Name):
            raise NotAllowed("to change what is no tensor")
        name, arguments = old.by.text, old.arguments
        if name in _PARAMETERS:
            return replace(old, arguments=(self.replaced(arguments[0], new), *arguments[1:]))
        if name == _OF_TYPE:
            inner = self.replaced(Made(arguments[0], arguments[2], True), new)
            return replace(old, arguments=(*arguments[:2], inner.arguments, *arguments[3:]))
        if name not in _VIEWS:
            raise NotAllowed(f"to change a tensor of {name}()")
        stored, offset, size, stride, *rest = arguments
        place = (storage_of(stored.reference), offset, tuple(new.shape), stride)
        same = self.made.setdefault(place, [])
        outside = next((each for value, each in same if bytes(bytes_of(value)) == bytes(bytes_of(new))), None)
        if outside is None:
            outside = Outside(stored.reference)
            same.append((new, outside))
        return replace(old, arguments=(outside, 0, size, new.contiguous().stride(), *rest[: _VIEWS[name]]))

    def placed(self, root: Any) -> dict[str, bytes]:
        """The bytes of the new storages by their keys: the old ones where nothing else needs those, or else new ones."""
        made = [each for same in self.made.values() for each in same]
        ours = {id(outside) for _value, outside in made}
        taken = {storage_of(each.reference)[1] for each in outsides(root) if id(each) not in ours}
        olds = {storage_of(outside.reference)[1] for _value, outside in made}
        fresh = (str(number) for number in itertools.count() if str(number) not in taken | olds)
        placed: dict[str, bytes] = {}
        for value, outside in made:
            dtype, key, _count = storage_of(outside.reference)
            if key in taken:
                key = next(fresh)
            taken.add(key)
            placed[key] = bytes(bytes_of(value))
            head, kind, _old, location, _size, *view = outside.reference
            outside.reference = (head, kind, key, location, len(placed[key]) // dtype.itemsize, *view)
        return placed


def opened_checkpoint(path: Path) -> Checkpoint:
    """The weights in a file of `torch.save`.

    Raises:
        LoadError: there are none, or what should be weights is more than tensors, or the file is damaged.
    """
    with told_as_load_error(path):
        file = opened_torch_file(path)
        named = names_in(file.root)  # which measures it too
        found = next(_places(file.root), None)
        if found is None:
            raise LoadError(f"{path} holds no weights, but {_said(file.root)}", hint=ALONE)
        within, weights = found
        tensors = {key: value for key, value in _entries(weights).items() if _is_tensor(value) and key not in COUNTS}
        notes = [*_notes(path, file.root, within), *_strangers(path, named)]
        return Checkpoint(path, within, _built(file, tensors), tuple(notes))


def _built(file: TorchFile, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    if strangers := names_in(list(tensors.values())):
        raise NotAllowed(*sorted(strangers))
    builder = Builder({}, file.stored)
    return {key: builder.build(value).detach() for key, value in tensors.items()}


def _is_tensor(value: Any) -> bool:
    made = isinstance(value, Made) and value.called and isinstance(value.by, Name)
    return made and value.by.text.startswith(("torch._utils._rebuild_", _OF_TYPE))


def _is_mapping(value: Any) -> bool:
    ordered = isinstance(value, Made) and isinstance(value.by, Name) and value.by.text == "collections.OrderedDict"
    return isinstance(value, dict) or ordered


def _entries(value: Any) -> dict[Any, Any]:
    """A mapping of a picture, or nothing where a value is none."""
    if not _is_mapping(value):
        return {}
    if isinstance(value, dict):
        return value
    first = value.arguments[0] if value.arguments else ()
    pairs = [tuple(pair) for pair in first if isinstance(pair, list | tuple) and len(pair) == 2] if first else []
    return dict([*pairs, *value.pairs])


def _set_entries(value: Any, new: Mapping[str, Any], dropped: Collection[str]) -> None:
    entries = {key: new.get(key, old) for key, old in _entries(value).items() if key not in dropped}
    if isinstance(value, dict):
        value.clear()
        value.update(entries)
    else:
        value.arguments, value.pairs = (), list(entries.items())


def _places(content: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Where weights may be: the content itself, then what plain ones and then averages are called."""
    if _are_weights(content):
        yield (), content
    entries = _entries(content)
    for name in (*WEIGHTS, *AVERAGES):
        inner = entries.get(name)
        if _are_weights(inner):
            yield (name,), inner
        elif _is_mapping(inner):
            yield from (((name, *within), found) for within, found in _places(inner))


def _are_weights(content: Any) -> bool:
    """Whether a mapping is a state dict: names of tensors, and nothing that is kept apart from them."""
    entries = _entries(content)
    tensors = [key for key, value in entries.items() if _is_tensor(value)]
    others = [value for value in entries.values() if not _is_tensor(value)]
    nested = any(_is_tensor(each) for value in others for each in _entries(value).values())
    return bool(tensors) and all(isinstance(key, str) for key in entries) and not nested and len(tensors) >= len(others)


def _said(content: Any) -> str:
    if entries := _entries(content):
        return ", ".join(map(_shown, itertools.islice(entries, 6)))
    if isinstance(content, Made):
        return f"a {content.by.text}" if isinstance(content.by, Name) else "an object"
    return "nothing" if _is_mapping(content) else f"a {type(content).__name__}"


def _shown(key: Any) -> str:
    return key if isinstance(key, str) else type(key).__name__


def _notes(path: Path, content: Any, within: tuple[str, ...]) -> Iterator[str]:
    entries = _entries(content)
    if within:
        yield f"the weights are {'.'.join(within)} of {path.name}, which holds {_said(content)}"
    averages = [name for name in AVERAGES if _is_mapping(entries.get(name))]
    if averages and within and within[0] not in AVERAGES:
        yield f"{path.name} has an average of the weights too ({averages[0]}), which was neither read nor changed"


def _strangers(path: Path, named: Collection[str]) -> Iterator[str]:
    if named:
        beside = f"{path.name} names {listed(sorted(named))} beside its weights"
        yield f"{beside}; none of it was read or run, and it is written as it stood"
