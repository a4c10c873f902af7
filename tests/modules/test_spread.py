"""A folder rewritten by several ranks is the one that one process makes; a rank that dies leaves nothing half."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from normfuse.cli import main
from normfuse.errors import LoadError
from normfuse.graph.expressions import Call, Read
from normfuse.limits import OverLimit
from normfuse.modules import spread
from normfuse.modules.recipe import Recipe
from normfuse.sources import ranks, tensor_files
from normfuse.sources.tensor_files import open_weights
from tests.ranks import Ended, asked_by_ranks
from tests.small_net import BLOCK
from tests.sources.test_brought_back import GPT2, saved
from tests.zoo.spread import spread as with_spread_numbers

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("ranks")]

CODE = f"""{BLOCK}
class Net(nn.Module):
    example_input_array = torch.ones(2, 3, 6)

    def __init__(self):
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(6, 6), nn.Sequential(Block(), Block()), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.blocks(self.embed(x)))
"""
SHARDS = 5


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder ``m`` of several files, ``net.py`` that says what they are of, and ``one``: what one process makes of it."""
    place = tmp_path_factory.mktemp("ranks")
    names: dict[str, Any] = {}
    exec(CODE, names)
    (place / "net.py").write_text(CODE)
    (place / "m").mkdir()
    state = with_spread_numbers(names["Net"]()).state_dict()
    files = {
        f"model-{number:05d}-of-{SHARDS:05d}.safetensors": list(state)[number - 1 :: SHARDS] for number in range(1, 1 + SHARDS)
    }
    for file, keys in files.items():
        save_file({key: state[key] for key in keys}, place / "m" / file, {"format": "pt"})
    table = {"metadata": {}, "weight_map": {key: file for file, keys in files.items() for key in keys}}
    (place / "m" / "model.safetensors.index.json").write_text(json.dumps(table))
    answer = CliRunner().invoke(main, [str(word) for word in words(place, place / "one")])
    assert answer.exit_code == 0, answer.output
    return place


def words(place: Path, out: Path, *more: object) -> list[object]:
    told = ("--model", f"{place / 'net.py'}:Net", "--input", "float32[2,3,6]", "--pass", "fold_affine", *more)
    return ["rewrite", place / "m", *told, "-o", out]


def sums(folder: Path) -> dict[str, str]:
    return {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in folder.iterdir()}


def scratch(folder: Path) -> list[Path]:
    return list(folder.glob(".normfuse-*"))


def told_by_rank_0(ended: list[Ended]) -> str:
    assert not any(each.said for each in ended[1:]), ended
    return ended[0].said


@pytest.mark.parametrize("count", [2, 4, 7])
def test_the_result_is_that_of_one_process(count: int, place: Path, tmp_path: Path) -> None:
    ended = asked_by_ranks(words(place, tmp_path / "out"), count, tmp_path)
    assert [each.code for each in ended] == [0] * count, ended
    assert "8 tensors changed" in told_by_rank_0(ended)
    assert sums(tmp_path / "out") == sums(place / "one")
    assert not scratch(tmp_path)


def test_every_rank_writes_some_of_the_files(place: Path, tmp_path: Path) -> None:
    def note(rank: int) -> None:
        write = tensor_files.Weights.write

        def noting(self: Any, *given: Any, **options: Any) -> set[str]:
            (tmp_path / f"wrote-{rank}").write_text(json.dumps(sorted(options["only"])))
            return write(self, *given, **options)

        tensor_files.Weights.write = noting  # type: ignore[method-assign]

    ended = asked_by_ranks(words(place, tmp_path / "out"), 3, tmp_path, first=note)
    assert [each.code for each in ended] == [0, 0, 0]
    wrote = [json.loads((tmp_path / f"wrote-{rank}").read_text()) for rank in range(3)]
    assert all(wrote)
    assert sorted(itertools.chain(*wrote)) == sorted(sums(place / "m"))


