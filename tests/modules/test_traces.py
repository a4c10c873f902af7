"""Traces are dear: how many of a model each call takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import normfuse
from tests.modules.models import IMAGES, net

PASS = "conv_bn"


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every module that torch.export is given."""
    seen: list[str] = []
    export = torch.export.export

    def counted(module: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(module).__name__)
        return export(module, *args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counted)
    return seen


@pytest.mark.parametrize(
    ("call", "level", "expected"),
    [
        (normfuse.tune, "full", 3),  # in evaluation, in training, and what was made of it
        (normfuse.tune, "none", 2),
        (normfuse.deploy, "full", 2),
        (normfuse.deploy, "none", 1),
    ],
)
def test_traces(call: Callable[..., Any], level: str, expected: int, traces: list[str]) -> None:
    call(net(), PASS, inputs=IMAGES, verify=level)
    assert traces == ["Net"] * expected


def test_the_way_back_and_the_evaluation_of_formulas_take_none(traces: list[str]) -> None:
    model = normfuse.tune(net(), PASS, inputs=IMAGES)
    traces.clear()
    normfuse.restore(normfuse.deploy(model, keep=True))
    assert not traces
