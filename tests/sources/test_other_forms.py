"""Folders whose tensors are not the module's one to one: renamed, joined, split, or of another dtype."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from normfuse.sources.opened import open as opened
from normfuse.sources.source import Source
from tests.sources.brought import ALL, Brought
from tests.sources.brought_back import rewritten

pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("brought")]


def saved(name: str, folder: Path) -> Path:
    brought: Brought = ALL[name]
    brought.save(brought.build(), folder / "m")
    return folder / "m"


def told(source: Source) -> str:
    return " ".join(each for each in source.notes if "as a whole" in each)


def reasons(report: dict[str, Any], code: str) -> set[str]:
    return {each["reason"] for each in report["refusals"] if each["code"] == code}


def test_renamed_tensors_stay_where_they_are(tmp_path: Path) -> None:
    source = opened(saved("gpt_neox", tmp_path))
    assert source.stored is not None
    assert all(source.stored.keys.values())
    assert source.stored.keys["lm_head.weight"] == ("embed_out.weight",)
    assert not told(source)


def test_joined_tensors_are_told_of(tmp_path: Path) -> None:
    source = opened(saved("phimoe", tmp_path))
    assert told(source).startswith("24 stored tensors are joined, split, cast or copied where the model is made")
    assert "experts.0.w1.weight" in told(source)


def test_what_would_change_a_split_tensor_is_refused_with_a_reason(tmp_path: Path) -> None:
    back = rewritten(saved("dinov2_split", tmp_path), tmp_path / "out", "fold_affine")
    assert not any("weights_in" in each for each in back.report["tensors"]["changed"])
    (one, two) = sorted(reasons(back.report, "NF104"))
    assert "'dinov2.encoder.layer.0.mlp." in one
    assert "stored in another form than its class has it" in one
    assert "'dinov2.encoder.layer.1.mlp." in two


def test_what_would_change_a_cast_tensor_is_refused_with_a_reason(tmp_path: Path) -> None:
    folder = saved("gpt_neox_sequential", tmp_path)
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    held = load_file(folder / places[name])
    save_file(held | {name: held[name].to(torch.bfloat16)}, folder / places[name], {"format": "pt"})
    back = rewritten(folder, tmp_path / "out", "fold_affine")
    assert name not in back.report["tensors"]["changed"]
    assert any(f"'{name}' is stored in another form" in each for each in reasons(back.report, "NF104"))
    assert any("a stored tensor is joined, split, cast or copied" in each for each in back.report["notes"])
    assert "gpt_neox.layers.1.attention.query_key_value.weight" in back.report["tensors"]["changed"]
