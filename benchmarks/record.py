"""What a benchmark prints is kept as JSON beside it, and its next run says what has changed since.

    if __name__ == "__main__":
        recorded(main)

The tables are read out of what was printed, so what is kept is what was shown: ``benchmarks/results/<script>.json``, a run for
every set of arguments.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import normfuse

RESULTS = Path(__file__).parent / "results"
NOISE = 0.05  # no smaller difference of two times is said to be one

Tables: TypeAlias = dict[str, dict[str, str]]
"""What stands above a table -> 'row, column' -> cell."""


def recorded(main: Callable[[], int | None], results: Path = RESULTS) -> None:
    """Run a benchmark, keep its tables, say what has changed since the last run, and leave with its exit code."""
    printed = _Tee(sys.stdout)
    with contextlib.redirect_stdout(printed):
        code = main()
    if tables := read_tables(printed.getvalue()):
        file, arguments = results / f"{Path(sys.argv[0]).stem}.json", " ".join(sys.argv[1:])
        runs: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        if before := runs.get(arguments):
            print(f"\nSince {before['date']}, {before['on']}:", *changes(before["tables"], tables) or ["no change"], sep="\n- ")
        on = f"normfuse {normfuse.__version__}, torch {version('torch')}"
        runs[arguments] = {"date": str(datetime.date.today()), "on": on, "tables": tables}
        results.mkdir(exist_ok=True)
        file.write_text(json.dumps(runs, indent=1, ensure_ascii=False) + "\n")
    sys.exit(code)


def read_tables(text: str) -> Tables:
    """The Markdown tables in a text; versions in the line above one are no part of its name."""
    tables: Tables = {}
    above, columns = "", list[str]()
    for line in filter(None, map(str.strip, text.splitlines())):
        if not line.startswith("|"):
            above, columns = _VERSION.sub("…", line), []
        elif not columns:
            columns = _cells(line)
        elif not re.fullmatch(r"[|: -]+", line):
            cells = _cells(line)
            named = next((place for place, cell in enumerate(cells) if place and _number(cell) is not None), 1)
            row = " ".join(cells[:named])
            figures = zip(columns[named:], cells[named:], strict=False)
            tables.setdefault(above, {}).update({f"{row}, {column}": cell for column, cell in figures})
    return tables


_VERSION = re.compile(r"\d+(\.\d+)+[^\s,;]*")


def changes(before: Tables, after: Tables) -> list[str]:
    """A line for every cell that is not what it was: numbers may differ by what noise does."""
    return [
        f"{above}: {place}: {was} → {cells[place]}"
        for above, cells in after.items()
        for place, was in before.get(above, {}).items()
        if place in cells and not _alike(was, cells[place])
    ]


def _alike(one: str, other: str) -> bool:
    a, b = _number(one), _number(other)
    return one == other if a is None or b is None else abs(a - b) <= NOISE * max(abs(a), abs(b))


def _number(cell: str) -> float | None:
    """The first number of a cell."""
    found = re.match(r"[^\w.+-]*([+-]?\d+(?:\.\d+)?)", cell)
    return float(found[1]) if found else None


def _cells(line: str) -> list[str]:
    return [each.strip() for each in line.strip("|").split("|")]


class _Tee(io.StringIO):
    """What is written goes on to where it went before."""

    def __init__(self, further: Any) -> None:
        super().__init__()
        self.further = further

    def write(self, text: str) -> int:
        self.further.write(text)
        return super().write(text)

    def flush(self) -> None:
        self.further.flush()
