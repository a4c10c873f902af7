"""`Recovery` in transformers' `Trainer`."""

from __future__ import annotations

from typing import Any

import torch

from normfuse.errors import NormfuseError
from normfuse.sources.packages import package
from normfuse.stripping.recovery import Recovery


def trainer_callback(recovery: Recovery) -> Any:
    """A callback that makes a `Trainer` follow a recovery's schedule: ``Trainer(..., callbacks=[trainer_callback(recovery)])``.

    Before training it checks that the run is long enough. While training it adds the auxiliary loss to the loss that the model
    returns, and stops with `Diverged` when that is no number. ``resume_from_checkpoint`` works: what was removed is in the
    checkpoint.

    Args:
        recovery: of the model that the trainer trains.

    Raises:
        MissingExtra: transformers is not installed.
    """
    base: Any = package("transformers").TrainerCallback

    class RecoveryCallback(base):  # type: ignore[misc]
        """Follows the schedule; the steps are the optimizer's, whatever gradient accumulation does."""

        def __init__(self) -> None:
            self.accumulated = 1
            self.hook: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
            """Check the length of the run and listen to the model."""
            recovery.require(state.max_steps)
            if model is not None and recovery.model not in model.modules():
                raise NormfuseError("the trainer trains another model than the one that the recovery was made for")
            self.on_train_end(args, state, control)  # of a training that was broken off
            self.accumulated = args.gradient_accumulation_steps
            self.hook = recovery.model.register_forward_hook(self.add_loss, with_kwargs=True)

        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            """Make the removals that are due."""
            recovery.begin(state.global_step)

        def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            """Leave the model alone."""
            if self.hook is not None:
                self.hook.remove()

        def add_loss(self, model: Any, args: Any, kwargs: Any, outputs: Any) -> None:
            """The auxiliary loss, a share of it where the trainer adds up losses that are normalized already."""
            if model.training and torch.is_grad_enabled() and getattr(outputs, "loss", None) is not None:
                own = outputs["loss"]
                shares = self.accumulated if kwargs.get("num_items_in_batch") is not None else 1
                outputs["loss"] = own + (recovery.loss(own) - own) / shares

    return RecoveryCallback()
