"""One safetensors file: its header as it stands, tensors mapped from the disk, and the same file with other numbers in it.

A file is 8 bytes of length, that many bytes of JSON (name → dtype, shape and byte range), and the tensors' bytes. The library
reads tensors; the header is read here too, because a copy in which only some ranges differ needs to know them, and because two
entries of one name are an attack or an accident, and never one tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from io import FileIO
from itertools import pairwise
from mmap import mmap
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from normfuse import limits
from normfuse.errors import LoadError, first_line
from normfuse.limits import OverLimit
from normfuse.sources.file_making import FileInTheMaking
from normfuse.sources.mapped import map_file, tensor_at
from normfuse.strict_json import parsed, record

DAMAGED = "fetch or save the file again"
METADATA = "__metadata__"

Change: TypeAlias = Callable[[Tensor], bool]
"""Told of a stored tensor, in memory of its own, makes another of it there; whether a bit of it differs."""

_LENGTH = 8

_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16, "U32": torch.uint32,
    "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
"""What a header calls a dtype -> the dtype."""


@dataclass(frozen=True)
class SafetensorsFile:
    """A file of tensors.

    Attributes:
        path: where it is.
        start: where the tensors' bytes begin.
        header: name → what the file says of it, in the file's order; the metadata too.
    """

    path: Path
    start: int
    header: Mapping[str, Mapping[str, Any]]

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the tensors, in the file's order."""
        return tuple(name for name in self.header if name != METADATA)

    def tensors(self, keys: Collection[str]) -> dict[str, Tensor]:
        """Some tensors, mapped from the disk.

        Raises:
            LoadError: the file cannot be read any more.
        """
        if not keys:
            return {}
        try:
            file = map_file(self.path)
            return {key: self._tensor(file, key) for key in keys}
        except (OSError, ValueError, SafetensorError) as error:
            raise LoadError(f"{self.path} cannot be read: {first_line(error)}", hint=DAMAGED) from error

    def _tensor(self, file: mmap, key: str) -> Tensor:
        entry = self.header[key]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:  # of parts of a byte
            with safe_open(self.path, "pt") as opened:
                packed: Tensor = opened.get_tensor(key)
                return packed
        return tensor_at(file, self.start + entry["data_offsets"][0], dtype, entry["shape"])

    def size(self, key: str) -> int:
        """Bytes of a tensor."""
        begin, end = self.header[key]["data_offsets"]
        return int(end - begin)

    def write(self, target: Path, changes: Mapping[str, Change], dropped: Collection[str] = ()) -> set[str]:
        """The same file with other numbers in some tensors, which keep their dtype and shape, and without some tensors.

        Every other byte is the original's, header and metadata included; where tensors leave, those behind them move up. No
        more than one tensor is in memory, and one that waits to be written (`normfuse.sources.file_making`).

        Returns:
            The tensors of which a bit has changed.
        """
        head, places = self._layout(set(dropped))
        size = len(head) + sum(self.size(key) for key in places)
        differing = set[str]()
        with self.path.open("rb", buffering=0) as source, FileInTheMaking(target, size) as made:
            if not changes and not dropped:  # as one piece, which some file systems share
                made.copy(source.fileno(), 0, 0, size)
                return differing
            made.allocate()
            made.put(0, memoryview(head))
            following = dict(pairwise(key for key in places if key in changes))
            for key, offset in places.items():
                begin = self.start + self.header[key]["data_offsets"][0]
                if key not in changes:
                    made.copy(source.fileno(), begin, len(head) + offset, self.size(key))
                    continue
                like, buffer = self.tensors([key])[key], made.buffer(self.size(key))
                held = buffer[: self.size(key)]
                _fill(held, source, begin)
                self._ask_for(source, following.get(key))
                if changes[key](held.view(like.dtype).view(like.shape)):
                    differing.add(key)
                made.put(len(head) + offset, memoryview(bytes_of(held)), buffer)
        return differing

    def _ask_for(self, source: FileIO, key: str | None) -> None:
        """Let the disk fetch the tensor that is read next while another one is computed."""
        if key is not None and hasattr(os, "posix_fadvise"):
            begin = self.start + self.header[key]["data_offsets"][0]
            os.posix_fadvise(source.fileno(), begin, self.size(key), os.POSIX_FADV_WILLNEED)

    def _layout(self, dropped: Collection[str]) -> tuple[bytes, dict[str, int]]:
        """What stands before the tensors, and where each begins behind that, in the order of their bytes."""
        kept = sorted((key for key in self.keys if key not in dropped), key=lambda key: self.header[key]["data_offsets"])
        if not dropped:
            with self.path.open("rb") as file:
                return file.read(self.start), {key: self.header[key]["data_offsets"][0] for key in kept}
        moved, end = dict[str, int](), 0
        for key in kept:
            moved[key] = end
            end += self.size(key)
        header = {
            name: entry if name == METADATA else {**entry, "data_offsets": [moved[name], moved[name] + self.size(name)]}
            for name, entry in self.header.items()
            if name not in dropped
        }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _LENGTH)
        return len(text).to_bytes(_LENGTH, "little") + text, moved


def opened_safetensors(path: Path) -> SafetensorsFile:
    """A safetensors file, its header checked.

    Raises:
        LoadError: it is damaged, cut short, names a tensor twice, or its header is beyond a limit.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH), "little")
            if length > limits.HEADER_BYTES:
                raise OverLimit(f"a header of {length:,} bytes", "HEADER_BYTES")
            text = file.read(length)
        header = record(parsed(text.decode(), once=True))
        with safe_open(path, "np") as opened:  # checks ranges, sizes and dtypes, each against the others and the file's end
            known = set(opened.keys())
        if known != set(header) - {METADATA}:
            raise ValueError("its header names other tensors than the library reads")
    except OverLimit as over:
        raise LoadError(f"{path} is not read: {over}", hint=over.hint) from None
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror or first_line(error)}", hint=DAMAGED) from error
    except (ValueError, SafetensorError) as error:
        raise LoadError(f"{path} is no safetensors file, or is damaged: {first_line(error)[:200]}", hint=DAMAGED) from error
    return SafetensorsFile(path, _LENGTH + length, header)


def _fill(held: Tensor, source: FileIO, begin: int) -> None:
    """Read as many bytes as a tensor has, from a place of a file."""
    source.seek(begin)
    left = memoryview(bytes_of(held))
    while left:
        done = source.readinto(left)
        if not done:
            raise OSError(0, "the file became shorter while it was read")
        left = left[done:]


def bytes_of(value: Tensor) -> Any:
    """The bytes of a dense tensor, entry by entry."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""
