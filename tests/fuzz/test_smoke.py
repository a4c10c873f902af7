"""The fuzzer works, sees what it is there to see, and what once failed does not fail again."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.fuzz import graphs
from tests.fuzz.files import KINDS, Corpus
from tests.fuzz.keeping import FOLDER, kept_files, kept_seeds
from tests.fuzz.worker import Answer
from tests.fuzz.workers import GOOD, Worker, judged


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Corpus, Worker]]:
    folder = tmp_path_factory.mktemp("fuzz")
    corpus = Corpus(folder / "work", folder / "bait")
    worker = Worker(corpus.folder, corpus.bait, corpus.warm()[:1])
    yield corpus, worker
    worker.close()


def test_good_files_are_answered_and_some_random_ones_do_no_harm(bench: tuple[Corpus, Worker]) -> None:
    corpus, worker = bench
    assert worker.verdict(corpus.warm()[0]) == ("answered", "")
    verdicts = {seed: (*worker.verdict(corpus.drawn(seed)[1]), corpus.drawn(seed)[0]) for seed in range(12)}
    assert not {seed: told for seed, told in verdicts.items() if told[0] not in GOOD}


def test_what_acts_is_seen(bench: tuple[Corpus, Worker]) -> None:
    """A file that runs its code, because it is allowed to, is caught by the hook and by the bait."""
    corpus, worker = bench
    path = corpus.folder / "acting.pt"

    class Acting(nn.Linear):
        def __reduce__(self):
            return Path.touch, (corpus.bait / "written",)

    torch.save(Acting(2, 2), path)
    assert worker.verdict(["inspect", str(path), "--trust-pickle"])[0] == "file effect"
    assert worker.verdict(["inspect", str(path)]) == ("refused", "")


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (Answer(2, "hint: this is a bug of normfuse"), "bug"),
        (Answer(None, raised="Traceback"), "traceback"),
        (Answer(2, "", acts=["os.system"]), "execution"),
        (Answer(2, "RuntimeError: DefaultCPUAllocator: can't allocate memory"), "memory"),
        (Answer(2, "a \x1b[2J b"), "control characters"),
        (Answer(2, "error: no"), "refused"),
    ],
)
def test_verdicts(answer: Answer, verdict: str) -> None:
    assert judged(answer, [])[0] == verdict


def test_files_that_once_failed(bench: tuple[Corpus, Worker]) -> None:
    corpus, worker = bench
    failed: dict[str, str] = {}
    for held in kept_files():
        if held["spec"] is not None:
            words = ["inspect", str(corpus.good), "--input", held["spec"]]
        else:
            path = str(shutil.copy(FOLDER / held["file"], corpus.folder))
            words = next(each for each in KINDS if each.name == held["kind"]).words(path, str(corpus.good))
        verdict, told = worker.verdict(words)
        failed |= {held["file"] or held["spec"]: told} if verdict not in GOOD else {}
    assert not failed


@pytest.mark.parametrize("seed", [1, 2, *kept_seeds()])
def test_models(seed: int) -> None:
    outcome = graphs.tried(seed)
    assert outcome.verdict in ("rewritten", "unchanged", "refused"), outcome.told


def test_a_wrong_model_is_told() -> None:
    recipe = graphs.Recipe(3)
    model, x = recipe.model()
    graphs.spread(model.eval())
    other, _ = graphs.Recipe(3).model()
    other.load_state_dict(model.state_dict())
    assert graphs.excess(model, other.eval(), x) < 1
    with torch.no_grad():
        [p for p in other.parameters() if p.dim() > 1][-1][0].mul_(1.01)  # a row of the head
    assert graphs.excess(model, other, x) > 1


@pytest.mark.slow
def test_it_runs_in_several_processes(tmp_path: Path) -> None:
    report = tmp_path / "fuzz.json"
    words = ("--part", "graphs", "--count", "2", "--jobs", "2", "--seconds", "200", "--no-keep", "--json", str(report))
    subprocess.run([sys.executable, "-m", "tests.fuzz", *words], cwd=Path(__file__).parents[2], check=True)
    assert report.is_file()
