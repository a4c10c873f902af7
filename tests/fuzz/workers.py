"""Runs commands in `tests.fuzz.worker` processes and judges what they did."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.fuzz.worker import Answer

SECONDS = 10.0
"""Of a processor, for one command; a busy machine makes no hang."""
WALL = 120.0
REPOSITORY = Path(__file__).parents[2]


class Worker:
    """A process, started again after a hang or a death.

    Args:
        folder: where commands run, and the only place where they may write.
        bait: a folder that hostile files try to write to.
        warm: commands that are run first, before memory is limited.
    """

    def __init__(self, folder: Path, bait: Path, warm: Sequence[Sequence[str]]) -> None:
        self.folder, self.bait, self.warm = folder, bait, [list(each) for each in warm]
        self.process: subprocess.Popen[str] | None = None

    def _started(self) -> subprocess.Popen[str]:
        if self.process is None or self.process.poll() is not None:
            environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{self.bait.parent / 'strangers'}"}
            words = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.worker", str(self.folder)]
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self.process = subprocess.Popen(words, text=True, cwd=REPOSITORY, env=environment, **pipes)
            self._ask(self.warm, limit=600.0)
        return self.process

    def _ask(self, what: Any, limit: float) -> Any:
        """The answer; None after a hang or a death."""
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(what), file=process.stdin, flush=True)
        before, started = _seconds_of(process.pid), time.monotonic()
        while not select.select([process.stdout], [], [], 0.2)[0]:
            if _seconds_of(process.pid) - before > limit or time.monotonic() - started > max(limit, WALL):
                process.kill()
                process.wait()
                return None
        line = process.stdout.readline()
        if not line:
            process.wait()
        return json.loads(line) if line else None

    def verdict(self, words: Sequence[str]) -> tuple[str, str]:
        """What a command did, in a word, and the particulars."""
        process = self._started()
        answer = self._ask(list(words), SECONDS)
        left = sorted(each.name for each in self.bait.iterdir())
        for name in left:
            shutil.rmtree(self.bait / name) if (self.bait / name).is_dir() else (self.bait / name).unlink()
        if answer is None:
            died = process.returncode not in (None, -9)
            return ("died", f"signal {-process.returncode}") if died else ("hang", f"more than {SECONDS:g} s")
        return judged(Answer(**answer), left)

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def judged(answer: Answer, left: Sequence[str]) -> tuple[str, str]:
    """A word for an answer, the worst first."""
    if answer.acts:
        return "execution", answer.acts[0]
    if answer.files or left:
        return "file effect", (answer.files or [f"{left[0]} was written"])[0]
    if "MemoryError" in answer.raised + answer.said or "can't allocate memory" in answer.said:
        return "memory", (answer.raised or answer.said)[-300:]
    if answer.raised or "Traceback (most recent call last)" in answer.said:
        return "traceback", (answer.raised or answer.said)[-300:]
    if "this is a bug of normfuse" in answer.said:
        return "bug", answer.said[-400:]
    if any(ord(each) < 32 and each not in "\n\t\r" for each in answer.said):
        return "control characters", repr(answer.said[-200:])
    return {0: "answered", 1: "answered", 2: "refused"}.get(answer.code or 0, f"exit {answer.code}"), ""


GOOD = {"answered", "refused"}


def _seconds_of(pid: int) -> float:
    """Processor time that a process has taken."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
