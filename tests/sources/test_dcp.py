"""Checkpoints of torch.distributed.checkpoint: the same folder with other numbers; what is hostile or damaged is refused."""

from __future__ import annotations

import errno
import io
import itertools
import os
import pickle
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

import normfuse
from normfuse.cli import main
from normfuse.errors import LoadError
from normfuse.sources import dcp_folder, dcp_metadata
from normfuse.sources.atomic import new_folder
from normfuse.sources.dcp_metadata import Item, Piece
from normfuse.sources.file_making import FileInTheMaking
from normfuse.sources.mapped import is_mapped
from normfuse.sources.safetensors_file import bytes_of
from normfuse.sources.tensor_files import open_weights
from tests.fuzz.files import mutated_bytes, mutated_pickle
from tests.kills import killed_at_every_step
from tests.small_net import BLOCK
from tests.sources.changing import becoming
from tests.sources.dcp_ranks import save_by_ranks
from tests.zoo.spread import spread

dcp: Any = torch.distributed.checkpoint
transformers: Any = pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("dcp")]

CODE = f"""{BLOCK}
class Net(nn.Module):
    example_input_array = torch.ones(2, 3, 6)

    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Linear(6, 6), nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.embed(x))))
"""
SPEC = "float32[2,3,6]"


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("code") / "net.py"
    path.write_text(CODE)
    return f"{path}:Net"


