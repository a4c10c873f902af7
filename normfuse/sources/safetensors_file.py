"""One safetensors file: its header as it stands, tensors mapped from the disk, and the same file with other numbers in it.

A file is 8 bytes of length, that many bytes of JSON (name → dtype, shape and byte range), and the tensors' bytes. The library
reads tensors; the header is read here too, because a copy in which only some ranges differ needs to know them, and because two
entries of one name are an attack or an accident, and never one tensor.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from normfuse import limits
from normfuse.errors import LoadError, first_line
from normfuse.limits import OverLimit
from normfuse.sources.atomic import to_disk
from normfuse.strict_json import parsed, record

DAMAGED = "fetch or save the file again"
METADATA = "__metadata__"
_LENGTH = 8


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
        try:
            with safe_open(self.path, "pt") as file:
                return {key: file.get_tensor(key) for key in keys}
        except (OSError, SafetensorError) as error:
            raise LoadError(f"{self.path} cannot be read: {first_line(error)}", hint=DAMAGED) from error

    def size(self, key: str) -> int:
        """Bytes of a tensor."""
        begin, end = self.header[key]["data_offsets"]
        return int(end - begin)

    def write(self, target: Path, changed: Mapping[str, Tensor], dropped: Collection[str] = ()) -> None:
        """The same file with other numbers in some tensors, which keep their dtype and shape, and without some tensors.

        Every other byte is the original's, header and metadata included; where tensors leave, those behind them move up.
        """
        if dropped:
            self._write_without(target, set(dropped))
            without = opened_safetensors(target)
        else:
            shutil.copyfile(self.path, target)
            without = self
        with target.open("r+b") as file:
            for key, value in changed.items():
                if key in without.header:
                    file.seek(without.start + without.header[key]["data_offsets"][0])
                    file.write(bytes_of(value))
        to_disk(target)

    def _write_without(self, target: Path, dropped: Collection[str]) -> None:
        kept = sorted((key for key in self.keys if key not in dropped), key=lambda key: self.header[key]["data_offsets"])
        moved, end = {}, 0
        for key in kept:
            moved[key] = [end, end + self.size(key)]
            end += self.size(key)
        header = {
            name: entry if name == METADATA else {**entry, "data_offsets": moved[name]}
            for name, entry in self.header.items()
            if name not in dropped
        }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _LENGTH)
        with self.path.open("rb") as source, target.open("wb") as file:
            file.write(len(text).to_bytes(_LENGTH, "little") + text)
            for key in kept:
                source.seek(self.start + self.header[key]["data_offsets"][0])
                _copy(source, file, self.size(key))


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
        with safe_open(path, "pt") as opened:  # checks ranges, sizes and dtypes, each against the others and the file's end
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


def bytes_of(value: Tensor) -> Any:
    """The bytes of a dense tensor, entry by entry."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""


def _copy(source: Any, target: Any, size: int) -> None:
    while size:
        block = source.read(min(size, limits.MIB))
        if not block:
            raise OSError(0, "the file became shorter while it was read")
        target.write(block)
        size -= len(block)
