"""Checkpoints of `torch.distributed.checkpoint`: a folder with a ``.metadata`` and files of pieces of tensors, ``*.distcp``.

What says where everything lies is judged first (`dcp_metadata`). Each piece is a small file of `torch.save` within a larger
one, read as such files are read here: as a picture, of which nothing but a tensor is built. Only what is asked for is read.
What is no tensor of the model, such as the state of an optimizer, is neither read nor changed: its bytes go along.
"""

from __future__ import annotations

import functools
import io
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from normfuse import limits
from normfuse.errors import LoadError, listed
from normfuse.limits import OverLimit
from normfuse.sources.allowlist import NotAllowed
from normfuse.sources.atomic import scratch
from normfuse.sources.building import Builder, names_in
from normfuse.sources.checkpoints import AVERAGES, COUNTS, WEIGHTS
from normfuse.sources.dcp_metadata import Item, Metadata, Piece, Sizes, StoredTensor, read_metadata
from normfuse.sources.file_making import FileInTheMaking
from normfuse.sources.loading import told_as_load_error
from normfuse.sources.mapped import map_file, tensor_at
from normfuse.sources.pickles import Unreadable, picture
from normfuse.sources.safetensors_file import Change, bytes_of
from normfuse.sources.storages import archived

METADATA = ".metadata"
AGAIN = "save it again with torch.distributed.checkpoint.save, or fetch what is missing"
_STRANGE = "no checkpoint needs that, and torch may run it: do not load it with anything else, and ask whoever made it"
IN_MEMORY = 1024 * limits.MIB
"""Bytes of tensors beyond which they are put together on the disk."""
_ALIGNED = 64


