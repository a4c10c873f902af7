"""A command of normfuse as torchrun starts it: several processes at once, each with its rank in the environment.

Forked here, which takes a second where torchrun takes ten; the tests that are slow ask torchrun itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.kills import as_child


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code, or minus the signal that ended it; and what it has said."""

    code: int
    said: str


def asked_by_ranks(
    words: Sequence[object],
    count: int,
    place: Path,
    *,
    first: Callable[[int], Any] = lambda rank: None,
    kills: int | None = None,
    after: float = 0.0,
    within: float = 60.0,
) -> list[Ended]:
    """Run a command in several processes.

    Args:
        words: the words of the command, without ``normfuse``.
        count: how many processes.
        place: a folder for what they say.
        first: called in each of them before, with its rank.
        kills: the rank to kill.
        after: when, in seconds.
        within: seconds after which a rank that has not ended is an error.
    """
    port = _free_port()
    children = [_forked(words, rank, count, port, place / f"said-{rank}", first) for rank in range(count)]
    if kills is not None:
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(children[kills], signal.SIGKILL)
    until = time.monotonic() + within
    codes = [_ended(child, until) for child in children]
    return [Ended(code, (place / f"said-{rank}").read_text()) for rank, code in enumerate(codes)]


def _forked(words: Sequence[object], rank: int, count: int, port: int, said: Path, first: Callable[[int], Any]) -> int:
    child = os.fork()
    if child:
        return child

    def work() -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ["TORCHELASTIC_RUN_ID"] = "none"
        first(rank)
        from normfuse.cli import main

        main([str(word) for word in words])

    as_child(work, said)
    raise AssertionError("a child ends there")


def _ended(child: int, until: float) -> int:
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError("a rank has not ended")
        time.sleep(0.01)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
