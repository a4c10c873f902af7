"""What comes from a file is shown, and never acts: names, paths and error texts with everything unprintable written out.

A module of a stranger's model may be called anything: control sequences that speak to the terminal, a newline that makes a
line of its own, marks that turn the direction of text, half a surrogate pair that no encoding takes. Whatever is rendered for
people goes through `escaped`, whatever is written as JSON through `json_text`; errors and warnings do it by themselves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import Any, TypeVar

T = TypeVar("T")


def escaped(value: T) -> T:
    r"""A text on one line of printable characters, all others as in Python's source (``\n``, ``\x1b``, ``\u202e``).

    Args:
        value: a text; or an answer (dataclasses and containers, however nested), every text of which is escaped.
    """
    result: Any = value
    kind: Any = type(value)
    if isinstance(value, str) and not isinstance(value, Enum):
        result = value if value.isprintable() else "".join(map(_escape, value))
    elif is_dataclass(value) and not isinstance(value, type):
        result = replace(value, **{each.name: escaped(getattr(value, each.name)) for each in fields(value) if each.init})
    elif isinstance(value, Mapping):
        result = {escaped(key): escaped(each) for key, each in value.items()}
    elif kind in (list, tuple, set, frozenset):
        result = kind(map(escaped, result))
    return result  # type: ignore[no-any-return]


def _escape(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def is_text(value: object) -> bool:
    """Whether every encoding takes it: a path may hold bytes that are no UTF-8, which Python keeps as half surrogate pairs."""
    return not any("\ud800" <= character <= "\udfff" for character in str(value))


def json_text(data: Any, indent: int = 2) -> str:
    """One document that every parser of JSON takes: a number that JSON does not have (inf, nan) is null in it."""
    return json.dumps(_strict(data), indent=indent, allow_nan=False, default=str)


def _strict(data: Any) -> Any:
    match data:
        case str():
            return data.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair is no text
        case float():
            return data if math.isfinite(data) else None
        case dict():
            return {_strict(key): _strict(value) for key, value in data.items()}
        case list() | tuple():
            return [_strict(each) for each in data]
    return data
