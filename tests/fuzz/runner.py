"""The runner: a table, and a JSON file with the date, the versions and every count.

Seeds are ``seed``, ``seed + 1``, … in each part, so that a run can be continued or repeated. What fails is kept in
``tests/fuzz/kept`` and replayed by the tests from then on.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.fuzz import commands, graphs
from tests.fuzz.files import Corpus
from tests.fuzz.keeping import keep_file, keep_seed
from tests.fuzz.workers import GOOD, Worker

PARTS = ("files", "graphs", "kills")
FAULTS = {"wrong", "crash"}
PACKAGES = ("normfuse", "torch", "onnx", "onnxruntime", "onnxscript", "numpy", "safetensors")
CHUNK = 20


def _until(end: float, seed: int, most: int, step: int = 1) -> Iterator[int]:
    for each in range(seed, seed + most, step):
        if time.monotonic() >= end:
            return
        yield each


def files_of(seeds: range, end: float, kept: bool) -> tuple[Counter[str], list[str]]:
    """Verdicts on files, and what was said of those that failed."""
    counts: Counter[str] = Counter()
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = Corpus(Path(folder) / "work", Path(folder) / "bait")
        worker = Worker(corpus.folder, corpus.bait, corpus.warm())
        try:
            for seed in _until(end, seeds.start, len(seeds)):
                kind, words, path = corpus.drawn(seed)
                verdict, told = worker.verdict(words)
                counts[verdict] += 1
                if verdict not in GOOD:
                    failed.append(f"{verdict}: {kind}, seed {seed}: {' '.join(told.split())}")
                    print(failed[-1], file=sys.stderr, flush=True)
                    if kept:
                        keep_file(kind, seed, verdict, words, path)
        finally:
            worker.close()
    return counts, failed


def graphs_of(seeds: range, end: float, kept: bool) -> tuple[Counter[str], list[str]]:
    """Verdicts on random models, and what was said of those that failed."""
    counts: Counter[str] = Counter()
    failed: list[str] = []
    for seed in _until(end, seeds.start, len(seeds)):
        outcome = graphs.tried(seed)
        counts[outcome.verdict] += 1
        if outcome.verdict in FAULTS:
            failed.append(f"{outcome.verdict}: {outcome.told}")
            print(failed[-1], file=sys.stderr, flush=True)
            if kept:
                keep_seed(seed, outcome.verdict, outcome.told)
    return counts, failed


def kills_of(moments: int, end: float) -> dict[str, dict[str, int]]:
    """What kills left, by command."""
    found = {}
    for name in commands.WRITING:
        if time.monotonic() < end:
            with tempfile.TemporaryDirectory() as folder:
                work = Path(folder) / "work"
                work.mkdir()
                found[name] = asdict(commands.kills(name, moments, work, chdir=os.chdir))
                os.chdir(folder)
                os.chdir("/")
    return found


def _in_parts(what: Any, seed: int, count: int, end: float, jobs: int, kept: bool) -> tuple[Counter[str], list[str]]:
    """Run chunks of seeds, in processes of their own where there are several jobs."""
    if jobs == 1:
        return what(range(seed, seed + count), end, kept)  # type: ignore[no-any-return]
    counts: Counter[str] = Counter()
    failed: list[str] = []
    size = -(-count // jobs)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        chunks = [range(start, min(start + size, seed + count)) for start in range(seed, seed + count, size)]
        for done in as_completed([pool.submit(what, each, end, kept) for each in chunks]):
            some, told = done.result()
            counts += some
            failed += told
    return counts, failed


def main() -> int:
    """Run the parts that are asked for; 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="for all parts together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=2000, help="files, and models, at most")
    parser.add_argument("--kills", type=int, default=40, help="kills of each writing command")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--json", type=Path, default=Path("out/fuzz.json"))
    parser.add_argument("--no-keep", action="store_true", help="do not keep what fails")
    asked = parser.parse_args()
    parts = asked.part or list(PARTS)
    data: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "seed": asked.seed,
    }
    started, failures = time.monotonic(), []
    for place, part in enumerate(parts):
        left = started + asked.seconds - time.monotonic()
        end = time.monotonic() + left / (len(parts) - place)
        if part == "kills":
            data[part] = kills_of(asked.kills, end)
            failures += [name for name, each in data[part].items() if each["half"] or each["strays"]]
        else:
            what = files_of if part == "files" else graphs_of
            counts, failed = _in_parts(what, asked.seed, asked.count, end, asked.jobs, not asked.no_keep)
            data[part] = {"tried": counts.total(), **dict(sorted(counts.items())), "failures": failed}
            failures += failed
    data["seconds"] = round(time.monotonic() - started)
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    asked.json.write_text(json.dumps(data, indent=2) + "\n")
    print(table(data))
    return 1 if failures else 0


def table(data: dict[str, Any]) -> str:
    """The counts as Markdown."""
    lines = [f"{data['date']}, Python {data['python']}, " + ", ".join(f"{k} {v}" for k, v in data["versions"].items())]
    lines += ["", "| part | tried | found |", "|---|---|---|"]
    for part in ("files", "graphs"):
        if part in data:
            found = ", ".join(f"{count} {word}" for word, count in data[part].items() if word not in ("tried", "failures"))
            lines.append(f"| {part} | {data[part]['tried']} | {found} |")
    for name, each in data.get("kills", {}).items():
        found = f"{each['killed']} killed before the end, {each['half']} half-written, {each['strays']} left over"
        lines.append(f"| kills of {name} | {each['moments']} | {found} |")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
