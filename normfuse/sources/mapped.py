"""Files mapped into memory: what nobody reads of a tensor costs nothing, and what was read can be let go of.

A map is private: whoever writes into a tensor gets pages of his own, copied on write, and the file never changes. It reserves
no memory for that, so a file larger than the machine's memory is mapped as well. While no page of a tensor was written, its
pages are the file's: they can be dropped at any time, and come back from the file when they are read.

What was written is asked of the kernel (`/proc/self/pagemap`), which alone knows of all ways to write. Where it does not tell,
nothing is dropped. Only large tensors are worth asking for.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import mmap
import os
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from normfuse.limits import MIB

LARGE = MIB
"""Bytes of a tensor whose pages are worth asking for."""

_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # older Pythons do not name it
_ENTRY = 8
"""Bytes that the kernel tells of a page."""
_ENTRIES = 1 << 17
"""Pages asked for at a time."""

_LIVE: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()
"""The maps that are still there, by their addresses."""


def map_file(path: Path) -> mmap.mmap:
    """A file's bytes, to be written into without a trace on the file. Tensors in it (`tensor_at`) keep it mapped.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is empty.
    """
    try:
        made = _mapped(path)
    except OSError as error:
        if error.errno != errno.EMFILE or not _more_files_allowed():
            raise
        made = _mapped(path)
    _LIVE[_bytes(made, 0, 1).data_ptr()] = made
    return made


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        if not hasattr(mmap, "MAP_PRIVATE"):
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        flags, access = mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(file.fileno(), 0, flags=flags, prot=access, **_NO_HANDLE)


_NO_HANDLE: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
"""A map needs no open file; older Pythons keep one for each, and a checkpoint may have hundreds of files."""


def _more_files_allowed() -> bool:
    """Let this process open as many files as its system allows it, which is more than it starts with; whether that is more."""
    try:
        import resource
    except ImportError:  # not on Windows
        return False
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if most != resource.RLIM_INFINITY else 1 << 16
    if wanted <= now:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
    return True


def tensor_at(file: mmap.mmap, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A tensor whose entries lie in a map, with a storage of its own; a copy where its place is none for its dtype.

    Raises:
        ValueError: it would reach beyond the file.
    """
    count = math.prod(shape)
    if count == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    size = count * dtype.itemsize
    if offset < 0 or offset + size > len(file):
        raise ValueError("a tensor that reaches beyond its file")
    if offset % dtype.itemsize:
        return _bytes(file, offset, size).clone().view(dtype).view(tuple(shape))
    return torch.frombuffer(file, dtype=dtype, count=count, offset=offset).view(tuple(shape))


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor's entries lie in a file that is mapped."""
    return _place(tensor) is not None


def is_unwritten(tensor: Tensor) -> bool:
    """Whether a tensor is what its file says because nobody wrote into it; False where that cannot be known."""
    place = _place(tensor)
    return place is not None and _is_unwritten(place)


def let_go(tensor: Tensor) -> None:
    """Drop what memory holds of a large mapped tensor that nobody wrote into; its values stay what they are.

    Nobody may write into it meanwhile. Nothing is done to any other tensor, nor to pages that are not all its own.
    """
    place = _place(tensor, LARGE)
    inner = place.inner if place is not None else None
    if inner is not None and _is_unwritten(inner):
        inner.drop()


def undoing(tensor: Tensor) -> Callable[[], None] | None:
    """What makes a large mapped tensor again what its file says, which it is now; None for any other tensor.

    Nothing is copied but what it shares a page with others of.
    """
    place = _place(tensor, LARGE)
    inner = place.inner if place is not None else None
    if place is None or inner is None or not tensor.is_contiguous() or not _is_unwritten(inner):
        return None
    edges = [(place.start, inner.start), (inner.end, place.end)]
    ends = [_bytes(place.file, begin, end - begin) for begin, end in edges if begin < end]
    before = [each.clone() for each in ends]

    def undo() -> None:
        if not _is_unwritten(inner):
            inner.drop()
        for end, value in zip(ends, before, strict=True):
            if not torch.equal(end, value):
                end.copy_(value)

    return undo


