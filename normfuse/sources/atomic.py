"""Write files so that none is ever left half written: the new file is complete, or the old one is untouched.

    write_atomically(path, write)    `write` fills a file in a scratch folder, which then takes the place of `path`
    proven_first(path, write)        the same as a context: what is checked inside it decides
    new_folder(path, write)          the same for a folder, which must not be there yet; one that was killed is gone on with
    scratch()                        a folder for files in the making
    late_errors(path)                a stream for writers that cannot bear an error while they write

A run can be killed at any moment, and what it then leaves is known by its name and by the lock that died with it: the next
run that writes there sweeps it. Files that belong together (a model and its weights beside it) take their places at one
moment; see `_place_together`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from normfuse.errors import InputError, NormfuseError

try:
    import fcntl
except ImportError:  # where there are no such locks nothing is swept
    fcntl = None  # type: ignore[assignment]

_SCRATCH = re.compile(r"\.normfuse-[0-9a-f]{16}")
_DESCRIPTORS = re.compile(r"/dev/std(out|err)|/proc/[^/]+/fd/\d+")
_PIECE = 1 << 20


class Unfinished(NormfuseError):
    """A run ended that the next one can go on with: what it was making stays."""


def write_atomically(path: Path, write: Callable[[Path], object], *, never_over: Sequence[Path] = ()) -> None:
    """Let `write` fill a file elsewhere, then put it at `path` in one step.

    Raises:
        InputError: `path` is one of `never_over`, also through a link; or no file can be written there.
    """
    with proven_first(path, write, never_over=never_over):
        pass


@contextlib.contextmanager
def proven_first(path: Path, write: Callable[[Path], object], *, never_over: Sequence[Path] = ()) -> Iterator[Path]:
    """Let `write` fill a file in a scratch folder beside `path`, yield it, and put it at `path` if nothing was raised.

    Files that `write` makes beside its own (external data) go along. Whatever stood at `path` stays until then. A terminal, a
    pipe and the null device are written into.

    Raises:
        InputError: `path` is one of `never_over`, also through a link; or no file can be written there.
    """
    with _told(path):
        into = is_stream(path)
        target = _target(path)
        _check(path, target, never_over)
    with _told(path), scratch(None if into else target.parent) as folder:
        (folder / "new").mkdir()
        new = folder / "new" / target.name
        write(new)
        yield new
        files = sorted((folder / "new").iterdir(), key=lambda file: file == new)  # the file itself comes last
        if into and len(files) > 1:
            raise InputError(f"cannot write {path}: it is one stream, and there are {len(files)} files", hint="name a file")
        if into:
            _pour(new, path)
            return
        for file in files:
            goal = target.with_name(file.name)
            _check(goal, goal, never_over)
            if goal.exists():
                shutil.copymode(goal, file)
            to_disk(file)
        _place(files, target.parent, folder)


@contextlib.contextmanager
def new_folder(
    path: Path, write: Callable[[Path], object], *, goes_on_with: Collection[str] = (), helped: bool = False
) -> Iterator[Path]:
    """Let `write` fill a folder in a scratch folder beside `path`, yield it, and put it at `path` if nothing was raised.

    Args:
        path: where the folder is to be.
        write: fills a folder.
        goes_on_with: names of files of which `write` keeps what is right in them: where a run for the same path was killed,
            `write` is given the folder that it left, with these files.
        helped: other processes write into it too (`helping`).

    Raises:
        InputError: something is at `path` already, or no folder can be made there.
    """
    path = Path(os.path.abspath(path))
    _check_absent(path)
    with _told(path), scratch(path.parent, with_folder=path.name if goes_on_with else None, helped=helped) as folder:
        new = folder / "new" / path.name
        new.mkdir(parents=True, exist_ok=True)
        for entry in [each for each in new.iterdir() if each.name not in goes_on_with or not _is_own_file(each)]:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        write(new)
        yield new
        for file in new.rglob("*"):
            if file.is_file():
                to_disk(file)
        os.rename(new, path)


def _is_own_file(path: Path) -> bool:
    """Whether nothing else is written where a file is: it is no link, and has no other name."""
    about = path.lstat()
    return stat.S_ISREG(about.st_mode) and about.st_nlink == 1


def check_new_folder(path: Path) -> None:
    """Fail now where `new_folder` would fail after all work; nothing is touched that a run has left to go on with.

    Raises:
        InputError: something is at `path` already, or no folder can be made there.
    """
    path = Path(os.path.abspath(path))
    _check_absent(path)
    with _told(path):
        folder, lock = _held(path.parent)
        os.close(lock)
        folder.rmdir()


def _check_absent(path: Path) -> None:
    with _told(path):
        if os.path.lexists(path):
            raise InputError(f"cannot write {path}: it is there already", hint="give another name with -o, or remove it first")
        if not path.parent.is_dir():
            raise InputError(f"cannot write {path}: there is no folder {path.parent}", hint=f"mkdir -p '{path.parent}'")


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = "nobody reads from it" if error.errno == errno.ENXIO else error.strerror or str(error)
        raise InputError(f"cannot write {path}: {reason}", hint=_HINTS.get(error.errno or 0)) from error


_HINTS = {
    errno.ENOSPC: "nothing was changed; make room, or name a place on another disk with -o",
    errno.EDQUOT: "nothing was changed; make room, or name a place on another disk with -o",
    errno.EACCES: "name a file in a folder that you may write to",
    errno.EROFS: "name a file in a folder that you may write to",
    errno.ENAMETOOLONG: "give a shorter name",
}


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether a path is no file to replace but something to write into: a pipe, a terminal, the null device.

    Raises:
        InputError: it is a socket or a disk, or no path at all.
        OSError: it cannot be looked at, such as a circle of links.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    except ValueError as error:  # a null byte, or half a surrogate pair
        raise InputError(f"cannot write {path}: it is no path ({error})", hint="give another name") from error
    if stat.S_ISSOCK(mode) or stat.S_ISBLK(mode):
        what = "a socket" if stat.S_ISSOCK(mode) else "a disk"
        raise InputError(f"cannot write {path}: it is {what}", hint="name a file")
    place = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(path))), os.path.basename(path))
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode) or _DESCRIPTORS.fullmatch(place) is not None


def _target(path: Path) -> Path:
    """The file to replace: a link stays a link, and the file that it points to is replaced."""
    real, here = Path(os.path.realpath(path)), Path(os.path.realpath(Path(path).parent))
    led = (folder for folder in real.parents if _SCRATCH.fullmatch(folder.name) and folder not in (here, *here.parents))
    inside = next(led, None)  # a run was killed while its files took their places
    return inside.parent / real.name if inside else real


def _check(path: Path, target: Path, never_over: Sequence[Path]) -> None:
    if not target.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {target.parent}", hint=f"mkdir -p '{target.parent}'")
    if target.is_dir():
        raise InputError(f"cannot write {path}: it is a folder", hint="name a file inside it")
    for kept in never_over:
        if target == _target(kept) or (target.exists() and Path(kept).exists() and target.samefile(kept)):
            raise InputError(f"cannot write {path}: it is the input {kept}", hint="give another name with -o")


def _pour(file: Path, path: Path) -> None:
    """The content of a file into a stream, which nobody can take back."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)  # a pipe without a reader says so at once
    with open(descriptor, "wb") as stream, file.open("rb") as content:
        os.set_blocking(descriptor, True)
        shutil.copyfileobj(content, stream, _PIECE)


