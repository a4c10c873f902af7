"""What is brought comes back: the same files, which the stock class loads strictly and which compute the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

from normfuse.cli import main
from tests.zoo import torchvision_shim
from tests.zoo.spread import spread

torchvision_shim.install()
transformers: Any = pytest.importorskip("transformers")
timm: Any = pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32} | TEXT
GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 64} | TEXT
RMS = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
} | TEXT
slow = pytest.mark.slow
FAMILIES = [
    pytest.param("GPT2LMHeadModel", GPT2, "pre_rmsnorm", id="gpt2"),
    pytest.param("LlamaForCausalLM", RMS, "fold_affine", id="llama"),
    pytest.param("GPTNeoXForCausalLM", SMALL | {"max_position_embeddings": 64}, "pre_rmsnorm", id="gpt_neox", marks=slow),
    pytest.param("BertForMaskedLM", SMALL | {"max_position_embeddings": 64}, "all", id="bert", marks=slow),
    pytest.param("OPTForCausalLM", SMALL | {"ffn_dim": 32, "word_embed_proj_dim": 24}, "pre_rmsnorm", id="opt", marks=slow),
    pytest.param("BloomForCausalLM", {"hidden_size": 24, "n_layer": 2, "n_head": 2} | TEXT, "all", id="bloom", marks=slow),
    pytest.param("Qwen2ForCausalLM", RMS, "fold_affine", id="qwen2", marks=slow),
    pytest.param("MistralForCausalLM", RMS, "fold_affine", id="mistral", marks=slow),
]  # fmt: skip


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


def stored(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize(("name", "settings", "passes"), FAMILIES)
def test_a_folder_of_transformers(name: str, settings: dict[str, Any], passes: str, tmp_path: Path) -> None:
    original, out = saved(tmp_path / "m", name, settings), tmp_path / "out"
    answer = asked("rewrite", tmp_path / "m", "--pass", passes, "-o", out, "--json")
    assert answer.exit_code == 0, answer.output
    listing = json.loads(answer.stdout)["tensors"]
    assert out.exists(), "every one of these classes can hold something of it"

    assert {each.name for each in out.iterdir()} == {each.name for each in (tmp_path / "m").iterdir()}
    assert (out / "config.json").read_bytes() == (tmp_path / "m" / "config.json").read_bytes()
    before, after = stored(tmp_path / "m"), stored(out)
    assert list(before) == list(after)
    assert {key for key in before if not torch.equal(before[key], after[key])} == set(listing["changed"]) != set()
    assert listing["kept"] == len(before) - len(listing["changed"])

    again, info = type(original).from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = original(input_ids=ids).logits, again.eval()(input_ids=ids).logits
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


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


def test_a_folder_of_timm(tmp_path: Path) -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    model = spread(timm.create_model("vit_tiny_patch16_224", num_classes=7, **sizes)).eval()
    timm.models.save_for_hf(model, tmp_path / "vit", model_args=sizes, safe_serialization=True)
    answer = asked("rewrite", tmp_path / "vit", "--pass", "pre_rmsnorm")
    assert answer.exit_code == 0, answer.output
    again = timm.create_model(f"local-dir:{tmp_path / 'vit.rewritten'}", pretrained=True).eval()
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
        (tmp_path / "a.pth", "--model", "resnet10t"): "names no architecture",
        (tmp_path / "a.pth", "--model", "timm:resnet10t"): "do not fit its architecture",
        (tmp_path / "a.pth", "--model", f"{tmp_path}/mine.py:build"): "there is no file",
    }
    for words, said in asked_of.items():
        answer = asked("inspect", *words)
        assert (answer.exit_code, said in answer.output) == (2, True), (words, answer.output)
