"""The processes that torchrun has started for one command: rank 0 does it, and the others help where it asks them to.

    torchrun --nproc-per-node 4 -m normfuse rewrite FOLDER …

They speak over a process group of torch's (gloo), in texts. A rank that dies closes its connections, which the others see at
once; and torchrun ends them all then. Nobody waits longer for another one than a command may take (`limits.SECONDS`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import TYPE_CHECKING

from normfuse import limits
from normfuse.sources.atomic import Unfinished

if TYPE_CHECKING:  # a command line that only helps is quicker without
    from torch import Tensor

_ENDLESS = 366 * 86_400
_GONE = "run the same command again: what was done already is looked at, and stays where it is right"


def started() -> int:
    """How many processes torchrun has started for this command; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def own() -> int:
    """The rank of this process."""
    return int(os.environ["RANK"]) if started() > 1 else 0


def joined() -> int:
    """How many processes work on this command together by now; 1 in a script that has ranks and groups of its own."""
    return started() if _together.get() else 1


_together: ContextVar[bool] = ContextVar("together", default=False)


@contextmanager
def group() -> Iterator[None]:
    """Be one of the processes of a command, where torchrun has started several; rank 0 tells the others when it is done."""
    if started() == 1:
        yield
        return
    from torch import distributed

    with _lost():
        distributed.init_process_group("gloo", timeout=timedelta(seconds=limits.SECONDS or _ENDLESS))
    before = _together.set(True)
    try:
        yield
        _dismiss()
    except Exception:
        _dismiss()
        raise
    finally:  # without a word where the process is stopped: the others see that it is gone
        _together.reset(before)
        with suppress(RuntimeError):
            distributed.destroy_process_group()


def _dismiss() -> None:
    if own() == 0:
        with suppress(Unfinished):
            tell("")


def tell(text: str) -> None:
    """Rank 0: send a text to all others.

    Raises:
        Unfinished: one of them is gone.
    """
    import torch

    data = _bytes(text)
    with _lost():
        torch.distributed.broadcast(torch.tensor([len(data)]), 0)
        torch.distributed.broadcast(data, 0)


def hear() -> str:
    """The others: wait for what rank 0 tells; nothing when it is done.

    Raises:
        Unfinished: it is gone.
    """
    import torch

    size = torch.zeros(1, dtype=torch.int64)
    with _lost():
        torch.distributed.broadcast(size, 0)
        data = torch.empty(int(size), dtype=torch.uint8)
        torch.distributed.broadcast(data, 0)
    return _text(data)


def exchanged(text: str) -> list[str]:
    """What every rank has to say, told to all of them.

    Raises:
        Unfinished: one of them is gone.
    """
    import torch

    data = _bytes(text)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(started())]
    with _lost():
        torch.distributed.all_gather(sizes, torch.tensor([len(data)]))
        longest = max(map(int, sizes))
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
        torch.distributed.all_gather(texts, torch.cat([data, data.new_zeros(longest - len(data))]))
    return [_text(each[: int(size)]) for each, size in zip(texts, sizes, strict=True)]


def spread(sizes: Sequence[tuple[str, int]]) -> list[list[str]]:
    """Names for every rank: the largest first, each to the rank that has least; the same wherever it is asked."""
    ranks: list[list[str]] = [[] for _ in range(started())]
    loads = [0] * len(ranks)
    for name, size in sorted(sizes, key=lambda each: (-each[1], each[0])):
        least = loads.index(min(loads))
        ranks[least].append(name)
        loads[least] += size
    return ranks


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of gloo, in several classes
        raise Unfinished("a process of this command is gone; nothing was put in its place", hint=_GONE) from error


def _bytes(text: str) -> Tensor:
    import torch

    return torch.tensor(list(text.encode("utf-8", "surrogatepass")), dtype=torch.uint8)


def _text(data: Tensor) -> str:
    return data.numpy().tobytes().decode("utf-8", "surrogatepass")
