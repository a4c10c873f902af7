"""Trained classifiers name the photographs as before, with all their BatchNorms folded into convolutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.proof.differences import distance
from normfuse.transforms.constant_norms import WRITERS
from tests.zoo import trained_conv
from tests.zoo.trained import FetchFailed
from tests.zoo.trained_conv import CLASSES

pytestmark = [pytest.mark.slow, pytest.mark.trained, pytest.mark.xdist_group("trained")]  # one worker: the models are large


@dataclass(frozen=True)
class Network:
    """A trained network: how to load it, what it reads, how many BatchNorms it has."""

    load: Callable[[], Any]
    prepared: Callable[[Tensor], Tensor]
    batch_norms: int


NETWORKS = {
    "mobilenet_v2": Network(trained_conv.mobilenet_v2, trained_conv.for_mobilenet_v2, 52),
    "resnet50": Network(trained_conv.resnet50, trained_conv.for_resnet50, 53),
}


@dataclass(frozen=True)
class Loaded:
    """What the tests of one network share: it, the photographs as it reads them, and what it says of them."""

    network: Network
    model: Any
    images: dict[str, Tensor]
    logits: dict[str, Tensor]
    result: normfuse.Result


@pytest.fixture(params=NETWORKS)
def loaded(request: pytest.FixtureRequest) -> Loaded:
    """A network, and its rewritten form proven on the first photograph."""
    try:
        return load(request.param)
    except FetchFailed as reason:
        pytest.skip(str(reason))


@cache  # not a fixture of the module: shuffled tests would load each network again and again
def load(name: str) -> Loaded:
    network = NETWORKS[name]
    model = network.load()
    images = {photo: network.prepared(trained_conv.photograph(photo))[None] for photo in CLASSES}
    result = normfuse.rewrite(model, passes=["conv_bn"], inputs=(images["chelsea"],))
    with torch.no_grad():
        return Loaded(network, model, images, {photo: model(image) for photo, image in images.items()}, result)


def test_the_network_is_loaded_whole(loaded: Loaded) -> None:
    norms = [module for module in loaded.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == loaded.network.batch_norms
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    for name, logits in loaded.logits.items():
        assert logits.argmax().item() in CLASSES[name]
        assert logits.softmax(-1).max() > 0.5


def test_every_batch_norm_is_folded_exactly_into_its_convolution(loaded: Loaded) -> None:
    report = loaded.result.report.to_dict()
    assert report["norms"] == {"before": {"batch_norm": loaded.network.batch_norms}, "after": {}}
    assert [each["because"] for each in report["rewrites"]] == [WRITERS] * loaded.network.batch_norms
    assert report["refusals"] == []
    assert report["evidence"]["ok"]
    assert loaded.result.report.evidence.relative <= 1e-11


def test_the_folded_network_says_the_same(loaded: Loaded) -> None:
    folded = loaded.result.module()
    with torch.no_grad():
        for name, before in loaded.logits.items():
            after = folded(loaded.images[name])
            assert after.argmax().item() == before.argmax().item()
            assert after.argmax().item() in CLASSES[name]
            assert distance(before, after) <= 1e-5  # float32: each is about 1e-6 from the truth
