"""Printing; nothing else of normfuse prints.

The answer goes to stdout, as text or (--json) as exactly one JSON document; progress, warnings and errors go to stderr.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import rich_click as click
from click.exceptions import Exit
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from normfuse.errors import InputError
from normfuse.escaping import escaped, json_text

YES, NO, CANNOT, INTERRUPTED, UNREAD = 0, 1, 2, 130, 141  # the last two as shells count SIGINT and SIGPIPE
PIPED_WIDTH = 100_000  # where a program reads, no line is folded or cut


@contextlib.contextmanager
def working(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar on a terminal's stderr; what models and libraries print meanwhile goes to stderr as well."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=False)
    with contextlib.redirect_stdout(sys.stderr), bar:
        task = bar.add_task(what, total=None)
        yield lambda now, done, total: bar.update(task, description=escaped(now), completed=done, total=total)


def tell(as_json: bool, data: Any, *parts: RenderableType) -> int:
    """Print an answer, as JSON or as text; the exit code of a yes."""
    if as_json:
        write_json(data)
    else:
        show(*parts)
    return YES


def rendered(answer: Any) -> Iterable[RenderableType]:
    """An answer as text: what it says of itself, or a table of its evidence."""
    from normfuse.report.evidence_text import evidence_lines

    return answer.render() if hasattr(answer, "render") else evidence_lines(answer)


def show(*parts: RenderableType) -> None:
    """Print text, wide where a program reads it."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    with console.capture() as caught:
        for part in parts:
            console.print(part)
    _write("\n".join(line.rstrip() for line in caught.get().splitlines()))


def write_json(data: Any) -> None:
    """Print one JSON document."""
    _write(json_text(data))


def _write(text: str) -> None:
    try:
        click.echo(text)
    except OSError as error:
        give_up(sys.stdout)
        if isinstance(error, BrokenPipeError):  # the reader, such as head, has enough
            raise Exit(UNREAD) from None
        raise InputError(f"cannot write the answer: {error.strerror}", hint="make room where the output goes") from error


def say(kind: str, text: str, style: str) -> None:
    """Print a line of what went wrong, or may have, to stderr."""
    line = Text.assemble((f"{kind}:", style), f" {escaped(text)}")
    try:
        Console(stderr=True, soft_wrap=True, highlight=False, emoji=False).print(line)
    except (OSError, SystemExit):  # nobody reads what goes wrong either; rich would leave with a code of its own
        give_up(sys.stderr)


def give_up(stream: Any) -> None:
    """Nothing more is written there, nor shall the interpreter complain at its last flush."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
