"""What every test gets: one thread, fixed seeds, torchvision beside a CPU torch, and a cache outside the repository."""

from __future__ import annotations

import gc
import random
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from tests.once import keep_what_is_gathered
from tests.zoo import torchvision_shim, trained

torchvision_shim.install()
hypothesis.settings.register_profile("same every time", derandomize=True)  # `make fuzz` looks for more
hypothesis.settings.load_profile("same every time")
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--run-slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: --run-slow runs it"))


def pytest_collection_finish() -> None:
    gc.freeze()  # what has been imported by now stays: half a million objects that each full collection would look at


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same random numbers in every test, alone or among others."""
    keep_what_is_gathered()
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)  # torch.manual_seed asks for every kind of device


@pytest.fixture(scope="session")
def cache_directory() -> Path:
    """Where downloads are kept between runs."""
    return trained.cache_directory()
