"""A file of a known size in the making: bytes of memory and of other files are put into it while others are computed.

The file is made equal to what is put: where a run that was killed has left it, what is there already is looked at and stays,
and only what differs is written. So what was done before counts by what it is, and nobody has to believe a list.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch

from normfuse import limits

_PIECE = 8 * limits.MIB
_NOT_IN_THE_KERNEL = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.EPERM)


class FileInTheMaking:
    """A context; the file is complete, though perhaps not on the disk yet, when it is left without an error.

    Args:
        path: where it is; nothing is written through a link.
        size: its bytes.

    Raises:
        OSError: it cannot be written, also of what was put before.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self.file = -1
        self.is_new = True
        self.workers = ThreadPoolExecutor(2)
        self.pending: deque[tuple[int, Future[None]]] = deque()
        self.room: list[tuple[torch.Tensor, Future[None]]] = []

    def __enter__(self) -> FileInTheMaking:
        """Open it; what a run left there stays, if it is a file of its own."""
        self._open()
        os.truncate(self.file, self.size)
        return self

    def _open(self) -> None:
        try:
            self.file = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW)
            about = os.fstat(self.file)
            if stat.S_ISREG(about.st_mode) and about.st_nlink == 1:
                self.is_new = False
                return
            os.close(self.file)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP, errno.EISDIR):
                raise
        self.path.unlink(missing_ok=True)
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)

    def buffer(self, size: int) -> torch.Tensor:
        """At least so many bytes of memory: those of what is written already where they do, as new ones cost time."""
        free = [each for each, written in self.room if written.done()]
        self.room = [(each, written) for each, written in self.room if not written.done()]
        found = next((each for each in free if len(each) >= size), None)
        return torch.empty(size, dtype=torch.uint8) if found is None else found

    def allocate(self) -> None:
        """Ask for all of the file's room at once, where the system can: it makes writing several times cheaper."""
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.file, 0, max(self.size, 1))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise

    def put(self, offset: int, data: memoryview, of: torch.Tensor | None = None) -> None:
        """Bytes of memory, which must stay as they are until they are written; ``of`` is the buffer that they lie in."""
        written = self._later(len(data), self._put, offset, data)
        if of is not None:
            self.room.append((of, written))

    def copy(self, source: int, begin: int, offset: int, size: int) -> None:
        """Bytes of another open file, copied by the kernel where it can."""
        self._later(0, self._copy, source, begin, offset, size)

    def _later(self, size: int, *job: object) -> Future[None]:
        """Do it beside what is computed next, unless too many bytes wait for their turn."""
        while self.pending and (
            self.pending[0][1].done() or sum(held for held, _ in self.pending) + size > limits.WAITING_BYTES
        ):
            self.pending.popleft()[1].result()
        done: Future[None] = self.workers.submit(*job)  # type: ignore[arg-type]
        self.pending.append((size, done))
        if size > limits.WAITING_BYTES:
            done.result()
        return done

    def _put(self, offset: int, data: memoryview) -> None:
        for piece in _pieces(len(data)):
            part, place = data[piece], offset + piece.start
            if self.is_new or os.pread(self.file, len(part), place) != part:
                _write(self.file, part, place)
                self._start_writing(place, len(part))

    def _start_writing(self, offset: int, size: int) -> None:
        """Let the disk begin, so that there is less to wait for at the end."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.file, offset, size, os.POSIX_FADV_DONTNEED)

    def _copy(self, source: int, begin: int, offset: int, size: int) -> None:
        for piece in _pieces(size):
            count, at, place = piece.stop - piece.start, begin + piece.start, offset + piece.start
            if self.is_new or os.pread(self.file, count, place) != os.pread(source, count, at):
                self._copy_piece(source, at, place, count)
                self._start_writing(place, count)

    def _copy_piece(self, source: int, begin: int, offset: int, size: int) -> None:
        done = 0
        while done < size:
            copied = _copied_by_kernel(source, self.file, size - done, begin + done, offset + done)
            if not copied:  # the kernel cannot, or the source is shorter than its header says
                block = os.pread(source, size - done, begin + done)
                if not block:
                    raise OSError(0, "the file became shorter while it was read")
                _write(self.file, memoryview(block), offset + done)
                copied = len(block)
            done += copied

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Wait for everything that was put."""
        try:
            self.workers.shutdown(cancel_futures=kind is not None)
            if kind is None:
                for _, each in self.pending:
                    each.result()
        finally:
            os.close(self.file)


def _copied_by_kernel(source: int, file: int, size: int, begin: int, offset: int) -> int:
    """How many bytes the kernel has copied; none where it cannot, or where the source has none."""
    try:
        return os.copy_file_range(source, file, size, begin, offset) if hasattr(os, "copy_file_range") else 0
    except OSError as error:
        if error.errno not in _NOT_IN_THE_KERNEL:
            raise
        return 0


def _pieces(size: int) -> Iterator[slice]:
    return (slice(start, min(start + _PIECE, size)) for start in range(0, size, _PIECE))


def _write(file: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(file, data, offset)
        data, offset = data[done:], offset + done


def check_room(target: Path, size: int) -> None:
    """Raise before anything is written where there is no room for it; what a run has left at the target is made use of.

    Args:
        target: a folder, or a file to be.
        size: bytes to write there.

    Raises:
        OSError: there is not enough room.
    """
    folder = target if target.is_dir() else target.parent
    there = sum(each.stat().st_blocks * 512 for each in folder.iterdir() if each.is_file()) if folder is target else 0
    if shutil.disk_usage(folder).free + there < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
