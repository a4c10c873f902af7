"""Weights in files: read as they lie, written back with nothing but what changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from normfuse.errors import LoadError
from normfuse.sources.safetensors_file import opened_safetensors
from normfuse.sources.tensor_files import open_weights
from tests.sources.changing import becoming

DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool,
)  # fmt: skip


@st.composite
def tensors(draw: Any) -> dict[str, Tensor]:
    names = draw(st.lists(st.text("abw.é_", min_size=1, max_size=6), min_size=1, max_size=6, unique=True))
    held = {}
    for name in names:
        dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 3), max_size=3))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        held[name] = (4 * torch.randn(shape, generator=generator)).to(dtype)
    return held


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b)


def bytes_of(value: Tensor) -> bytes:
    return bytes(value.contiguous().reshape(-1).view(torch.uint8).numpy()) if value.numel() else b""


def sharded(folder: Path, parts: list[dict[str, Tensor]]) -> None:
    names = [f"model-{place:05}-of-{len(parts):05}.safetensors" for place in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name, {"format": "pt"})
    places = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    size = sum(value.nbytes for part in parts for value in part.values())
    index = {"metadata": {"total_size": size, "kept": "as it is"}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(held=tensors(), data=st.data())
def test_only_what_changed_differs(held: dict[str, Tensor], data: Any, tmp_path_factory: Any) -> None:
    folder, target = tmp_path_factory.mktemp("from"), tmp_path_factory.mktemp("to")
    names = list(held)
    cut = data.draw(st.integers(0, len(names) - 1))
    parts = [part for part in ({k: held[k] for k in names[:cut]}, {k: held[k] for k in names[cut:]}) if part]
    sharded(folder, parts)
    weights = open_weights(folder)
    assert all(same(value, held[name]) for name, value in weights.tensors().items())
    assert weights.tensors().keys() == held.keys()

    chosen = data.draw(st.lists(st.sampled_from(names), unique=True))
    wanted = {name: torch.full(held[name].shape, 1.0, dtype=torch.float64) for name in chosen}
    dropped = [name for name in names if name not in chosen and data.draw(st.booleans())] if cut else []
    weights.write(target, becoming(wanted), dropped)

    again = open_weights(target)
    assert again.tensors().keys() == held.keys() - set(dropped)
    for name, value in again.tensors().items():
        assert same(value, torch.ones_like(held[name]) if name in wanted else held[name])
    for path in weights.files:
        if not dropped:
            before, after = path.read_bytes(), (target / path.name).read_bytes()
            assert len(before) == len(after)
            touched = path.suffix == ".safetensors" and set(opened_safetensors(path).keys) & set(wanted)
            assert before == after or touched
    table = json.loads((target / "model.safetensors.index.json").read_text())
    assert table["metadata"] == {"total_size": sum(again.tensors()[name].nbytes for name in again.names), "kept": "as it is"}


def test_every_dtype_that_is_stored(tmp_path: Path) -> None:
    kinds = (
        "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "bfloat16", "float32",
        "float64", "complex64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
    )  # fmt: skip
    held = {kind: torch.arange(24, dtype=torch.uint8).view(3, 8).view(getattr(torch, kind)) for kind in kinds[1:]}
    held["bool"] = torch.tensor([True, False, True])
    for kind, tensor in list(held.items()):
        try:
            save_file({kind: tensor}, tmp_path / f"{kind}.safetensors")
        except (KeyError, SafetensorError):  # a dtype that the installed library does not write
            del held[kind]
    assert len(held) > 12
    for kind, tensor in held.items():
        found = open_weights(tmp_path / f"{kind}.safetensors").tensors()
        assert same(found[kind], tensor), kind


def test_a_file_larger_than_the_memory_opens(tmp_path: Path) -> None:
    path, entries = tmp_path / "large.safetensors", 1 << 35
    place = {"dtype": "F32", "shape": [entries // 4], "data_offsets": [0, entries]}
    small = {"dtype": "F32", "shape": [2], "data_offsets": [entries, entries + 8]}
    text = json.dumps({"large": place, "small": small}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + entries)
        file.seek(0, 2)
        file.write(torch.tensor([1.5, -2.0]).numpy().tobytes())
    held = [open_weights(path).tensors() for _ in range(3)]  # the original, what was written, what is compared with
    assert held[0]["small"].tolist() == [1.5, -2.0]
    assert held[2]["large"].shape == (entries // 4,)
    held[1]["large"][-1] = 7
    assert float(held[0]["large"][-1]) == 0
    assert float(open_weights(path).tensors()["large"][-1]) == 0


def test_a_header_stays_byte_for_byte(tmp_path: Path) -> None:
    save_file({"b": torch.ones(3), "a": torch.zeros(2, 2)}, tmp_path / "m.safetensors", {"who": "me"})
    before = (tmp_path / "m.safetensors").read_bytes()
    open_weights(tmp_path / "m.safetensors").write(tmp_path / "n.safetensors", becoming({"a": torch.full((2, 2), 5.0)}))
    after = (tmp_path / "n.safetensors").read_bytes()
    start = opened_safetensors(tmp_path / "m.safetensors").start
    assert before[:start] == after[:start]
    assert sum(x != y for x, y in zip(before, after, strict=True)) <= 16


CHECKPOINTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "state dict": (lambda w: w, ""),
    "lightning": (lambda w: {"epoch": 3, "state_dict": {f"model.{k}": v for k, v in w.items()}, "callbacks": {}}, "model."),
    "data parallel": (lambda w: {f"module.{k}": v for k, v in w.items()}, "module."),
    "compiled": (lambda w: {"model": {f"_orig_mod.{k}": v for k, v in w.items()}, "optimizer": {"state": {}}}, "_orig_mod."),
    "both": (lambda w: {"net": {f"module._orig_mod.{k}": v for k, v in w.items()}}, "module._orig_mod."),
    "average beside": (lambda w: {"ema": {k: v + 1 for k, v in w.items()}, "model": w, "step": 7}, ""),
    "average alone": (
        lambda w: {"model_ema": {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in w.items()}}},
        "module.",
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_in_and_out(name: str, tmp_path: Path) -> None:
    wrap, undone = CHECKPOINTS[name]
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    path = tmp_path / "c.pt"
    torch.save(wrap(dict(model.state_dict())), path)
    weights = open_weights(path).fitted(list(model.state_dict()))
    model.load_state_dict(weights.tensors(), strict=True)
    assert any(undone in note for note in weights.notes) or not undone
    weights.write(tmp_path / "d.pt", becoming({weights.names["0.weight"]: torch.full((4, 3), 2.0, dtype=torch.float64)}))
    again = open_weights(tmp_path / "d.pt").fitted(list(model.state_dict()))
    assert torch.equal(again.tensors()["0.weight"], torch.full((4, 3), 2.0))
    assert all(torch.equal(again.tensors()[key], value) for key, value in model.state_dict().items() if key != "0.weight")
    before, after = (torch.load(tmp_path / each, weights_only=True) for each in ("c.pt", "d.pt"))
    assert before.keys() == after.keys()
    for key in before.keys() - {"state_dict", "model", "net", "model_ema"}:
        assert isinstance(before[key], (dict, Tensor)) or before[key] == after[key]


def test_what_is_one_tensor_stays_one(tmp_path: Path) -> None:
    table = torch.randn(4, 3)
    for legacy in (False, True):
        torch.save({"embed": table, "head": table}, tmp_path / "c.bin", _use_new_zipfile_serialization=not legacy)
        new = torch.ones(4, 3)
        open_weights(tmp_path / "c.bin").write(tmp_path / "d.bin", becoming({"embed": new, "head": new}))
        held = torch.load(tmp_path / "d.bin", weights_only=True)
        assert held["embed"].data_ptr() == held["head"].data_ptr()
        open_weights(tmp_path / "c.bin").write(tmp_path / "d.bin", becoming({"embed": new, "head": 2 * new}))
        held = torch.load(tmp_path / "d.bin", weights_only=True)
        assert torch.equal(held["head"], 2 * held["embed"])
        assert (tmp_path / "d.bin").read_bytes()[:2] == (tmp_path / "c.bin").read_bytes()[:2]


def test_a_layout_with_pickled_shards(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-1.bin")
    torch.save({"b": torch.zeros(2)}, tmp_path / "pytorch_model-2.bin")
    index = {"weight_map": {"b": "pytorch_model-2.bin", "a": "pytorch_model-1.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "out").mkdir()
    open_weights(tmp_path).write(tmp_path / "out", becoming({"a": torch.full((2,), 3.0)}))
    assert torch.equal(open_weights(tmp_path / "out").tensors()["a"], torch.full((2,), 3.0))
    assert (tmp_path / "out" / "pytorch_model-2.bin").exists()


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    weights = open_weights(tmp_path)
    assert torch.equal(weights.tensors()["a"], torch.ones(2))
    assert "pytorch_model.bin" in weights.notes[0]


class Acts:
    def __reduce__(self) -> Any:
        return print, ("acted",)


def header(text: bytes, behind: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + behind


def index_of(**places: str) -> str:
    return json.dumps({"weight_map": places})


WRONG: dict[str, tuple[dict[str, bytes | str], str]] = {
    "empty": ({"model.safetensors": b""}, "is empty"),
    "cut short": ({"model.safetensors": b"good:-4"}, "damaged"),
    "longer": ({"model.safetensors": b"good:+4"}, "damaged"),
    "huge header": ({"model.safetensors": (1 << 40).to_bytes(8, "little") + b'{"a"'}, "HEADER_BYTES"),
    "header beyond the file": ({"model.safetensors": (1 << 20).to_bytes(8, "little") + b"{}"}, "damaged"),
    "header is no JSON": ({"model.safetensors": header(b"{oops}")}, "damaged"),
    "two of a name": (
        {"model.safetensors": header(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"
        )},
        "two entries",
    ),
    "overlap": (
        {"model.safetensors": header(
            b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', b"xx"
        )},
        "damaged",
    ),
    "out of range": (
        {"model.safetensors": header(b'{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}', b"xx")}, "damaged",
    ),
    "unknown dtype": (
        {"model.safetensors": header(b'{"a":{"dtype":"Q7","shape":[2],"data_offsets":[0,2]}}', b"xx")}, "damaged",
    ),
    "no weights": ({"config.json": "{}"}, "has no weights"),
    "several and no index": ({"a.safetensors": b"good", "b.safetensors": b"good"}, "no index"),
    "index is no JSON": ({"model.safetensors.index.json": "{"}, "no index of weights"),
    "index is a list": ({"model.safetensors.index.json": "[]"}, "no index of weights"),
    "no weight_map": ({"model.safetensors.index.json": "{}"}, "no index of weights"),
    "two places": (
        {"model.safetensors.index.json": '{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}'}, "two entries",
    ),
    "up": ({"model.safetensors.index.json": index_of(w="../a.safetensors")}, "no file beside it"),
    "absolute": ({"model.safetensors.index.json": index_of(w="/etc/passwd")}, "no file beside it"),
    "null": ({"model.safetensors.index.json": index_of(w="a\0b")}, "no file beside it"),
    "missing shard": ({"model.safetensors.index.json": index_of(w="a.safetensors")}, "not there"),
    "missing key": (
        {"model.safetensors.index.json": index_of(w="a.safetensors", v="a.safetensors"), "a.safetensors": b"good"},
        "does not",
    ),
    "unnamed key": (
        {"model.safetensors.index.json": index_of(v="b.safetensors", w="a.safetensors"),
         "a.safetensors": b"good", "b.safetensors": b"good"},
        "same tensors",
    ),
    "pickle that acts": ({"pytorch_model.bin": b"acts"}, "holds no weights"),
    "not of torch": ({"pytorch_model.bin": b"\x93NUMPY rest"}, "NumPy"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_a_line(name: str, tmp_path: Path) -> None:
    files, said = WRONG[name]
    save_file({"w": torch.ones(4)}, tmp_path / "good")
    good = (tmp_path / "good").read_bytes()
    (tmp_path / "good").unlink()
    for path, content in files.items():
        if content == b"acts":
            torch.save({"w": Acts()}, tmp_path / path)
        elif isinstance(content, bytes) and content.startswith(b"good"):
            cut = int(content[5:] or b"0")
            (tmp_path / path).write_bytes(good[:cut] if cut < 0 else good + b"x" * cut)
        else:
            (tmp_path / path).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(LoadError) as caught:
        open_weights(tmp_path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_links_stay_in_their_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "private"
    for each in (inside, outside, tmp_path / "hub" / "blobs"):
        each.mkdir(parents=True)
    for each in (outside / "a.safetensors", tmp_path / "hub" / "blobs" / "0123"):
        save_file({"w": torch.ones(2)}, each)
    (inside / "model.safetensors").symlink_to("../../blobs/0123")
    assert open_weights(inside).tensors()["w"].tolist() == [1, 1]
    (inside / "model.safetensors").unlink()
    (inside / "model.safetensors").symlink_to(outside / "a.safetensors")
    with pytest.raises(LoadError, match="link out of"):
        open_weights(inside)
    (inside / "model.safetensors").rename(inside / "a.safetensors")
    (inside / "model.safetensors.index.json").write_text(index_of(w="a.safetensors"))
    with pytest.raises(LoadError, match="link out of"):
        open_weights(inside)


FITS: dict[str, tuple[list[str], dict[str, str]]] = {
    "as they are": (["a.w", "b.w"], {"a.w": "a.w", "b.w": "b.w"}),
    "parts compiled": (["a._orig_mod.w", "b.w"], {"a.w": "a._orig_mod.w", "b.w": "b.w"}),
    "any attribute of a training": (
        ["backbone.a.w", "backbone.b.w", "loss.w"], {"a.w": "backbone.a.w", "b.w": "backbone.b.w", "loss.w": "loss.w"},
    ),
    "with an average": (
        ["ema.a.w", "ema.b.w", "net.a.w", "net.b.w"],
        {"a.w": "net.a.w", "b.w": "net.b.w", "ema.a.w": "ema.a.w", "ema.b.w": "ema.b.w"},
    ),
    "fsdp": (
        ["_fsdp_wrapped_module.a._checkpoint_wrapped_module.w", "_fsdp_wrapped_module.b.w"],
        {"a.w": "_fsdp_wrapped_module.a._checkpoint_wrapped_module.w", "b.w": "_fsdp_wrapped_module.b.w"},
    ),
    "other weights": (["c.x", "d.x"], {"c.x": "c.x", "d.x": "d.x"}),
}  # fmt: skip


@pytest.mark.parametrize("name", FITS)
def test_what_is_around_a_model_is_undone(name: str, tmp_path: Path) -> None:
    stored, names = FITS[name]
    save_file({key: torch.ones(1) for key in stored}, tmp_path / "m.safetensors")
    assert dict(open_weights(tmp_path / "m.safetensors").fitted(["a.w", "b.w"]).names) == names


@pytest.mark.parametrize("stored", [["x.a.w", "y.a.w"], ["a.w", "m.a.w", "m.b.w"]])
def test_a_model_that_is_there_twice_is_no_model(stored: list[str], tmp_path: Path) -> None:
    save_file({key: torch.ones(1) for key in stored}, tmp_path / "m.safetensors")
    with pytest.raises(LoadError):
        open_weights(tmp_path / "m.safetensors").fitted(["a.w", "b.w"])
