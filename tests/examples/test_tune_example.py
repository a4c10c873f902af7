"""The transfer-learning example: Tune trains as Eval does, Deploy does not, and the script runs from end to end."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples" / "tune"


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    """The example's modules, which import each other as scripts do: by name, from their own folder."""
    names = ("curves", "mobilenet", "transfer", "pictures")  # the last is found by way of the one before
    before = list(sys.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path[:] = before
    for name in names:
        del sys.modules[name]


@pytest.mark.slow
def test_tune_trains_as_eval_does(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train = scripts.transfer
    monkeypatch.setattr(scripts.mobilenet, "STAGES", scripts.mobilenet.STAGES[:2])  # 5 of 17 blocks
    data = scripts.pictures.made_up(64, 16)
    start = train.beginning(data.train, smoke=True)
    curves = {mode: train.train(mode, start, data.train, data.test, steps=3) for mode in train.MODES}
    eval_, tune, deploy = (torch.tensor(curves[mode].losses, dtype=torch.float64) for mode in ("Eval", "Tune", "Deploy"))
    assert curves["Eval"].predictions == curves["Tune"].predictions
    torch.testing.assert_close(tune, eval_, rtol=1e-9, atol=0)
    torch.testing.assert_close(deploy[0], eval_[0], rtol=1e-9, atol=0)
    assert (deploy[1:] - eval_[1:]).abs().max() > 1e-6, "another training, which this test could not tell apart"


def test_names_are_torchvisions(scripts: Any) -> None:
    from torchvision.models import mobilenet_v2

    expected = {name: value.shape for name, value in mobilenet_v2().state_dict().items()}
    assert {name: value.shape for name, value in scripts.mobilenet.MobileNetV2().state_dict().items()} == expected


def test_a_curve_that_is_no_number_any_more_is_drawn_up_to_there(scripts: Any, tmp_path: Path) -> None:
    scripts.curves.write_svg({"a": [1.0, 0.5, 0.25], "b": [1.0, 30.0, float("nan")]}, tmp_path / "c.svg")
    drawn = ElementTree.parse(tmp_path / "c.svg").getroot().findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(each.attrib["points"].split()) for each in drawn] == [3, 2]


@pytest.mark.slow
def test_the_script_runs(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(FOLDER / "transfer.py"), "--smoke", "--out", str(tmp_path)], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert {each["mode"] for each in json.loads((tmp_path / "curves.json").read_text())} == {"Eval", "Tune", "Deploy"}
    assert "20 of 20 predictions are the same" in ran.stdout
    assert (tmp_path / "curves.svg").exists()
