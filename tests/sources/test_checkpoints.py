"""Checkpoints as trainings keep them: only weights are built, and all else is written as it stood."""

from __future__ import annotations

import argparse
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from normfuse.errors import LoadError
from normfuse.sources.pickle_writing import pickled
from normfuse.sources.pickles import Name, Unreadable, picture
from normfuse.sources.tensor_files import open_weights
from tests.sources.changing import becoming


class Settings:
    """A class of the training's own, which no file may name."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    class Inner:
        """Its name has a dot of its own."""


def trained() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    return {
        "epoch": 3,
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1, name="é\u2028", sizes=(1, 2, 3, 4), big=1 << 90, small=-(1 << 40), ratio=-0.0),
        "best": np.float64(0.25),
        "history": np.arange(4.0),
        "own": Settings(0.5),
        "inner": Settings.Inner,
        "sets": {1, 2},
        "octets": b"\x00\xff",
        "loop": Settings(1.0),
    }


def agree(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool((a == b).all())
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(agree(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(agree, a, b))
    if isinstance(a, (Settings, argparse.Namespace)):
        return type(a) is type(b) and agree(vars(a), {**vars(b)})
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("legacy", [False, True])
def test_all_else_is_written_as_it_stood(protocol: int, legacy: bool, tmp_path: Path) -> None:
    if legacy and protocol > 2:
        pytest.skip("torch wrote these with protocol 2")
    content = trained()
    path, target = tmp_path / "c.ckpt", tmp_path / "d.ckpt"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    weights = open_weights(path)
    assert "Settings" in weights.notes[-1]
    new = torch.full((4, 3), 7.0, dtype=torch.float64)
    weights.write(target, becoming({weights.names["0.weight"]: new}))
    before, after = (torch.load(each, weights_only=False) for each in (path, target))
    assert torch.equal(after["state_dict"].pop("0.weight"), new.float())
    before["state_dict"].pop("0.weight")
    assert before["state_dict"]._metadata == after["state_dict"]._metadata
    assert agree(before, after)
    assert zipfile.is_zipfile(target) == (not legacy)


def test_what_does_not_change_is_a_copy(tmp_path: Path) -> None:
    torch.save(trained(), tmp_path / "c.pt")
    open_weights(tmp_path / "c.pt").write(tmp_path / "d.pt", {})
    assert (tmp_path / "c.pt").read_bytes() == (tmp_path / "d.pt").read_bytes()


def test_storages_that_others_need_stay(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    content = {
        "q": whole[:4],
        "k": whole[4:8].view(2, 2).t(),
        "v": whole[8:],
        "n": nn.Parameter(torch.ones(2)),
        "half": whole.half(),
    }
    torch.save(content, tmp_path / "c.pt")
    new = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    open_weights(tmp_path / "c.pt").write(tmp_path / "d.pt", becoming({"k": new, "n": torch.tensor([5.0, 6.0])}), ["half"])
    held = torch.load(tmp_path / "d.pt", weights_only=True)
    assert list(held) == ["q", "k", "v", "n"]
    assert torch.equal(held["k"], new)
    assert held["q"].data_ptr() + 32 == held["v"].data_ptr()
    assert isinstance(held["n"], nn.Parameter)
    assert held["n"].tolist() == [5.0, 6.0]
    with zipfile.ZipFile(tmp_path / "d.pt") as archive:
        assert sum("/data/" in name for name in archive.namelist()) == 3  # q and v, k, n; not half's


def test_an_average_is_not_touched(tmp_path: Path) -> None:
    weights = {"w": torch.ones(3), "b": torch.zeros(3)}
    torch.save({"state_dict": weights, "state_dict_ema": dict(weights)}, tmp_path / "c.pt")  # in the same memory
    opened = open_weights(tmp_path / "c.pt")
    assert "state_dict_ema" in opened.notes[1]
    opened.write(tmp_path / "d.pt", becoming({"w": torch.full((3,), 9.0)}))
    held = torch.load(tmp_path / "d.pt", weights_only=True)
    assert held["state_dict"]["w"].tolist() == [9, 9, 9]
    assert held["state_dict_ema"]["w"].tolist() == [1, 1, 1]


def test_pairs_in_arguments_are_entries(tmp_path: Path) -> None:
    """As Python 2 wrote an OrderedDict."""

    class Old(OrderedDict):  # type: ignore[type-arg]
        def __reduce__(self) -> Any:
            return OrderedDict, ([[key, value] for key, value in self.items()],)

    torch.save({"state_dict": Old(w=torch.ones(2), b=torch.zeros(1))}, tmp_path / "c.pt")
    open_weights(tmp_path / "c.pt").write(tmp_path / "d.pt", becoming({"w": torch.full((2,), 4.0)}))
    assert torch.load(tmp_path / "d.pt", weights_only=True)["state_dict"]["w"].tolist() == [4, 4]


def test_what_is_not_dense_is_not_changed(tmp_path: Path) -> None:
    torch.save({"s": torch.eye(3).to_sparse(), "w": torch.ones(2)}, tmp_path / "c.pt")
    weights = open_weights(tmp_path / "c.pt")
    weights.write(tmp_path / "d.pt", becoming({"w": torch.zeros(2)}))
    assert torch.equal(torch.load(tmp_path / "d.pt", weights_only=True)["s"].to_dense(), torch.eye(3))
    with pytest.raises(LoadError, match="sparse"):
        weights.write(tmp_path / "e.pt", becoming({"s": torch.eye(3)}))


def test_weights_that_are_more_than_tensors_are_refused_by_name(tmp_path: Path) -> None:
    class Act:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Settings(1.0), 0, (1,), (1,), False, OrderedDict())

    torch.save({"state_dict": {"w": torch.ones(2), "x": Act()}}, tmp_path / "c.pt")
    with pytest.raises(LoadError, match="Settings"):
        open_weights(tmp_path / "c.pt")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(value=PLAIN)
def test_a_picture_of_data_is_that_data(value: Any) -> None:
    data = pickled(value, 5)
    pickletools.dis(data, out=open("/dev/null", "w"))  # noqa: SIM115
    again = picture(data)
    assert again == value
    assert repr(again) == repr(value)  # True is no 1
    assert pickled(again, 5) == data or value != value


@pytest.mark.parametrize("stored", [("os\nsystem", "x"), ("os", "a\nb"), ("", "x")])
def test_a_name_does_not_end_its_line(stored: tuple[str, str]) -> None:
    with pytest.raises(Unreadable):
        pickled([Name("os.x", stored)])
