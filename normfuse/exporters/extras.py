"""Optional packages are imported when they are needed, or the error says which extra of normfuse brings them."""

from __future__ import annotations

import importlib
from typing import Any

from normfuse.errors import MissingExtra


def package(name: str, extra: str) -> Any:
    """Import a package.

    Raises:
        MissingExtra: it is not installed; names the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtra(name, extra) from error
