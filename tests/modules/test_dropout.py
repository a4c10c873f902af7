"""Dropout on what is added to the stream gives it a mean again: refused, or taken away behind the mask."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict

import pytest
import torch

import normfuse
from tests.modules.live_models import Drops, cross_entropy, gpt, text
from tests.modules.test_training import STEPS, converted, largest_difference, trained
from tests.zoo.models import VIT
from tests.zoo.spread import spread

FORMS = ("pre_rmsnorm", "pre_crmsnorm")

# drops: (norms converted, codes of the others, explicit mean-subtractions or changes of basis), for each form
WANTED: dict[Drops, dict[str, tuple[int, dict[str, int], int]]] = {
    Drops(): {"pre_rmsnorm": (5, {}, 0), "pre_crmsnorm": (5, {}, 0)},
    Drops(inside=0.2): {"pre_rmsnorm": (5, {}, 0), "pre_crmsnorm": (5, {}, 0)},
    Drops(embedding=0.2): {"pre_rmsnorm": (5, {}, 1), "pre_crmsnorm": (5, {}, 1)},
    Drops(residual=0.2): {"pre_rmsnorm": (1, {"NF202": 4}, 0), "pre_crmsnorm": (0, {"NF401": 4, "NF405": 1}, 0)},
    Drops(0.2, 0.2, 0.2): {"pre_rmsnorm": (0, {"NF202": 5}, 0), "pre_crmsnorm": (0, {"NF401": 5}, 0)},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("drops", WANTED, ids=str)
def test_is_exact_whatever_is_dropped(drops: Drops, form: str) -> None:
    """The draws are seeded alike for both, and they train alike, with dropout active."""
    model = gpt(drops=drops)
    twin = copy.deepcopy(model)
    windows = list(text(STEPS))
    result = normfuse.rewrite(twin, form, inputs=(windows[0][:, :-1],), mode="live")
    count, codes, explicit = WANTED[drops][form]
    assert converted(result) == count
    assert Counter(each.code for each in result.report.plan.refusals) == codes
    edits = [edit for rewrite in result.report.plan.rewrites for edit in rewrite.edits]
    assert sum(getattr(edit, "readers", None) is not None for edit in edits) == explicit
    expected = trained(model, model, windows, cross_entropy)
    found = trained(twin, result.module(), windows, cross_entropy)
    assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) <= 1e-9
    assert largest_difference(model, twin) <= 1e-9


def test_a_refusal_names_the_dropout() -> None:
    model = gpt(drops=Drops(residual=0.2))
    result = normfuse.rewrite(model, "pre_rmsnorm", inputs=(text(1)[0, :, :-1],), mode="live")
    reasons = [each.reason for each in result.report.plan.refusals]
    assert all("dropout" in reason for reason in reasons)
    assert {each.at.module for each in result.report.plan.refusals if each.at} == {"blocks.0.residual", "blocks.1.residual"}


def test_dropout_is_really_drawn() -> None:
    model = gpt(drops=Drops(inside=0.5))
    ids = text(1)[0, :, :-1]
    live = normfuse.rewrite(model, "pre_rmsnorm", inputs=(ids,), mode="live").module()
    assert not torch.equal(live(ids), live(ids))


def test_in_evaluation_mode_there_is_none_and_the_report_says_so() -> None:
    model = gpt(drops=Drops(0.2, 0.2, 0.2)).eval()
    ids = text(1)[0, :, :-1]
    result = normfuse.rewrite(model, "pre_rmsnorm", inputs=(ids,), mode="live")
    assert converted(result) == 5
    assert "call model.train() first" in result.report.notes[0]
    assert torch.equal(result.module()(ids), result.module()(ids))


def test_a_rewrite_leaves_every_module_in_its_mode() -> None:
    model = gpt(drops=Drops(embedding=0.2))
    model.blocks[1].eval()
    before = [each.training for each in model.modules()]
    normfuse.rewrite(model, "pre_rmsnorm", inputs=(text(1)[0, :, :-1],), mode="live")
    assert [each.training for each in model.modules()] == before


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
def test_stochastic_depth_scales_whole_branches(form: str) -> None:
    """One number per sample passes a mean-subtraction, and a change of basis."""
    from timm.models.vision_transformer import VisionTransformer

    model = spread(VisionTransformer(**VIT, depth=2, num_heads=3, drop_path_rate=0.5)).double().train()
    twin = copy.deepcopy(model)
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    result = normfuse.rewrite(twin, form, inputs=(images,), mode="live")
    assert converted(result) == 5
    live = result.module()
    draws = []
    for step in range(3):
        torch.manual_seed(step)
        expected = model(images)
        torch.manual_seed(step)
        draws.append(live(images))
        torch.testing.assert_close(draws[-1], expected, rtol=1e-11, atol=1e-11)
    assert not torch.equal(draws[0], draws[1])


def test_what_to_do_about_a_dropout_is_told_whatever_it_is_called() -> None:
    layers = {"conv": torch.nn.Conv2d(3, 8, 3), "d": torch.nn.Dropout(0.1), "bn": spread(torch.nn.BatchNorm2d(8))}
    model = torch.nn.Sequential(OrderedDict(layers)).eval()
    with pytest.raises(normfuse.NormfuseError) as caught:
        normfuse.tune(model, "conv_bn", (torch.randn(2, 3, 8, 8),))
    assert "set the dropout's p to 0" in str(caught.value.hint)
