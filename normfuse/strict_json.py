"""Read JSON that anybody may have written: a bounded text, of a bounded depth, in which every value is what it should be.

Plans, lock files and calibrations are read with these; whatever is wrong is a `ValueError` that tells where.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from normfuse import limits
from normfuse.limits import OverLimit

_LARGEST_INTEGER = 1 << 53  # beyond it JSON's numbers are not exact


def read_file(path: str | os.PathLike[str]) -> str:
    """The text of a file.

    Raises:
        ValueError: it is no regular file, too large, or not UTF-8.
        OSError: it cannot be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is not a regular file")
    with Path(path).open("rb") as file:
        content = file.read(limits.PLAN_BYTES + 1)
    return _bounded(content).decode()


def _bounded(content: bytes) -> bytes:
    if len(content) > limits.PLAN_BYTES:
        raise OverLimit("it is larger than a plan may be", "PLAN_BYTES")
    return content


def parsed(text: str, *, once: bool = False) -> Any:
    """The JSON in a text.

    Args:
        text: the text.
        once: an object may not have two entries of one name, of which JSON takes the last.

    Raises:
        ValueError: it is none, or is nested deeper than `limits.NESTING`.
        OverLimit: it is larger or deeper than is allowed.
    """
    _bounded(text.encode("utf-8", "surrogatepass"))
    try:
        data = json.loads(text, object_pairs_hook=_once if once else None)
    except RecursionError:
        raise OverLimit("it is nested too deep", "NESTING") from None
    level, depth = [data], 0
    while level:
        depth += 1
        if depth > limits.NESTING:
            raise OverLimit("it is nested too deep", "NESTING")
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, (dict, list)))
        level = [each for several in inner for each in several]
    return data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _times), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has two entries for {_brief(name)}")
    return found


def record(value: Any) -> dict[str, Any]:
    """A JSON object."""
    found: dict[str, Any] = _is(value, dict, "an object")
    return found


def items(value: Any) -> list[Any]:
    """A JSON list."""
    found: list[Any] = _is(value, list, "a list")
    return found


def text(value: Any) -> str:
    """A JSON string."""
    found: str = _is(value, str, "a text")
    return found


def texts(value: Any) -> tuple[str, ...]:
    """A JSON list of strings."""
    return tuple(map(text, items(value)))


def name(value: Any) -> str:
    """A string that can name a node or a tensor of a graph."""
    if not re.fullmatch(r"\w[\w.]{0,999}", text(value)):
        raise ValueError(f"{_brief(value)} is no name")
    return str(value)


def whole(value: Any) -> int:
    """A JSON integer."""
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _LARGEST_INTEGER:
        raise ValueError(f"{_brief(value)} is no whole number")
    return value


def number(value: Any) -> float:
    """A number, also one that JSON does not have, as `number_to_json` writes it."""
    if isinstance(value, str) and value in ("inf", "-inf", "nan"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{_brief(value)} is no number")
    return float(value)


def number_to_json(value: float) -> float | str:
    """A number; as text where JSON has none."""
    return value if math.isfinite(value) else str(float(value))


def literal(value: Any) -> Any:
    """A literal argument of an operator: nothing, a truth value, a number, a text."""
    if isinstance(value, dict) and set(value) == {"float"}:
        return number(value["float"])
    if value is None or isinstance(value, (bool, str, float)):
        return value
    return whole(value)


def literal_to_json(value: Any) -> Any:
    """What `literal` reads."""
    return {"float": str(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _is(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{_brief(value)} is not {what}")
    return value


def _brief(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"