def test_older_files_are_spread_too(place: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    shutil.copyfile(place / "net.py", tmp_path / "net.py")
    table = json.loads((place / "m" / "model.safetensors.index.json").read_text())
    for file in set(table["weight_map"].values()):
        torch.save(load_file(place / "m" / file), tmp_path / "m" / f"{file}.bin")
    table["weight_map"] = {key: f"{file}.bin" for key, file in table["weight_map"].items()}
    (tmp_path / "m" / "pytorch_model.bin.index.json").write_text(json.dumps(table))
    for count in (1, 3):
        ended = asked_by_ranks(words(tmp_path, tmp_path / f"out{count}"), count, tmp_path)
        assert [each.code for each in ended] == [0] * count, ended
    assert sums(tmp_path / "out1") == sums(tmp_path / "out3")
    assert sums(tmp_path / "out1") != sums(tmp_path / "m")


def test_a_checkpoint_of_several_ranks_is_written_by_rank_0(place: Path, tmp_path: Path) -> None:
    shutil.copyfile(place / "net.py", tmp_path / "net.py")
    state = tensor_files.open_weights(place / "m").tensors()
    dcp: Any = torch.distributed.checkpoint
    dcp.save({"model": state, "step": 3}, checkpoint_id=tmp_path / "m", no_dist=True)
    for count in (1, 2):
        ended = asked_by_ranks(words(tmp_path, tmp_path / f"out{count}"), count, tmp_path)
        assert [each.code for each in ended] == [0] * count, ended
    assert sums(tmp_path / "out1") == sums(tmp_path / "out2")
    assert "8 tensors changed" in told_by_rank_0(ended)


def test_tensors_and_code_of_transformers(tmp_path: Path) -> None:
    """Tensors leave where code does without them, and so do their places in the index."""
    saved(tmp_path / "m", "GPT2LMHeadModel", GPT2)
    asked = ["rewrite", tmp_path / "m", "--pass", "all", "--as-code", "--verify", "structure"]
    for count in (1, 2):
        ended = asked_by_ranks([*asked, "-o", tmp_path / f"out{count}"], count, tmp_path)
        assert [each.code for each in ended] == [0] * count, ended
    assert sums(tmp_path / "out1") == sums(tmp_path / "out2")
    assert len(list((tmp_path / "out2").glob("*.safetensors"))) > 2
    left = json.loads((tmp_path / "out2" / "model.safetensors.index.json").read_text())["weight_map"]
    assert left.keys() < set(tensor_files.open_weights(tmp_path / "m").names)


def test_what_cannot_be_told_is_done_alone(place: Path, tmp_path: Path) -> None:
    def first(rank: int) -> None:
        def refuse(text: str) -> Any:
            raise ValueError("an operator that nobody knows")

        Recipe.from_json = refuse  # type: ignore[method-assign, assignment]

    ended = asked_by_ranks(words(place, tmp_path / "out"), 2, tmp_path, first=first)
    assert [each.code for each in ended] == [0, 0], ended
    assert sums(tmp_path / "out") == sums(place / "one")


def test_files_go_to_whom_has_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "started", lambda: 3)
    assert ranks.spread([("a", 5), ("b", 9), ("c", 4), ("d", 4), ("e", 1)]) == [["b"], ["a", "e"], ["c", "d"]]
    assert ranks.spread([]) == [[], [], []]


def test_a_script_with_ranks_of_its_own_is_left_alone(place: Path, tmp_path: Path) -> None:
    """Each of its ranks, or one of them, calls what it wants: nobody is asked to help."""

    def script(rank: int) -> None:
        import normfuse

        torch.distributed.init_process_group("gloo")
        if rank == 1:
            source = normfuse.open(place / "m", architecture=f"{place / 'net.py'}:Net")
            normfuse.rewrite(source, "fold_affine", torch.randn(2, 3, 6)).save(tmp_path / "out")
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        sys.exit(0)

    ended = asked_by_ranks([], 2, tmp_path, first=script)
    assert [each.code for each in ended] == [0, 0], ended
    assert sums(tmp_path / "out") == sums(place / "one")


