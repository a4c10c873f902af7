"""What is written of a folder is what is compared: in its class where a folder leaves, loaded back where a program does."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import normfuse
from normfuse.cli import main
from normfuse.errors import VerificationFailed
from normfuse.graph.program import Program
from tests.sources.test_brought_back import GPT2, saved

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_answer_tells_of_the_folder_and_of_no_program(tmp_path: Path) -> None:
    saved(tmp_path / "m", "GPT2LMHeadModel", GPT2)
    answer = CliRunner().invoke(main, ["rewrite", f"{tmp_path / 'm'}", "--pass", "pre_rmsnorm", "--json"])
    data = json.loads(answer.stdout)
    assert (data["evidence"]["ok"], data["evidence"]["called"]) == (True, [])
    assert data["tensors"]["evidence"]["ok"]
    assert data["tensors"]["evidence"]["algebra"]


def test_a_program_of_a_folder_is_loaded_back_before_it_is_written(tmp_path: Path) -> None:
    model = saved(tmp_path / "m", "GPT2LMHeadModel", GPT2)
    result = normfuse.rewrite(normfuse.open(tmp_path / "m"), "pre_rmsnorm")
    path = result.save(tmp_path / "out.pt2")
    ids = torch.randint(3, 99, tuple(result.inputs.kwargs["input_ids"].shape))
    given = {**result.inputs.kwargs, "input_ids": ids}
    found, expected = torch.export.load(path).module()(**given), model(**given)
    torch.testing.assert_close(found[0] if isinstance(found, tuple) else found.logits, expected.logits, rtol=1e-4, atol=1e-4)

    other = Program(copy.deepcopy(result.program.exported))  # what leaves is another program than what was proven
    with torch.no_grad():
        other.tensor("transformer.h.0.mlp.c_proj.weight").mul_(1.01)
    with pytest.raises(VerificationFailed, match="gives other outputs"):
        replace(result, program=other).save(tmp_path / "wrong.pt2")
    assert not (tmp_path / "wrong.pt2").exists()
