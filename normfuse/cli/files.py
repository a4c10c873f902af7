"""The files that a command writes: asked for before the work, written whole."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

from normfuse.errors import InputError
from normfuse.escaping import escaped


def check_writable(targets: Iterable[str | Path | None], sources: Iterable[str | None]) -> None:
    """Fail now rather than after minutes of proof: do all that `write_atomically` does, short of putting a file there."""
    from normfuse.sources.atomic import is_stream, write_atomically

    class Writable(Exception):
        """Stops the write where only the content is missing."""

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

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")

    if path:
        write_atomically(Path(path), write)


def wrote(target: str, started: float) -> str:
    """What was written, how large it is, and how long all of it took."""
    return escaped(f"wrote {target} ({Path(target).stat().st_size / 1e6:.1f} MB) in {time.perf_counter() - started:.1f} s")
