"""Is a checkpoint that does not fit the memory rewritten as fast as it is copied, and proven? Seconds, MB/s and peaks.

A folder of a GPT-NeoX shape is made for every size (`benchmarks.large_folders`), copied and rewritten in turns, both under
a limit of memory, each time in a process of its own, and removed. What is written is on the disk before the clock stops. The
peaks are the process's own (what it holds and what it maps of files), not the kernel's cache of files, which takes what the
limit leaves.

    python -m benchmarks.large_checkpoint FOLDER [--gigabytes 2 4 8 14.5] [--limit-gib 3] [--rounds 3] [--levels regions full]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.large_folders import layers_for, make
from benchmarks.record import recorded

Taken: TypeAlias = dict[str, Any]
"""What a rewrite took."""
_Row: TypeAlias = tuple[int, list[float], list[Taken]]

GROUPS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))
LIMITS = ("memory.limit_in_bytes", "memory.max")


def rewritten(folder: str, out: str, passes: str, level: str) -> None:
    """In a process of its own: plan, prove and write, and print what it took as JSON."""
    import warnings

    warnings.simplefilter("ignore")
    import torch

    from tests.zoo import torchvision_shim

    torchvision_shim.install()
    import normfuse
    from normfuse.modules import spread

    torch.set_num_threads(1)
    peak = _watched()
    started = time.perf_counter()
    held = normfuse.open(folder)
    opened = time.perf_counter() - started
    ids = torch.arange(16)[None]
    result = normfuse.rewrite(held, passes, kwargs={"input_ids": ids}, verify=level)
    laps = result.report.seconds
    files = _timed(spread, "_write")
    begun = time.perf_counter()
    written = result.write_back(out)
    wrote = time.perf_counter() - begun
    planned = opened + laps.get("trace", 0.0) + laps.get("plan", 0.0)
    said = written.evidence or result.report.evidence
    print(
        json.dumps(
            {
                "plan": planned, "verify": laps.get("verify", 0.0), "write": wrote, "files": sum(files),
                "peak": _status("VmHWM"), "own": peak[0],  "changed": len(written.changed), "verdict": str(said.verdict),
            }
        )
    )  # fmt: skip


def _timed(module: Any, name: str) -> list[float]:
    """The seconds of every call of a function from now on."""
    function, taken = getattr(module, name), list[float]()

    def timed(*args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        result = function(*args, **options)
        taken.append(time.perf_counter() - started)
        return result

    setattr(module, name, timed)
    return taken


def _status(name: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").open() if line.startswith(name))


def _watched() -> list[int]:
    """The most that the process holds by itself, looked at fifty times a second."""
    peak = [0]

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], _status("RssAnon"))
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()
    return peak


@contextlib.contextmanager
def limited(size: int) -> Iterator[tuple[list[str], str]]:
    """The start of a command that may have so many bytes of memory, the cache of its files among them; and what limits it."""
    for home in GROUPS:
        group = home / f"normfuse-{os.getpid()}"
        with contextlib.suppress(OSError):
            group.mkdir()
            file = next((group / name for name in LIMITS if (group / name).exists()), None)
            if file is None:
                group.rmdir()
                continue
            file.write_text(str(size))
            try:
                yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "limited"], "a control group"
            finally:
                with contextlib.suppress(OSError):
                    group.rmdir()
            return
    if shutil.which("systemd-run"):
        yield ["systemd-run", "--user", "--scope", "--quiet", "-p", f"MemoryMax={size}", "--"], "systemd-run"
    else:
        yield [], "nothing (no control groups here)"


def copied(command: Sequence[str], folder: Path, out: Path) -> float:
    """Seconds that `cp` takes, until what it wrote is on the disk."""
    started = time.perf_counter()
    subprocess.run([*command, "cp", "-r", str(folder), str(out)], check=True)
    for file in out.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    return time.perf_counter() - started


def measured(command: Sequence[str], folder: Path, out: Path, passes: str, level: str) -> Taken:
    child = [*command, sys.executable, "-m", "benchmarks.large_checkpoint", str(folder), "--child", str(out), passes, level]
    done = subprocess.run(child, check=True, capture_output=True, text=True)
    found: Taken = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="on the disk that is measured; removed afterwards")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[2.0, 4.0, 8.0, 14.5])
    parser.add_argument("--limit-gib", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", default="pre_rmsnorm")
    parser.add_argument("--levels", nargs="*", default=["structure"], help="each other than structure is run once")
    parser.add_argument("--keep", action="store_true", help="keep the folders that were made")
    options = parser.parse_args()
    rows, proofs = [], []
    for gigabytes in options.gigabytes:
        folder, out = options.folder / f"neox-{gigabytes:g}", options.folder / "out"
        if not folder.exists():
            make(folder, layers_for(gigabytes), 2 * 10**9)
        size = sum(file.stat().st_size for file in folder.iterdir())
        copies, writes = [], []
        with limited(int(options.limit_gib * 2**30)) as (command, by):
            for _ in range(options.rounds):
                copies.append(copied(command, folder, out))
                shutil.rmtree(out)
                writes.append(measured(command, folder, out, options.passes, "structure"))
                shutil.rmtree(out)
            rows.append((size, copies, writes))
            for level in options.levels:
                if level != "structure":
                    proofs.append((size, level, measured(command, folder, out, options.passes, level)))
                    shutil.rmtree(out)
        if not options.keep:
            shutil.rmtree(folder)
    _print(rows, proofs, options.limit_gib, by, options.passes)


def _print(
    rows: Sequence[tuple[int, list[float], list[dict[str, float]]]],
    proofs: Sequence[tuple[int, str, dict[str, float]]],
    limit: float,
    by: str,
    passes: str,
) -> None:
    print(f"{passes}, bfloat16, limited to {limit:g} GiB by {by}; medians, and least over least for the ratio\n")
    print(
        "| size | tensors changed | plan | write | its files | `cp` | MB/s | of `cp` | medians | minima | limit | peak | own |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for size, copies, writes in rows:
        wrote = [each["write"] for each in writes]
        middle, copy = statistics.median(wrote), statistics.median(copies)
        files = statistics.median(each["files"] for each in writes)
        plan = statistics.median(each["plan"] for each in writes)
        peak, own = (max(each[name] for each in writes) / 2**30 for name in ("peak", "own"))
        print(
            f"| {size / 1e9:.1f} GB | {writes[0]['changed']} | {plan:.1f} s | {middle:.1f} s | {files:.1f} s | {copy:.1f} s | "
            f"{size / 1e6 / middle:.0f} | {size / 1e6 / copy:.0f} | {middle / copy:.2f} | "
            f"{min(wrote) / min(copies):.2f} | 1.30 | {peak:.2f} GiB | {own:.2f} GiB |"
        )
    if proofs:
        print("\nThe proof of the same, one run\n")
        print("| size | level | verdict | all of it | peak | of its own |")
        print("|---|---|---|---|---|---|")
    for size, level, each in proofs:
        whole = each["plan"] + each["verify"] + each["write"]
        print(
            f"| {size / 1e9:.1f} GB | {level} | {each['verdict']} | {whole:.0f} s | {each['peak'] / 2**30:.2f} GiB | "
            f"{each['own'] / 2**30:.2f} GiB |"
        )


if __name__ == "__main__":
    if "--child" in sys.argv:
        rewritten(sys.argv[1], *sys.argv[3:])
    else:
        recorded(main)