@pytest.mark.parametrize(
    ("asked", "code", "said"),
    [
        (["inspect", "{m}", "--model", "{net}", "--input", "float32[2,3,6]"], 0, "layer_norm"),
        (["verify", "{m}", "{m}", "--model", "{net}", "--input", "float32[2,3,6]"], 0, "equivalent"),
        (["passes"], 0, "fold_affine"),
        (["--help"], 0, "Rewrite the normalization"),
        (["rewrite", "{m}/nothing", "--pass", "all"], 2, "hint:"),
        (["rewrite", "{m}", "--model", "{net}", "--pass", "prepbn"], 0, "nothing to rewrite"),
        (["rewrite", "{m}", "--model", "{net}", "--pass", "all", "--dry-run"], 0, "dry run"),
        (["no-such-command"], 2, "no-such-command"),
    ],
)
def test_what_is_not_spread_is_done_once(asked: list[str], code: int, said: str, place: Path, tmp_path: Path) -> None:
    ended = asked_by_ranks([each.format(m=place / "m", net=f"{place / 'net.py'}:Net") for each in asked], 2, tmp_path)
    assert [each.code for each in ended] == [code, 0], ended
    assert said in told_by_rank_0(ended)


def test_a_program_and_one_file_are_written_by_rank_0(place: Path, tmp_path: Path) -> None:
    ended = asked_by_ranks(words(place, tmp_path / "out.pt2"), 2, tmp_path)
    assert [each.code for each in ended] == [0, 0], ended
    assert (tmp_path / "out.pt2").is_file()
    state: dict[str, Any] = tensor_files.open_weights(place / "m").tensors()
    torch.save({key: each.clone() for key, each in state.items()}, tmp_path / "w.pt")
    asked = ["rewrite", tmp_path / "w.pt", *words(place, tmp_path / "x.pt")[2:]]
    ended = asked_by_ranks(asked, 2, tmp_path)
    assert [each.code for each in ended] == [0, 0], ended
    told_by_rank_0(ended)
    assert (tmp_path / "x.pt").is_file()


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def failing(error: BaseException) -> Any:
    """What makes the last rank fail at its part."""

    def first(rank: int) -> None:
        def fail(**_: Any) -> set[str]:
            raise error

        if rank:
            spread._asked = fail  # type: ignore[assignment]

    return first


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device (on rank 1)"),
        (MemoryError(), "there is not enough memory"),
        (LoadError("it is damaged", hint="fetch it again"), "it is damaged (on rank 1)"),
        (ValueError("odd"), "ValueError: odd (on rank 1)"),
        (OverLimit("a header of 1 byte", "HEADER_BYTES"), "(on rank 1)\nhint: if you know where"),
    ],
)
def test_an_error_of_another_rank_is_told_once(error: BaseException, said: str, place: Path, tmp_path: Path) -> None:
    ended = asked_by_ranks(words(place, tmp_path / "out"), 2, tmp_path, first=failing(error))
    assert ended[0].code == 2
    assert said in told_by_rank_0(ended)
    assert told_by_rank_0(ended).count("error:") == 1
    assert not (tmp_path / "out").exists()
    assert not scratch(tmp_path)


def test_an_error_of_rank_0_ends_the_others(place: Path, tmp_path: Path) -> None:
    def first(rank: int) -> None:
        def fail(*_: Any, **__: Any) -> set[str]:
            raise OSError(errno.ENOSPC, "No space left on device")

        if rank == 0:
            spread._write = fail

    ended = asked_by_ranks(words(place, tmp_path / "out"), 2, tmp_path, first=first)
    assert [each.code for each in ended] == [2, 0]
    assert "No space left on device\nhint" in told_by_rank_0(ended)
    assert not (tmp_path / "out").exists()
    assert not scratch(tmp_path)


