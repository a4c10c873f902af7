"""conv_bn on convolutional architectures: every BatchNorm goes where the table says, exactly, and none is left."""

from __future__ import annotations

from collections import Counter

import pytest
from torch import nn

import normfuse
from normfuse.transforms.constant_norms import HALF, LEFT, READERS, WRITERS
from tests.zoo.conv_models import CONV_ZOO

WAYS = (WRITERS, READERS, HALF, LEFT)

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]


LARGE = {"resnet50", "efficientnet", "regnet", "mobilenet_v3"}


@pytest.mark.parametrize("name", [pytest.param(each, marks=[pytest.mark.slow] * (each in LARGE)) for each in CONV_ZOO])
def test_every_batch_norm_goes_where_it_should(name: str) -> None:
    entry = CONV_ZOO[name]
    model, inputs = entry.build(), entry.inputs()
    batch_norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    result = normfuse.rewrite(model, ["conv_bn"], inputs=inputs)
    report = result.report.to_dict()
    ways = Counter(way for each in report["rewrites"] for way in WAYS if each["because"].startswith(way))
    assert report["refusals"] == []
    assert report["norms"]["before"].get("batch_norm", 0) == batch_norms == sum(entry.counts)
    assert report["norms"]["after"].get("batch_norm", 0) == 0
    assert tuple(ways[way] for way in WAYS) == entry.counts, entry.note
    evidence = result.report.evidence
    assert evidence.ok
    assert evidence.relative <= 1e-11
