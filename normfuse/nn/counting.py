"""What counts as one iteration, for norms that keep state while they train.

A norm that remembers something between batches is wrong when a batch is counted twice. Three things run a forward pass more
often than the optimizer steps:

Activation checkpointing
    The forward runs again inside the backward. `Calls` hands the second run what the first one used and nothing is counted.
    Both kinds of `torch.utils.checkpoint` work.

Gradient accumulation, and modules that are called several times in one forward
    With ``schedule="forward"`` every forward call is an iteration, as published and as in torch's BatchNorm. With
    ``schedule="step"`` all forward calls between two calls of `step` are one iteration::

        optimizer.step()
        normfuse.nn.step(model)

    or, once for all: ``optimizer.register_step_post_hook(lambda *_: normfuse.nn.step(model))``.

BatchNorm inside our modules
    `batch_norm` leaves the running statistics alone while an activation is recomputed. Otherwise it is torch's BatchNorm: its
    statistics move once per forward call. One case counts twice, as with torch's own: a function compiled by itself and then
    checkpointed from outside. Put the checkpoint into what is compiled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import wraps
from typing import Any, Generic, Literal, ParamSpec, TypeAlias, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

IterationEnd: TypeAlias = Literal["forward", "step"]
T = TypeVar("T")
P = ParamSpec("P")

REMEMBERED = 64  # forward calls that a recomputation is looked for among; only a few numbers are kept of each
SAMPLES = 256  # values of an input that identify it
SAME = 1e-2  # relative distance of the samples of two runs on the same input: kernels may differ in rounding


class Counted(nn.Module):
    """A norm that counts iterations, by itself or when it is told. Abstract.

    Args:
        schedule: "forward": every forward call in training is an iteration. "step": it ends when `step` is called.

    Raises:
        ValueError: the schedule is neither.
    """

    def __init__(self, schedule: IterationEnd) -> None:
        super().__init__()
        if schedule not in ("forward", "step"):
            raise ValueError(f"schedule is 'forward' or 'step', not {schedule!r}")
        self.schedule: IterationEnd = schedule

    def step(self) -> None:
        """End the iteration; call it after every step of the optimizer.

        Raises:
            RuntimeError: this norm counts its forward calls by itself.
        """
        if self.schedule != "step":
            raise RuntimeError("this norm counts its forward calls by itself; build it with schedule='step' to count steps")
        self._end_iteration()

    def _end_iteration(self) -> None:
        raise NotImplementedError


def step(model: nn.Module) -> None:
    """Tell every norm in ``model`` that was built with ``schedule="step"`` that the optimizer has stepped."""
    for module in model.modules():
        if isinstance(module, Counted) and module.schedule == "step":
            module.step()


def recomputing() -> bool:
    """Whether this forward runs inside a backward: activation checkpointing repeats an earlier forward.

    Compiled code does not ask, as asking would cut its graph at every norm.
    """
    return not torch.compiler.is_compiling() and bool(torch._C._current_graph_task_id() != -1)


def uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """The function, left to Python under torch.compile: it counts, and would be compiled anew for every count."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return cast(T, torch.compiler.disable(function)(*args, **kwargs))  # type: ignore[no-untyped-call]
        return function(*args, **kwargs)

    return call


class Calls(Generic[T]):
    """What the latest forward calls used, for the forward that repeats one of them. Copies and pickles are empty."""

    def __init__(self) -> None:
        self._latest: deque[tuple[torch.Size, Tensor, T]] = deque(maxlen=REMEMBERED)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def remember(self, x: Tensor, used: T) -> T:
        """Note what the forward on ``x`` used, and return it."""
        self._latest.append((x.shape, _samples(x), used))
        return used

    def recall(self, x: Tensor) -> T:
        """What the forward on this same input used; the latest one if there are several.

        Raises:
            RuntimeError: none of the latest forward calls had this input.
        """
        wanted = _samples(x)
        known = [(seen, used) for shape, seen, used in reversed(self._latest) if shape == x.shape]
        if known:
            distances = torch.stack([(seen.to(wanted) - wanted).norm() for seen, _ in known])
            nearest = int(distances.argmin())
            if float(distances[nearest]) <= SAME * float(wanted.norm()):
                return known[nearest][1]
        raise RuntimeError(
            "a forward in training runs inside a backward, and its input is none of the latest "
            f"{REMEMBERED} inputs of this norm. Activation checkpointing must repeat the same computation: leave "
            "preserve_rng_state on, and run the backward before many more forward calls"
        )


def _samples(x: Tensor) -> Tensor:
    x = x.detach()
    places = torch.linspace(0, x.numel() - 1, min(x.numel(), SAMPLES), device=x.device, dtype=torch.float64).long()
    return torch.take(x, places).float().nan_to_num()


def batch_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)``; a BatchNorm in training does not count the recomputation of an activation.

    `torch.nn.SyncBatchNorm` does: its statistics move twice under activation checkpointing.
    """
    if (
        isinstance(norm, _BatchNorm)
        and not isinstance(norm, nn.SyncBatchNorm)
        and norm.training
        and norm.running_mean is not None
        and norm.running_var is not None
        and recomputing()
    ):
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, momentum=0.0, eps=norm.eps)
    y: Tensor = norm(x)
    return y
