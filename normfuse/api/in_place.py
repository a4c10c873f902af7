"""`normfuse.tune`, `deploy` and `restore`: plans made on the live module, in place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from normfuse.analysis.choice import Choice
from normfuse.api.opening import Given, inputs_for
from normfuse.errors import InputError
from normfuse.graph.findings import Claim
from normfuse.modules.deploy import deploy_modules, evaluate_formulas, restore_modules
from normfuse.modules.tune import tune_modules
from normfuse.planning.registry import requested
from normfuse.proof.measuring import Progress
from normfuse.proof.proving import checked_level
from normfuse.sources.batches import warn_of
from normfuse.sources.source import Source

Module = TypeVar("Module", bound=nn.Module | Source)


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
        model: the model, or what `normfuse.open` made of a folder or a file; its class, its parameters and its state dict stay.
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
    live = _live(model)
    given = inputs_for(live, inputs, kwargs, dynamic_shapes)
    warn_of(given)
    tune_modules(
        live, requested(passes), given,
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
        model: the model, or what `normfuse.open` made of a folder or a file; its class stays.
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
    live = _live(model)
    if passes is None:
        evaluate_formulas(live, keep=keep)
        return model
    given = inputs_for(live, inputs, kwargs, dynamic_shapes)
    warn_of(given)
    deploy_modules(
        live, requested(passes), given,
        allow=Claim.named(allow), choice=Choice.of(only, skip), level=checked_level(verify), keep=keep, progress=progress,
    )  # fmt: skip
    return model


def restore(model: Module) -> Module:
    """The untouched model behind a tuned one, or behind one that was deployed with ``keep=True``: in place, bit for bit.

    Raises:
        NormfuseError: the model was deployed and its own tensors were not kept.
    """
    restore_modules(_live(model))
    return model


def _live(model: Any) -> nn.Module:
    """The module that is changed in place."""
    live = model.model if isinstance(model, Source) else model
    if isinstance(live, nn.Module):
        return live
    if isinstance(live, str | Path):
        raise InputError(
            f"{live} is a path, and a live module is changed in place", hint=f"open it first: normfuse.open({str(live)!r})"
        )
    what = f"the model of {model.name}" if isinstance(model, Source) else f"a {type(live).__name__}"
    raise InputError(
        f"{what} is no module that could be changed in place", hint="normfuse.rewrite(model, passes) makes another one"
    )
