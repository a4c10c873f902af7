"""The two containers of `torch.save`: what of them is no pickle, read and written as it stands.

Since torch 1.6 a zip archive with a record for every storage; before, pickles in a row with the storages behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from normfuse.errors import LoadError
from normfuse.sources.atomic import late_errors
from normfuse.sources.constructors import Stored
from normfuse.sources.loading import LEGACY, RESAVE, archive_reader, first_bytes, foreign
from normfuse.sources.pickle_writing import pickled
from normfuse.sources.pickles import Outside, Unreadable, everything, picture
from normfuse.sources.storages import archived, in_a_row, storage_of

_OWN_RECORDS = ("version", ".data/serialization_id")  # torch's writer adds them itself


@dataclass(frozen=True)
class TorchFile:
    """A file of `torch.save`.

    Attributes:
        path: where it is.
        root: the picture of its content.
        stored: gives the storage that a reference of the picture means.
        write: fills a stream with the same file, given another root and the storages that are new, by their keys.
    """

    path: Path
    root: Any
    stored: Callable[[Any], Stored]
    write: Callable[[Any, Any, Mapping[str, bytes]], None]

    def written(self, target: Path, root: Any, new: Mapping[str, bytes]) -> None:
        """Write it elsewhere."""
        with late_errors(target) as stream:
            self.write(stream, root, new)


def opened_torch_file(path: Path) -> TorchFile:
    """What a file of `torch.save` holds, as a picture; nothing of it is built.

    Raises:
        LoadError: it is no such file.
        OverLimit: it is larger than is allowed.
        Unreadable: it is damaged.
    """
    head = first_bytes(path)
    if head.startswith(LEGACY):
        return _legacy(path)
    if not head.startswith(b"PK\x03\x04"):
        raise foreign(path, head)
    return _archive(path)


def outsides(root: Any) -> Iterator[Outside]:
    """Every mention of a storage in a picture."""
    return (each for each in everything(root) if isinstance(each, Outside))


def _archive(path: Path) -> TorchFile:
    reader = archive_reader(path)
    records = set(reader.get_all_records())
    if "constants.pkl" in records:
        raise LoadError(
            f"{path} is a TorchScript archive, not weights", hint="save the weights: torch.save(m.state_dict(), path)"
        )
    if "data.pkl" not in records:
        raise LoadError(f"{path} is a zip file, but not one of torch.save", hint=RESAVE)
    data, storages = archived(reader, path, path.stat().st_size)
    if storages.swapped:
        raise Unreadable("it was written on a machine of another byte order")

    def write(stream: Any, root: Any, new: Mapping[str, bytes]) -> None:
        used = {f"data/{storage_of(each.reference)[1]}" for each in outsides(root)}
        writer = torch._C.PyTorchFileWriter(stream)
        try:
            for record in reader.get_all_records():
                if record in _OWN_RECORDS or (record.startswith("data/") and record not in used):
                    continue
                key = record.removeprefix("data/")
                content = pickled(root, _protocol(data)) if record == "data.pkl" else new.get(key)
                content = reader.get_record(record) if content is None else content
                writer.write_record(record, content, len(content))
            for key, content in new.items():
                if f"data/{key}" not in records:
                    writer.write_record(f"data/{key}", content, len(content))
        finally:  # torch's writer has to be ended in any case
            writer.write_end_of_file()

    return TorchFile(path, picture(data), storages, write)


def _legacy(path: Path) -> TorchFile:
    parts, storages = in_a_row(path.read_bytes())
    root, keys = picture(parts[3]), picture(parts[4])
    for each in outsides(root):
        storages(each.reference)
    storages.fill(keys)

    def write(stream: Any, root: Any, new: Mapping[str, bytes]) -> None:
        used = {storage_of(each.reference)[1]: each.reference for each in outsides(root)}
        kept = [key for key in map(str, keys) if key in used]
        order = [*kept, *(key for key in new if key not in kept)]
        stream.write(b"".join(parts[:3]) + pickled(root, _protocol(parts[3])) + pickled(order, _protocol(parts[4])))
        for key in order:
            dtype, _key, count = storage_of(used[key])
            content = new[key] if key in new else bytes_of_storage(storages(used[key]).bytes)[: count * dtype.itemsize]
            stream.write(count.to_bytes(8, "little") + content)

    return TorchFile(path, root, storages, write)


def _protocol(data: bytes) -> int:
    return data[1] if data[:1] == b"\x80" else 2


def bytes_of_storage(storage: torch.UntypedStorage) -> bytes:
    """The bytes of a storage."""
    return bytes(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())  # type: ignore[call-overload]
