"""Write files so that none is ever left half written: the new file is complete, or the old one is untouched.

write_atomically(path, write)    `write` fills a temporary file, which then takes the place of `path`
proven_first(path, write)        the same as a context: what is checked inside it decides
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from normfuse.errors import InputError


def write_atomically(path: Path, write: Callable[[Path], None], *, never_over: Sequence[Path] = ()) -> None:
    """Let `write` fill a temporary file, then put it at `path` in one step.

    Raises:
        InputError: `path` is one of `never_over`, also through a link; or no file can be written there.
    """
    with proven_first(path, write, never_over=never_over):
        pass


@contextlib.contextmanager
def proven_first(path: Path, write: Callable[[Path], None], *, never_over: Sequence[Path] = ()) -> Iterator[Path]:
    """Let `write` fill a file in a temporary folder beside `path`, yield it, and put it at `path` if nothing was raised.

    Files that `write` makes beside its own (external data) go along. Whatever stood at `path` stays until then.

    Raises:
        InputError: `path` is one of `never_over`, also through a link; or no file can be written there.
    """
    target = Path(path).resolve()  # a link stays a link, and the file that it points to is replaced
    if not target.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {target.parent}", hint=f"mkdir -p '{target.parent}'")
    if target.is_dir():
        raise InputError(f"cannot write {path}: it is a folder", hint="name a file inside it")
    for kept in never_over:
        if target == Path(kept).resolve() or (target.exists() and Path(kept).exists() and target.samefile(kept)):
            raise InputError(f"cannot write {path}: it is the input {kept}", hint="give another name with -o")
    folder = target.with_name(f".{target.stem}.{secrets.token_hex(4)}")
    try:
        folder.mkdir()
        write(folder / target.name)
        yield folder / target.name
        for file in sorted(folder.iterdir(), key=lambda file: file.name == target.name):  # the file itself comes last
            _to_disk(file)
            goal = target.with_name(file.name)
            if goal.exists():
                shutil.copymode(goal, file)
            os.replace(file, goal)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
