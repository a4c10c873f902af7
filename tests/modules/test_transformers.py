"""A rewritten transformers model is a normal checkpoint: same class, same keys, the same tokens, in stock transformers too."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import normfuse
from tests.modules.models import distance
from tests.zoo.models import ZOO

pytestmark = pytest.mark.filterwarnings("ignore")

MODELS = {"hf_gpt2": 5, "hf_opt": 5, "hf_whisper": 12, "hf_vit": 5}


@functools.cache
def deployed(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """A deployed model, its original and their inputs; tests look at them and change nothing."""
    original: Any = ZOO[name].build()
    original.config.use_cache = name != "hf_vit"
    _, kwargs = ZOO[name].inputs(original)
    return normfuse.deploy(copy.deepcopy(original), "pre_rmsnorm", kwargs=kwargs), original, kwargs


@pytest.mark.parametrize("name", MODELS)
def test_a_normal_checkpoint(name: str, tmp_path: Path) -> None:
    model, original, kwargs = deployed(name)
    with torch.no_grad():
        expected, found = original(**kwargs).logits, model(**kwargs).logits
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == list(original.state_dict())

    model.save_pretrained(tmp_path)
    stock, info = type(original).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert stock.config.to_dict().get("tie_word_embeddings") == original.config.to_dict().get("tie_word_embeddings")
    norms = [module for module in stock.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == MODELS[name]
    with torch.no_grad():  # LayerNorm on a stream whose mean is zero, or, behind a tied table, is seen by no norm
        assert torch.allclose(stock.eval()(**kwargs).logits, expected, rtol=1e-4, atol=1e-4)


class LayerNorms(TorchFunctionMode):
    """Counts the calls of layer_norm."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.nn.functional.layer_norm
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS)
def test_every_norm_runs_as_rms_norm(name: str) -> None:
    model, original, kwargs = deployed(name)
    counts = []
    for each in (model, original):
        with LayerNorms() as counted, torch.no_grad():
            each(**kwargs)
        counts.append(counted.count)
    assert counts == [0, MODELS[name]]


@pytest.mark.parametrize("name", ["hf_gpt2", "hf_opt", "hf_whisper"])
def test_generation_with_a_cache_gives_the_same_tokens(name: str) -> None:
    model, original, kwargs = deployed(name)
    prompt = {key: value for key, value in kwargs.items() if key != "decoder_input_ids"}
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": True, "min_new_tokens": 8}
    for length in (1, 2):  # another batch than the traced one
        given = {key: value[:length] for key, value in prompt.items()}
        assert torch.equal(model.generate(**given, **options), original.generate(**given, **options))


def test_live_gpt2_trains_as_the_original_does() -> None:
    """Without dropout; gradients of all parameters, in training mode, behind one explicit mean-subtraction."""
    from tests.zoo.models import SPECIAL, _transformers, tiny

    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    original = tiny(_transformers, "GPT2LMHeadModel", "eager", **SPECIAL, **sizes, **quiet)().double()
    _, kwargs = ZOO["hf_gpt2"].inputs(original)
    model = normfuse.tune(copy.deepcopy(original), "pre_rmsnorm", kwargs=kwargs)
    grads = []
    for each in (model, original):
        each.train()
        each(**kwargs, labels=kwargs["input_ids"]).loss.backward()
        grads.append({name: parameter.grad for name, parameter in each.named_parameters()})
    assert distance(*grads) <= 1e-12
    assert type(model).forward is type(original).forward


def test_dropout_on_the_stream_is_refused_in_live_mode() -> None:
    """Centring a weight in front of an elementwise dropout is another function while the model trains."""
    model = ZOO["hf_gpt2"].build()
    _, kwargs = ZOO["hf_gpt2"].inputs(model)
    with pytest.raises(normfuse.NormfuseError, match="dropout"):
        normfuse.tune(model, "pre_rmsnorm", kwargs=kwargs)
