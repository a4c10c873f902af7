"""Writing: whatever fails at whatever moment, the old files are whole or the new ones are, and nothing else is left."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normfuse.errors import InputError
from normfuse.graph.program import Program
from normfuse.sources import atomic
from normfuse.sources.atomic import late_errors, proven_first, scratch, write_atomically
from tests.kills import killed_at_every_step

NAMES = ("model.bin", "model.xml")


def text(content: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(content)


def pair(content: str) -> Callable[[Path], None]:
    """Writes a file, and another one beside it that belongs to it."""

    def write(path: Path) -> None:
        path.write_text(content)
        path.with_suffix(".bin").write_text(content)

    return write


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


def both(content: str) -> dict[str, str]:
    return dict.fromkeys(NAMES, content)


# -- what is no file ---------------------------------------------------------------------------------------------------


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    for _ in range(1000):
        try:
            write_atomically(pipe, text("x" * 200_000))
            break
        except InputError as error:  # the reader has not come yet
            assert "nobody reads" in str(error)  # noqa: PT017
    reader.join(10)
    assert read == [b"x" * 200_000]
    assert pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_devices_are_written_into() -> None:
    before = os.stat("/dev/null")
    write_atomically(Path("/dev/null"), text("x"))
    assert os.stat("/dev/null").st_rdev == before.st_rdev
    with pytest.raises(InputError, match="cannot write /dev/full: No space left on device"):
        write_atomically(Path("/dev/full"), text("x"))
    assert Path("/dev/full").is_char_device()


def test_a_link_to_a_device_is_written_into(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/null")
    write_atomically(tmp_path / "link", text("x"))
    assert (tmp_path / "link").is_symlink()
    assert Path("/dev/null").is_char_device()


def test_two_files_do_not_fit_a_stream() -> None:
    with pytest.raises(InputError, match="2 files"):
        write_atomically(Path("/dev/null"), pair("x"))


def test_a_redirected_output_is_written_into(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path; from normfuse.sources.atomic import write_atomically as w\n"
        "w(Path('/dev/stdout'), lambda path: path.write_text('answer'))"
    )
    with (tmp_path / "out").open("wb") as out:
        out.write(b"before ")
        out.flush()
        subprocess.run([sys.executable, "-c", script], stdout=out, check=True)
    assert contents(tmp_path) == {"out": "before answer"}


def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        with pytest.raises(InputError, match="it is a socket"):
            write_atomically(Path("s"), text("x"))
        assert Path("s").is_socket()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("loop", "symbolic links"),
        ("a\0b", "it is no path"),
        ("\ud800", "it is no path"),
        ("x" * 256, "name too long"),
        ("missing/out.pt", "there is no folder"),
        ("folder", "it is a folder"),
        ("file/out.pt", "Not a directory"),
        ("loop/out.pt", "symbolic links"),
    ],
)
def test_where_nothing_can_be_written_is_one_line(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write") as caught:
        write_atomically(tmp_path / name, text("x"))
    assert said in str(caught.value)
    assert str(caught.value).isprintable()
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "loop"]
    assert not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("name", [os.fsdecode(b"caf\xe9.pt"), "x" * 251 + ".pt", "a\nb.pt", "-o.pt"])
def test_any_name_that_the_system_takes_is_written(name: str, tmp_path: Path) -> None:
    write_atomically(tmp_path / name, text("x"))
    assert contents(tmp_path) == {name: "x"}


def test_a_link_that_leads_nowhere_gets_its_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    write_atomically(tmp_path / "link", text("x"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "x"


# -- files that belong together ----------------------------------------------------------------------------------------


def test_a_pair_replaces_a_pair(tmp_path: Path) -> None:
    for content in ("old", "new"):
        write_atomically(tmp_path / "model.xml", pair(content))
        assert contents(tmp_path) == both(content)
        assert not any(path.is_symlink() for path in tmp_path.iterdir())


def test_the_second_file_is_no_input_either(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_text("precious")
    with pytest.raises(InputError, match="it is the input"):
        write_atomically(tmp_path / "model.xml", pair("new"), never_over=[tmp_path / "model.bin"])
    assert contents(tmp_path) == {"model.bin": "precious"}


def test_without_links_a_pair_is_written_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "model.xml", pair("old"))

    def refuses(*_: Any) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuses)
    write_atomically(tmp_path / "model.xml", pair("new"))
    assert contents(tmp_path) == both("new")


# -- failures at every moment ------------------------------------------------------------------------------------------

STEPS = ("open", "fsync", "replace", "link", "symlink", "mkdir", "unlink", "scandir", "chmod")


class Faults:
    """Makes the n-th of the system's calls fail; by itself it only counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException], at: int = -1) -> None:
        self.count, self.at, self.error = 0, at, error
        for name in STEPS:
            monkeypatch.setattr(os, name, self._faulty(getattr(os, name)))
        monkeypatch.setattr("io.open", self._faulty(open))

    def _faulty(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(*args: Any, **options: Any) -> Any:
            self.count += 1
            if self.count - 1 == self.at:
                raise self.error()
            return call(*args, **options)

        return faulty


@pytest.mark.parametrize("error", [lambda: OSError(28, "No space left on device"), MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("start", ["nothing", "pair"])
def test_a_failure_at_any_call_leaves_old_or_new(start: str, error: Callable[[], BaseException], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        counted = Faults(patch, error)
        write_atomically(tmp_path / "model.xml", pair("first"))
    whole = 0
    for at in range(counted.count + 8):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        old = both("old") if start == "pair" else {}
        if old:
            write_atomically(tmp_path / "model.xml", pair("old"))
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, error, at)
            try:
                write_atomically(tmp_path / "model.xml", pair("new"))
                whole += 1
            except (InputError, MemoryError, KeyboardInterrupt) as caught:
                assert "\n" not in str(caught)  # noqa: PT017
        with scratch(tmp_path):  # the next run
            pass
        assert contents(tmp_path) in (old, both("new")), at
        assert not any(path.is_symlink() for path in tmp_path.iterdir()), at
    assert 0 < whole < counted.count + 8


SAVING = """
import resource, sys, torch
from pathlib import Path
from torch import nn
from normfuse.sources.atomic import write_atomically
from normfuse.graph.program import Program
program = Program.trace(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)), (torch.randn(2, 64),))
for limit in (0, 1, 100, 4096, 9000, 16000, 20000, 25000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write_atomically(Path(sys.argv[1]), program.save)
    except Exception as error:
        print(error, error.hint)
"""


def test_a_full_disk_is_a_line_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    target = tmp_path / "out.pt2"
    target.write_text("old")
    done = subprocess.run([sys.executable, "-c", SAVING, target], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 8
    assert all(line.startswith(f"cannot write {target}: File too large") for line in lines)
    assert done.stderr == ""
    assert contents(tmp_path) == {"out.pt2": "old"}


def test_a_late_error_comes_at_the_end(tmp_path: Path) -> None:
    program = Program.trace(nn.Linear(4, 4), (torch.randn(2, 4),))
    with pytest.raises(OSError, match="No space left"), late_errors(Path("/dev/full")) as stream:
        torch.export.save(program.exported, stream)
    with late_errors(tmp_path / "x") as stream:
        stream.write(b"whole")
    assert (tmp_path / "x").read_bytes() == b"whole"


# -- runs that were killed ---------------------------------------------------------------------------------------------


@pytest.fixture
def forgotten(tmp_path: Path) -> Path:
    """A scratch folder whose run was killed."""
    folder = tmp_path / ".normfuse-0123456789abcdef"
    (folder / "new").mkdir(parents=True)
    (folder / "new" / "half").write_text("half")
    return folder


def test_the_next_run_sweeps(forgotten: Path) -> None:
    write_atomically(forgotten.parent / "out", text("x"))
    assert contents(forgotten.parent) == {"out": "x"}


def test_what_a_run_holds_is_not_swept(tmp_path: Path) -> None:
    with proven_first(tmp_path / "one", text("1")) as file:
        write_atomically(tmp_path / "two", text("2"))
        assert file.read_text() == "1"
    assert contents(tmp_path) == {"one": "1", "two": "2"}


def test_only_folders_of_that_name_are_swept(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (tmp_path / ".normfuse-0123456789abcdef").symlink_to("kept")
    (tmp_path / ".normfuse-abc").mkdir()
    (tmp_path / ".normfuse-fedcba9876543210").write_text("a file")
    write_atomically(tmp_path / "out", text("x"))
    assert sorted(os.listdir(tmp_path)) == sorted(
        [".normfuse-0123456789abcdef", ".normfuse-abc", ".normfuse-fedcba9876543210", "kept", "out"]
    )


@pytest.mark.parametrize("start", ["nothing", "pair", "through a link"])
def test_killed_at_every_step(start: str, tmp_path: Path) -> None:
    folder, goal = tmp_path / "real", tmp_path / "real" / "model.xml"
    folder.mkdir()
    if start == "through a link":
        goal = tmp_path / "link.xml"
        goal.symlink_to("real/model.xml")
    old = {} if start == "nothing" else both("old")

    def prepare() -> None:
        for path in folder.iterdir():
            path.unlink()
        if old:
            write_atomically(folder / "model.xml", pair("old"))

    def check() -> None:
        seen = {name: (folder / name).read_text() for name in NAMES if (folder / name).exists()}
        assert seen in (old, both("new"))
        write_atomically(goal, pair("next"))
        assert contents(folder) == both("next")
        assert not any(path.is_symlink() for path in folder.iterdir())

    steps = killed_at_every_step(lambda: write_atomically(goal, pair("new")), prepare=prepare, check=check)
    assert steps > 10


def test_limits_are_put_back() -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert atomic._SCRATCH.fullmatch(".normfuse-0123456789abcdef")


def test_a_writer_may_write_atomically_itself(tmp_path: Path) -> None:
    write_atomically(tmp_path / "model.xml", lambda path: write_atomically(path, pair("new")))
    assert contents(tmp_path) == both("new")
