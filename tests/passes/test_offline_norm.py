"""Norms that are constants at inference, on the streams of tests/streams.py: where each goes, and that the result is exact."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import normfuse
from normfuse.transforms.constant_norms import HALF, LEFT, READERS, WRITERS
from normfuse.transforms.into_readers import CONDITION
from tests.streams import STREAMS, WORDS, Statistic, Transformer

WAYS = (WRITERS, READERS, HALF, LEFT)
ROOTS = ("sqrt", "batch_norm", "pow")


def _ways(result: normfuse.Result) -> tuple[int, ...]:
    because = [each["because"] for each in result.report.to_dict()["rewrites"]]
    ways = Counter(way for each in because for way in WAYS if each.startswith(way))
    return tuple(ways[way] for way in WAYS)


@pytest.mark.parametrize("name", STREAMS)
def test_every_norm_goes_where_it_should(name: str) -> None:
    fold = STREAMS[name]
    result = normfuse.rewrite(fold.module(), "offline_norm", inputs=fold.inputs)
    assert _ways(result) == (fold.writers, fold.readers, fold.halves, fold.kept)
    assert result.report.to_dict()["norms"]["after"] == {}
    assert not [node for node in result.program.graph.nodes if any(root in str(node.target) for root in ROOTS)]
    assert result.report.evidence.relative <= 1e-11


@pytest.mark.parametrize(
    ("name", "pass_name", "norms"),
    [
        ("unified norm, pre-norm", "unified_norm", 5),
        ("unified norm, post-norm", "unified_norm", 5),
        ("unified norm, pre-norm", "conv_bn", 0),
        ("unified norm, pre-norm", "prepbn", 0),
        ("rep norm, pre-norm", "prepbn", 5),
        ("rep norm, post-norm", "prepbn", 5),
        ("rep norm, pre-norm", "unified_norm", 0),
        ("joined before", "prepbn", 0),
        ("frozen by hand", "conv_bn", 1),
    ],
)
def test_each_pass_takes_its_own(name: str, pass_name: str, norms: int) -> None:
    fold = STREAMS[name]
    result = normfuse.rewrite(fold.module(), pass_name, inputs=fold.inputs)
    before, after = (sum(result.report.to_dict()["norms"][when].values()) for when in ("before", "after"))
    assert before - after == norms


@pytest.mark.parametrize("gain", [0.0, 1e-6])
def test_a_stream_is_not_divided_by_what_is_zero_or_small(gain: float) -> None:
    model: Any = Transformer(Statistic, post=True)
    with torch.no_grad():
        model.blocks[1].norm1.weight[3] = gain
    result = normfuse.rewrite(model.eval(), "unified_norm", inputs=WORDS)
    writers, _, halves, kept = _ways(result)
    assert result.report.to_dict()["norms"]["after"] == {}
    assert (writers, halves) == (0, 0)
    assert kept > 0, "the norm before the sum must stay as a scale and a shift"
    told = [each["because"] for each in result.report.to_dict()["rewrites"] if each["because"].startswith(LEFT)]
    assert any(f"{CONDITION:g}" in each for each in told)


def test_the_report_says_what_stood_in_the_way() -> None:
    fold = STREAMS["a tied head behind a norm"]
    result = normfuse.rewrite(fold.module(), "offline_norm", inputs=fold.inputs)
    (told,) = [each["because"] for each in result.report.to_dict()["rewrites"] if each["because"].startswith(LEFT)]
    assert "'head.weight' is read more than once" in told or "'table.weight' is read more than once" in told


def test_a_static_map_needs_static_sizes() -> None:
    fold = STREAMS["padded reader of a small map"]
    dims = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    inputs = (torch.randn(2, 4, 5, 6),)
    result = normfuse.rewrite(fold.module(), "offline_norm", inputs=inputs, dynamic_shapes=(dims,))
    assert _ways(result) == (0, 0, 1, 0)
