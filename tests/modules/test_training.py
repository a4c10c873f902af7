"""Training is the Pre-LN model's: the same losses step by step, and weight decay on the Pre-LN model's own weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from tests.modules.live_models import cross_entropy, gpt, text
from tests.zoo.models import ZOO

STEPS = 20
FORMS = ("pre_rmsnorm", "pre_crmsnorm", "pre_crmsnorm_compressed", "all")

Loss = Callable[[Any, Any], Tensor]


def trained(parameters: nn.Module, run: Any, batches: Sequence[Any], loss: Loss, **options: Any) -> list[float]:
    """The loss before each step of AdamW on the parameters, of what ``run`` computes."""
    optimizer = torch.optim.AdamW(parameters.parameters(), **{"lr": 3e-3, "weight_decay": 0.1, **options})
    losses = []
    for step, batch in enumerate(batches):
        torch.manual_seed(step)  # both draw the same dropout
        optimizer.zero_grad()
        value = loss(run, batch)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def converted(result: normfuse.Result) -> int:
    return sum(len(each.sites) for each in result.report.plan.rewrites)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("passes", FORMS)
def test_a_gpt_trains_as_its_original_on_text(passes: str, tied: bool) -> None:
    model = gpt(tied=tied, blocks=3)
    twin = copy.deepcopy(model)
    windows = list(text(STEPS))
    result = normfuse.rewrite(twin, passes, inputs=(windows[0][:, :-1],), mode="live")
    expected = trained(model, model, windows, cross_entropy)
    found = trained(twin, result.module(), windows, cross_entropy)
    assert converted(result) >= 6
    assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) <= 1e-9
    assert largest_difference(model, twin) <= 1e-9
    assert expected[-1] < expected[0] - 0.5  # it has trained


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("passes", FORMS[:3])
@pytest.mark.parametrize("name", [pytest.param("timm_vit", marks=pytest.mark.slow), "timm_vit_layerscale"])
def test_a_vit_trains_as_its_original(name: str, passes: str) -> None:
    model = ZOO[name].build().double().train()
    twin = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(4, 3, 32, 32, generator=draw, dtype=torch.float64), torch.randint(7, (4,), generator=draw))
        for _ in range(STEPS)
    ]

    def loss(run: Any, batch: Any) -> Tensor:
        images, classes = batch
        return F.cross_entropy(run(images), classes)

    result = normfuse.rewrite(twin, passes, inputs=(batches[0][0],), mode="live")
    expected = trained(model, model, batches, loss)
    found = trained(twin, result.module(), batches, loss)
    assert converted(result) == 5
    assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) <= 1e-9
    assert largest_difference(model, twin) <= 1e-9


@pytest.mark.parametrize("passes", FORMS[:3])
def test_weight_decay_is_on_the_original_weights(passes: str) -> None:
    """No gradient points along the mean that the norms take away, so plain SGD changes it by its weight decay alone."""
    model, rate, decay = gpt(), 1e-2, 0.3
    live = normfuse.rewrite(model, passes, inputs=(text(1)[0, :, :-1],), mode="live").module()
    writers = [model.get_parameter(name) for name in ("blocks.0.out.weight", "blocks.1.down.weight")]
    means = [each.detach().mean(0) for each in writers]
    optimizer = torch.optim.SGD(live.parameters(), lr=rate, weight_decay=decay)
    for window in text(STEPS):
        optimizer.zero_grad()
        cross_entropy(live, window).backward()
        optimizer.step()
    for mean, each in zip(means, writers, strict=True):
        torch.testing.assert_close(each.detach().mean(0), mean * (1 - rate * decay) ** STEPS, rtol=1e-11, atol=1e-13)


def test_what_is_deployed_does_not_train_like_the_original() -> None:
    """So the tests above see what they are meant to see: weights that are centred once go another way."""
    model = gpt()
    windows = list(text(STEPS))
    deployed = normfuse.rewrite(copy.deepcopy(model), "pre_rmsnorm", inputs=(windows[0][:, :-1],)).module()
    found = trained(deployed, deployed, windows, cross_entropy)
    expected = trained(model, model, windows, cross_entropy)
    assert abs(found[0] - expected[0]) <= 1e-12
    assert abs(found[-1] - expected[-1]) > 1e-6
