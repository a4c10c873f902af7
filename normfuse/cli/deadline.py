"""A command of the command line ends: after `limits.SECONDS` it is stopped, wherever it is."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from normfuse import limits
from normfuse.limits import OverLimit

AGAIN = 10.0
"""Seconds until it is stopped again, if a library has swallowed the first stop."""


class _OutOfTime(BaseException):
    """No `Exception`: torch.export answers those with errors of its own, and goes on."""


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """Stop what runs inside when its time is over; not outside of the main thread, nor where there is no timer or it is in use.

    Raises:
        OverLimit: it was not done in time. One operator is never cut short: the error comes when it is done.
    """
    own = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not own or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limits.SECONDS, AGAIN)
    try:
        yield
    except _OutOfTime:
        raise OverLimit("this takes too many seconds", "SECONDS") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
