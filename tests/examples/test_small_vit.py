"""The small vision Transformer of the examples: it trains, its norms fold away, and its twins are fair to each other."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import normfuse
from normfuse.nn import PRepBN, UnifiedNorm

FOLDER = Path(__file__).parents[2] / "examples" / "small_vit"
STEPS = 60


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    """The example's modules, which import each other as scripts do: by name, from their own folder."""
    names = ("deploy", "pictures", "small_vit", "train")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        del sys.modules[name]


@pytest.mark.parametrize("norm", [pytest.param("prepbn", marks=pytest.mark.slow), "unified_norm"])
def test_a_trained_twin_keeps_no_norm(norm: str, scripts: Any, tmp_path: Path) -> None:
    data = scripts.pictures.made_up()
    model, figures = scripts.train.trained(norm, data, STEPS, seed=0)
    assert float(figures["validation"]) > 0.2, "it learned nothing: chance is 0.1"
    path = tmp_path / f"{norm}.safetensors"
    save_file(model.state_dict(), path, metadata=figures)

    twin = scripts.deploy.fold(path, data.test.inputs()[:4])
    scripts.deploy.check([twin])

    before = scripts.deploy.graph_ops(normfuse.Program.trace(model, twin.result.inputs.args, {}, None))
    after = scripts.deploy.graph_ops(twin.result.program)
    assert scripts.deploy.norm_ops(before) >= 9, "the count does not see norms"
    assert scripts.deploy.norm_ops(after) == 0
    assert after.total() < before.total()
    report = twin.result.report
    assert (report.evidence.level, report.evidence.ok, sum(report.norms_before.values())) == ("full", True, 9)
    assert not report.norms_after
    images = data.test.inputs()[:200]
    torch.testing.assert_close(twin.result.module()(images), model(images), rtol=1e-4, atol=1e-5)


def test_layer_norms_stay_and_say_why(scripts: Any) -> None:
    images = scripts.pictures.made_up(100, 100).test.inputs()[:4]
    model = scripts.small_vit.make_twin("layer_norm", STEPS).eval()
    result = normfuse.rewrite(model, scripts.deploy.FOLDS, inputs=(images,), verify="structure")
    assert result.report.norms_after == {"layer_norm": 9}
    assert [refusal.code for refusal in result.report.plan.refusals] == ["NF311"] * 9


def test_twins_start_from_the_same_weights(scripts: Any) -> None:
    states = []
    for norm, kind in (("layer_norm", torch.nn.LayerNorm), ("prepbn", PRepBN), ("unified_norm", UnifiedNorm)):
        torch.manual_seed(0)
        model = scripts.small_vit.make_twin(norm, STEPS)
        assert sum(type(module) is kind for module in model.modules()) == 9
        states.append({name: value for name, value in model.state_dict().items() if "norm" not in name})
    for other in states[1:]:
        assert other.keys() == states[0].keys()
        assert all(torch.equal(other[name], value) for name, value in states[0].items())


def test_lambda_is_zero_well_before_the_end(scripts: Any) -> None:
    norm = scripts.small_vit.make_twin("prepbn", 100).norm.train()
    for _ in range(60):
        norm(torch.randn(4, 16, 96))
    assert norm.ready_to_deploy


def test_an_augmented_picture_is_a_window_of_the_picture_or_its_mirror(scripts: Any) -> None:
    pictures, reach = scripts.pictures, scripts.train.SHIFT
    count, size = scripts.train.BATCH, 32
    images = torch.randint(1, 256, (count, 3, size, size), dtype=torch.uint8)  # no picture has a black pixel of its own
    given, classes = next(scripts.train.augmented(pictures.Pictures(images, torch.arange(count)), seed=0))
    assert sorted(classes.tolist()) == list(range(count))
    mirrored = 0
    for image, number in zip(given, classes, strict=True):
        framed = torch.nn.functional.pad(images[number], (reach,) * 4)
        windows = pictures.as_input(framed).unfold(1, size, 1).unfold(2, size, 1).movedim(0, 2).flatten(0, 1)
        straight, flipped = ((windows == each).flatten(1).all(1).any() for each in (image, image.flip(-1)))
        assert straight or flipped
        mirrored += int(flipped)
    assert 20 < mirrored < 80


def test_made_up_pictures_are_not_shared_between_the_parts(scripts: Any) -> None:
    data = scripts.pictures.made_up(200, 100)
    sizes = [len(part.classes) for part in (data.train, data.validation, data.test)]
    everything = torch.cat([data.train.images, data.validation.images, data.test.images])
    assert sizes == [200, 100, 100]
    assert len(everything.unique(dim=0)) == 400


@pytest.mark.slow
def test_the_scripts_run_from_training_to_the_tables(tmp_path: Path) -> None:
    for script, option in (("train.py", "--out"), ("deploy.py", "--weights")):
        command = [sys.executable, str(FOLDER / script), "--smoke", option, str(tmp_path)]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
    rows = [line for line in ran.stdout.splitlines() if line.startswith(("| prepbn |", "| unified_norm |"))]
    assert sum("| none | 0 |" in row and "1,000 of 1,000" in row for row in rows) == 2