def made() -> nn.Module:
    names: dict[str, Any] = {}
    exec(CODE, names)
    return spread(names["Net"]()).eval()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks, and beside it the weights in one file; no test writes there."""
    place = tmp_path_factory.mktemp("ranks")
    torch.save(made().state_dict(), place / "weights.pt")
    save_by_ranks(place / "weights.pt", place / "c")
    return place / "c"


def saved(content: dict[str, Any], folder: Path) -> Path:
    dcp.save(content, checkpoint_id=folder, no_dist=True)
    return folder


def loaded(folder: Path, within: str = "") -> dict[str, Any]:
    """All tensors below a key, as torch itself reads them."""
    about = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {key: torch.empty(each.size, dtype=each.properties.dtype) for key, each in about.items() if hasattr(each, "size")}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return {key.removeprefix(within): each for key, each in state.items() if key.startswith(within)}


def asked(*words: Any) -> Any:
    return CliRunner().invoke(main, [str(word) for word in words])


# -- what comes back ---------------------------------------------------------------------------------------------------


def test_pieces_of_two_ranks_come_back_as_pieces_of_two_ranks(two_ranks: Path, code: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    answer = asked("rewrite", two_ranks, "--model", code, "--input", SPEC, "--pass", "fold_affine", "-o", out)
    assert answer.exit_code == 0, answer.output
    assert "the weights are model of c, which holds " in answer.output
    assert {each.name for each in out.iterdir()} == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert (out / ".metadata").read_bytes() == (two_ranks / ".metadata").read_bytes()

    before, after = loaded(two_ranks), loaded(out)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert {"model.norm.weight", "model.blocks.0.up.weight", "model.head.bias"} <= changed
    assert all(key.startswith("model.") and "down" not in key for key in changed)
    old, new = made(), made()
    old.load_state_dict(loaded(two_ranks, "model."))
    new.load_state_dict(loaded(out, "model."))
    x = torch.randn(4, 3, 6)
    torch.testing.assert_close(new(x), old(x))

    same = asked("verify", two_ranks, out, "--model", code, "--input", SPEC)
    assert same.exit_code == 0, same.output
    shown = asked("inspect", out, "--model", code, "--input", SPEC)
    assert shown.exit_code == 0, shown.output
    assert "layer_norm" in shown.output


def test_it_is_the_same_as_of_one_file(two_ranks: Path, code: str, tmp_path: Path) -> None:
    held = torch.load(two_ranks.with_name("weights.pt"), weights_only=True)
    read = open_weights(two_ranks).tensors()
    assert held.keys() == read.keys()
    assert all(torch.equal(held[key], read[key]) for key in held)
    for source, target in ((two_ranks, "c"), (two_ranks.with_name("weights.pt"), "w.pt")):
        normfuse.rewrite(
            normfuse.open(source, architecture=code), "pre_rmsnorm", torch.randn(2, 3, 6)
        ).save(tmp_path / target)  # fmt: skip
    new = torch.load(tmp_path / "w.pt", weights_only=True)
    of_ranks = loaded(tmp_path / "c", "model.")
    assert all(torch.equal(new[key], of_ranks[key]) for key in new)


def test_everything_is_as_torch_reads_it(two_ranks: Path) -> None:
    part: Any = open_weights(two_ranks).parts[0]
    read = {key: part._tensor(each) for key, each in part.metadata.tensors.items()}
    wanted = loaded(two_ranks)
    assert wanted["small.one"].tolist() == [3]
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[key], wanted[key]) for key in wanted)


def test_tensors_of_every_kind(tmp_path: Path) -> None:
    kinds = (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64,
        torch.float8_e4m3fn, torch.uint16,
    )  # fmt: skip
    content = {str(kind): torch.arange(6).view(2, 3).to(kind) for kind in kinds}
    content |= {
        "number": torch.tensor(2.5), "empty": torch.empty(0, 4), "turned": torch.randn(3, 4).t(),
        "part": torch.randn(9)[2:5], "trained": nn.Parameter(torch.randn(2)),
    }  # fmt: skip
    saved(content, tmp_path / "c")
    read = open_weights(tmp_path / "c").tensors()
    for key, value in content.items():
        assert read[key].dtype == value.dtype
        assert read[key].shape == value.shape
        assert bytes(bytes_of(read[key])) == bytes(bytes_of(value))
    (tmp_path / "d").mkdir()
    new = {"torch.bfloat16": torch.full((2, 3), 7.0), "turned": torch.ones(4, 3), "number": torch.tensor(1.0)}
    open_weights(tmp_path / "c").write(tmp_path / "d", becoming(new), ["part", "empty"])
    after = loaded(tmp_path / "d")
    assert after.keys() == content.keys() - {"part", "empty"}
    for key, value in after.items():
        assert value.dtype == content[key].dtype
        assert bytes(bytes_of(value)) == bytes(bytes_of(new.get(key, content[key]).to(value.dtype)))


def test_what_has_two_names_is_changed_under_both(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(
        CODE + "\ndef two():\n    net = Net()\n    net.again, net.gain = net.blocks[0], net.norm.weight\n    return net\n"
    )
    net = made()
    net.again, net.gain = net.blocks[0], net.norm.weight  # type: ignore[index, union-attr]
    saved({"app": {"model": net.state_dict(), "optim": {"lr": 1.0}}}, tmp_path / "c")
    out = tmp_path / "out"
    words = ("--model", f"{tmp_path / 'two.py'}:two", "--input", SPEC)
    answer = asked("rewrite", tmp_path / "c", *words, "--pass", "fold_affine", "-o", out)
    assert answer.exit_code == 0, answer.output
    after = loaded(out, "app.model.")
    for one, other in (("blocks.0.up.weight", "again.up.weight"), ("gain", "norm.weight")):
        assert torch.equal(after[one], after[other])
        assert not torch.equal(after[one], net.state_dict()[one])


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (lambda w: w, ""),
        (lambda w: {f"module.{key}": each for key, each in w.items()}, ""),
        (lambda w: {"model": {f"_orig_mod.{key}": each for key, each in w.items()}}, "model"),
        (lambda w: {"app": {"model": w, "optim": {"state": {"m": dict(w)}}}, "rng": torch.ones(2)}, "app.model"),
        (lambda w: {**w, "optimizer": {f"state.{key}.exp_avg": each for key, each in w.items()}, "step": 3}, ""),
        (lambda w: {"model_ema": {key: each + 1 for key, each in w.items()}, "state_dict": w}, "state_dict"),
        (lambda w: {"net_of_mine": w, "optimizer": {"params": dict(w)}}, "net_of_mine"),
    ],
)
def test_weights_are_found_where_trainings_keep_them(
    content: Callable[[Any], Any], found: str, code: str, tmp_path: Path
) -> None:
    weights = made().state_dict()
    saved(content(weights), tmp_path / "c")
    opened = normfuse.open(tmp_path / "c", architecture=code)
    assert isinstance(opened.model, nn.Module)
    assert all(torch.equal(each, weights[key]) for key, each in opened.model.state_dict().items())
    assert not found or f"the weights are {found} of c" in " ".join(opened.notes)


def test_a_tied_model_of_transformers(tmp_path: Path) -> None:
    """A checkpoint holds both names of a tied tensor; transformers has one of them."""
    config = transformers.GPT2Config(
        n_embd=12, n_layer=2, n_head=2, n_positions=16, vocab_size=20, architectures=["GPT2LMHeadModel"]
    )
    model = spread(transformers.GPT2LMHeadModel(config)).eval()
    config.save_pretrained(tmp_path / "config")
    saved({"app": {"model": model.state_dict(), "optim": {"lr": 0.1}}}, tmp_path / "c")
    out = tmp_path / "out"
    answer = asked(
        "rewrite", tmp_path / "c", "--model", f"transformers:{tmp_path / 'config'}", "--pass", "pre_rmsnorm", "-o", out
    )
    assert answer.exit_code == 0, answer.output
    after = loaded(out, "app.model.")
    assert after.keys() == model.state_dict().keys()
    x, before = torch.randint(20, (2, 7)), model.state_dict()
    assert not all(torch.equal(before[key], each) for key, each in after.items())
    wanted = model(x).logits
    model.load_state_dict(after)
    torch.testing.assert_close(model(x).logits, wanted)


def test_a_run_that_is_killed_is_gone_on_with(tmp_path: Path) -> None:
    source = saved({"a": torch.randn(3), "b": torch.randn(2), "c": torch.randn(4)}, tmp_path / "source")
    whole, out = tmp_path / "whole", tmp_path / "out"
    whole.mkdir()
    weights, changes = open_weights(source), becoming({"a": torch.ones(3)})
    weights.write(whole, changes, ["b"])

    def work() -> None:
        names = [each.name for each in weights.files]
        with new_folder(out, lambda new: weights.write(new, changes, ["b"]), goes_on_with=names):
            pass

    def is_whole() -> bool:
        return all((out / each.name).read_bytes() == each.read_bytes() for each in whole.iterdir())

    def check() -> None:
        assert not out.exists() or is_whole()
        shutil.rmtree(out, ignore_errors=True)
        work()
        assert is_whole()
        shutil.rmtree(out)
        assert {each.name for each in tmp_path.iterdir()} == {"source", "whole"}

    assert killed_at_every_step(work, prepare=lambda: None, check=check) > 10


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_pieces_cover_a_tensor_or_they_do_not(data: st.DataObject) -> None:
    size = data.draw(st.lists(st.integers(0, 4), max_size=3).map(tuple))
    boxes = data.draw(st.lists(st.tuples(*(st.tuples(st.integers(0, 4), st.integers(0, 4)) for _ in size)), max_size=5))
    if data.draw(st.booleans()):  # a grid of pieces, which cover it
        cuts = [sorted({0, each, *data.draw(st.lists(st.integers(0, each), max_size=2))}) for each in size]
        boxes = list(itertools.product(*([(a, b - a) for a, b in itertools.pairwise(each)] or [(0, 0)] for each in cuts)))
        boxes = data.draw(st.permutations(boxes))
    item = Item("f", 0, 0, {})
    pieces = [Piece(tuple(begin for begin, _ in box), tuple(length for _, length in box), item) for box in boxes]
    counts = torch.zeros(size, dtype=torch.int64)
    outside = False
    for box in boxes:
        outside |= any(begin + length > extent for (begin, length), extent in zip(box, size, strict=True))
        counts[tuple(slice(begin, begin + length) for begin, length in box)] += 1
    assert dcp_metadata.covers(size, pieces) == (not outside and bool((counts == 1).all()))


def test_two_models_are_not_guessed_between(code: str, tmp_path: Path) -> None:
    weights = made().state_dict()
    saved({"generator": {"model": weights}, "critic": {"model": dict(weights)}}, tmp_path / "c")
    with pytest.raises(LoadError, match=r"holds weights 2 times, as generator\.model, critic\.model"):
        normfuse.open(tmp_path / "c", architecture=code)


def test_what_is_large_is_put_together_on_the_disk(two_ranks: Path, code: str, tmp_path: Path, monkeypatch: Any) -> None:
    held = open_weights(two_ranks).tensors()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(dcp_folder, "IN_MEMORY", 0)
    read = open_weights(two_ranks).tensors()
    assert all(is_mapped(each) and torch.equal(each, held[key]) for key, each in read.items())
    assert not list(tmp_path.iterdir())
    words = ("--model", code, "--input", SPEC, "--pass", "fold_affine")
    assert asked("rewrite", two_ranks, *words, "-o", tmp_path / "a").exit_code == 0
    monkeypatch.setattr(dcp_folder, "IN_MEMORY", 1 << 30)
    assert asked("rewrite", two_ranks, *words, "-o", tmp_path / "b").exit_code == 0
    for each in (tmp_path / "a").iterdir():
        assert each.read_bytes() == (tmp_path / "b" / each.name).read_bytes()


def test_only_what_is_asked_for_is_read(two_ranks: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(two_ranks, tmp_path / "c")
    about = dcp.FileSystemReader(folder).read_metadata()
    for index, info in about.storage_data.items():  # everything else is no piece any more
        if index.fqn != "model.norm.weight":
            with (folder / info.relative_path).open("rb+") as file:
                file.seek(info.offset)
                file.write(b"\0" * info.length)
    weights = open_weights(folder)
    held = torch.load(two_ranks.with_name("weights.pt"), weights_only=True)
    assert torch.equal(weights.parts[0].tensors(["norm.weight"])["norm.weight"], held["norm.weight"])
    (tmp_path / "d").mkdir()
    weights.write(tmp_path / "d", becoming({"norm.weight": torch.ones(6)}))
    with pytest.raises(LoadError, match="did not write"):
        weights.tensors()


# -- what is hostile or damaged ----------------------------------------------------------------------------------------

Spoil = Callable[[Path], Any]


class Acts:
    """Its pickle makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def canary(folder: Path) -> Path:
    return folder.parent / "canary"


