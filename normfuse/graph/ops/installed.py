"""Rows that other packages bring for operators of theirs: the entry points of `normfuse.operators` (`docs/plugins.md`)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

from normfuse.errors import NormfuseWarning
from normfuse.graph.ops.row import TABLE, Operator
from normfuse.plugins import parts_of

GROUP = "normfuse.operators"


@cache
def installed() -> Mapping[Any, Operator]:
    """Rows by operator; read once, when a program first has an operator without a row of normfuse's own."""
    rows: dict[Any, Operator] = {}
    for name, brought in parts_of(GROUP, (), _rows):
        if taken := next((op for op in brought if op in TABLE or op in rows), None):
            warnings.warn(f"'{name}' of {GROUP} is left out: there is a row of {taken} already", NormfuseWarning, stacklevel=2)
        else:
            rows |= brought
    return rows


def _rows(name: str, module: ModuleType, package: str) -> dict[Any, Operator]:
    rows = dict(module.OPERATORS)
    if wrong := next((op for op, row in rows.items() if not isinstance(row, Operator)), None):
        raise TypeError(f"what it has for {wrong} is no normfuse.graph.ops.row.Operator")
    return rows
