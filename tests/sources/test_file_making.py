"""Files in the making: what is put is there, what was there and is right stays, and a run that was killed is gone on with."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from normfuse import limits
from normfuse.errors import InputError
from normfuse.sources import file_making
from normfuse.sources.atomic import Unfinished, check_new_folder, helping, new_folder, write_atomically
from normfuse.sources.file_making import FileInTheMaking, check_room
from normfuse.sources.tensor_files import open_weights
from tests.kills import killed_at_every_step
from tests.sources.changing import becoming


def filled(path: Path, source: Path, content: bytes, cuts: list[int], memory: list[bool]) -> None:
    """Put `content` together of memory and of another file."""
    with source.open("rb") as file, FileInTheMaking(path, len(content)) as made:
        for place, (start, end) in enumerate(itertools.pairwise([0, *sorted(cuts), len(content)])):
            if memory[place % len(memory)]:
                made.put(start, memoryview(content[start:end]))
            else:
                made.copy(file.fileno(), start, start, end - start)


@given(
    content=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300), max_size=6), memory=st.lists(st.booleans(), min_size=1),
    before=st.none() | st.binary(max_size=400), piece=st.integers(1, 50), waiting=st.integers(0, 100),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_what_is_put_is_there(
    content: bytes, cuts: list[int], memory: list[bool], before: bytes | None, piece: int, waiting: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("making")
    (folder / "source").write_bytes(content)
    if before is not None:
        (folder / "made").write_bytes(before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_making, "_PIECE", piece)
        patch.setattr(limits, "WAITING_BYTES", waiting)
        filled(folder / "made", folder / "source", content, [min(cut, len(content)) for cut in cuts], memory)
    assert (folder / "made").read_bytes() == content


def test_what_is_right_already_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(1000)
    (tmp_path / "source").write_bytes(content)
    (tmp_path / "made").write_bytes(content[:300] + b"?" + content[301:800])
    written: list[int] = []
    write, copy = os.pwrite, os.copy_file_range

    def writes(file: int, data: memoryview, at: int) -> int:
        written.append(at)
        return write(file, data, at)

    def copies(source: int, file: int, size: int, begin: int, at: int) -> int:
        written.append(at)
        return copy(source, file, size, begin, at)

    monkeypatch.setattr(file_making, "_PIECE", 100)
    monkeypatch.setattr(os, "pwrite", writes)
    monkeypatch.setattr(os, "copy_file_range", copies)
    filled(tmp_path / "made", tmp_path / "source", content, [400], [True, False])
    assert (tmp_path / "made").read_bytes() == content
    assert sorted(written) == [300, 800, 900]


@pytest.mark.parametrize("kind", ["link", "hard link", "folder link"])
def test_nothing_is_written_through_a_link(kind: str, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"precious")
    (tmp_path / "inside").mkdir()
    if kind == "link":
        (tmp_path / "made").symlink_to("other")
    elif kind == "hard link":
        os.link(tmp_path / "other", tmp_path / "made")
    else:
        (tmp_path / "made").symlink_to("inside")
    with FileInTheMaking(tmp_path / "made", 3) as made:
        made.put(0, memoryview(b"new"))
    assert (tmp_path / "other").read_bytes() == b"precious"
    assert (tmp_path / "made").read_bytes() == b"new"


def test_the_kernel_may_not_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> int:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    content = os.urandom(500)
    (tmp_path / "source").write_bytes(content)
    filled(tmp_path / "made", tmp_path / "source", content, [], [False])
    assert (tmp_path / "made").read_bytes() == content


def test_a_source_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"abc")
    file = (tmp_path / "source").open("rb")
    with pytest.raises(OSError, match="shorter"), file, FileInTheMaking(tmp_path / "made", 9) as made:
        made.copy(file.fileno(), 0, 0, 9)


def test_an_error_of_the_disk_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="full"), FileInTheMaking(tmp_path / "made", 3) as made:
        made.put(0, memoryview(b"new"))


def test_a_disk_without_room_is_told_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    made = new_folder(tmp_path / "out", lambda folder: open_weights(tmp_path).write(folder, {}))
    with pytest.raises(InputError, match="No space left"), made:
        pass
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model.safetensors"]
    check_room(tmp_path, 0)


def folder_of(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.iterdir()}


def writing(source: Path, target: Path, value: float) -> Callable[[], None]:
    def write(folder: Path) -> None:
        weights = open_weights(source)
        weights.write(folder, becoming({name: torch.full((40,), value) for name in ("a", "c")}))

    def work() -> None:
        names = [each.name for each in open_weights(source).files]
        with new_folder(target, write, goes_on_with=names):
            pass

    return work


@pytest.mark.parametrize("again", [5.0, 6.0])
def test_a_run_that_was_killed_at_any_step_is_gone_on_with(again: float, tmp_path: Path) -> None:
    """The next run, of the same plan or another, gives what it gives where nothing was killed; the old folder stays whole."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name, keys in (("1", "ab"), ("2", "cd")):
        save_file({key: torch.randn(40) for key in keys}, source / f"model-{name}.safetensors")
    places = {key: f"model-{name}.safetensors" for name, keys in (("1", "ab"), ("2", "cd")) for key in keys}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    before = folder_of(source)
    writing(source, tmp_path / "expected", again)()
    expected = folder_of(tmp_path / "expected")
    resumed = 0

    def prepare() -> None:
        shutil.rmtree(target, ignore_errors=True)

    def check() -> None:
        nonlocal resumed
        assert folder_of(source) == before
        if target.exists():
            shutil.rmtree(target)
        left = list(tmp_path.glob(".normfuse-*/new/target/model-1.safetensors"))
        for each in left:
            (each.parent / "stranger.bin").write_bytes(b"?")  # of a run with other files
        resumed += bool(left)
        writing(source, target, again)()
        assert folder_of(target) == expected
        assert not list(tmp_path.glob(".normfuse-*"))

    assert killed_at_every_step(writing(source, target, 5.0), prepare=prepare, check=check) > 10
    assert resumed > 3
    assert torch.equal(load_file(target / "model-1.safetensors")["a"], torch.full((40,), again))


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_what_a_stranger_packed_is_not_written_through(link: Callable[[Path, Path], None], tmp_path: Path) -> None:
    """An archive may bring a folder that looks as if a run had left it, with links in it."""
    (tmp_path / "precious").write_text("mine")
    left = tmp_path / ".normfuse-0123456789abcdef" / "new" / "target"
    left.mkdir(parents=True)
    (tmp_path / ".normfuse-0123456789abcdef").chmod(0o700)
    link(tmp_path / "precious", left / "kept")
    with new_folder(tmp_path / "target", lambda folder: (folder / "kept").write_text("new"), goes_on_with=["kept"]):
        pass
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "target" / "kept").read_text() == "new"


