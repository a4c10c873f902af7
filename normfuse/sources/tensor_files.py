"""Weights as they lie in files, and the same files with other numbers in them.

    model.safetensors                  one file
    model.safetensors.index.json       several, and an index that says which tensor is in which
    pytorch_model.bin, *.pt, *.pth     of torch.save: a dictionary of tensors, or one that holds such a dictionary
    .metadata                          of torch.distributed.checkpoint.save: pieces of tensors in *.distcp beside it

`open_weights` takes any of these or the folder that they are in. What a model calls a tensor and what the file calls
it may differ by what a training put around the model (`module.` of DataParallel, `_orig_mod.` of torch.compile, `model.` of
Lightning): `Weights.fitted` undoes that for a model, and says so.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from torch import Tensor

from normfuse import limits
from normfuse.errors import LoadError, first_line, listed
from normfuse.limits import OverLimit
from normfuse.sources.checkpoints import opened_checkpoint
from normfuse.sources.dcp_folder import METADATA as DCP
from normfuse.sources.dcp_folder import opened_dcp
from normfuse.sources.file_making import check_room
from normfuse.sources.loading import first_bytes
from normfuse.sources.safetensors_file import Change, opened_safetensors
from normfuse.strict_json import parsed, read_file, record, text

INDEX = ".index.json"
LAYOUTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json", DCP)
"""What a folder may hold; the first that is there is taken, as transformers does."""

SAVED = "save the folder again with save_pretrained, or fetch the files that are missing"


class TensorFile(Protocol):
    """One file of tensors."""

    @property
    def path(self) -> Path:
        """Where it is."""

    @property
    def keys(self) -> Collection[str]:
        """Names of the tensors, in the file's order."""

    def tensors(self, keys: Collection[str]) -> dict[str, Tensor]:
        """Some of the tensors."""

    def size(self, key: str) -> int:
        """Bytes of a tensor."""

    def write(self, target: Path, changes: Mapping[str, Change], dropped: Collection[str] = ()) -> set[str]:
        """The same file elsewhere, some tensors changed and some left out; which of them have another bit now."""


