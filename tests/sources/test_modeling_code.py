"""The modeling file beside a folder's tensors: what is in it, and that a stranger's names get into it as literals alone."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normfuse.errors import CannotApply, NormfuseError
from normfuse.sources.modeling_code import FILE, Centring, SwappedNorm, add_code, auto_classes, code, unheld
from tests.zoo.models import ZOO

pytestmark = pytest.mark.filterwarnings("ignore")

BLOCKS = [SwappedNorm(f"transformer.h.{at}.ln_{which}", 24, 1e-5) for at in (0, 1) for which in (1, 2)]
FINAL = SwappedNorm("transformer.ln_f", 24, 1e-5, bias=True)


def gpt2() -> Any:
    return ZOO["hf_gpt2"].build()


def table(text: str, name: str) -> Any:
    """A table of the file, as literals: anything else in it is an error."""
    found = [
        each.value for each in ast.parse(text).body if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == name
    ]
    return ast.literal_eval(found[0])


def test_blocks_in_a_row_are_one_line() -> None:
    norms = table(code(gpt2(), [*BLOCKS, FINAL]), "NORMS")
    assert list(norms) == ["transformer.h.*.ln_1", "transformer.h.*.ln_2", "transformer.ln_f"]
    assert norms["transformer.ln_f"] == {"size": 24, "eps": 1e-05, "weight": True, "bias": True}


def test_a_norm_that_stays_is_in_no_pattern() -> None:
    assert list(table(code(gpt2(), BLOCKS[:1]), "NORMS")) == ["transformer.h.0.ln_1"]
    other_eps = [SwappedNorm(BLOCKS[0].path, 24, 1e-6), BLOCKS[2]]
    assert list(table(code(gpt2(), other_eps), "NORMS")) == ["transformer.h.0.ln_1", "transformer.h.1.ln_1"]


def test_the_file_says_nothing_of_means_that_nobody_subtracts() -> None:
    assert "entre" not in code(gpt2(), BLOCKS)
    text = code(gpt2(), BLOCKS, [Centring("transformer.drop", 2), Centring("transformer.h.0", 1, before=True)])
    assert table(text, "CENTRED_AFTER") == {"transformer.drop": 2}
    assert table(text, "CENTRED_BEFORE") == {"transformer.h.0": 1}


@pytest.mark.parametrize(
    "name",
    ['a"] = 0\nimport os; breakpoint()\nB["', '"""', "x'\\", "${name}$norms", "[ab]*?", "\u2028import os", "\ud800", "é"],
)
def test_a_hostile_module_name_is_a_literal(name: str) -> None:
    model = gpt2()
    model.transformer.add_module(name, nn.LayerNorm(24))
    path = f"transformer.{name}"
    text = code(model, [*BLOCKS, SwappedNorm(path, 24, 1e-5)], [Centring(path, 2)])
    harmless = code(gpt2(), [*BLOCKS, FINAL], [Centring("transformer.drop", 2)])
    text.encode()
    kinds = [[type(each) for each in ast.walk(ast.parse(one)) if isinstance(each, ast.stmt)] for one in (text, harmless)]
    assert kinds[0] == kinds[1]
    assert table(text, "CENTRED_AFTER") == {path: 2}
    assert len(table(text, "NORMS")) == 3


def test_a_class_that_is_not_transformers_own_is_refused() -> None:
    import transformers

    names = ["Mine", "GPT2LMHeadModel", "X):\n    pass\nimport os\nclass Y(nn.Module", "import", "GPT2Config"]
    for name in names:
        model = gpt2()
        model.__class__ = type(name, (transformers.GPT2LMHeadModel,), {})
        with pytest.raises(CannotApply, match="no class of transformers"):
            code(model, BLOCKS)


def test_norms_of_another_model_are_refused() -> None:
    wrong = [SwappedNorm("transformer.h.7.ln_1", 24, 1e-5), SwappedNorm("transformer.ln_f", 24, float("nan"))]
    for each in wrong:
        with pytest.raises(CannotApply, match="not norms of this model"):
            code(gpt2(), [each])


def test_the_configuration_keeps_all_else(tmp_path: Path) -> None:
    model = gpt2()
    model.config.save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    add_code(tmp_path, model, [*BLOCKS, FINAL])
    after = json.loads((tmp_path / "config.json").read_text())
    assert after.pop("auto_map") == dict.fromkeys(
        ("AutoModelForCausalLM", "AutoModelForPreTraining"), "modeling_rms_norm.GPT2LMHeadModel"
    )
    assert list(after.items()) == list(before.items())
    compile((tmp_path / FILE).read_text(), FILE, "exec")
    with pytest.raises(NormfuseError, match="of its own"):
        add_code(tmp_path, model, BLOCKS)


def test_auto_classes_and_what_the_class_has_no_place_for() -> None:
    assert "AutoModelForImageClassification" in auto_classes(ZOO["hf_vit"].build())
    assert "AutoModel" in auto_classes(gpt2().transformer)
    assert unheld(gpt2(), [*BLOCKS, FINAL]) == {f"{each.path}.bias" for each in BLOCKS}
    assert isinstance(gpt2().get_parameter("transformer.h.0.ln_1.bias"), torch.Tensor)