@dataclass(frozen=True)
class DcpFolder:
    """The weights in a checkpoint of `torch.distributed.checkpoint`.

    Attributes:
        path: the ``.metadata``.
        held: name of a tensor of the model -> key in the checkpoint.
        metadata: what the checkpoint holds.
        notes: what was done to find the weights.
    """

    path: Path
    held: Mapping[str, str]
    metadata: Metadata
    notes: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the tensors."""
        return tuple(self.held)

    @property
    def files(self) -> tuple[Path, ...]:
        """All that the checkpoint consists of."""
        return self.path, *(self.path.with_name(file) for file in sorted({each.file for each in self.metadata.items}))

    def tensors(self, keys: Collection[str]) -> dict[str, Tensor]:
        """Some of the tensors, put together of their pieces: in memory, or in a file that is mapped where that is much.

        Raises:
            LoadError: a piece cannot be read, or is not what the metadata says.
        """
        wanted = {key: self.metadata.tensors[self.held[key]] for key in keys}
        size = sum(_room(each) for each in wanted.values())
        if size <= IN_MEMORY or shutil.disk_usage(tempfile.gettempdir()).free < size:
            return {key: self._tensor(each) for key, each in wanted.items()}
        with scratch() as folder:
            places = self._gathered(wanted.values(), folder / "tensors")
            file = map_file(folder / "tensors")  # which has no name any more when this is left
        return {
            key: tensor_at(file, place, each.dtype, each.size)
            for (key, each), place in zip(wanted.items(), places, strict=True)
        }

    def _gathered(self, wanted: Iterable[StoredTensor], path: Path) -> list[int]:
        """Put tensors together in a file; where each of them begins."""
        places = []
        with path.open("wb") as file:
            for each in wanted:
                places.append(file.tell())
                file.write(bytes_of(self._tensor(each)))
                file.seek(places[-1] + _room(each))
            file.truncate()
        return places

    def _tensor(self, stored: StoredTensor) -> Tensor:
        pieces = [each for each in stored.pieces if each.sizes == stored.size]
        if pieces:
            return self._piece(stored, pieces[0])
        whole = torch.empty(stored.size, dtype=stored.dtype)
        for piece in stored.pieces:
            _part(whole, piece).copy_(self._piece(stored, piece))
        return whole

    def _piece(self, stored: StoredTensor, piece: Piece) -> Tensor:
        item = piece.item
        path = self.path.with_name(item.file)
        with _told(path), path.open("rb") as file:
            tensor = _tensor_in(file, item)
            if type(tensor) is not Tensor or tensor.layout is not torch.strided:
                raise Unreadable("it has a piece that is no dense tensor")
            if tensor.dtype != stored.dtype or tuple(tensor.shape) != piece.sizes:
                raise Unreadable("it has a piece of another size or dtype than its metadata says")
            return tensor.detach()

    def size(self, key: str) -> int:
        """Bytes of a tensor."""
        return self.metadata.tensors[self.held[key]].nbytes

    def write(self, target: Path, changes: Mapping[str, Change], dropped: Collection[str] = ()) -> set[str]:
        """The same checkpoint with other numbers in some tensors and without some: the same files with the same pieces in them.

        No more than one changed tensor is in memory, and a piece of it.

        Args:
            target: its ``.metadata``, in a folder that is there.
            changes: what to make of tensors.
            dropped: names of tensors that leave.

        Returns:
            The tensors of which a bit has changed.

        Raises:
            LoadError: the checkpoint cannot be read any more.
            OSError: it cannot be written.
        """
        keys = {self.held[name]: name for name in changes if name not in dropped}
        gone = frozenset(self.held[name] for name in dropped)
        with _told(self.path):
            data = self.path.read_bytes()
            about = read_metadata(data)
            new = {
                id(each.item): _length(each.sizes, about.tensors[key].dtype)
                for key in keys
                for each in about.tensors[key].pieces
            }
            new |= {id(each.item): 0 for key in gone for each in about.tensors[key].pieces}
        for path in self.files[1:]:
            _lay_out(path, target.with_name(path.name), [each for each in about.items if each.file == path.name], new)
        changed = {name for key, name in keys.items() if self._change(about.tensors[key], target.parent, changes[name])}
        if gone:
            about.without(gone)
        target.unlink(missing_ok=True)  # which a run that was killed may have left
        target.write_bytes(about.pickled() if gone or any(each.is_moved for each in about.items) else data)
        return changed

    def _change(self, stored: StoredTensor, folder: Path, change: Change) -> bool:
        """Write a changed tensor into the files, where there is room for it."""
        value = self._tensor(stored).clone(memory_format=torch.contiguous_format)
        differs = change(value)
        for piece in stored.pieces:
            item = piece.item
            with self.path.with_name(item.file).open("rb") as source, (folder / item.file).open("rb+") as file:
                file.seek(item.info["offset"])
                if differs or item.info["length"] != item.length:
                    saved = io.BytesIO()  # not into the file: torch ends the process where a disk is full
                    torch.save(_part(value, piece).clone(memory_format=torch.contiguous_format), saved)
                    assert saved.tell() == item.info["length"], "as long as it was said to be"
                    file.write(saved.getbuffer())
                else:
                    shutil.copyfileobj(_view(source, item), file, limits.MIB)
        return differs


def opened_dcp(folder: Path) -> DcpFolder:
    """The weights in a checkpoint of `torch.distributed.checkpoint`.

    Raises:
        LoadError: there are none, or what says where they are is damaged or asks for what is not allowed.
    """
    path = folder / METADATA
    with _told(path):
        if path.stat().st_size > limits.PICKLE_BYTES:
            raise OverLimit(f"a pickle of {path.stat().st_size:,} bytes", "PICKLE_BYTES")
        metadata = read_metadata(path.read_bytes())
        sizes = {file: _size(folder / file) for file in sorted({each.file for each in metadata.items})}
        for each in metadata.items:
            if each.offset + each.length > sizes[each.file]:
                raise LoadError(f"{folder / each.file} is shorter than {METADATA} says", hint=AGAIN)
        within, held = _weights(path, metadata)
    return DcpFolder(path, held, metadata, tuple(_notes(folder, metadata, within)))


def _size(path: Path) -> int:
    if not path.exists():
        raise LoadError(f"{path.parent / METADATA} names {path.name}, which is not there", hint=AGAIN)
    if not path.is_file():
        raise LoadError(f"{path} is not a regular file", hint=AGAIN)
    return path.stat().st_size


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """As all files of torch are told of, but that no trust opens these, and that they are saved in another way."""
    with told_as_load_error(path):
        try:
            yield
        except NotAllowed as refused:
            raise LoadError(f"{path} wants {refused}; refused", hint=_STRANGE) from None
        except (Unreadable, OSError) as error:
            reason = error.strerror or str(error) if isinstance(error, OSError) else error
            raise LoadError(f"{path} cannot be read: {reason}", hint=AGAIN) from error


def _room(tensor: StoredTensor) -> int:
    """Bytes that a tensor takes in a file of many."""
    return -(-tensor.nbytes // _ALIGNED) * _ALIGNED


# -- pieces in files ---------------------------------------------------------------------------------------------------


def _view(file: IO[bytes], item: Item) -> Any:
    from torch.distributed.checkpoint.utils import _create_file_view

    return _create_file_view(file, item.offset, item.length)  # type: ignore[arg-type]


def _tensor_in(file: IO[bytes], item: Item) -> Tensor:
    view = _view(file, item)
    if view.read(4) != b"PK\x03\x04":
        raise Unreadable("it has a piece that torch.save did not write")
    view.seek(0)
    reader: Any = torch._C.PyTorchFileReader(view)
    if "data.pkl" not in reader.get_all_records():
        raise Unreadable("it has a piece that torch.save did not write")
    content, storages = archived(reader, None, item.length)
    root = picture(content)
    if strangers := names_in(root):
        raise NotAllowed(*sorted(strangers))
    return Builder({}, storages).build(root)  # type: ignore[no-any-return]


def _part(whole: Tensor, piece: Piece) -> Tensor:
    for axis, (begin, length) in enumerate(zip(piece.offsets, piece.sizes, strict=True)):
        whole = whole.narrow(axis, begin, length)
    return whole


class _Counting(io.RawIOBase):
    """A stream that only counts."""

    size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.size += memoryview(data).nbytes
        return memoryview(data).nbytes


@functools.lru_cache(1024)
def _length(sizes: Sizes, dtype: torch.dtype) -> int:
    """Bytes of a piece as `torch.distributed.checkpoint` writes it, whatever its values are."""
    stream = _Counting()
    torch.save(torch.empty(sizes, dtype=dtype), stream)  # type: ignore[arg-type]
    return stream.size


def _lay_out(path: Path, target: Path, items: Sequence[Item], new: Mapping[int, int]) -> None:
    """The same file with room of other lengths for some items; the picture is told where all of them are then."""
    copied: list[tuple[int, int, int]] = []
    at = end = 0
    for item in sorted(items, key=lambda each: each.offset):
        copied.append((at, end, item.offset - at))  # what lies between items
        end += item.offset - at
        length = new.get(id(item), item.length)
        if id(item) not in new:
            copied.append((item.offset, end, length))
        item.info.update(offset=end, length=length)
        at, end = item.offset + item.length, end + length
    rest = path.stat().st_size - at
    with path.open("rb") as source, FileInTheMaking(target, end + rest) as made:
        for begin, offset, size in (*copied, (at, end, rest)):
            made.copy(source.fileno(), begin, offset, size)


# -- the weights among all that is saved -------------------------------------------------------------------------------


def _weights(path: Path, metadata: Metadata) -> tuple[tuple[Any, ...], dict[str, str]]:
    """Where the weights of the model lie in what was saved, and their keys by the names that they have there."""
    groups: dict[tuple[Any, ...], dict[str, str]] = {}
    for key in metadata.tensors:
        *within, name = metadata.paths[key]
        group = groups.setdefault(tuple(within), {})
        if str(name) in group:
            raise Unreadable(f"it has two tensors of the name '{name}'")
        group[str(name)] = key
    largest = max(map(len, groups.values()), default=0)
    ranks = {within: _rank(within, len(group) == largest) for within, group in groups.items() if not _is_optimizer(within)}
    best = [within for within in ranks if ranks[within] == min(ranks.values())]
    if not best:
        raise LoadError(f"{path.parent} holds no weights, but {_said(metadata)}", hint=AGAIN)
    if len(best) > 1:
        raise LoadError(
            f"{path.parent} holds weights {len(best)} times, as {listed(['.'.join(map(str, each)) for each in best])}",
            hint="save those that you mean as a checkpoint of their own",
        )
    return best[0], {name: key for name, key in groups[best[0]].items() if name not in COUNTS}


def _is_optimizer(within: tuple[Any, ...]) -> bool:
    return any(isinstance(each, str) and each.lower().startswith("optim") for each in within)


def _rank(within: tuple[Any, ...], is_largest: bool) -> tuple[int, int, int]:
    """What is taken for the weights: what has a name for weights, or else what lies there without one; averages come last."""
    depth = len(within)
    if any(each in AVERAGES for each in within):
        return 4, depth, 0
    if not within:
        return 1 if is_largest else 3, 0, 0
    named = within[-1] in WEIGHTS
    return (0 if depth == 1 else 2, depth, WEIGHTS.index(within[-1])) if named else (5, 0, 0)


def _said(metadata: Metadata) -> str:
    return listed(dict.fromkeys(str(path[0]) for path in metadata.paths.values())) or "nothing"


def _notes(folder: Path, metadata: Metadata, within: tuple[Any, ...]) -> Iterator[str]:
    if within:
        yield f"the weights are {'.'.join(map(str, within))} of {folder.name}, which holds {_said(metadata)}"
