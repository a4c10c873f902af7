"""`normfuse.tune`, `deploy` and `restore`: plans made on the live module, in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from normfuse.analysis.choice import Choice
from normfuse.api.opening import Given, inputs_for
from normfuse.graph.findings import Claim
from normfuse.modules.deploy import deploy_modules, evaluate_formulas, restore_modules
from normfuse.modules.tune import tune_modules
from normfuse.planning.registry import requested
from normfuse.proof.measuring import Progress
from normfuse.proof.proving import checked_level
from normfuse.sources.batches import warn_of

Module = TypeVar("Module", bound=nn.Module)


def tune(
    model: Module,
    passes: str | Sequence[str],
    inputs: Given = None,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    *,
    verify: str = "full",
    allow: str = "rounding",
    only: str | Sequence[str] = (),
    skip: str | Sequence[str] = (),
    progress: Progress | None = None,
) -> Module:
    """Rewrite a live model for training, in place: its layers read formulas of its own parameters (live mode, *Tune*).

    Gradients reach the original parameters and equal the original model's; the state dict, optimizers, hooks and training
    modes are as before. A BatchNorm that is set to train turns its rewrite off by itself, and on again.

    Args:
        model: the model; its class, its parameters and its state dict stay.
        passes: names of passes, or ``"all"`` for those of `normfuse.planning.registry.ALL`, which contain the others.
        inputs: as for `rewrite`.
        kwargs: as for `rewrite`.
        dynamic_shapes: as for `rewrite`.
        verify: as for `rewrite`.
        allow: as for `rewrite`.
        only: as for `rewrite`.
        skip: as for `rewrite`.
        progress: as for `rewrite`.

    Returns:
        The same object. A `NormfuseWarning` says what could not be rewritten on modules.

    Raises:
        InputError: no example inputs are known, or they do not fit; or ``only`` or ``skip`` names no norm.
        TraceError: torch.export cannot trace the model, in evaluation mode or as it trains.
        CannotApply: nothing can be rewritten; the error lists the reasons.
        VerificationFailed: the result is not equivalent; the model is put back.
    """
    given = inputs_for(model, inputs, kwargs, dynamic_shapes)
    warn_of(given)
    tune_modules(
        model, requested(passes), given,
        allow=Claim.named(allow), choice=Choice.of(only, skip), level=checked_level(verify), progress=progress,
    )  # fmt: skip
    return model


def deploy(
    model: Module,
    passes: str | Sequence[str] | None = None,
    inputs: Given = None,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    *,
    keep: bool = False,
    verify: str = "full",
    allow: str = "rounding",
    only: str | Sequence[str] = (),
    skip: str | Sequence[str] = (),
    progress: Progress | None = None,
) -> Module:
    """Rewrite a live model for inference, in place: its tensors take the formulas' values (*Deploy*).

    What is saved of the model is the same function in its own class, or is not loaded by it strictly: gains that were folded
    are ones, statistics do nothing. A second deploy goes on from the first.

    Args:
        model: the model; its class stays.
        passes: names of passes, or ``"all"``; None to evaluate the formulas of a tuned model.
        inputs: as for `rewrite`.
        kwargs: as for `rewrite`.
        dynamic_shapes: as for `rewrite`.
        keep: keep the model's own tensors, so that `restore` can put them back.
        verify: as for `rewrite`.
        allow: as for `rewrite`.
        only: as for `rewrite`.
        skip: as for `rewrite`.
        progress: as for `rewrite`.

    Returns:
        The same object. A `NormfuseWarning` says what could not be rewritten on modules.

    Raises:
        InputError: no example inputs are known, or they do not fit; or ``only`` or ``skip`` names no norm.
        TraceError: torch.export cannot trace the model.
        CannotApply: nothing can be rewritten; the error lists the reasons.
        VerificationFailed: the result is not equivalent; the model is put back.
    """
    if passes is None:
        evaluate_formulas(model, keep=keep)
        return model
    given = inputs_for(model, inputs, kwargs, dynamic_shapes)
    warn_of(given)
    deploy_modules(
        model, requested(passes), given,
        allow=Claim.named(allow), choice=Choice.of(only, skip), level=checked_level(verify), keep=keep, progress=progress,
    )  # fmt: skip
    return model


def restore(model: Module) -> Module:
    """The untouched model behind a tuned one, or behind one that was deployed with ``keep=True``: in place, bit for bit.

    Raises:
        NormfuseError: the model was deployed and its own tensors were not kept.
    """
    restore_modules(model)
    return model
