"""Many sites under one name, such as ``blocks.0-11.norm1-2``."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import groupby
from typing import TypeAlias, TypeVar

from normfuse.graph.program import Site

T = TypeVar("T")
Parts: TypeAlias = tuple[tuple[str, ...], ...]


def sites_text(sites: Iterable[Site | str]) -> str:
    """Names of sites, those that differ only in one number as one: ``blocks.0-11.norm1-2, norm``."""
    # Text, numbers, text, … for every name; the numbers of names that are otherwise alike are merged, the last ones first.
    names: list[Parts] = [tuple((part,) for part in re.split(r"(\d+)", site)) for site in dict.fromkeys(map(str, sites))]
    for place in reversed(range(1, max(map(len, names), default=0), 2)):
        alike = grouped(names, key=lambda name: (len(name), name[:place], name[place + 1 :]))
        names = [_merged(same, place) for same in alike]
    return ", ".join("".join(_ranges(part) for part in name) for name in names)


def _merged(names: Sequence[Parts], place: int) -> Parts:
    first = names[0]
    if place >= len(first):  # names without a number there are alike only if they are the same
        return first
    numbers = {number for name in names for number in name[place]}
    return (*first[:place], tuple(sorted(numbers, key=int)), *first[place + 1 :])


def _ranges(numbers: Sequence[str]) -> str:
    """``0-3,7`` for 0, 1, 2, 3, 7."""
    if len(numbers) == 1:
        return numbers[0]
    runs = [list(run) for _, run in groupby(enumerate(map(int, numbers)), key=lambda pair: pair[1] - pair[0])]
    return ",".join(f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else f"{run[0][1]}" for run in runs)


def grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """The items with equal keys together, in the order in which they come."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())
