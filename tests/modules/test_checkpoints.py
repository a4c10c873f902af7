"""A deployed transformers model saves a plain checkpoint, whichever of its norms were folded with ``deploy(model, "all")``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import normfuse
from normfuse.errors import CannotApply
from tests.zoo.models import ZOO, _rms_decoder, _transformers, tiny
from tests.zoo.spread import spread

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]

QUICK = {"hf_gpt2", "hf_gemma"}
OTHERS = {
    "hf_nemotron": lambda: tiny(_rms_decoder, "NemotronForCausalLM")(),
    "hf_resnet": lambda: tiny(
        _transformers,
        "ResNetForImageClassification",
        "eager",
        num_labels=5,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
    )(),
}
NAMES = ["hf_gpt2", "hf_opt", "hf_vit", "hf_whisper", "hf_llama", "hf_gemma", "hf_t5", *OTHERS]


def _built(name: str) -> tuple[Any, dict[str, Any]]:
    if name in ZOO:
        model = ZOO[name].build()
        return model, ZOO[name].inputs(model)[1]
    model = spread(OTHERS[name]()).eval()
    like = ZOO["hf_vit" if name == "hf_resnet" else "hf_llama"]
    return model, like.inputs(model)[1]


@pytest.mark.parametrize("name", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in NAMES])
def test_deployed_saved_and_loaded_by_the_class_itself(name: str, tmp_path: Path) -> None:
    original, kwargs = _built(name)
    model = copy.deepcopy(original)
    try:
        normfuse.deploy(model, "all", kwargs=kwargs, verify="none")
    except CannotApply as error:
        pytest.fail(f"nothing to save: {error}")
    model.save_pretrained(tmp_path)
    stock, info = type(original).from_pretrained(tmp_path, output_loading_info=True)
    stock = stock.eval()
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected = original(**kwargs).logits
        for each in (model, stock):
            assert (each(**kwargs).logits - expected).norm() <= 1e-5 * expected.norm()
    if hasattr(original, "generate") and name in ("hf_gpt2", "hf_whisper"):
        prompt = {key: value for key, value in kwargs.items() if key != "decoder_input_ids"}
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        assert torch.equal(stock.generate(**prompt, **options), original.generate(**prompt, **options))
    model.load_state_dict(original.state_dict())
    with torch.no_grad():
        assert (model(**kwargs).logits - expected).norm() <= 1e-5 * expected.norm()
