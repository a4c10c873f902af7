"""The tensors' bytes of a file of `torch.save`: in a zip archive, or behind the pickle in the format from before torch 1.6."""

from __future__ import annotations

import pickletools
import sys
import zipfile
from collections.abc import Mapping
from mmap import mmap
from pathlib import Path
from typing import Any

import torch

from normfuse import limits
from normfuse.limits import OverLimit, check_inflation
from normfuse.sources.archive import NO_ZIP
from normfuse.sources.constructors import Stored
from normfuse.sources.mapped import map_file, tensor_at
from normfuse.sources.pickles import Name, Unreadable, picture

# The names of storages in pickles, such as torch.FloatStorage, and what they hold.
_DTYPES: Mapping[str, torch.dtype] = {
    "UntypedStorage": torch.uint8,
    **{name: dtype for dtype, name in torch.storage._dtype_to_storage_type_map().items()},
}


def storage_of(reference: Any) -> tuple[torch.dtype, str, int]:
    """A reference of a pickle to a storage: its dtype, its key, and how many entries it has.

    Raises:
        Unreadable: it is none.
    """
    match reference:
        case ("storage" | b"storage", Name(text), (str() | int()) as key, _location, int(count), *view) if view in ([], [None]):
            dtype = _DTYPES.get(text.rpartition(".")[2]) if text.startswith("torch.") else None
            if dtype is not None and count >= 0:
                return dtype, str(key), count
    raise Unreadable("its pickle refers to what is no storage of a tensor")


class ArchiveStorages:
    """Storages of a zip archive; read without copying where the archive lies on the disk, uncompressed and aligned."""

    def __init__(self, reader: Any, path: Path | None) -> None:
        self.reader = reader
        self.done: dict[str, torch.UntypedStorage] = {}
        self.mapped: mmap | None = None
        if path is not None and _is_uncompressed(path):
            self.mapped = map_file(path)
        order = reader.get_record("byteorder") if reader.has_record("byteorder") else b"little"
        self.swapped = order.decode() != sys.byteorder

    def __call__(self, reference: Any) -> Stored:
        """The storage that the pickle refers to."""
        dtype, key, count = storage_of(reference)
        if key not in self.done:
            bytes_ = self._read(f"data/{key}", count * dtype.itemsize, dtype)
            if self.swapped:
                bytes_.byteswap(dtype)  # type: ignore[no-untyped-call]
            self.done[key] = bytes_
        return Stored(self.done[key], dtype)

    def _read(self, record: str, size: int, dtype: torch.dtype) -> torch.UntypedStorage:
        if not self.reader.has_record(record) or self.reader.get_record_size(record) < size:
            raise Unreadable("a tensor in it is larger than what is stored of it")
        if size == 0:
            return torch.UntypedStorage(0)  # type: ignore[no-untyped-call]
        offset = self.reader.get_record_offset(record) if self.mapped is not None else 1
        if self.mapped is None or offset % dtype.itemsize or offset + size > len(self.mapped):
            copied: torch.UntypedStorage = self.reader.get_storage_from_record(record, size, torch.uint8).untyped_storage()
            return copied
        return tensor_at(self.mapped, offset, torch.uint8, (size,)).untyped_storage()


def _is_uncompressed(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
    except NO_ZIP:
        return False


def unpacked_size(reader: Any) -> int:
    """The bytes of an archive's records when they are unpacked."""
    return sum(map(reader.get_record_size, reader.get_all_records()))


def archived(reader: Any, path: Path | None, packed: int) -> tuple[bytes, ArchiveStorages]:
    """The pickle of an archive, and the storages that it refers to.

    Args:
        reader: of the archive.
        path: where it lies on the disk; None where it lies in another file.
        packed: its bytes.

    Raises:
        OverLimit: it is larger than is allowed, packed or unpacked.
    """
    check_inflation(unpacked_size(reader), packed)
    if reader.get_record_size("data.pkl") > limits.PICKLE_BYTES:
        raise OverLimit(f"a pickle of {reader.get_record_size('data.pkl'):,} bytes", "PICKLE_BYTES")
    return reader.get_record("data.pkl"), ArchiveStorages(reader, path)


class LegacyStorages:
    """Storages behind the pickle of a file from before torch 1.6: a list of their keys, then each with its size before it."""

    def __init__(self, behind: bytes) -> None:
        self.behind = behind
        self.wanted: dict[str, tuple[int, torch.UntypedStorage]] = {}

    def __call__(self, reference: Any) -> Stored:
        """A storage of the right size, which `fill` fills."""
        dtype, key, count = storage_of(reference)
        if key not in self.wanted:
            if count * dtype.itemsize > len(self.behind):
                raise Unreadable("a tensor in it is larger than what is stored of it")
            self.wanted[key] = count, torch.UntypedStorage(count * dtype.itemsize)  # type: ignore[no-untyped-call]
        return Stored(self.wanted[key][1], dtype)

    def fill(self, keys: Any) -> None:
        """Read all that was asked for.

        Raises:
            Unreadable: the file is cut short, or does not hold what its pickle said.
        """
        at = 0
        for key in keys if isinstance(keys, list) else []:
            count, storage = self.wanted[str(key)]
            said = int.from_bytes(self.behind[at : at + 8], "little", signed=True)
            data = self.behind[at + 8 : at + 8 + storage.nbytes()]
            if said != count or len(data) != storage.nbytes():
                raise Unreadable("it is damaged or cut short")
            if data:
                torch.empty(0, dtype=torch.uint8).set_(storage).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            at += 8 + len(data)
        if not isinstance(keys, list) or {str(key) for key in keys} != set(self.wanted):
            raise Unreadable("it does not hold all of its tensors")


def in_a_row(data: bytes) -> tuple[list[bytes], LegacyStorages]:
    """The pickles of a file from before torch 1.6 (magic number, version, machine, content, keys), and its storages.

    Raises:
        Unreadable: it is of another kind of machine.
    """
    parts, behind = _pickles_in(data, 5)
    if picture(parts[2]).get("little_endian") is not True:
        raise Unreadable("it was written on a machine of another byte order")
    return parts, LegacyStorages(behind)


def _pickles_in(data: bytes, count: int) -> tuple[list[bytes], bytes]:
    """The first `count` pickles of a stream, and what follows them."""
    found = []
    for _ in range(count):
        end = 1 + next(position for opcode, _argument, position in pickletools.genops(data) if opcode.name == "STOP")  # type: ignore[operator]
        found.append(data[:end])
        data = data[end:]
    return found, data