def told(change: Callable[[Any], Any]) -> Spoil:
    """Another metadata."""

    def spoil(folder: Path) -> None:
        about = pickle.loads((folder / ".metadata").read_bytes())
        about = change(about) or about
        (folder / ".metadata").write_bytes(pickle.dumps(about))

    return spoil


def first(about: Metadata) -> Any:
    """Where a piece of the first tensor of the model is."""
    return next(each for index, each in about.storage_data.items() if index.fqn == "model.embed.weight")


def place(**changes: Any) -> Spoil:
    def change(about: Metadata) -> None:
        vars(first(about)).update(changes)

    return told(change)


def tensor(change: Callable[[Any], Any]) -> Spoil:
    def changed(about: Metadata) -> None:
        change(about.state_dict_metadata["model.embed.weight"])

    return told(changed)


def grown(about: Any) -> None:
    about.size = torch.Size((10**6, 10**6))
    about.chunks = [ChunkStorageMetadata(torch.Size((0, 0)), about.size), *about.chunks[1:]]


def piece(content: Callable[[Path], Any], key: str = "model.embed.weight") -> Spoil:
    """Another content of a piece of a tensor, behind all others in its file."""

    def spoil(folder: Path) -> None:
        about = pickle.loads((folder / ".metadata").read_bytes())
        info = next(each for index, each in about.storage_data.items() if index.fqn == key)
        made: Any = content(folder)
        if not isinstance(made, bytes):
            stream = io.BytesIO()
            torch.save(made, stream)
            made = stream.getvalue()
        with (folder / info.relative_path).open("ab") as file:
            info.offset, info.length = file.tell(), len(made)
            file.write(made)
        (folder / ".metadata").write_bytes(pickle.dumps(about))

    return spoil


