"""What torch gathers anew at every call, and a run of tests needs but once: half of the time of a small export."""

from __future__ import annotations

import functools
import sys
import typing
from types import ModuleType, SimpleNamespace
from typing import Any

from torch._export import utils
from torch._export.serde import schema, serialize

_KEPT = {"onnxscript._framework_apis.": "get_torchlib_ops"}
"""Start of the names of modules -> their function that reads and parses the source of all of torchlib."""


def keep_what_is_gathered() -> None:
    """Keep it from now on, of what has been imported by now."""
    _keep_of(len(sys.modules))


@functools.cache
def _keep_of(modules: int) -> None:
    """Once for each number of modules that have been imported."""
    _keep(utils, "_materialize_cpp_cia_ops")
    for start, name in _KEPT.items():
        for module in [each for path, each in sys.modules.items() if path.startswith(start)]:
            _keep(module, name)
    # the types of a record, which are asked for again with each record of a file
    vars(serialize)["typing"] = SimpleNamespace(**{**vars(typing), "get_type_hints": _type_hints})


def _type_hints(record: Any, globalns: dict[str, Any]) -> dict[str, Any]:
    return _types_in_schema(record) if globalns is vars(schema) else typing.get_type_hints(record, globalns)


@functools.cache
def _types_in_schema(record: Any) -> dict[str, Any]:
    return typing.get_type_hints(record, vars(schema))


def _keep(module: ModuleType, name: str) -> None:
    function = getattr(module, name, None)
    if function is not None and not hasattr(function, "cache_info"):
        setattr(module, name, functools.cache(function))
