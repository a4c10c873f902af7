"""Models of the hub by their names: from the local cache, at a revision; what is not there is one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import normfuse
from tests.sources.test_brought_back import GPT2, asked, saved

constants: Any = pytest.importorskip("huggingface_hub").constants
pytestmark = pytest.mark.filterwarnings("ignore")
NEW, OLD = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache as the hub's package lays it out: a model at two revisions, and only a configuration."""
    place = tmp_path_factory.mktemp("hub")
    for commit, layers in ((NEW, 2), (OLD, 1)):
        saved(place / commit, "GPT2LMHeadModel", GPT2 | {"n_layer": layers})
        keep(place / "cache" / "models--org--tiny", place / commit, commit)
    keep(place / "cache" / "models--org--part", place / NEW, NEW, only=("config.json",))
    for repo, refs in (("tiny", {"main": NEW, "v1.0": OLD}), ("part", {"main": NEW})):
        for ref, commit in refs.items():
            (place / "cache" / f"models--org--{repo}" / "refs" / ref).write_text(commit)
    return place / "cache"


def keep(repo: Path, folder: Path, commit: str, only: tuple[str, ...] = ()) -> None:
    for each in ("blobs", "refs", f"snapshots/{commit}"):
        (repo / each).mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if not only or file.name in only:
            shutil.copy(file, repo / "blobs" / f"{commit[:4]}{file.name}")
            (repo / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{commit[:4]}{file.name}")


@pytest.fixture(autouse=True)
def away(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, this cache, and a working directory of its own."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)


def norms(name: str) -> int:
    model = normfuse.open(name).model
    assert isinstance(model, nn.Module)
    return sum(isinstance(each, nn.LayerNorm) for each in model.modules())


def test_a_name_and_a_revision_are_found_in_the_cache() -> None:
    answer = asked("inspect", "org/tiny", "--json")
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["counts"]["layer_norm"] == 5
    assert norms("org/tiny@v1.0") == 3
    assert norms(f"org/tiny@{OLD}") == 3


def test_weights_of_a_model_of_the_hub(cache: Path) -> None:
    index = cache.parent / OLD / "model.safetensors.index.json"
    model = normfuse.open(index, architecture="transformers:org/tiny@v1.0").model
    assert isinstance(model, nn.Module)
    assert sum(isinstance(each, nn.LayerNorm) for each in model.modules()) == 3


def test_what_lies_here_comes_first(cache: Path, tmp_path: Path) -> None:
    """A folder that is called like an id is that folder; a folder with the owner's name only is none."""
    (tmp_path / "org").mkdir()
    assert norms("org/tiny") == 5
    shutil.copytree(cache / "models--org--tiny" / "snapshots" / OLD, tmp_path / "org" / "tiny")
    assert norms("org/tiny") == 3
    assert norms(f"org/tiny@{NEW}") == 5


def test_what_is_written_lies_here_and_not_in_the_cache(cache: Path, tmp_path: Path) -> None:
    before = sorted(map(str, cache.rglob("*")))
    answer = asked("rewrite", "org/tiny@v1.0", "--pass", "pre_rmsnorm", "--verify", "structure")
    assert answer.exit_code == 0, answer.output
    assert [each.name for each in tmp_path.iterdir()] == ["tiny.rewritten"]
    written = tmp_path / "tiny.rewritten"
    assert {each.name for each in written.iterdir()} == set(os.listdir(cache / "models--org--tiny" / "snapshots" / OLD))
    assert not any(each.is_symlink() for each in written.iterdir())
    assert sorted(map(str, cache.rglob("*"))) == before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/none", "it is not in the cache, and HF_HUB_OFFLINE is set"),
        ("org/tiny@none", "it is not in the cache, and HF_HUB_OFFLINE is set"),
        ("org/part", "only a part without weights is in the cache"),
        ("org/tiny@../../refs", "No such file"),
        ("org/tiny/more", "No such file"),
        ("../tiny", "No such file"),
        ("gpt2", "there is no file or folder gpt2"),
    ],
)
def test_what_is_not_there_is_one_line(name: str, said: str, tmp_path: Path) -> None:
    answer = asked("rewrite", name, "--pass", "pre_rmsnorm")
    assert answer.exit_code == 2
    assert [line.partition(": ")[0] for line in answer.output.splitlines()] == ["error", "hint"], answer.output
    assert said in answer.output
    assert not list(tmp_path.iterdir())
