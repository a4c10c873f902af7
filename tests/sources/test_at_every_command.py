"""Every command takes every source: a folder, a checkpoint with its architecture, a model of the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normfuse
from normfuse.errors import InputError
from tests.sources.test_brought_back import asked
from tests.sources.test_folders_wrong import gpt2, refused, rewritten, vit
from tests.sources.test_hub import NEW, keep

constants: Any = pytest.importorskip("huggingface_hub").constants
pytestmark = pytest.mark.filterwarnings("ignore")
__all__ = ["gpt2", "vit"]


@pytest.fixture(scope="module")
def here(gpt2: Path, vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers, one of timm, a checkpoint, a cache of the hub, and data; no test writes to it."""
    place = tmp_path_factory.mktemp("here")
    shutil.copytree(gpt2, place / "folder")
    shutil.copytree(vit, place / "timm")
    repo = place / "cache" / "models--org--tiny"
    keep(repo, gpt2, NEW)
    (repo / "refs" / "main").write_text(NEW)
    shutil.copytree(gpt2, place / "single")
    rewritten(lambda held: held)(place / "single")
    (place / "single" / "model.safetensors").rename(place / "weights.safetensors")
    torch.save({"input_ids": torch.randint(3, 99, (16, 8), generator=torch.Generator().manual_seed(0))}, place / "data.pt")
    torch.save(torch.randn(2, 3, 32, 32), place / "images.pt")
    return place


@pytest.fixture(autouse=True)
def away(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory from which all of them can be named, and in which nothing stays."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "cache"))
    monkeypatch.chdir(tmp_path)
    for each in here.iterdir():
        Path(each.name).symlink_to(each)


SOURCES = {
    "folder": ["folder"],
    "hub": ["org/tiny"],
    "checkpoint": ["weights.safetensors", "--model", "transformers:single"],
    "index": ["folder/model.safetensors.index.json", "--model", "transformers:folder"],
}
COMMANDS: dict[str, tuple[list[str], str]] = {
    "inspect": (["inspect"], "layer_norm"),
    "calibrate": (["calibrate", "--data", "data.pt", "-o", "cal.json"], "wrote cal.json"),
    "strip": (["strip", "--data", "data.pt", "--max-loss-increase", "9", "-o", "stripped.pt2"], "wrote stripped.pt2"),
    "export": (["export", "--to", "onnx", "-o", "model.onnx"], "wrote model.onnx"),
    "rewrite": (["rewrite", "--pass", "fold_affine", "--verify", "structure", "--dry-run"], "dry run"),
}
QUICK = {("inspect", "checkpoint"), ("calibrate", "hub"), ("strip", "folder"), ("rewrite", "index"), ("export", "folder")}


@pytest.mark.parametrize(
    ("command", "source"),
    [
        pytest.param(command, source, marks=() if (command, source) in QUICK else pytest.mark.slow)
        for command in COMMANDS
        for source in SOURCES
    ],
)
def test_a_command_takes_a_source(command: str, source: str) -> None:
    words, said = COMMANDS[command]
    answer = asked(words[0], *SOURCES[source], *words[1:])
    assert answer.exit_code == 0, answer.output
    assert said in answer.output


def test_a_folder_of_timm_is_inspected() -> None:
    answer = asked("inspect", "timm", "--json")
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["counts"]["layer_norm"] == 5


def test_two_folders_are_compared() -> None:
    """Equal, different, and one that is not there."""
    answer = asked("verify", "folder", "org/tiny")
    assert answer.exit_code == 0, answer.output
    assert "equivalent" in answer.output

    def louder(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: 1.01 * each if key.endswith("h.1.ln_2.weight") else each for key, each in held.items()}

    shutil.copytree("folder", "other")
    rewritten(louder)(Path("other"))
    answer = asked("verify", "folder", "other")
    assert answer.exit_code == 1, answer.output
    assert "NOT equivalent" in answer.output
    refused(asked("verify", "folder", "nowhere"), "there is no file or folder nowhere")
    refused(asked("verify", "nowhere/at/all", "folder"), "No such file")


def test_weights_are_compared_with_what_was_made_of_them() -> None:
    """The architecture is for the weights; a program needs none."""
    words = ("--model", "transformers:single")
    answer = asked(
        "rewrite", "weights.safetensors", *words, "--pass", "fold_affine", "--verify", "structure", "-o", "program.pt2"
    )
    assert answer.exit_code == 0, answer.output
    answer = asked("verify", "weights.safetensors", "program.pt2", *words)
    assert answer.exit_code == 0, answer.output


def test_two_architectures_are_one_comparison_that_cannot_be_made() -> None:
    answer = asked("verify", "folder", "timm")
    assert answer.exit_code == 2, answer.output
    assert answer.output.count("error: ") == 1
    assert "bug" not in answer.output


def test_what_was_opened_is_tuned_and_deployed_in_place() -> None:
    source = normfuse.open("folder")
    assert isinstance(source.model, nn.Module)
    ids = torch.randint(3, 99, (2, 9))
    with torch.no_grad():
        expected = source.model(ids).logits
    assert normfuse.tune(source, "fold_affine", verify="none") is source
    assert torch.allclose(source.model(ids).logits, expected, atol=1e-4)
    source.model(ids).logits.sum().backward()
    assert normfuse.restore(source) is source
    assert normfuse.deploy(source, "fold_affine", verify="none") is source
    assert torch.allclose(source.model(ids).logits, expected, atol=1e-4)
    for change in (normfuse.tune, normfuse.deploy):
        with pytest.raises(InputError, match="folder is a path") as told:
            change("folder", "fold_affine")  # type: ignore[type-var]
        assert "normfuse.open('folder')" in (told.value.hint or "")
