"""A process without normfuse, for all that is brought."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The process of `brought_process`, started once."""
    from tests.sources.brought_back import StockProcess

    with StockProcess(tmp_path_factory.mktemp("stock")) as process:
        yield process
