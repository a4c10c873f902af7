"""Trained models still do what they were trained for: first as they are, then rewritten."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import normfuse
from tests.zoo import trained

pytestmark = [pytest.mark.slow, pytest.mark.trained, pytest.mark.xdist_group("trained")]  # one worker: the models are large


@pytest.fixture(scope="session")
def whisper() -> Any:
    try:
        return trained.whisper_tiny_en()
    except trained.FetchFailed as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def speech() -> Tensor:
    """The features of "Ever tried, ever failed. No matter, try again. Fail again. Fail better." read aloud."""
    try:
        return trained.log_mel(trained.recording("beckett"))
    except trained.FetchFailed as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def rewritten(whisper: Any, speech: Tensor) -> normfuse.Result:
    """The trained model with its LayerNorms turned into RMSNorms, proven on real speech."""
    inputs = {"input_features": speech, "decoder_input_ids": torch.full((1, 64), 50256)}
    return normfuse.rewrite(whisper, ["pre_rmsnorm"], kwargs=inputs)


def test_all_norms_of_whisper_are_converted_exactly(rewritten: normfuse.Result) -> None:
    report = rewritten.report.to_dict()
    assert report["norms"] == {"before": {"layer_norm": 22}, "after": {"rms_norm": 22}}
    assert report["refusals"] == []
    assert report["evidence"]["ok"]
    assert rewritten.report.evidence.relative <= 1e-11
    # one for the encoder, whose stream begins at a GELU; one for the decoder, whose table is tied to the head
    assert sum("sub.Tensor" in edit["edit"] for edit in report["edits"]) == 2


def test_the_tied_table_of_whisper_is_not_copied(whisper: Any, rewritten: normfuse.Result) -> None:
    state = rewritten.program.exported.state_dict
    tables = {state[name].data_ptr() for name in ("model.decoder.embed_tokens.weight", "proj_out.weight")}
    assert tables == {whisper.proj_out.weight.data_ptr()}


def test_the_rewritten_whisper_hears_the_same(rewritten: normfuse.Result, speech: Tensor, heard: list[int]) -> None:
    assert trained.greedy_tokens(rewritten.module(), speech, draft=heard) == heard
