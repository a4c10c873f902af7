"""What torch gathers anew at every call, and a run of tests needs but once: half of the time of a small export."""

from __future__ import annotations

import functools
import sys
from types import ModuleType

from torch._export import utils

_KEPT = {"onnxscript._framework_apis.": "get_torchlib_ops"}
"""Start of the names of modules -> their function that reads and parses the source of all of torchlib."""


def keep_what_is_gathered() -> None:
    """Keep it from now on, of what has been imported by now."""
    _keep(utils, "_materialize_cpp_cia_ops")
    for start, name in _KEPT.items():
        for module in [each for path, each in sys.modules.items() if path.startswith(start)]:
            _keep(module, name)


def _keep(module: ModuleType, name: str) -> None:
    function = getattr(module, name, None)
    if function is not None and not hasattr(function, "cache_info"):
        setattr(module, name, functools.cache(function))
