"""Folders that are not what they should be: one line and what to do, exit code 2, nothing written, nothing changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.sources.test_brought_back import GPT2, asked, saved
from tests.zoo.spread import spread

timm: Any = pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore")

Spoil = Callable[[Path], Any]
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
HUGE = 10**12


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers in shards, which no test writes to."""
    folder = tmp_path_factory.mktemp("gpt2") / "m"
    saved(folder, "GPT2LMHeadModel", GPT2)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of timm, which no test writes to."""
    folder = tmp_path_factory.mktemp("vit") / "m"
    model = spread(timm.create_model("vit_tiny_patch16_224", num_classes=7, **VIT)).eval()
    timm.models.save_for_hf(model, folder, model_args=VIT, safe_serialization=True)
    return folder


def everything(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder, and what is in it."""
    return {str(each.relative_to(folder)): each.read_bytes() if each.is_file() else None for each in folder.rglob("*")}


def refused(answer: Any, said: str) -> None:
    """One line and a hint, and nothing else."""
    assert answer.exit_code == 2, answer.output
    assert [line.partition(": ")[0] for line in answer.output.splitlines()] == ["error", "hint"], answer.output
    assert said in answer.output
    assert "bug" not in answer.output


# -- how to spoil a folder ---------------------------------------------------------------------------------------------


def config(**changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def settings(**changes: Any) -> Spoil:
    """Of the model that a folder of timm describes."""

    def spoil(folder: Path) -> None:
        held = json.loads((folder / "config.json").read_text())["model_args"]
        config(model_args=held | changes)(folder)

    return spoil


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def cut(length: int) -> Spoil:
    def spoil(folder: Path) -> None:
        shard(folder).write_bytes(shard(folder).read_bytes()[:length])

    return spoil


def index(folder: Path) -> Path:
    return folder / "model.safetensors.index.json"


def leading_to(place: Any) -> Spoil:
    """An index whose first tensor is said to be elsewhere."""

    def spoil(folder: Path) -> None:
        table = json.loads(index(folder).read_text())
        table["weight_map"][next(iter(table["weight_map"]))] = place
        index(folder).write_text(json.dumps(table))

    return spoil


def twice_in_index(folder: Path) -> None:
    text = index(folder).read_text()
    name = next(iter(json.loads(text)["weight_map"]))
    index(folder).write_text(text.replace(f'"{name}":', f'"{name}": "x.safetensors", "{name}":', 1))


def twice_in_header(folder: Path) -> None:
    content = shard(folder).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end].decode().rstrip()
    name = next(each for each in json.loads(header) if each != "__metadata__")
    twice = f'{header[:-1]}, "{name}": {json.dumps(json.loads(header)[name])}}}'.encode()
    shard(folder).write_bytes(len(twice).to_bytes(8, "little") + twice + content[end:])


