"""Kill a run at many moments, and see what it leaves: at each of its system calls, or at moments of the clock.

killed_at_every_step(work, prepare=…, check=…)    SIGKILL just before each call to the system that Python makes
killed_at_moments(words, moments, prepare=…, check=…)    the command line, killed at moments spread over its whole run
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CALLS = (
    "open",
    "fsync",
    "replace",
    "rename",
    "link",
    "symlink",
    "mkdir",
    "rmdir",
    "unlink",
    "scandir",
    "close",
    "pwrite",
    "copy_file_range",
    "truncate",
)


def killed_at_every_step(work: Callable[[], Any], *, prepare: Callable[[], Any], check: Callable[[], Any]) -> int:
    """Run `work` in a child that is killed before its first call to the system, then before its second, and so on.

    Args:
        work: what is to be killed.
        prepare: makes the state that it starts from.
        check: looks at what is left.

    Returns:
        The number of kills.
    """
    for step in itertools.count():
        prepare()
        ended = _forked(lambda step=step: _counted(work, step))  # type: ignore[misc]
        check()
        if ended == 0:
            return step
        assert ended == -signal.SIGKILL, ended
    raise AssertionError


def killed_at_moments(
    words: Sequence[object], moments: int, *, prepare: Callable[[], Any], check: Callable[[], Any]
) -> tuple[int, float]:
    """Run a command of normfuse in children that are killed at moments spread evenly over the time that it takes.

    Args:
        words: the words of the command, without ``normfuse``.
        moments: how many kills.
        prepare: makes the state that it starts from.
        check: looks at what is left; called after the whole run as well.

    Returns:
        How many were killed before they were done, and the seconds that a whole run takes.
    """

    def work() -> None:
        from normfuse.cli import main

        main([str(word) for word in words])

    prepare()
    started = time.perf_counter()
    assert _forked(work) == 0, words
    whole = time.perf_counter() - started
    check()
    killed = 0
    for moment in range(moments):
        prepare()
        killed += _forked(work, after=whole * (moment + 0.5) / moments) == -signal.SIGKILL
        check()
    return killed, whole


def _forked(work: Callable[[], Any], *, after: float | None = None) -> int:
    """The exit code of a child that does the work, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        as_child(work)
    if after is not None:
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def as_child(work: Callable[[], Any], said: Path = Path(os.devnull)) -> None:
    """Do the work as a process that was forked, which ends with it.

    Args:
        work: what is done.
        said: a file for what it says.
    """
    code = 3
    try:
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(out, number)
            setattr(sys, name, os.fdopen(number, "w", buffering=1))
        work()
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


def _counted(work: Callable[[], Any], step: int) -> None:
    """Do the work, and be killed before call number `step`."""
    calls = itertools.count()

    def counting(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            if next(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return counted

    for name in CALLS:
        setattr(os, name, counting(getattr(os, name)))
    work()