@dataclass(frozen=True)
class Weights:
    """The tensors of files.

    Attributes:
        parts: the files, in the order in which they are named.
        names: name in the model → name in the files.
        index: the file that says which tensor is where.
        notes: what was done to find the tensors, as sentences.
    """

    parts: tuple[TensorFile, ...]
    names: Mapping[str, str]
    index: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """The files, which are not to be written over."""
        held = (file for part in self.parts for file in getattr(part, "files", (part.path,)))
        return (*([self.index] if self.index else []), *held)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(each.stat().st_size for each in self.files)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name in the model, mapped from the disk where that can be.

        Raises:
            LoadError: a file cannot be read.
        """
        held: dict[str, Tensor] = {}
        wanted = set(self.names.values())
        for part in self.parts:
            held |= part.tensors([key for key in part.keys if key in wanted])
        return {name: held[key] for name, key in self.names.items()}

    def tensor(self, key: str) -> Tensor:
        """The tensor of a name in the files."""
        return self._part_of[key].tensors([key])[key]

    @cached_property
    def _part_of(self) -> dict[str, TensorFile]:
        return {key: part for part in self.parts for key in part.keys}

    def fitted(self, expected: Collection[str]) -> Weights:
        """The same weights under the names that fit a model best: what a training put around the model is undone.

        Args:
            expected: names of the model's tensors.

        Raises:
            LoadError: the model's weights are there several times.
        """
        wanted = set(expected)
        plain = {name: name for name in self.names} if wanted <= self.names.keys() else _plain(self.names)
        prefix = _prefix(plain, wanted)
        fitting = {name[len(prefix) :]: old for name, old in plain.items() if name.startswith(prefix)}
        others = {name: old for name, old in plain.items() if not name.startswith(prefix)}
        if both := sorted(fitting.keys() & others.keys() & wanted):
            said = f"both '{others[both[0]]}' and '{fitting[both[0]]}' could be '{both[0]}' of the model"
            raise LoadError(said, hint="save the weights that you mean as a file of their own")
        best = {**others, **fitting}
        undone = next(((old, name) for name, old in fitting.items() if name != old and name in wanted), None)
        if undone is None or len(best) < len(self.names):
            return self
        note = f"what was around the model when it was saved was left out of names: '{undone[0]}' is taken for '{undone[1]}'"
        return replace(self, names={name: self.names[old] for name, old in best.items()}, notes=(*self.notes, note))

    def write(
        self,
        target: Path,
        changes: Mapping[str, Change],
        dropped: Collection[str] = (),
        *,
        only: Collection[str] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> set[str]:
        """The same files with other numbers in some tensors: same names, layout, order, dtypes, shapes and metadata.

        Args:
            target: a folder that is there, for the files of a folder; else the file to write.
            changes: what to make of tensors, by their names in the files.
            dropped: names in the files of tensors that leave.
            only: names of the files to write, where others write the rest; None for all.
            progress: told (what, done, total).

        Returns:
            Names in the files of those of which a bit has changed.

        Raises:
            OSError: a file cannot be written, or there is not enough room for all of them.
        """
        assert {*changes, *dropped} <= self._part_of.keys(), "names in the files"
        if only is None:
            check_room(target, self.nbytes)
        differing = set[str]()
        parts = [each for each in self.parts if only is None or each.path.name in only]
        for done, part in enumerate(parts):
            if progress:
                progress(f"writing {part.path.name}", done, len(parts))
            ours = set(part.keys)
            mine = {key: change for key, change in changes.items() if key in ours}
            place = target / part.path.name if self._is_folder(target) else target
            differing |= part.write(place, mine, ours.intersection(dropped))
        if self.index and (only is None or self.index.name in only):
            self._write_index(target / self.index.name, dropped)
        return differing

    def _is_folder(self, target: Path) -> bool:
        return self.index is not None or len(self.parts) > 1 or target.is_dir()

    def _write_index(self, target: Path, gone: Collection[str]) -> None:
        assert self.index is not None
        content = self.index.read_bytes()
        if gone:
            table = json.loads(content)
            table["weight_map"] = {key: file for key, file in table["weight_map"].items() if key not in gone}
            if "total_size" in table.get("metadata", {}):
                left = sum(part.size(key) for part in self.parts for key in part.keys if key in gone)
                table["metadata"]["total_size"] -= left
            content = (json.dumps(table, indent=2) + "\n").encode()
        target.write_bytes(content)


def open_weights(path: str | os.PathLike[str]) -> Weights:
    """The weights in a file, in the files that an index names, or in a folder that has either.

    Raises:
        LoadError: there are none, or they are damaged, incomplete, in each other's way, or ask for what is not allowed.
    """
    path = Path(path)
    if path.is_dir():
        return _of_folder(path)
    if path.name.endswith(INDEX):
        return _of_index(path)
    return _of_parts((_opened(path),))


def _of_folder(folder: Path) -> Weights:
    there = [name for name in LAYOUTS if (folder / name).exists()]
    if not there:
        if any(folder.glob(f"__*{DCP}")):
            said = f"{folder} was saved by every rank for itself, and nothing says what the whole is"
            raise LoadError(said, hint="save it with torch.distributed.checkpoint.save, whose ranks know of each other")
        found = sorted(each.name for each in folder.iterdir() if each.suffix in (".safetensors", ".bin"))
        if len(found) != 1:
            said = f"has the files {', '.join(found[:6])} and no index" if found else "has no weights"
            raise LoadError(f"{folder} {said}", hint=f"a folder of weights has one of {', '.join(LAYOUTS)}")
        there = found
    _check_home(folder / there[0])
    weights = open_weights(folder / there[0])
    if not there[1:]:
        return weights
    return replace(weights, notes=(*weights.notes, f"{there[0]} was read, and {' and '.join(there[1:])} was not"))


def _of_index(path: Path) -> Weights:
    try:
        table = record(record(parsed(read_file(path), once=True)).get("weight_map"))
        places = {key: text(file) for key, file in table.items()}
    except OverLimit as over:
        raise LoadError(f"{path} is not read: {over}", hint=over.hint) from None
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror}", hint="check the path and its permissions") from error
    except ValueError as error:
        raise LoadError(f"{path} is no index of weights: {first_line(error)[:200]}", hint=SAVED) from error
    files = list(dict.fromkeys(places.values()))
    if strange := [
        each for each in files if Path(each).name != each or each in ("", ".", "..") or "\\" in each or "\0" in each
    ]:
        raise LoadError(f"{path} names '{strange[0]}', which is no file beside it; it is not read", hint=SAVED)
    if lost := [each for each in files if not (path.parent / each).exists()]:
        raise LoadError(f"{path} names files that are not there: {listed(lost)}", hint=SAVED)
    for each in files:
        _check_home(path.parent / each)
    parts = tuple(_opened(path.parent / each) for each in files)
    weights = _of_parts(parts, path)
    for part in parts:
        said = {key for key, file in places.items() if file == part.path.name}
        if lacking := sorted(said - set(part.keys)):
            raise LoadError(f"{path} says that {part.path.name} holds {listed(lacking)}, and it does not", hint=SAVED)
        if unnamed := sorted(set(part.keys) - said):
            raise LoadError(f"{part.path} holds {listed(unnamed)}, which {path.name} does not name", hint=SAVED)
    return weights


def is_at_home(file: Path) -> bool:
    """Whether a file of a folder is no link, or one to that folder, or to the hub's cache that its snapshot is made of."""
    folder, real = file.parent.resolve(), file.resolve()
    homes = [folder, *([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])]
    return any(real.is_relative_to(home) for home in homes)