def twice_in_shards(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file(load_file(second) | dict([next(iter(load_file(first).items()))]), second, {"format": "pt"})


def linked_out(folder: Path) -> None:
    place = shard(folder)
    place.rename(folder.parent / "elsewhere")
    place.symlink_to(folder.parent / "elsewhere")


def whole(folder: Path) -> dict[str, Tensor]:
    return {key: each for path in sorted(folder.glob("*.safetensors")) for key, each in load_file(path).items()}


def rewritten(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Spoil:
    """One file of other tensors."""

    def spoil(folder: Path) -> None:
        held = whole(folder)
        for each in (*folder.glob("*.safetensors"), index(folder)):
            each.unlink()
        save_file(change(held), folder / "model.safetensors", {"format": "pt"})

    return spoil


def with_first_layers(change: Callable[[Tensor], Tensor], ending: str = "weight") -> Spoil:
    """The first layer of every MLP stored otherwise, and under another name."""

    def changed(held: dict[str, Tensor]) -> dict[str, Tensor]:
        first = {key for key in held if key.endswith("c_fc.weight")}
        others = {key: each for key, each in held.items() if key not in first}
        return others | {key.removesuffix("weight") + ending: change(held[key]) for key in first}

    return rewritten(changed)


def without_weights(folder: Path) -> None:
    for each in (*folder.glob("*.safetensors"), index(folder)):
        each.unlink()


def replaced(name: str, content: bytes | Spoil) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            content(folder / name)

    return spoil


def quantized(**told: Any) -> Spoil:
    return config(quantization_config=told)


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


CONFIG, INDEX = "config.json", "model.safetensors.index.json"
BITS = {torch.int8: "int8", torch.float8_e4m3fn: "float8_e4m3fn"}

# -- folders of transformers -------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Spoil, str]] = {
    "two architectures": (config(architectures=["GPT2LMHeadModel", "GPT2Model"]), "names 2 architectures"),
    "no architecture": (config(architectures=None), "does not say which class"),
    "a number for an architecture": (config(architectures=[1]), "does not say which class"),
    "an unknown class": (config(architectures=["NoSuchModel"]), "has no model class 'NoSuchModel'"),
    "a class that is no model": (config(architectures=["GPT2Config"]), "has no model class 'GPT2Config'"),
    "a function": (config(architectures=["is_torch_available"]), "has no model class 'is_torch_available'"),
    "a base of models": (config(architectures=["PreTrainedModel"]), "transformers cannot make"),
    "a name that acts on a terminal": (config(architectures=["\x1b[31mGPT2\u202e"]), r"'\x1b[31mGPT2\u202e'"),
    "a class of another model": (config(architectures=["OPTForCausalLM"]), "names two models"),
    "an unknown type": (config(model_type="nope"), "names two models"),
    "a number for a type": (config(model_type=3), "names two models"),
    "code of its own": (config(auto_map={"AutoModel": "x.Y"}), "brings code of its own"),
    "code of a part's own": (config(text_config={"auto_map": {"AutoModel": "x.Y"}}), "brings code of its own"),
    "gptq": (quantized(quant_method="gptq", bits=4), "is quantized (gptq)"),
    "awq": (quantized(quant_method="awq"), "is quantized (awq)"),
    "bitsandbytes": (quantized(quant_method="bitsandbytes", load_in_4bit=True), "is quantized (bitsandbytes)"),
    "bitsandbytes of old": (quantized(load_in_8bit=True), "is quantized (bitsandbytes)"),
    "fp8": (quantized(quant_method="fp8"), "is quantized (fp8)"),
    "compressed-tensors": (config(compression_config={"quant_method": "compressed-tensors"}), "(compressed-tensors)"),
    "a quantized part": (config(text_config={"quantization_config": {"quant_method": "awq"}}), "is quantized (awq)"),
    "quantized somehow": (config(quantization_config=[1]), "is quantized (by a method that it does not name)"),
    "packed weights alone": (with_first_layers(lambda w: w.to(torch.int32), "qweight"), "is quantized (as gptq and awq do"),
    **{
        f"stored as {name}": (with_first_layers(lambda w, dtype=dtype: w.to(dtype)), f"is stored as {name}")  # type: ignore[misc]
        for dtype, name in BITS.items()
    },
    "another size": (config(n_embd=48), "do not fit its architecture: of another shape"),
    "a layer more": (config(n_layer=3), "do not fit its architecture: missing"),
    "a layer less": (config(n_layer=1), "do not fit its architecture: unexpected"),
    "layers below none": (config(n_layer=-1), "do not fit its architecture: unexpected"),
    "a text for a size": (config(n_embd="24"), "expected int, got str"),
    "a size below none": (config(n_embd=-24), "transformers cannot make the model"),
    "no size": (config(n_embd=0), "transformers cannot make the model"),
    "no heads": (config(n_head=0), "transformers cannot make the model"),
    "a text for a number": (config(layer_norm_epsilon="x"), "expected float, got str"),
    "half a layer": (config(n_layer=2.5), "expected int, got float"),
    "a huge size": (config(n_embd=3 * HUGE), "limit MODEL_ENTRIES"),
    "a huge vocabulary": (config(vocab_size=HUGE), "limit MODEL_ENTRIES"),
    "huge positions": (config(n_positions=HUGE), "limit MODEL_ENTRIES"),
    "a huge inner size": (config(n_inner=HUGE), "limit MODEL_ENTRIES"),
    "huge labels": (config(num_labels=HUGE), "limit MODEL_ENTRIES"),
    "layers without end": (config(n_layer=HUGE), "limit MODULES"),
    "too many layers": (config(n_layer=100_000), "limit MODULES"),
    "no configuration": (replaced(CONFIG, b"{"), "is no configuration"),
    "an empty configuration": (replaced(CONFIG, b""), "is no configuration"),
    "a list for a configuration": (replaced(CONFIG, b"[]"), "is no configuration: [] is not an object"),
    "a configuration of bytes": (replaced(CONFIG, b"\xff\xfe"), "is no configuration"),
    "a deep configuration": (replaced(CONFIG, b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"), "limit NESTING"),
    "a folder for a configuration": (replaced(CONFIG, Path.mkdir), "is no configuration: it is not a regular file"),
    "a missing shard": (lambda f: shard(f).unlink(), "not there"),
    "a shard without data": (cut(-8), "is damaged"),
    "a shard without its header": (cut(30), "is damaged"),
    "a few bytes of a shard": (cut(5), "is damaged"),
    "nothing of a shard": (cut(0), "is empty"),
    "more than a shard": (lambda f: shard(f).write_bytes(shard(f).read_bytes() + b"more"), "is damaged"),
    "a header without end": (lambda f: shard(f).write_bytes(b"\xff" * 7 + b"\x00{}"), "limit HEADER_BYTES"),
    "a folder for a shard": (lambda f: replaced(shard(f).name, Path.mkdir)(f), "is a folder with nothing in it"),
    "a way up": (leading_to("../x.safetensors"), "no file beside it"),
    "a way from the root": (leading_to("/etc/passwd"), "no file beside it"),
    "a way from another root": (leading_to("C:\\x"), "no file beside it"),
    "a number for a file": (leading_to(3), "is no index of weights"),
    "a link out": (linked_out, "is a link out of its folder"),
    "an index without a map": (replaced(INDEX, b"{}"), "is no index of weights"),
    "an index of bytes": (replaced(INDEX, b"\xff\xfe"), "is no index of weights"),
    "an index of nothing": (replaced(INDEX, b'{"weight_map": {}}'), "do not fit its architecture: missing"),
    "a tensor twice in the index": (twice_in_index, "two entries"),
    "a tensor twice in a header": (twice_in_header, "two entries"),
    "a tensor in two shards": (twice_in_shards, "hold the same tensors"),
    "no weights": (without_weights, "has no weights"),
    "an adapter beside": (lambda f: (f / "adapter_config.json").write_text("{}"), "has an adapter of PEFT"),
    "an adapter alone": (lambda f: [emptied(f), (f / "adapter_config.json").write_text("{}")], "has an adapter of PEFT"),  # type: ignore[func-returns-value]
    "a pipeline": (lambda f: [emptied(f), (f / "model_index.json").write_text("{}")], "is a pipeline of several models"),  # type: ignore[func-returns-value]
    "nothing": (emptied, "is a folder with nothing in it"),
    "no folder": (lambda f: shutil.rmtree(f) or f.write_text("text"), "is a text file"),  # type: ignore[func-returns-value]
    "nothing there": (shutil.rmtree, "No such file"),
}  # fmt: skip


def spoiled_is_refused(folder: Path, spoil: Spoil, said: str, place: Path) -> None:
    """A copy of a folder that is spoiled: one line that says so, and nothing is written."""
    shutil.copytree(folder, place / "m")
    spoil(place / "m")
    before = everything(place)
    refused(asked("rewrite", place / "m", "--pass", "pre_rmsnorm", "-o", place / "out"), said)
    assert everything(place) == before


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_one_line_and_nothing_is_written(wrong: str, gpt2: Path, tmp_path: Path) -> None:
    spoiled_is_refused(gpt2, *WRONG[wrong], tmp_path)


@pytest.mark.parametrize("there", [Path.mkdir, lambda path: path.write_text("mine")])
def test_a_place_that_is_taken_is_not_touched(there: Spoil, gpt2: Path, tmp_path: Path) -> None:
    there(tmp_path / "out")
    before = everything(tmp_path)
    refused(asked("rewrite", gpt2, "--pass", "pre_rmsnorm", "-o", tmp_path / "out"), "it is there already")
    assert everything(tmp_path) == before
    refused(asked("rewrite", gpt2, "--pass", "pre_rmsnorm", "-o", gpt2), "it is there already")


@pytest.mark.parametrize("name", ["out.safetensors", "out.bin", "out.onnx"])
def test_a_folder_is_not_named_like_a_file(name: str, gpt2: Path, tmp_path: Path) -> None:
    refused(asked("rewrite", gpt2, "--pass", "pre_rmsnorm", "-o", tmp_path / name), "is named like a file")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="who may do anything is never refused")
@pytest.mark.parametrize("name", [CONFIG, INDEX, "model-00002-of-00004.safetensors"])
def test_what_may_not_be_read_is_one_line(name: str, gpt2: Path, tmp_path: Path) -> None:
    shutil.copytree(gpt2, tmp_path / "m")
    (tmp_path / "m" / name).chmod(0)
    refused(asked("rewrite", tmp_path / "m", "--pass", "pre_rmsnorm", "-o", tmp_path / "out"), "Permission denied")
    assert not (tmp_path / "out").exists()


# -- folders of timm ---------------------------------------------------------------------------------------------------

WRONG_OF_TIMM: dict[str, tuple[Spoil, str]] = {
    "an unknown architecture": (config(architecture="nope"), "timm has no model 'nope'"),
    "a number for an architecture": (config(architecture=3), "does not say which architecture"),
    "a way to another folder": (config(architecture="local-dir:/etc"), "timm has no model 'local-dir:/etc'"),
    "a layer more": (settings(depth=3), "do not fit its architecture: missing"),
    "a layer less": (settings(depth=1), "do not fit its architecture: unexpected"),
    "another size": (settings(embed_dim=48), "do not fit its architecture: of another shape"),
    "layers without end": (settings(depth=HUGE), "limit MODULES"),
    "a huge size": (settings(embed_dim=3 * HUGE), "limit MODEL_ENTRIES"),
    "a huge picture": (settings(img_size=10**9), "limit MODEL_ENTRIES"),
    "a text for a size": (settings(embed_dim="x"), "cannot be built"),
    "a size below none": (settings(embed_dim=-24), "cannot be built"),
    "an unknown setting": (settings(nope=1), "cannot be built"),
    "weights from elsewhere": (settings(checkpoint_path="/etc/passwd"), "cannot be built"),
    "trained weights": (settings(pretrained=True), "cannot be built"),
    "a list for settings": (config(model_args=[1]), "cannot be built"),
    "a text about its training": (config(pretrained_cfg="x"), "cannot be built"),
    "quantized": (quantized(quant_method="awq"), "is quantized (awq)"),
    "cut": (replaced("model.safetensors", b"\x10" + b"\0" * 7 + b'{"a"'), "is damaged"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_OF_TIMM)
def test_a_folder_of_timm_that_is_wrong_is_one_line(wrong: str, vit: Path, tmp_path: Path) -> None:
    spoiled_is_refused(vit, *WRONG_OF_TIMM[wrong], tmp_path)
