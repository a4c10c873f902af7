"""A rewritten folder that brings its own class, with RMSNorm: in a process where there is no normfuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import normfuse
from normfuse.cli import main
from normfuse.errors import CannotApply, NormfuseError
from tests.zoo.models import ZOO

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("together")]

MODELS = {
    "hf_gpt2": ("AutoModelForCausalLM", 5),
    "hf_opt": ("AutoModelForCausalLM", 5),
    "hf_gpt_neox": ("AutoModelForCausalLM", 5),
    "hf_vit": ("AutoModelForImageClassification", 5),
}
"""Zoo model -> the auto class that leads to it, and its norms, all of which become RMSNorm."""


def saved(name: str, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder of several files, as its class saves it, and inputs."""
    model: Any = ZOO[name].build()
    kwargs = ZOO[name].inputs(model)[1]
    model.save_pretrained(folder / "stock", max_shard_size="20KB")
    return folder / "stock", kwargs


def in_another_process(*args: str, cache: Path) -> dict[str, Any]:
    """What `stock_process` tells."""
    script = Path(__file__).with_name("stock_process.py")
    env = {**os.environ, "HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *args], env=env, cwd=cache.parent, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", MODELS)
def test_a_class_of_its_own_in_a_process_without_normfuse(name: str, tmp_path: Path) -> None:
    folder, kwargs = saved(name, tmp_path)
    auto, norms = MODELS[name]
    level = "full" if name == "hf_gpt2" else "structure"  # once is enough: the outputs are compared below
    result = normfuse.rewrite(str(folder), "all", kwargs=kwargs, verify=level)
    written = result.write_back(tmp_path / "rewritten", as_code=True)
    assert (written.evidence is not None) == (level == "full")
    torch.save(kwargs, tmp_path / "inputs.pt")

    told = in_another_process(
        str(folder), str(written.path), str(tmp_path / "inputs.pt"), auto, cache=tmp_path / "modules"
    )  # fmt: skip
    stock = type(ZOO[name].build())
    assert told["class"] == [stock.__name__, "transformers_modules", stock.__module__]
    assert (told["layer_norms"], told["rms_norms"]) == (0, norms)
    assert told["missing"] == told["missing_untrusted"] == []
    assert told["apart"] < 1e-5
    assert told["untrusted"] < 1e-5
    assert told["copied"] == told["reloaded"] == 0
    assert len(told["without_bias"]) == len(written.dropped) > 0  # under other names where the files have older ones
    assert all(each.endswith(".bias") for each in (*told["without_bias"], *written.dropped))
    assert "modeling_rms_norm.py" in told["files"]
    assert told["auto_map"][auto] == f"modeling_rms_norm.{stock.__name__}"
    if "tokens" in told:
        assert told["tokens"][0] == told["tokens"][1]
    before, after = told["losses"]
    assert after[0] == pytest.approx(before[0], rel=1e-5)
    assert after[-1] < after[0]


def test_what_has_no_place_in_code_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    folder, kwargs = saved("hf_gpt2", tmp_path)
    result = normfuse.rewrite(str(folder), "fold_affine", kwargs=kwargs, verify="structure")
    with pytest.raises(CannotApply, match="no norm of it becomes an RMSNorm"):
        result.save(tmp_path / "rewritten", as_code=True)
    with pytest.raises(NormfuseError, match="is a program"):
        result.save(tmp_path / "rewritten.pt2", as_code=True)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["stock"]


def test_the_command_says_where_code_has_no_place(tmp_path: Path) -> None:
    folder, _ = saved("hf_gpt2", tmp_path)
    out = tmp_path / "out.pt2"
    args = ["rewrite", str(folder), "--pass", "all", "--as-code", "--input", "input_ids:int64[2,10]", "-o", str(out)]
    told = CliRunner().invoke(main, args)
    assert told.exit_code == 2
    assert "leave out --as-code" in told.output
    assert not out.exists()
