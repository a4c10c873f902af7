"""`normfuse.rewrite`: plan, apply, prove."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

from torch import nn

from normfuse.analysis.choice import Choice
from normfuse.analysis.facts import norm_counts
from normfuse.api.opening import Given, Model, Tracer, brought, files_of, served, to_program
from normfuse.api.result import Result
from normfuse.errors import InputError, one_of
from normfuse.exporters import eager_cpu
from normfuse.graph.findings import Claim
from normfuse.graph.interpreter import flat_inputs
from normfuse.graph.kept_tensors import only_read, own_state
from normfuse.graph.program import Program
from normfuse.graph.views import NormKind
from normfuse.modules import live_program
from normfuse.modules.module_plan import FOR_CLASS, plan_for_modules
from normfuse.planning.planner import Plan, plan_and_apply
from normfuse.planning.registry import requested
from normfuse.proof.cases import cases_for
from normfuse.proof.evidence import COMPARED, Evidence, checked
from normfuse.proof.fidelity import traced
from normfuse.proof.loaded_back import called_as_written
from normfuse.proof.measuring import Progress
from normfuse.proof.proving import checked_level, prove
from normfuse.report.report import Report
from normfuse.sources.inputs import Inputs
from normfuse.sources.source import Source
from normfuse.transforms.swallowed_variance import measured


def rewrite(
    model: Model,
    passes: str | Sequence[str],
    inputs: Given = None,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    *,
    mode: str = "deploy",
    verify: str = "full",
    allow: str = "rounding",
    only: str | Sequence[str] = (),
    skip: str | Sequence[str] = (),
    trust_pickle: bool = False,
    keep_unread: bool = False,
    same_class: bool | None = None,
    progress: Progress | None = None,
) -> Result:
    """Rewrite the norms of a trained model, and prove that its outputs stay the same.

    Args:
        model: an `nn.Module`, an `ExportedProgram`, a `Program`, a `Result`, or the path of a saved one. It is not changed.
        passes: names of passes, or ``"all"`` for those of `normfuse.planning.registry.ALL`, which contain the others.
        inputs: example positional inputs, or a loader of several examples such as a `torch.utils.data.DataLoader`, of whose
            tuples the arguments that the forward requires are taken (`normfuse.sources.batches`); found on the model
            (`normfuse.sources.found_inputs`) when None.
        kwargs: example keyword inputs.
        dynamic_shapes: as for `torch.export.export`.
        mode: ``deploy`` evaluates the new weights. ``live`` is for training: the result keeps the original's own parameters
            and computes the new weights from them at every call, so that gradients and optimizers are the original's. A
            module is then traced as it is set, in training or in evaluation mode.
        verify: ``full`` (the trace is the module; structure, float64 algebra, rounding), ``regions`` (the same of each region
            of the rewrite by itself, which together imply the whole, in a region's memory), ``structure`` (nothing is run),
            or ``none``.
        allow: the weakest claim that may run: ``exact``, ``rounding`` or ``approximate``.
        only: globs over the paths of modules, such as ``"*.ln_1"``: the norms that may be rewritten; all of them if there is
            none. What is not chosen stays as it is, and everything else is planned around it.
        skip: globs of norms that stay, such as ``"transformer.h.0.*"``; ``--keep`` on the command line.
        trust_pickle: load a pickled file with the full unpickler, which can run any code that the file holds.
        keep_unread: keep tensors that the rewritten program does not read, such as a folded norm's; in live mode all are kept.
        same_class: rewrite only what the model's own class can hold, so that `Result.save` can write a folder or a checkpoint
            of the same kind; None for what was brought as one.
        progress: called with (what, done, total) while the proof runs.

    Returns:
        The rewritten program with its report; with no rewrite possible, the original and the reasons.

    Raises:
        LoadError: the file cannot or may not be read.
        InputError: no example inputs are known, or they do not fit; or ``only`` or ``skip`` names no norm.
        TraceError: torch.export cannot trace the model, or the trace is another function than the model.
        NormfuseError: there is no such mode, or the model is a live result.
        VerificationFailed: the result is not equivalent; this would be a bug of normfuse.
    """
    checked_level(verify)
    trace = _tracer(mode, verify)
    clock = _Clock()
    start = served(model).planned if isinstance(model, Result) else brought(model, trust_pickle)
    source = start if isinstance(start, Source) else None
    inputs = model.inputs if isinstance(model, Result) and inputs is None else inputs
    name, original, given = to_program(start, inputs, kwargs, dynamic_shapes, trust_pickle, trace)
    clock.lap("trace")
    allowed, choice = Claim.named(allow), Choice.of(only, skip)
    for_class = _for_class(source, same_class, mode)
    if for_class:
        chosen, planned = _planned_for_class(original, source, requested(passes), allowed, choice)
    else:
        seen = measured(original, lambda: (case.flat for case in cases_for(original, given))) if verify in COMPARED else None
        chosen, planned = plan_and_apply(original, requested(passes), allow=allowed, choice=choice, variance_of=seen)
    rewritten = live_program.alive(planned) if mode == "live" else planned
    clock.lap("plan")
    evidence = Evidence("none")
    if verify != "none":
        tried = cases_for(original, given)
        evidence = prove(original, rewritten, chosen, tried, promised=planned, level=verify, progress=progress)
    clock.lap("verify")
    form = cache(partial(_evaluated, rewritten, chosen, mode, keep_unread))
    if not for_class:  # for a class, what is written is compared
        form()
    clock.lap("write")
    if evidence.ok and not evidence.unchanged and not for_class:
        flat = flat_inputs(original, given.args, given.kwargs)
        evidence = called_as_written(original, rewritten, form(), flat, evidence)
    clock.lap("verify")
    counted = evidence.structure  # the proof has counted the norms already
    before, after = (counted.norms_before, counted.norms_after) if counted else (norm_counts(original), norm_counts(planned))
    spelled = _of_its_class(chosen) if for_class else eager_cpu.notes(original, planned)
    notes = (*original.notes, *given.notes, *spelled)
    report = Report(name, chosen, evidence, before, after, clock.laps, notes)
    checked(evidence, report)
    return Result(
        form, report, given, planned, files_of(start if source else model), mode,
        training=mode == "live" and getattr(model, "training", False), source=source,
        original=original if source else None,
    )  # fmt: skip


def _evaluated(rewritten: Program, chosen: Plan, mode: str, keep_unread: bool) -> Program:
    """What leaves as a program."""
    written = rewritten.baked()
    if mode == "live":  # which is the original's own tensors, all of them
        return written
    return own_state(written if keep_unread or not chosen.rounds else only_read(written))


def _of_its_class(chosen: Plan) -> tuple[str, ...]:
    """What to say of norms that a class goes on computing as it did."""
    if not any(each.becomes == "rms_norm" and NormKind.LAYER_NORM in each.was for each in chosen.rewrites):
        return ()
    return ("the model's own class goes on calling layer_norm, of a mean that is zero: rms_norm, in what it computes",)


def _for_class(source: Source | None, same_class: bool | None, mode: str) -> bool:
    is_kept = source is not None and source.stored is not None and mode == "deploy"
    if same_class and not is_kept:
        raise InputError("only a folder or a checkpoint is written as it came, in deploy mode", hint="leave out same_class")
    return is_kept if same_class is None else same_class


def _planned_for_class(
    original: Program, source: Source | None, passes: Sequence[str], allow: Claim, choice: Choice
) -> tuple[Plan, Program]:
    assert source is not None
    assert source.stored is not None
    assert isinstance(source.model, nn.Module)
    held = source.stored.as_they_are
    made = plan_for_modules(
        original, passes, allow, source.model, choice=choice, same_keys=True, stored=held, hint=FOR_CLASS
    )  # fmt: skip
    chosen = made.plan
    return chosen, chosen.apply(original)


def _unchecked(module: nn.Module, given: Inputs) -> Program:
    return traced(module, given, check=False)


def _tracer(mode: str, level: str) -> Tracer:
    if one_of(mode, ("deploy", "live"), "mode") == "live":
        return live_program.traced_as_set
    return traced if level in COMPARED else _unchecked


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage] = self.laps.get(stage, 0.0) + now - self._last
        self._last = now