def test_what_others_could_have_written_is_not_gone_on_with(tmp_path: Path) -> None:
    open_to_all = tmp_path / ".normfuse-0123456789abcdef"
    (open_to_all / "new" / "target").mkdir(parents=True)
    open_to_all.chmod(0o777)
    (open_to_all / "new" / "target" / "kept").write_text("theirs")
    with new_folder(tmp_path / "target", lambda folder: (folder / "kept").open("x").close(), goes_on_with=["kept"]):
        pass
    assert (tmp_path / "target" / "kept").read_text() == ""


# -- a folder in the making, and other runs ----------------------------------------------------------------------------


def left_behind(parent: Path) -> Path:
    """What a run leaves that was killed while it made the folder ``out``."""
    new = parent / ".normfuse-0123456789abcdef" / "new" / "out"
    new.mkdir(parents=True)
    new.parents[1].chmod(0o700)
    (new / "part").write_text("half")
    return new


def test_a_file_that_is_written_beside_leaves_it(tmp_path: Path) -> None:
    left_behind(tmp_path)
    write_atomically(tmp_path / "report.json", lambda file: file.write_text("{}"))
    check_new_folder(tmp_path / "out")
    seen: list[str] = []
    with new_folder(tmp_path / "out", lambda new: seen.append((new / "part").read_text()), goes_on_with=["part"]):
        pass
    assert seen == ["half"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out", "report.json"]


def test_a_folder_that_is_made_beside_removes_it(tmp_path: Path) -> None:
    left_behind(tmp_path)
    with new_folder(tmp_path / "other", lambda new: (new / "x").touch(), goes_on_with=["x"]):
        pass
    assert [each.name for each in tmp_path.iterdir()] == ["other"]


def test_nobody_goes_on_with_what_a_helper_is_still_at(tmp_path: Path) -> None:
    """Whoever asked for the help may be dead by now."""
    new = left_behind(tmp_path)
    with helping(new), new_folder(tmp_path / "out", lambda other: (other / "x").touch(), goes_on_with=["part"], helped=True):
        assert (new / "part").read_text() == "half"
    assert (new / "part").exists()
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["x"]


def test_what_another_run_has_is_not_helped_with(tmp_path: Path) -> None:
    def write(new: Path) -> None:
        with pytest.raises(OSError, match="another run"), helping(new):
            raise AssertionError

    with new_folder(tmp_path / "out", write):
        pass


def test_what_is_unfinished_stays(tmp_path: Path) -> None:
    with pytest.raises(Unfinished), new_folder(tmp_path / "out", lambda new: (new / "part").write_text("half")):
        raise Unfinished("somebody is gone")
    assert not (tmp_path / "out").exists()
    with new_folder(tmp_path / "out", lambda new: None, goes_on_with=["part"]):
        pass
    assert (tmp_path / "out" / "part").read_text() == "half"


@pytest.mark.parametrize(("name", "said"), [("there", "there already"), ("no/out", "no folder")])
def test_where_no_folder_can_be_is_told_before(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match=said):
        check_new_folder(tmp_path / name)
    assert [each.name for each in tmp_path.iterdir()] == ["there"]
