"""What the ``.metadata`` of a checkpoint of `torch.distributed.checkpoint` says: which tensors there are, and where they lie.

It is a pickle, which torch itself unpickles with no check. Here it is read as a picture, may name nothing but torch's own
descriptions of checkpoints, and what it says must add up: the pieces of a tensor cover it once, and lie in files beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import torch

from normfuse.sources.allowlist import NotAllowed
from normfuse.sources.constructors import KINDS
from normfuse.sources.pickle_writing import pickled
from normfuse.sources.pickles import Made, Name, Outside, Unreadable, everything, picture

_HOME = "torch.distributed.checkpoint.metadata"
_METADATA, _TENSOR, _CHUNK, _BYTES, _INDEX, _PROPERTIES = (
    f"{_HOME}.{name}"
    for name in (
        "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata", "MetadataIndex",
        "TensorProperties",
    )
)  # fmt: skip
_INFO = "torch.distributed.checkpoint.filesystem._StorageInfo"
_OLD_PROPERTIES = "torch.distributed._shard.sharded_tensor.metadata.TensorProperties"
_SIZE = "torch.Size"
_ALLOWED = frozenset(
    {
        *(_METADATA, _TENSOR, _CHUNK, _BYTES, _INDEX, _PROPERTIES, _INFO, _OLD_PROPERTIES, _SIZE),
        *(f"{_HOME}.StorageMeta", f"{_HOME}._MEM_FORMAT_ENCODING"),
        *("torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING", "torch.serialization._get_layout"),
        *("pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath", "collections.OrderedDict"),
        *(name for name, kind in KINDS.items() if isinstance(kind, torch.dtype)),
    }
)
"""All that such a file may name."""

Sizes: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Item:
    """Bytes of one file that belong together, as `torch.save` wrote them; ``info`` is what the picture says of their place."""

    file: str
    offset: int
    length: int
    info: dict[str, Any]

    @property
    def is_moved(self) -> bool:
        """Whether the picture says by now that it lies elsewhere."""
        return (self.info["offset"], self.info["length"]) != (self.offset, self.length)


@dataclass(frozen=True)
class Piece:
    """A part of a tensor: where it begins, how large it is, and its bytes."""

    offsets: Sizes
    sizes: Sizes
    item: Item


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it is stored."""

    dtype: torch.dtype
    size: Sizes
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return math.prod(self.size) * self.dtype.itemsize


@dataclass(frozen=True)
class Metadata:
    """What a checkpoint holds.

    Attributes:
        root: the picture of the file.
        protocol: of the pickle.
        tensors: by their keys.
        others: keys of what is no tensor.
        paths: key -> how it lies in the nested state dict that was saved.
        items: everything that lies in the files beside, whose pieces are disjoint.
    """

    root: Any
    protocol: int
    tensors: Mapping[str, StoredTensor]
    others: tuple[str, ...]
    paths: Mapping[str, tuple[Any, ...]]
    items: tuple[Item, ...]

    def without(self, keys: frozenset[str]) -> None:
        """Forget some tensors in the picture."""
        fields = _fields(self.root, _METADATA)
        for name in ("state_dict_metadata", "planner_data"):
            fields[name] = {key: each for key, each in _mapping(fields.get(name)).items() if key not in keys} or None
        fields["storage_data"] = {
            index: each for index, each in fields["storage_data"].items() if _fields(index, _INDEX).get("fqn") not in keys
        }

    def pickled(self) -> bytes:
        """The picture as a file again."""
        return pickled(self.root, self.protocol)


def read_metadata(data: bytes) -> Metadata:
    """What a ``.metadata`` says.

    Raises:
        NotAllowed: it names what no checkpoint needs.
        OverLimit: it is larger than is allowed.
        Unreadable: it is damaged, or does not add up.
    """
    root = picture(data)
    _check_names(root)
    fields = _fields(root, _METADATA)
    items = dict(_items(_mapping(fields.get("storage_data"))))
    _check_disjoint(list(items.values()))
    said = _mapping(fields.get("state_dict_metadata"))
    if not all(isinstance(key, str) for key in said):
        raise Unreadable("it has a key that is no text")
    tensors = {key: _tensor(key, each, items) for key, each in said.items() if not _is(each, _BYTES)}
    planned = _mapping(fields["planner_data"]) if fields.get("planner_data") else {}
    paths = {key: _path(planned.get(key, (key,))) for key in said}
    others = tuple(key for key in said if key not in tensors)
    return Metadata(root, data[1] if data[:1] == b"\x80" else 2, tensors, others, paths, tuple(items.values()))


def _check_names(root: Any) -> None:
    values = list(everything(root))
    if strangers := {each.text for each in values if isinstance(each, Name)} - _ALLOWED:
        raise NotAllowed(*sorted(strangers))
    if any(isinstance(each, Outside) or (isinstance(each, Made) and not isinstance(each.by, Name)) for each in values):
        raise Unreadable("it has what no checkpoint has")


def _is(value: Any, name: str) -> bool:
    return isinstance(value, Made) and isinstance(value.by, Name) and value.by.text == name


