"""A command that would not end is stopped, also where a library swallows errors, and leaves signals as they were."""

from __future__ import annotations

import contextlib
import signal
import threading
import time

import pytest

from normfuse import limits
from normfuse.cli import app, deadline
from normfuse.limits import OverLimit


def endless() -> int:
    while True:
        with contextlib.suppress(Exception):
            time.sleep(0.01)


def swallowing_once() -> int:
    with contextlib.suppress(BaseException):
        endless()
    return endless()


def test_a_command_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(limits, "SECONDS", 1)
    begin, before = time.monotonic(), signal.getsignal(signal.SIGALRM)
    assert app._answer(endless, []) == 2
    assert time.monotonic() - begin < 8
    told = capsys.readouterr().err
    assert "the limit SECONDS is 1" in told
    assert "NORMFUSE_LIMIT_SECONDS=" in told
    assert "bug" not in told
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_stop_that_is_swallowed_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SECONDS", 1)
    monkeypatch.setattr(deadline, "AGAIN", 0.2)
    with pytest.raises(OverLimit), deadline.in_time():
        swallowing_once()


def test_no_time_is_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0)
    with deadline.in_time():
        time.sleep(0.05)


def test_a_timer_of_somebody_else_stays() -> None:
    signal.setitimer(signal.ITIMER_REAL, 500)
    try:
        with deadline.in_time():
            assert 400 < signal.getitimer(signal.ITIMER_REAL)[0] <= 500
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 400
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def test_other_threads_have_no_timer() -> None:
    def enter() -> None:
        with deadline.in_time():
            done.append(signal.getitimer(signal.ITIMER_REAL)[0])

    done: list[float] = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert done == [0.0]
