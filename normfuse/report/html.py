"""What was printed, as a page of HTML."""

from __future__ import annotations

import io
from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.text import Text

from normfuse.escaping import escaped


def html(lines: Iterable[RenderableType], title: str) -> str:
    """A page of its own with what a terminal would show."""
    console = Console(record=True, file=io.StringIO(), width=140, markup=False, emoji=False, highlight=False)
    console.print(Text(escaped(title), "bold"))
    for line in lines:
        console.print(line)
    return console.export_html(inline_styles=True)
