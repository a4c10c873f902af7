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
from normfuse.errors import InputError, VerificationFailed
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
        replace(result, form=lambda: other).save(tmp_path / "wrong.pt2")
    assert not (tmp_path / "wrong.pt2").exists()


def test_a_head_that_took_the_last_norm_over_is_told_of(tmp_path: Path) -> None:
    """What AutoModel loads of such a folder is another function, unless the last norm is kept."""
    model = saved(tmp_path / "m", "GPT2LMHeadModel", GPT2 | {"tie_word_embeddings": False})
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))
    for flags, same in (([], False), (["--keep", "*.ln_f"], True)):
        words = ["rewrite", f"{tmp_path / 'm'}", "--pass", "fold_affine", "-o", f"{tmp_path / f'out{same}'}", *flags, "--json"]
        notes = json.loads(CliRunner().invoke(main, words).stdout)["tensors"]["notes"]
        assert len(notes) == (not same)
        assert all("'lm_head.weight'" in note and "AutoModel" in note for note in notes)
        hidden = type(model.transformer).from_pretrained(tmp_path / f"out{same}").eval()(input_ids=ids).last_hidden_state
        expected = model.transformer(input_ids=ids).last_hidden_state
        assert torch.allclose(hidden, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())) == same


@pytest.mark.parametrize("name", ["transformer.h.0.mlp.c_fc.weight", "transformer.h.1.ln_1.bias"])
def test_a_model_that_was_changed_since_it_was_opened_is_not_written_from_its_files(name: str, tmp_path: Path) -> None:
    saved(tmp_path / "m", "GPT2LMHeadModel", GPT2)
    source = normfuse.open(tmp_path / "m")
    assert isinstance(source.model, torch.nn.Module)
    with torch.no_grad():
        source.model.get_parameter(name).view(-1)[3] += 0.5
    result = normfuse.rewrite(source, "fold_affine", verify="structure")
    with pytest.raises(InputError, match=f"'{name}' was changed since"):
        result.write_back(tmp_path / "out")
    assert not (tmp_path / "out").exists()