def _fields(value: Any, name: str) -> dict[str, Any]:
    """The attributes of an instance of a dataclass."""
    if not _is(value, name) or value.called or len(value.states) != 1 or not isinstance(value.states[0], dict):
        raise Unreadable(f"it has no {name.rpartition('.')[2]} where one should be")
    return value.states[0]  # type: ignore[no-any-return]


def _mapping(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise Unreadable("it does not say what there is, or where")
    return value


def _sizes(value: Any) -> Sizes:
    held = value.arguments[0] if _is(value, _SIZE) and len(value.arguments) == 1 else None
    if not isinstance(held, tuple) or len(held) > 64 or not all(type(each) is int and each >= 0 for each in held):
        raise Unreadable("it has a size that is none")
    return held


def _path(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple) or not value or not all(type(each) in (str, int) for each in value):
        raise Unreadable("it has a key that is no text")
    return value


Place: TypeAlias = tuple[str, Sizes | None]


def _items(stored: dict[Any, Any]) -> Iterator[tuple[Place, Item]]:
    seen = set[Place]()
    for index, info in stored.items():
        named, place = _fields(index, _INDEX), _fields(info, _INFO)
        name, offset = named.get("fqn"), named.get("offset")
        file, begin, length = (place.get(each) for each in ("relative_path", "offset", "length"))
        if not isinstance(name, str) or not isinstance(file, str) or type(begin) is not int or type(length) is not int:
            raise Unreadable("it does not say where its tensors are")
        key: Place = name, None if offset is None else _sizes(offset)
        if begin < 0 or length < 0 or key in seen:
            raise Unreadable(f"it says two things of where '{name}' is" if key in seen else "it has a place that is none")
        if Path(file).name != file or file in ("", ".", "..") or "\\" in file or "\0" in file:
            raise Unreadable(f"it names '{file}', which is no file beside it")
        if place.get("transform_descriptors"):
            raise Unreadable(f"'{name}' was written through an extension ({place['transform_descriptors']})"[:200])
        seen.add(key)
        yield key, Item(file, begin, length, place)


def _check_disjoint(items: list[Item]) -> None:
    ordered = sorted(items, key=lambda each: (each.file, each.offset, each.length))
    if any(a.file == b.file and a.offset + a.length > b.offset for a, b in pairwise(ordered)):
        raise Unreadable("it says of the same bytes that they are two tensors")


def _tensor(key: str, value: Any, items: Mapping[Place, Item]) -> StoredTensor:
    fields = _fields(value, _TENSOR)
    size, dtype, chunks = _sizes(fields.get("size")), _dtype(fields.get("properties")), fields.get("chunks")
    if not isinstance(chunks, list):
        raise Unreadable(f"it does not say of what '{key}' is made")
    pieces = []
    for each in chunks:
        chunk = _fields(each, _CHUNK)
        offsets, sizes = _sizes(chunk.get("offsets")), _sizes(chunk.get("sizes"))
        if (key, offsets) not in items:
            raise Unreadable(f"it does not say where a piece of '{key}' is")
        pieces.append(Piece(offsets, sizes, items[key, offsets]))
        if math.prod(sizes) * dtype.itemsize > pieces[-1].item.length:
            raise Unreadable(f"'{key}' is larger than what is stored of it")
    if not covers(size, pieces):
        raise Unreadable(f"the pieces of '{key}' are not the whole of it, each part once")
    return StoredTensor(dtype, size, tuple(pieces))


def _dtype(properties: Any) -> torch.dtype:
    is_known = _is(properties, _PROPERTIES) or _is(properties, _OLD_PROPERTIES)
    state = properties.states[0] if is_known and len(properties.states) == 1 else None
    named = state[0] if isinstance(state, tuple) and state else state.get("dtype") if isinstance(state, dict) else None
    dtype = KINDS.get(named.text) if isinstance(named, Name) else None
    if not isinstance(dtype, torch.dtype):
        raise Unreadable("it has a tensor without a dtype")
    return dtype


def covers(size: Sizes, pieces: Sequence[Piece]) -> bool:
    """Whether pieces cover a tensor of this size, and each entry of it once."""
    ends = [tuple(map(sum, zip(each.offsets, each.sizes, strict=False))) for each in pieces]
    inside = all(
        len(each.offsets) == len(each.sizes) == len(size) and all(map(int.__le__, end, size))
        for each, end in zip(pieces, ends, strict=True)
    )
    if not inside or sum(math.prod(each.sizes) for each in pieces) != math.prod(size):
        return False
    boxes = [(each.offsets, end) for each, end in zip(pieces, ends, strict=True) if math.prod(each.sizes)]
    axis = max(range(len(size)), key=lambda dim: len({begin[dim] for begin, _end in boxes}), default=None)
    return len(boxes) < 2 or (axis is not None and not _overlap(sorted(boxes, key=lambda box: box[0][axis]), axis))


def _overlap(boxes: Sequence[tuple[Sizes, Sizes]], axis: int) -> bool:
    """Whether any two boxes meet; they are in the order of where they begin along an axis."""
    for number, (begin, end) in enumerate(boxes):
        for other, until in boxes[number + 1 :]:
            if other[axis] >= end[axis]:
                break
            if all(b < u and o < e for b, e, o, u in zip(begin, end, other, until, strict=True)):
                return True
    return False
