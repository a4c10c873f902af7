"""Trained files as they come in their packages: one command, and the same file back, which hears and sees the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.sources.brought_back import Returned, StockProcess, rewritten
from tests.zoo import openai_whisper, trained, trained_conv

slow = pytest.mark.slow
pytestmark = [slow, pytest.mark.trained, pytest.mark.xdist_group("trained"), pytest.mark.filterwarnings("ignore")]


def told_of(back: Returned, stock: StockProcess, inputs: tuple[Tensor, ...], folder: Path, **opened: Any) -> dict[str, Any]:
    """Only what is listed has changed; what a process without normfuse tells of the two files."""
    listing = back.report["tensors"]
    assert set(listing["changed"]) == back.differing != set()
    assert listing["kept"] == back.count - len(back.differing)
    torch.save((inputs, {}), folder / "inputs.pt")
    paths = {"original": str(back.original), "rewritten": str(back.path), "inputs": str(folder / "inputs.pt")}
    return stock.told(**opened, **paths)


def test_whisper_tiny_en(stock: StockProcess, tmp_path: Path) -> None:
    """In float16, under OpenAI's names, with a class of one's own; and in transformers' class as always."""
    try:
        file, speech = trained.whisper_file(), trained.log_mel(trained.recording("beckett"))
    except trained.FetchFailed as reason:
        pytest.skip(str(reason))
    code = Path(openai_whisper.__file__)
    model, inputs = ("--model", f"{code}:tiny_en"), ("--input", "float16[1,80,3000]", "--input", "int64[1,16]")
    # float16 takes minutes on a CPU: proven by the outputs below
    back = rewritten(file, tmp_path / "out.pt", "pre_rmsnorm", *model, *inputs, "--verify", "structure")
    assert back.report["norms"] == {"before": {"layer_norm": 22}, "after": {"rms_norm": 22}}

    said = trained.greedy_tokens(trained.whisper_tiny_en(), speech)
    assert trained.greedy_tokens(trained.whisper_tiny_en(back.path), speech, draft=said) == said
    tokens = torch.tensor([[trained.START, trained.NO_TIMESTAMPS, *said]])
    told = told_of(
        back, stock, (speech, tokens), tmp_path, package="file", name="tiny_en", settings={"file": str(code)}
    )  # fmt: skip
    assert told["apart"] < 2e-3  # the file keeps eleven bits


def test_whisper_tiny_en_as_a_folder(stock: StockProcess, tmp_path: Path) -> None:
    """Of many files of a megabyte, whose head is tied; what it generates."""
    try:
        model, speech = trained.whisper_tiny_en(), trained.log_mel(trained.recording("beckett"))
    except trained.FetchFailed as reason:
        pytest.skip(str(reason))
    model.config.use_cache = True
    model.save_pretrained(tmp_path / "m", max_shard_size="1MB")
    back = rewritten(tmp_path / "m", tmp_path / "out", "pre_rmsnorm", "--verify", "structure")
    assert back.report["norms"] == {"before": {"layer_norm": 22}, "after": {"rms_norm": 22}}
    assert len([*tmp_path.glob("out/*.safetensors")]) > 10
    listing = back.report["tensors"]
    assert set(listing["changed"]) == back.differing
    tokens = torch.tensor([[trained.START, trained.NO_TIMESTAMPS]])
    torch.save(((), {"input_features": speech, "decoder_input_ids": tokens}), tmp_path / "inputs.pt")
    told = stock.told(
        package="transformers", name="WhisperForConditionalGeneration", settings={}, original=str(back.original),
        rewritten=str(back.path), inputs=str(tmp_path / "inputs.pt"),
    )  # fmt: skip
    assert told["apart"] < 1e-4
    assert told["tokens"][0] == told["tokens"][1] is not None


def test_mobilenet_v2(stock: StockProcess, tmp_path: Path) -> None:
    try:
        file = trained_conv.mobilenet_v2_file()
        pictures = {name: trained_conv.photograph(name) for name in trained_conv.CLASSES}
    except trained.FetchFailed as reason:
        pytest.skip(str(reason))
    back = rewritten(file, tmp_path / "out.pth", "conv_bn", "--model", "torchvision:mobilenet_v2")
    assert back.report["norms"] == {"before": {"batch_norm": 52}, "after": {}}
    batch = torch.stack([trained_conv.for_mobilenet_v2(each) for each in pictures.values()])
    told = told_of(back, stock, (batch,), tmp_path, package="torchvision", name="mobilenet_v2", settings={})
    assert told["apart"] < 1e-4
    assert all(found in trained_conv.CLASSES[name] for name, found in zip(pictures, told["classes"][1], strict=True))
    assert told["classes"][0] == told["classes"][1]