def dying(which: int) -> Any:
    """What makes a rank die when it is to write its files."""

    def first(rank: int) -> None:
        write = spread._write

        def die(*given: Any, **more: Any) -> set[str]:
            if rank == which:
                time.sleep(1)  # the others have done theirs by now
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*given, **more)

        spread._write = die

    return first


@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_that_dies_leaves_files_to_go_on_with(which: int, place: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    ended = asked_by_ranks(words(place, tmp_path / "out"), 2, tmp_path, first=dying(which))
    assert time.monotonic() - began < 30
    assert ended[which].code == -signal.SIGKILL
    assert ended[1 - which].code == 2, ended
    if which == 1:
        assert "error: a process of this command is gone" in told_by_rank_0(ended)
    assert not (tmp_path / "out").exists()
    (left,) = scratch(tmp_path)
    inodes = {each.name: each.stat().st_ino for each in (left / "new" / "out").iterdir() if each.suffix == ".safetensors"}
    assert inodes

    ended = asked_by_ranks(words(place, tmp_path / "out"), 2, tmp_path)
    assert [each.code for each in ended] == [0, 0], ended
    assert sums(tmp_path / "out") == sums(place / "one")
    assert inodes.items() <= {each.name: each.stat().st_ino for each in (tmp_path / "out").iterdir()}.items()
    assert not scratch(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_may_die_at_any_moment(which: int, place: Path, tmp_path: Path) -> None:
    before = sums(place / "m")
    began = time.monotonic()
    asked_by_ranks(words(place, tmp_path / "out"), 2, tmp_path)
    whole = time.monotonic() - began
    killed = 0
    for moment in range(10):
        out = tmp_path / f"out{moment}"
        ended = asked_by_ranks(words(place, out), 2, tmp_path, kills=which, after=whole * (moment + 0.5) / 10)
        killed += ended[which].code == -signal.SIGKILL
        assert sums(place / "m") == before
        assert not out.exists() or sums(out) == sums(place / "one")
        if not out.exists():
            assert any(each.code for each in ended)
            again = asked_by_ranks(words(place, out), 2, tmp_path)
            assert [each.code for each in again] == [0, 0], again
        assert sums(out) == sums(place / "one")
        assert not [each for each in scratch(tmp_path) if any((each / "new").glob("out*"))]
    assert killed >= 5


def torchrun(count: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", "-m", "normfuse"]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
def test_torchrun_itself(count: int, place: Path, tmp_path: Path) -> None:
    asked = [*torchrun(count), *map(str, words(place, tmp_path / "out"))]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    assert sums(tmp_path / "out") == sums(place / "one")


@pytest.mark.slow
def test_torchrun_ends_where_a_rank_is_killed(place: Path, tmp_path: Path) -> None:
    asked = [*torchrun(2), *map(str, words(place, tmp_path / "out"))]
    job = subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    workers: list[int] = []
    while len(workers) < 2 and job.poll() is None:
        time.sleep(0.05)
        workers = [int(each) for each in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
    time.sleep(1)
    os.kill(workers[-1], signal.SIGKILL)
    began = time.monotonic()
    _out, said = job.communicate(timeout=120)
    assert time.monotonic() - began < 90
    assert job.returncode != 0
    assert "SIGKILL" in said or "-9" in said
    assert not (tmp_path / "out").exists()


def test_the_bytes_are_the_same_with_any_number_of_threads(tmp_path: Path) -> None:
    """Torch shares a sum over a long row among its threads, and each number of them rounds in another way."""
    draw = torch.Generator().manual_seed(0)
    held = {"w": torch.randn(7, 200_003, generator=draw, dtype=torch.float64), "b": torch.zeros(7, dtype=torch.float64)}
    save_file(held, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path)
    recipe = Recipe({"b": Read("b") + Call("sum.dim_IntList", (Read("w"), (1,)))})
    threads, made = torch.get_num_threads(), set[bytes]()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            spread._write(weights, recipe, tmp_path / f"of_{count}")
            made.add((tmp_path / f"of_{count}").read_bytes())
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert len(made) == 1