def _check_home(file: Path) -> None:
    if not is_at_home(file):
        raise LoadError(
            f"{file} is a link out of its folder; it is not read", hint="copy the file that you mean into the folder"
        )


def _of_parts(parts: tuple[TensorFile, ...], index: Path | None = None) -> Weights:
    times = Counter(key for part in parts for key in part.keys)
    if twice := [key for key, number in times.items() if number > 1]:
        raise LoadError(f"{index} names files that hold the same tensors: {listed(twice)}", hint=SAVED)
    notes = tuple(note for part in parts for note in getattr(part, "notes", ()))
    return Weights(parts, {key: key for key in times}, index, notes)


def _opened(path: Path) -> TensorFile:
    """One file, by what is in it."""
    if path.name == DCP:
        part = opened_dcp(path.parent)
        for each in part.files:
            _check_home(each)
        return part
    head = first_bytes(path)
    if (head[:2] != b"PK" and head[8:9] == b"{") or (path.suffix == ".safetensors" and len(head) <= 8):
        return opened_safetensors(path)
    return opened_checkpoint(path)


_INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, FSDP and checkpointed activations put into names, wherever a part was wrapped."""


def _plain(names: Iterable[str]) -> dict[str, str]:
    """Names without what was put into them → names; nothing is left out where two would become one."""
    names = list(names)
    plain = {".".join(part for part in name.split(".") if part not in _INSIDE): name for name in names}
    return plain if len(plain) == len(names) else {name: name for name in names}


def _prefix(names: Collection[str], wanted: Collection[str]) -> str:
    """What has to be taken off names so that most of them are wanted; nothing, if that does not make it better.

    Raises:
        LoadError: several prefixes fit equally well, such as those of a student and its teacher.
    """
    fits: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")[: limits.NESTING]
        starts = ("".join(f"{part}." for part in parts[:count]) for count in range(len(parts)))
        fits.update(start for start in starts if name[len(start) :] in wanted)
    most = max(fits.values(), default=0)
    best = [start for start, number in fits.items() if number == most]
    if not most or fits[""] == most:
        return ""
    plain = [start for start in best if not _AVERAGED.search(start)]
    best = plain or best
    if len(best) > 1:
        raise LoadError(
            f"the weights of the model are there {len(best)} times, as {listed([f'{each}*' for each in best])}",
            hint="save those that you mean as a file of their own, without the prefix",
        )
    return best[0]


_AVERAGED = re.compile(r"(^|[._])(ema|averaged?|teacher|momentum)([._]|$)")
