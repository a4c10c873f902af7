"""What is brought comes back: the same files, which the stock class loads strictly and which compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from normfuse.cli import main
from tests.zoo import torchvision_shim
from tests.zoo.spread import spread

torchvision_shim.install()
transformers: Any = pytest.importorskip("transformers")
timm: Any = pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 64} | TEXT


def saved(folder: Path, name: str, settings: dict[str, Any]) -> Any:
    cls = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = spread(cls(cls.config_class(**settings))).eval()
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    return model


def asked(*words: Any) -> Any:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_a_checkpoint_with_an_architecture(tmp_path: Path) -> None:
    """Of timm, behind a training's wrapper, with weights of another head: one command, one checkpoint of the same keys."""
    model = spread(timm.create_model("resnet10t", num_classes=7)).eval()
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "r.pth")
    spec = "float32[2,3,32,32]"
    answer = asked(
        "rewrite", tmp_path / "r.pth", "--model", "timm:resnet10t,num_classes=7", "--pass", "conv_bn", "--input", spec
    )
    assert answer.exit_code == 0, answer.output
    assert "module." in answer.output  # it is said what was undone
    after = torch.load(tmp_path / "r.rewritten.pth")
    assert list(after) == list(state)
    again = timm.create_model("resnet10t", num_classes=7).eval()
    again.load_state_dict({key.removeprefix("module."): value for key, value in after.items()}, strict=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(again(x), model(x), rtol=1e-4, atol=1e-4 * float(model(x).abs().max()))


def test_what_a_class_cannot_hold_is_refused(tmp_path: Path) -> None:
    """A narrower stream has no place in GPT-2's class; a program holds it."""
    saved(tmp_path / "m", "GPT2LMHeadModel", GPT2)
    answer = asked("rewrite", tmp_path / "m", "--pass", "pre_crmsnorm_compressed", "-o", tmp_path / "out")
    assert answer.exit_code == 0, answer.output
    assert not (tmp_path / "out").exists()
    assert "nothing to rewrite" in answer.output


def test_architectures_and_weights_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pth")
    asked_of = {
        ("timm:resnet10t",): "without weights",
        (tmp_path / "a.pth",): "is a state dict",
        (tmp_path / "a.pth", "--model", "timm:resnet10"): "timm has no model",
        (tmp_path / "a.pth", "--model", "timm:resnet10t,7"): "is no setting of a model",
        (tmp_path / "a.pth", "--model", "timm:resnet10t,layers=(1"): "is no setting of a model",
        (tmp_path / "a.pth", "--model", "resnet10t"): "names no architecture",
        (tmp_path / "a.pth", "--model", "timm:resnet10t"): "do not fit its architecture",
        (tmp_path / "a.pth", "--model", f"{tmp_path}/mine.py:build"): "there is no file",
    }
    for words, said in asked_of.items():
        answer = asked("inspect", *words)
        assert (answer.exit_code, said in answer.output) == (2, True), (words, answer.output)
