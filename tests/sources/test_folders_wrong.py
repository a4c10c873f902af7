"""Folders and checkpoints that are not what they should be: one line, exit code 2, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.sources.test_brought_back import GPT2, asked, saved

pytestmark = pytest.mark.filterwarnings("ignore")


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


WRONG = {
    "two architectures": (lambda f: _config(f, architectures=["GPT2LMHeadModel", "GPT2Model"]), "names 2 architectures"),
    "an unknown class": (lambda f: _config(f, architectures=["NoSuchModel"]), "has no model class 'NoSuchModel'"),
    "a class of another model": (lambda f: _config(f, architectures=["OPTForCausalLM"]), "names two models"),
    "quantized": (lambda f: _config(f, quantization_config={"quant_method": "gptq"}), r"quantized (gptq)"),
    "code of its own": (lambda f: _config(f, auto_map={"AutoModel": "x.Y"}), "brings code of its own"),
    "another size": (lambda f: _config(f, n_embd=48), "do not fit its architecture: of another shape"),
    "a layer more": (lambda f: _config(f, n_layer=3), "do not fit its architecture: missing"),
    "a layer less": (lambda f: _config(f, n_layer=1), "do not fit its architecture: unexpected"),
    "a missing shard": (lambda f: next(f.glob("*-00002-*")).unlink(), "not there"),
    "no configuration": (lambda f: (f / "config.json").write_text("{"), "is no configuration"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_one_line_and_nothing_is_written(wrong: str, tmp_path: Path) -> None:
    saved(tmp_path / "m", "GPT2LMHeadModel", GPT2)
    spoil, said = WRONG[wrong]
    spoil(tmp_path / "m")
    answer = asked("rewrite", tmp_path / "m", "--pass", "pre_rmsnorm", "-o", tmp_path / "out")
    assert answer.exit_code == 2
    assert said in answer.output
    assert answer.output.count("error:") == 1
    assert {each.name for each in tmp_path.iterdir()} == {"m"}


def test_a_folder_that_is_there_is_not_touched(tmp_path: Path) -> None:
    saved(tmp_path / "m", "GPT2LMHeadModel", GPT2)
    (tmp_path / "out").mkdir()
    answer = asked("rewrite", tmp_path / "m", "--pass", "pre_rmsnorm", "-o", tmp_path / "out")
    assert answer.exit_code == 2
    assert "it is there already" in answer.output
    assert not list((tmp_path / "out").iterdir())