def cut(name: str, length: int) -> Spoil:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def linked_out(folder: Path) -> None:
    (folder / "__1_0.distcp").rename(folder.parent / "elsewhere")
    (folder / "__1_0.distcp").symlink_to(folder.parent / "elsewhere")


def a_pipe(folder: Path) -> None:
    (folder / "__1_0.distcp").unlink()
    os.mkfifo(folder / "__1_0.distcp")


def twice(about: Metadata) -> None:
    info = first(about)
    about.storage_data[MetadataIndex("model.norm.weight", torch.Size((0,)))] = info


HUGE = 10**12
WRONG: dict[str, tuple[Spoil, str]] = {
    "a metadata that calls": (lambda f: (f / ".metadata").write_bytes(pickle.dumps(Acts(canary(f)))), "wants posix.mkdir;"),
    "a call in a field": (lambda f: told(lambda m: setattr(m, "planner_data", Acts(canary(f))))(f), "posix.mkdir; refused"),
    "a call as an id": (lambda f: told(lambda m: setattr(m.storage_meta, "save_id", Acts(canary(f))))(f), "wants posix.mkdir"),
    "a class of nobody's": (told(lambda m: setattr(m, "version", io.BytesIO)), "wants _io.BytesIO; refused"),
    "a lookup": (told(lambda m: setattr(m, "version", getattr)), "wants builtins.getattr; refused"),
    "no metadata": (lambda f: (f / ".metadata").unlink(), "has no weights"),
    "nothing of the metadata": (cut(".metadata", 0), "pickle is damaged"),
    "a few bytes of the metadata": (cut(".metadata", 99), "pickle is damaged"),
    "half of the metadata": (cut(".metadata", 3000), "pickle is damaged"),
    "another metadata": (lambda f: (f / ".metadata").write_bytes(pickle.dumps({"a": 1})), "has no Metadata"),
    "a text": (lambda f: (f / ".metadata").write_text("text"), "cannot be read"),
    "a folder for metadata": (lambda f: [(f / ".metadata").unlink(), (f / ".metadata").mkdir()], "has no weights"),  # type: ignore[func-returns-value]
    "nothing in the metadata": (told(lambda m: Metadata({}, None, {})), "holds no weights, but nothing"),
    "no places": (told(lambda m: setattr(m, "storage_data", None)), "does not say what there is, or where"),
    "numbers for keys": (told(lambda m: m.state_dict_metadata.update({3: m.state_dict_metadata["plain"]})), "no text"),
    "a path of nothing": (told(lambda m: m.planner_data.update({"plain": ()})), "no text"),
    "two of a name": (told(lambda m: m.planner_data.update({"model.norm.weight": ("model", "norm.bias")})), "two tensors of"),
    "every rank for itself": (lambda f: (f / ".metadata").rename(f / "__0.metadata"), "saved by every rank for itself"),
    "a way up": (place(relative_path="../c/__0_0.distcp"), "no file beside it"),
    "a way from the root": (place(relative_path="/etc/passwd"), "no file beside it"),
    "a way from another root": (place(relative_path="C:\\x"), "no file beside it"),
    "the folder": (place(relative_path="."), "no file beside it"),
    "a name that acts on a terminal": (place(relative_path="\x1b[31m"), r"\x1b[31m"),
    "a number for a file": (place(relative_path=3), "does not say where"),
    "a file that is not there": (place(relative_path="__7_0.distcp"), "__7_0.distcp, which is not there"),
    "a place before the file": (place(offset=-1), "a place that is none"),
    "a place behind the file": (place(offset=HUGE), "is shorter than .metadata says"),
    "half a place": (place(offset=0.5), "does not say where"),
    "a huge length": (place(length=HUGE), "the same bytes that they are two"),
    "a length of nothing": (place(length=0), "is larger than what is stored of it"),
    "a length too short": (place(length=300), "cannot be read"),
    "bytes of another tensor": (told(twice), "the same bytes that they are two"),
    "an extension": (place(transform_descriptors=["stream.zstd"]), "was written through an extension"),
    "another dtype": (tensor(lambda t: setattr(t.properties, "dtype", torch.float16)), "another size or dtype"),
    "no dtype": (tensor(lambda t: setattr(t.properties, "dtype", 3)), "without a dtype"),
    "another size": (tensor(lambda t: setattr(t, "size", torch.Size((6, 7)))), "not the whole of it"),
    "a size of many": (tensor(lambda t: setattr(t, "size", torch.Size((HUGE, HUGE)))), "not the whole of it"),
    "a piece of many": (tensor(grown), "is larger than what is stored of it"),
    "a number for a size": (tensor(lambda t: setattr(t, "size", 3)), "a size that is none"),
    "a size of texts": (tensor(lambda t: setattr(t, "size", ("a", "b"))), "a size that is none"),
    "no pieces": (tensor(lambda t: setattr(t, "chunks", [])), "not the whole of it"),
    "no list of pieces": (tensor(lambda t: setattr(t, "chunks", None)), "of what"),
    "a piece twice": (tensor(lambda t: setattr(t, "chunks", [t.chunks[0]] * 2)), "not the whole of it"),
    "a piece elsewhere": (tensor(lambda t: setattr(t.chunks[0], "offsets", torch.Size((1, 0)))), "where a piece"),
    "a piece in no room": (tensor(lambda t: setattr(t.chunks[0], "sizes", torch.Size((3,)))), "not the whole of it"),
    "a missing file": (lambda f: (f / "__1_0.distcp").unlink(), "which is not there"),
    "half of a file": (cut("__1_0.distcp", 5000), "is shorter than .metadata says"),
    "nothing of a file": (cut("__1_0.distcp", 0), "is shorter than .metadata says"),
    "a link out": (linked_out, "is a link out of its folder"),
    "a pipe": (a_pipe, "is not a regular file"),
    "a piece that calls": (piece(lambda f: Acts(canary(f))), "wants posix.mkdir; refused"),
    "a plain pickle": (piece(lambda f: pickle.dumps(Acts(canary(f)))), "that torch.save did not write"),
    "a piece of zeros": (piece(lambda f: b"\0" * 2000), "that torch.save did not write"),
    "a damaged archive": (piece(lambda f: b"PK\x03\x04" + b"\0" * 2000), "cannot be read"),
    "no tensor": (piece(lambda f: {"a": torch.ones(3, 6), "long": "x" * 999}), "no dense tensor"),
    "a sparse tensor": (piece(lambda f: torch.ones(3, 6).to_sparse()), "no dense tensor"),
    "a tensor of another size": (piece(lambda f: torch.ones(4, 6)), "another size or dtype"),
    "a tensor of another dtype": (piece(lambda f: torch.ones(3, 6).half()), "another size or dtype"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_line(name: str, two_ranks: Path, code: str, tmp_path: Path) -> None:
    spoil, said = WRONG[name]
    folder = shutil.copytree(two_ranks, tmp_path / "c")
    spoil(folder)
    before = {each.name: each.read_bytes() for each in folder.iterdir() if each.is_file()}
    answer = asked("rewrite", folder, "--model", code, "--input", SPEC, "--pass", "fold_affine", "-o", tmp_path / "out")
    assert answer.exit_code == 2, answer.output
    assert [line.partition(": ")[0] for line in answer.output.splitlines()] == ["error", "hint"], answer.output
    assert said in answer.output
    assert "bug" not in answer.output
    assert before == {each.name: each.read_bytes() for each in folder.iterdir() if each.is_file()}
    assert {each.name for each in tmp_path.iterdir()} <= {"c", "elsewhere"}


def test_a_full_disk_is_told_of(two_ranks: Path, code: str, tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FileInTheMaking, "copy", full)
    answer = asked("rewrite", two_ranks, "--model", code, "--input", SPEC, "--pass", "fold_affine", "-o", tmp_path / "out")
    assert answer.exit_code == 2
    assert f"error: cannot write {tmp_path / 'out'}: No space left on device\nhint: nothing was changed" in answer.output
    assert not list(tmp_path.iterdir())


def test_what_is_no_tensor_is_not_unpickled_and_goes_along(two_ranks: Path, code: str, tmp_path: Path) -> None:
    folder = shutil.copytree(two_ranks, tmp_path / "c")
    piece(lambda f: Acts(canary(f)), "step")(folder)
    answer = asked("rewrite", folder, "--model", code, "--input", SPEC, "--pass", "fold_affine", "-o", tmp_path / "out")
    assert answer.exit_code == 0, answer.output
    assert not canary(folder).exists()

    def content(place: Path) -> bytes:
        info = dcp.FileSystemReader(place).read_metadata().storage_data[MetadataIndex("step")]
        return (place / info.relative_path).read_bytes()[info.offset : info.offset + info.length]

    assert content(folder) == content(tmp_path / "out")


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_what_is_damaged_is_refused_or_read_and_written(name: str, two_ranks: Path, tmp_path: Path) -> None:
    folder, rng = shutil.copytree(two_ranks, tmp_path / "c"), random.Random(0)
    good = (folder / name).read_bytes()
    damage = [mutated_pickle] * 3 + [mutated_bytes] if name == ".metadata" else [mutated_bytes]
    outcomes = Counter[bool]()
    for _ in range(int(os.environ.get("DAMAGED", "40"))):
        (folder / name).write_bytes(rng.choice(damage)(rng, good))
        out = tmp_path / "out"
        out.mkdir()
        try:
            weights = open_weights(folder)
            assert all(type(each) is Tensor for each in weights.tensors().values())
            key = next(iter(weights.names))
            value = torch.ones_like(weights.tensor(key))
            weights.write(out, becoming({key: value}))
            assert torch.equal(open_weights(out).tensor(key), value)
            outcomes[True] += 1
        except LoadError:
            outcomes[False] += 1
        shutil.rmtree(out)
    assert outcomes[False] > 5


def test_a_part_is_no_whole(two_ranks: Path, code: str) -> None:
    for name in (".metadata", "__0_0.distcp"):
        answer = asked("inspect", two_ranks / name, "--model", code)
        assert "is a part of a checkpoint" in answer.output
    assert "weights without a model" in asked("inspect", two_ranks).output
