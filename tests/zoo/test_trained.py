"""Trained models still do what they were trained for: first as they are, then rewritten."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.zoo import trained

pytestmark = pytest.mark.trained


@pytest.fixture(scope="module")
def whisper() -> Any:
    try:
        return trained.whisper_tiny_en()
    except trained.FetchFailed as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def speech() -> Tensor:
    """The features of "Ever tried, ever failed. No matter, try again. Fail again. Fail better." read aloud."""
    try:
        return trained.log_mel(trained.recording("beckett"))
    except trained.FetchFailed as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def heard(whisper: Any, speech: Tensor) -> list[int]:
    """The tokens that the model as it is writes."""
    return trained.greedy_tokens(whisper, speech)


def test_whisper_is_loaded_whole(whisper: Any) -> None:
    norms = [module for module in whisper.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 22
    assert whisper.proj_out.weight is whisper.model.decoder.embed_tokens.weight
    assert {parameter.dtype for parameter in whisper.parameters()} == {torch.float32}


def test_whisper_hears_the_words(heard: list[int]) -> None:
    try:
        text = trained.text_of(heard)
    except trained.FetchFailed as reason:
        pytest.skip(str(reason))
    assert "Ever tried" in text
    assert "Fail better" in text


def test_a_draft_changes_the_calls_and_not_the_tokens(whisper: Any, speech: Tensor, heard: list[int]) -> None:
    wrong = [*heard[:3], 0, *heard[4:]]
    assert trained.greedy_tokens(whisper, speech, draft=heard) == heard
    assert trained.greedy_tokens(whisper, speech, draft=wrong) == heard


# The rewritten model goes here: `trained.greedy_tokens(rewritten, speech, draft=heard) == heard`. With the draft, one
# call decides when the rewrite is right. An exported graph is called as model(input_features=…, decoder_input_ids=…)
# with decoder_input_ids of shape (1, 64), and has to return something with `.logits`.
