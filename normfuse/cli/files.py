"""The files that a command writes: asked for before the work, written whole."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from normfuse.errors import InputError
from normfuse.escaping import escaped

if TYPE_CHECKING:
    from normfuse.sources.source import Source


class Writable(Exception):
    """Stops a write where only the content is missing."""


def check_writable(targets: Iterable[str | Path | None], sources: Iterable[str | None]) -> None:
    """Fail now rather than after minutes of proof: do all that `write_atomically` does, short of putting a file there."""
    from normfuse.sources.atomic import is_stream, write_atomically

    def probe(temporary: Path) -> None:
        temporary.touch()
        raise Writable

    kept, asked = ([Path(each) for each in paths if each] for paths in (sources, targets))
    if not all(each.exists() for each in kept):
        return  # whoever reads it has a better message
    for target in asked:
        with contextlib.suppress(Writable):
            write_atomically(target, probe, never_over=kept)
    files = [os.path.realpath(each) for each in asked if not is_stream(each)]
    if len(set(files)) < len(files):
        raise InputError("two outputs have the same name", hint="give each its own")


def write_file(path: str | None, text: str) -> None:
    """Write a text whole, if a path was given."""
    from normfuse.sources.atomic import write_atomically

    if path:
        write_atomically(Path(path), lambda file: file.write_text(text, encoding="utf-8", errors="backslashreplace"))


def wrote(target: str, started: float) -> str:
    """What was written, how large it is, and how long all of it took."""
    path = Path(target)
    size = sum(each.stat().st_size for each in path.rglob("*")) if path.is_dir() else path.stat().st_size
    return escaped(f"wrote {target} ({size / 1e6:.1f} MB) in {time.perf_counter() - started:.1f} s")


def beside(source: Source | str, what: str, *, program: bool = False) -> Path:
    """Where to write what is made of a model, if the user does not say: beside it, under a name that tells what was done.

    What came from a hub has its place in a cache, where nothing is written: it goes into the working directory.
    """
    path, stored = Path(source if isinstance(source, str) else source.name), getattr(source, "stored", None)
    if stored is not None and not path.exists():
        path = Path(path.name.partition("@")[0]) if stored.path.is_dir() else stored.path
    if stored is not None and stored.is_folder:
        folder = path if stored.path.is_dir() else path.parent
        path = folder if folder.name else folder.resolve()
        return path.with_name(f"{path.name}.{what}.pt2" if program else f"{path.name}.{what}")
    return path.with_name(f"{path.stem}.{what}{path.suffix if stored is not None and not program else '.pt2'}")


def writes_back(source: Source | str, target: Path) -> bool:
    """Whether what is written there is of the kind that was brought, and not a program.

    Raises:
        InputError: it is, and the place is named like something else.
    """
    stored = getattr(source, "stored", None)
    if stored is None or target.suffix == ".pt2":
        return False
    stored.check_name(target)
    return True


def check_absent(target: Path | None) -> None:
    """Fail now where a folder cannot be put."""
    from normfuse.sources.atomic import check_new_folder

    if target is not None:
        check_new_folder(target)
