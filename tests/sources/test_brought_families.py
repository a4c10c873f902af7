"""One command for what people bring, one command back: the same files, in which the stock class computes and says the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.sources.brought import ALL, LAYER_NORM, RMS_NORM, TIMM, TORCHVISION
from tests.sources.brought_back import StockProcess, bring

pytest.importorskip("transformers")
pytest.importorskip("timm")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("brought")]


def _cases() -> Iterator[Any]:
    for name, each in ALL.items():
        yield pytest.param(name, marks=() if each.quick else pytest.mark.slow)


@pytest.mark.parametrize("name", [*_cases()])
def test_what_is_brought_comes_back(name: str, stock: StockProcess, tmp_path: Path) -> None:
    brought = ALL[name]
    back, inputs = bring(brought, tmp_path)
    assert (back.norms, back.stay) == (brought.norms, brought.stay)
    assert back.path.exists() == bool(back.report["rewrites"])
    if not back.path.exists():
        return
    listing = back.report["tensors"]
    assert set(listing["changed"]) == back.differing != set()
    assert listing["kept"] == back.count - len(back.differing)
    assert listing["dropped"] == []
    assert brought.package != "transformers" or len([*tmp_path.glob("out/*.safetensors")]) > 1  # it is sharded

    torch.save(inputs, tmp_path / "inputs.pt")
    paths = {"original": str(back.original), "rewritten": str(back.path), "inputs": str(tmp_path / "inputs.pt")}
    told = stock.told(**brought.opened, **paths)
    assert told["apart"] < 1e-5
    assert told["dtypes"][0] == told["dtypes"][1]
    assert told["tokens"][0] == told["tokens"][1]
    assert (told["tokens"][0] is not None) == brought.says


def test_the_table_has_every_kind() -> None:
    kinds = {"layer norm": (LAYER_NORM, 12), "RMS norm": (RMS_NORM, 6), "timm": (TIMM, 8), "torchvision": (TORCHVISION, 5)}
    few = [kind for kind, (table, least) in kinds.items() if len({each.model for each in table.values() if each.norms}) < least]
    assert not few
    assert {each.form for each in TIMM.values()} == {"folder", "m.pth", "m.ckpt", "m.safetensors"}
