"""A pass's manual in the width of a terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator


def wrapped(manual: str, width: int) -> Iterator[str]:
    """The lines of a manual, its paragraphs filled anew for a terminal; everything else in them stays as written."""
    paragraphs = [""]
    last = ""
    for line in manual.splitlines():
        first_word = (line.split() or [""])[0]
        continues = len(last) + 1 + len(first_word) >= _FILLED and line.startswith(_hang(paragraphs[-1]) + first_word)
        if continues and first_word:  # it did not fit into the last line
            paragraphs[-1] += f" {line.strip()}"
        else:
            paragraphs.append(line)
        last = line
    for each in paragraphs[1:]:
        yield from textwrap.wrap(each, width, subsequent_indent=_hang(each), break_on_hyphens=False) or [""]


_FILLED = 110  # manuals are written in lines of 110 to 120 characters


def _hang(paragraph: str) -> str:
    """The indentation of a paragraph's lines after the first."""
    return " " * re.match(r" *(NF\d{3}  )?", paragraph).end()  # type: ignore[union-attr]