def to_disk(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _place(files: Sequence[Path], parent: Path, folder: Path) -> None:
    if len(files) == 1 or not _place_together(files, parent, folder):
        for file in files:
            os.replace(file, parent / file.name)
    with contextlib.suppress(OSError):  # some file systems cannot
        descriptor = os.open(parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _place_together(files: Sequence[Path], parent: Path, folder: Path) -> bool:
    """Several files take their places at one moment; false, and nothing is done, where the file system has no links.

    Each place becomes a link by way of ``now``, which leads to the old files until one rename makes it lead to the new ones;
    then each link becomes the file that it leads to. Readers find all old files or all new ones between any two steps, and
    where a run is killed there, removing its folder does the last step (`_remove`).
    """
    old, now = folder / "old", folder / "now"
    old.mkdir()
    try:
        now.symlink_to("old")
        for file in files:
            if (parent / file.name).exists():
                os.link(os.path.realpath(parent / file.name), old / file.name)
    except OSError:
        return False
    for file in files:
        (folder / "link").symlink_to(f"{folder.name}/now/{file.name}")
        os.replace(folder / "link", parent / file.name)
    (folder / "next").symlink_to("new")
    os.replace(folder / "next", now)
    _settle(folder)
    return True


def _settle(folder: Path) -> None:
    """Every link into a scratch folder becomes the file that it leads to, or goes where it leads to none."""
    with os.scandir(folder.parent) as entries:
        links = [
            each.path for each in entries if each.is_symlink() and os.readlink(each.path).startswith(f"{folder.name}/now/")
        ]
    for link in links:
        if os.path.exists(link):
            with contextlib.suppress(FileNotFoundError):
                (folder / "settled").unlink()
            os.link(os.path.realpath(link), folder / "settled")
            os.replace(folder / "settled", link)
        else:
            os.unlink(link)


# -- scratch folders ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def scratch(beside: Path | None = None, *, with_folder: str | None = None, helped: bool = False) -> Iterator[Path]:
    """A folder for files in the making, gone afterwards; those that killed runs left in the same place are swept.

    Args:
        beside: where to make it; None for the system's folder of temporary files.
        with_folder: name of a new folder: of runs that were making one, the last one's is taken over and not swept.
        helped: other processes write into it too (`helping`).
    """
    parent = beside or Path(tempfile.gettempdir())
    folder, lock = _swept(parent, with_folder) or _held(parent)
    while helped and not _is_shared(folder, lock):
        os.close(lock)
        folder, lock = _held(parent)
    unfinished = False
    try:
        yield folder
    except Unfinished:
        unfinished = True
        raise
    finally:
        try:
            if not unfinished:
                _remove(folder)
        finally:
            os.close(lock)


@contextlib.contextmanager
def helping(new: Path) -> Iterator[None]:
    """Hold a new folder that another process is making, so that nobody takes it for one whose run was killed.

    Raises:
        OSError: it is not there any more, or another run has it.
    """
    lock = os.open(new.parents[1], os.O_RDONLY)
    try:
        if not _is_shared(new.parents[1], lock):
            raise OSError(errno.EBUSY, "another run goes on with it")
        yield
    finally:
        os.close(lock)


def _is_shared(folder: Path, lock: int) -> bool:
    """Whether the lock of a folder is one by now that other processes can have too."""
    return _locked(lock, shared=True) is not False and folder.exists()


def _held(parent: Path) -> tuple[Path, int]:
    """A new folder and the open lock on it, which lives as long as this process."""
    while True:
        folder = parent / f".normfuse-{secrets.token_hex(8)}"
        folder.mkdir(mode=0o700)
        with contextlib.ExitStack() as undo:
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            try:
                lock = os.open(folder, os.O_RDONLY)
            except FileNotFoundError:
                continue
            undo.callback(os.close, lock)
            if _locked(lock) is not False and folder.exists():
                undo.pop_all()
                return folder, lock
            # another run's sweep came between the making and the locking, and takes it away


def _locked(descriptor: int, *, shared: bool = False) -> bool | None:
    """Whether the lock on an open folder is ours now; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _swept(parent: Path, with_folder: str | None) -> tuple[Path, int] | None:
    """Remove the scratch folders of runs that are no more; but one with such a new folder is returned, and the lock on it.

    Who makes no folder leaves those in which one was in the making: a run for that folder can go on with it.
    """
    found: tuple[Path, int] | None = None
    with contextlib.suppress(OSError):
        for folder in [Path(entry) for entry in os.scandir(parent) if _SCRATCH.fullmatch(entry.name)]:
            with contextlib.suppress(OSError):
                lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                about = os.fstat(lock)
                makes = _in_the_making(folder) if not about.st_mode & 0o077 else []  # nobody else has put anything there
                is_free = about.st_uid == os.getuid() and (with_folder or not makes) and _locked(lock)
                if is_free and found is None and with_folder in makes:
                    found = folder, lock
                    continue
                try:
                    if is_free:
                        _remove(folder)
                finally:
                    os.close(lock)
    return found


def _in_the_making(folder: Path) -> list[str]:
    """Names of the new folders in a scratch folder."""
    new = folder / "new"
    if new.is_symlink() or not new.is_dir():
        return []
    return [each.name for each in os.scandir(new) if each.is_dir(follow_symlinks=False)]


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):  # without it links lead nowhere; so it stays for the next run where this fails
        if os.path.lexists(folder / "now"):
            _settle(folder)
        shutil.rmtree(folder, ignore_errors=True)


# -- writers that cannot fail ------------------------------------------------------------------------------------------


class _Late(io.RawIOBase):
    """Keeps the first error of a stream for later."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return 0  # torch rewinds when all is written; nothing is read back here

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self.error is None:
            try:
                self.stream.write(data)
            except OSError as error:
                self.error = error
        return size


@contextlib.contextmanager
def late_errors(path: Path) -> Iterator[IO[bytes]]:
    """A new file to write to, whose errors (a full disk) are raised when it is closed and not before.

    torch's writer of archives ends the process where a write fails while it cleans up.

    Raises:
        OSError: the file could not be written.
    """
    with path.open("wb") as stream:
        late = _Late(stream)
        yield late  # type: ignore[misc]
        if late.error is not None:
            with contextlib.suppress(OSError):
                stream.close()
            raise late.error
