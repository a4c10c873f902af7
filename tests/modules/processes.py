"""Functions that run on several processes at once, which hold one model together (gloo, on this machine)."""

from __future__ import annotations

import datetime
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

WAIT = 100.0
"""Seconds until a process that does not come is given up."""


def _process(rank: int, size: int, rendezvous: str, function: Callable[..., Any], args: tuple[Any, ...], found: Any) -> None:
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=WAIT / 2)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size, timeout=patience)
    try:
        answer: Any = function(*args)
    except BaseException:
        answer = AssertionError(f"process {rank}: {traceback.format_exc()}")
    found.put((rank, answer))
    found.close()
    found.join_thread()
    os._exit(0)  # no destructors: gloo's thread may want the GIL, with which the main thread would wait for it


def on_processes(function: Callable[..., Any], *args: Any, size: int = 2, start: str = "fork") -> list[Any]:
    """What a function returns on each of some processes of one group, which raise here what they raise there.

    Args:
        function: what runs; what it returns is pickled.
        args: its arguments.
        size: how many processes.
        start: ``fork``, or ``spawn`` for interpreters of their own, which order their sets differently.
    """
    context: Any = torch.multiprocessing.get_context(start)
    found = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{folder}/rendezvous"
        every = [
            context.Process(target=_process, args=(rank, size, rendezvous, function, args, found), daemon=True)
            for rank in range(size)
        ]
        for each in every:
            each.start()
        answers = dict(found.get(timeout=WAIT) for _ in every)
        for each in every:
            each.join(timeout=5)
    for rank in range(size):
        if isinstance(answers[rank], AssertionError):
            raise answers[rank]
    return [answers[rank] for rank in range(size)]