@contextlib.contextmanager
def letting_go() -> Iterator[None]:
    """Modules that are called inside let go of their tensors once they have read them."""

    def after(module: nn.Module, _inputs: Any, _output: Any) -> None:
        for part in (module, *module.children()):  # whose weights it may have read without a call of it
            for tensor in (*part._parameters.values(), *part._buffers.values()):
                if tensor is not None:
                    let_go(tensor)

    hook = register_module_forward_hook(after, always_call=True)
    try:
        yield
    finally:
        hook.remove()


# ---- places in a map


@dataclass(frozen=True)
class _Place:
    """Bytes of a map.

    Attributes:
        file: the map.
        address: of its first byte.
        start: where the bytes begin in it.
        end: where they end.
    """

    file: mmap.mmap
    address: int
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def inner(self) -> _Place | None:
        """The whole pages in it."""
        start, end = -(-self.start // mmap.PAGESIZE) * mmap.PAGESIZE, self.end // mmap.PAGESIZE * mmap.PAGESIZE
        return _Place(self.file, self.address, start, end) if start < end else None

    def drop(self) -> None:
        """Its pages become the file's, which are read when somebody asks for them; whole pages only."""
        self.file.madvise(mmap.MADV_DONTNEED, self.start, self.size)


def _place(tensor: Tensor, least: int = 1) -> _Place | None:
    """Where a tensor of at least so many bytes lies; None where that is in no map."""
    if not _LIVE or type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_nested:
        return None
    if tensor.nbytes < least or tensor.device.type != "cpu" or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return None
    begin = tensor.data_ptr()
    maps = sorted(_LIVE.items())
    found = bisect_right(maps, begin, key=lambda each: each[0]) - 1
    if found < 0:
        return None
    address, file = maps[found]
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    end = begin - address + reach * tensor.dtype.itemsize
    return _Place(file, address, begin - address, end) if end <= len(file) else None


def _bytes(file: mmap.mmap, begin: int, size: int) -> Tensor:
    return torch.frombuffer(file, dtype=torch.uint8, count=size, offset=begin)


def _is_unwritten(place: _Place) -> bool:
    return _kernel_tells() and _are_files(place)


def _are_files(place: _Place) -> bool:
    """Whether all pages of a place that are there are the file's."""
    first = (place.address + place.start) // mmap.PAGESIZE
    last = -(-(place.address + place.end) // mmap.PAGESIZE)
    with open("/proc/self/pagemap", "rb", buffering=0) as kernel:
        for begin in range(first, last, _ENTRIES):
            count = min(_ENTRIES, last - begin)
            told = os.pread(kernel.fileno(), count * _ENTRY, begin * _ENTRY)
            state = np.frombuffer(told, dtype=np.uint64) >> np.uint64(61)  # is there, is swapped out, is a file's or shared
            if len(state) != count or bool(((state != 0) & (state & np.uint64(1) == 0)).any()):
                return False
    return True


@functools.cache
def _kernel_tells() -> bool:
    """Whether this kernel says what was written, and drops what it is told to: tried on two pages of a file."""
    if not hasattr(mmap, "MADV_DONTNEED") or not os.access("/proc/self/pagemap", os.R_OK):
        return False
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pages"
            path.write_bytes(b"\1" * 2 * mmap.PAGESIZE)
            file = map_file(path)
            address = _bytes(file, 0, 1).data_ptr()
            read, written = (_Place(file, address, each * mmap.PAGESIZE, (each + 1) * mmap.PAGESIZE) for each in (0, 1))
            file[written.start] += 1
            told = file[read.start] == 1 and _are_files(read) and not _are_files(written)
            written.drop()
            return told and _are_files(written) and file[written.start] == 1
    except OSError:
        return False
