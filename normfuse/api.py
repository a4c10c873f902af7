"""The Python surface: `rewrite`, `inspect`, `verify`, `export`. Each is a few calls of the parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType
from typing import Any, TypeAlias, TypeVar

import torch
from rich.console import RenderableType
from rich.text import Text
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from normfuse import living, spelling
from normfuse.atomic import write_atomically
from normfuse.batches import taken, warn_of
from normfuse.errors import CannotApply, InputError, NormfuseError, one_of
from normfuse.escaping import escaped
from normfuse.facts import Facts, analyze
from normfuse.findings import Claim, Refusal
from normfuse.inputs import Inputs, as_inputs, found_on, is_loader
from normfuse.interpret import flat_inputs
from normfuse.live import tuning
from normfuse.loading import load
from normfuse.planner import Plan, plan, site_in
from normfuse.program import Program, Site
from normfuse.proof.cases import cases_for
from normfuse.proof.evidence import Evidence, checked
from normfuse.proof.fidelity import traced
from normfuse.proof.loaded_back import called_as_written
from normfuse.proof.proving import Progress, checked_level, prove
from normfuse.registry import ALL
from normfuse.registry import passes as all_passes
from normfuse.report import Report, norms_table, plain_table, refusals_lines
from normfuse.stored import only_read, own_state
from normfuse.views import Norm

Given: TypeAlias = tuple[Any, ...] | list[Any] | dict[str, Any] | torch.Tensor | Inputs | Iterable[Any] | None
"""Example inputs: positional ones in a tuple or list, one tensor, keyword ones in a dict; None to find them on the model."""


@dataclass(frozen=True)
class Result:
    """A rewritten model.

    Attributes:
        program: the rewritten program; its new weights are evaluated, or (live mode) computed at every call. It shares tensors
            that nothing changed with the original, and has its own copies of those that it updates.
        report: what was done, refused and proven.
        inputs: the example inputs that it was proven on.
        planned: the same program with its new weights as formulas of the old ones; a further rewrite starts there, so that
            weights are rounded once and what the formulas tell of them is known.
        sources: files that `save` must not overwrite.
        mode: ``deploy`` or ``live``.
        training: the model was traced in training mode, as a live one may be.
    """

    program: Program
    report: Report
    inputs: Inputs
    planned: Program
    sources: tuple[Path, ...] = ()
    mode: str = "deploy"
    training: bool = False

    def module(self) -> nn.Module:
        """A module that is called with the same arguments as the original.

        Tensors that nothing changed are the original's own memory, and those that it updates at every call are its own copies.
        In live mode it is the original in another form: its parameters and buffers are the original's own, under the same
        names; train either, and both are. ``eval()`` leaves it as it is, and ``train()`` says what it cannot do.
        On a CPU the norms are spelled as torch runs them fastest operator by operator; see `normfuse.spelling`.
        """
        if self.mode == "live":
            return _in_its_mode(self.program.module(), self.training)
        return _in_its_mode(own_state(spelling.for_cpu(self.planned, self.program)).module(), False)

    def apply_to(self, model: nn.Module, *, keep: bool = False) -> nn.Module:
        """Make the same plan on the live module that was rewritten, in place; see `deploy`.

        Args:
            model: the module that `rewrite` was given.
            keep: keep the module's own tensors, so that `restore` can put them back.

        Returns:
            The same object.

        Raises:
            CannotApply: part of the plan has no place on modules; nothing is changed.
            VerificationFailed: the module is not equivalent afterwards; it is put back.
        """
        if self.mode == "live":
            raise CannotApply(["a live program is no plan for modules"], hint="normfuse.tune(model, ...) makes modules live")
        tuning.applied(model, self.report.plan, self.inputs, keep=keep)
        return model

    def save(self, path: str | Path) -> Path:
        """Write ``.pt2`` atomically; `torch.export.load` opens it without normfuse. What is live stays live.

        Raises:
            InputError: the path is the input file, or its folder does not exist.
        """
        write_atomically(Path(path), self.program.save, never_over=self.sources)
        return Path(path)


def _in_its_mode(module: nn.Module, training: bool) -> nn.Module:
    """A traced module, which `train` and `eval` leave in the one mode that it is."""

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        if mode is not training:
            traced, wanted = ("training", "evaluation") if training else ("evaluation", "training")
            raise NormfuseError(
                f"this is the model as it was traced, in {traced} mode; it cannot be set to {wanted} mode",
                hint="rewrite the model again" if training else 'rewrite(model.train(), ..., mode="live") makes one to train',
            )
        return self

    for each in module.modules():
        each.training = training
    module.train = MethodType(train, module)  # type: ignore[method-assign]
    module.eval = MethodType(lambda self: self.train(False), module)  # type: ignore[method-assign]
    return module


Model: TypeAlias = nn.Module | ExportedProgram | Program | Result | str | Path
"""Anything that normfuse takes for a model; a path is loaded without executing a stranger's code."""


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
    trust_pickle: bool = False,
    keep_unread: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Rewrite the norms of a trained model, and prove that its outputs stay the same.

    Args:
        model: an `nn.Module`, an `ExportedProgram`, a `Program`, a `Result`, or the path of a saved one. It is not changed.
        passes: names of passes, or ``"all"`` for those of `normfuse.registry.ALL`, which contain the others.
        inputs: example positional inputs, or a loader of several examples such as a `torch.utils.data.DataLoader`, of whose
            tuples the arguments that the forward requires are taken (`normfuse.batches`); found on the model (timm,
            transformers, ``.pt2``) when None.
        kwargs: example keyword inputs.
        dynamic_shapes: as for `torch.export.export`.
        mode: ``deploy`` evaluates the new weights. ``live`` is for training: the result keeps the original's own parameters
            and computes the new weights from them at every call, so that gradients and optimizers are the original's. A
            module is then traced as it is set, in training or in evaluation mode.
        verify: ``full`` (the trace is the module; structure, float64 algebra, rounding), ``structure`` (nothing is run), or
            ``none``.
        allow: the weakest claim that may run: ``exact``, ``rounding`` or ``approximate``.
        trust_pickle: load a pickled file with the full unpickler, which can run any code that the file holds.
        keep_unread: keep tensors that the rewritten program does not read, such as a folded norm's; in live mode all are kept.
        progress: told (what, done, total) while the proof runs.

    Returns:
        The rewritten program with its report; with no rewrite possible, the original and the reasons.

    Raises:
        LoadError: the file cannot or may not be read.
        InputError: no example inputs are known, or they do not fit.
        TraceError: torch.export cannot trace the model, or the trace is another function than the model.
        NormfuseError: there is no such mode, or the model is a live result.
        VerificationFailed: the result is not equivalent; this would be a bug of normfuse.
    """
    checked_level(verify)
    trace = _tracer(mode, verify)
    clock = _Clock()
    start = _deployed(model).planned if isinstance(model, Result) else model
    inputs = model.inputs if isinstance(model, Result) and inputs is None else inputs
    name, original, given = to_program(start, inputs, kwargs, dynamic_shapes, trust_pickle, trace)
    clock.lap("trace")
    chosen = plan(original, _names(passes), allow=_claim(allow))
    planned = chosen.apply(original)
    rewritten = living.alive(planned) if mode == "live" else planned
    clock.lap("plan")
    evidence = Evidence("none")
    if verify != "none":
        tried = cases_for(original, given)
        evidence = prove(original, rewritten, chosen, tried, promised=planned, level=verify, progress=progress)
    clock.lap("verify")
    written = rewritten.baked()
    if mode != "live":  # which is the original's own tensors, all of them
        written = own_state(written if keep_unread or not chosen.rounds else only_read(written))
    clock.lap("write")
    if evidence.ok and not evidence.unchanged:
        flat = flat_inputs(original, given.args, given.kwargs)
        evidence = called_as_written(original, rewritten, written, flat, evidence)
    clock.lap("verify")
    counted = evidence.structure  # the proof has counted the norms already
    before, after = (counted.norms_before, counted.norms_after) if counted else (_kinds(original), _kinds(planned))
    notes = (*original.notes, *given.notes, *spelling.notes(original, planned))
    report = Report(name, chosen, evidence, before, after, clock.laps, notes)
    checked(evidence, report)
    return Result(
        written, report, given, planned, _sources(model), mode, training=mode == "live" and getattr(model, "training", False)
    )


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
    progress: Progress | None = None,
) -> Module:
    """Rewrite a live model for training, in place: its layers read formulas of its own parameters (live mode, *Tune*).

    Gradients reach the original parameters and equal the original model's; the state dict, optimizers, hooks and training
    modes are as before. A BatchNorm that is set to train turns its rewrite off by itself, and on again.

    Args:
        model: the model; its class, its parameters and its state dict stay.
        passes: names of passes, or ``"all"`` for those of `normfuse.registry.ALL`, which contain the others.
        inputs: as for `rewrite`.
        kwargs: as for `rewrite`.
        dynamic_shapes: as for `rewrite`.
        verify: as for `rewrite`.
        allow: as for `rewrite`.
        progress: as for `rewrite`.

    Returns:
        The same object. What could not be rewritten on modules is told by a `NormfuseWarning`.

    Raises:
        InputError: no example inputs are known, or they do not fit.
        TraceError: torch.export cannot trace the model, in evaluation mode or as it trains.
        CannotApply: nothing can be rewritten; the error lists the reasons.
        VerificationFailed: the result is not equivalent; the model is put back.
    """
    given = _given(model, inputs, kwargs, dynamic_shapes)
    warn_of(given)
    tuning.tuned(model, _names(passes), given, allow=_claim(allow), level=checked_level(verify), progress=progress)
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
        progress: as for `rewrite`.

    Returns:
        The same object. What could not be rewritten on modules is told by a `NormfuseWarning`.

    Raises:
        InputError: no example inputs are known, or they do not fit.
        TraceError: torch.export cannot trace the model.
        CannotApply: nothing can be rewritten; the error lists the reasons.
        VerificationFailed: the result is not equivalent; the model is put back.
    """
    if passes is None:
        if not tuning.is_live(model):
            raise NormfuseError("this model is not tuned, so there is nothing to evaluate", hint="name the passes to deploy")
        tuning.baked(model, keep=keep)
        return model
    given = _given(model, inputs, kwargs, dynamic_shapes)
    warn_of(given)
    tuning.deployed(
        model, _names(passes), given, allow=_claim(allow), level=checked_level(verify), keep=keep, progress=progress
    )
    return model


def restore(model: Module) -> Module:
    """The untouched model behind a tuned one, or behind one that was deployed with ``keep=True``: in place, bit for bit.

    Raises:
        NormfuseError: the model was deployed and its own tensors were not kept.
    """
    tuning.restored(model)
    return model


@dataclass(frozen=True)
class Inspection:
    """Every norm of a model, and what each pass would do with it.

    Attributes:
        model: how the user named the model.
        norms: a row per norm, as JSON types.
        counts: norms by kind.
        plan: what all passes together would do.
    """

    model: str
    norms: tuple[dict[str, Any], ...]
    counts: Mapping[str, int]
    plan: Plan

    def to_dict(self) -> dict[str, Any]:
        """The inspection as JSON types."""
        return {"model": self.model, "counts": dict(self.counts), "norms": list(self.norms)}

    def render(self) -> Iterator[RenderableType]:
        """The inspection for a terminal: a row per norm, then the reasons, then the counts."""
        self = escaped(self)
        yield Text(self.model, style="bold")
        yield ""
        if not self.norms:
            yield Text("no norms found")
            return
        table = plain_table("norm", "kind", "axis", "eps", "mean seen by", "would be")
        for row in self.norms:
            fates = _fates(row["passes"].values(), row["kind"])
            axes = ",".join(map(str, row["axes"]))
            cells = (row["site"], row["kind"], axes, f"{row['eps']:g}", row["seen_by"] or "—", fates or "—")
            table.add_row(*map(Text, cells))
        yield table
        yield ""
        if self.plan.refusals:
            yield from refusals_lines(self.plan.refusals)
            yield ""
        yield norms_table(self.counts, self.plan.norms_after(self.counts))


def inspect(
    model: Model,
    inputs: Given = None,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    *,
    trust_pickle: bool = False,
) -> Inspection:
    """Every norm of a model: kind, axis, who else sees its input's mean, and what each pass would do.

    Args:
        model: as for `rewrite`.
        inputs: as for `rewrite`.
        kwargs: as for `rewrite`.
        dynamic_shapes: as for `rewrite`.
        trust_pickle: as for `rewrite`.
    """
    name, program, _ = to_program(model, inputs, kwargs, dynamic_shapes, trust_pickle)
    plans = {each: plan(program, [each]) for each in ALL}
    facts = analyze(program)
    rows = [_row(program.site(norm.out), norm, plans, _seen_by(program, facts, norm)) for norm in facts.norms]
    rows += [_row(site_in(body, norm.out), norm, plans, None) for body, norm in facts.norms_in_bodies]
    return Inspection(name, tuple(rows), dict(facts.kinds), plan(program, list(plans)))


def _seen_by(program: Program, facts: Facts, norm: Norm) -> str | None:
    """A reader that sees the mean of what a LayerNorm normalizes."""
    witness = facts.first_sight(norm.x, norm.axes[0]) if norm.kind == "layer_norm" and len(norm.axes) == 1 else None
    return None if witness is None else "the caller" if witness.op == "output" else str(program.site(witness))


def _row(site: Site, norm: Norm, plans: Mapping[str, Plan], seen_by: str | None) -> dict[str, Any]:
    return {
        **site.to_dict(),
        "kind": norm.kind,
        "by_hand": norm.by_hand,
        "axes": list(norm.axes),
        "eps": norm.eps,
        "gain": norm.gain is not None,
        "shift": norm.shift is not None,
        "seen_by": seen_by,
        "passes": {each: fate for each, chosen in plans.items() if (fate := _fate(chosen, site.node))},
    }


def _fate(chosen: Plan, node: str) -> str | None:
    for rewrite_ in chosen.rewrites:
        if any(site.node == node for site in rewrite_.sites):
            return f"becomes {rewrite_.becomes}"
    refusal: Refusal | None = next((each for each in chosen.refusals if each.site.node == node), None)
    return f"refused, {refusal.code}: {refusal.reason}" if refusal else None


def _fates(every: Iterable[str], kind: str) -> str:
    """What a norm would be; where it stays what it is, the codes of the refusals."""
    becomes = [each for each in every if each.startswith("becomes ") and each != f"becomes {kind}"]
    return ", ".join(dict.fromkeys(map(_short, becomes or every)))


def _short(fate: str) -> str:
    return fate.removeprefix("becomes ").removeprefix("refused, ").partition(":")[0]


# -- from what the user has to a program -------------------------------------------------------------------------------


Tracer: TypeAlias = Callable[[nn.Module, Inputs], Program]


def _unchecked(module: nn.Module, given: Inputs) -> Program:
    return traced(module, given, check=False)


def _tracer(mode: str, level: str) -> Tracer:
    if one_of(mode, ("deploy", "live"), "mode") == "live":
        return living.traced_as_set
    return traced if level == "full" else _unchecked


def _deployed(result: Result) -> Result:
    """The result itself, if it is one to serve.

    Raises:
        NormfuseError: it is live, and its graph may be that of a model in training.
    """
    if result.mode == "live":
        hint = "rewrite the model itself, whose parameters are trained with it: normfuse.rewrite(model, passes) evaluates them"
        raise NormfuseError("a live program is for training: it is not exported or rewritten again", hint=hint)
    return result


def _sources(model: Model) -> tuple[Path, ...]:
    """Files that a result of this model must not overwrite."""
    return model.sources if isinstance(model, Result) else (Path(model),) if isinstance(model, (str, Path)) else ()


def to_program(
    model: Model,
    inputs: Given,
    kwargs: Any,
    dynamic_shapes: Any,
    trust_pickle: bool,
    trace: Tracer = traced,
    *,
    fit: bool = False,
) -> tuple[str, Program, Inputs]:
    """What the user has, as a program: its name for messages, the program, and the inputs that it is called with.

    Args:
        model: as for `rewrite`.
        inputs: as for `rewrite`.
        kwargs: as for `rewrite`.
        dynamic_shapes: as for `rewrite`.
        trust_pickle: as for `rewrite`.
        trace: makes a program of a module.
        fit: trace a module whose tensors are all of one floating dtype with inputs of that dtype.

    Raises:
        LoadError: the file cannot or may not be read.
        InputError: it is no model, or no example inputs are known, or they do not fit.
        TraceError: torch.export cannot trace it.
    """
    name = str(model) if isinstance(model, (str, Path)) else type(model).__name__
    loaded = load(Path(model), trust_pickle=trust_pickle) if isinstance(model, (str, Path)) else model
    if isinstance(loaded, Result):
        inputs = loaded.inputs if inputs is None else inputs
        loaded = loaded.program
    if not isinstance(loaded, (nn.Module, ExportedProgram, Program)):
        raise InputError(f"{name} is not a model", hint="pass an nn.Module, an ExportedProgram, or a path")
    given = _given(loaded, inputs, kwargs, dynamic_shapes)
    if isinstance(loaded, nn.Module):
        given = _in_dtype_of(loaded, given) if fit else given
        return name, trace(loaded, given), given
    return name, loaded if isinstance(loaded, Program) else Program.from_exported(loaded), given


def _in_dtype_of(module: nn.Module, given: Inputs) -> Inputs:
    held = {each.dtype for each in (*module.parameters(), *module.buffers()) if each.is_floating_point()}
    if len(held) != 1:
        return given
    (dtype,) = held

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    args, kwargs = pytree.tree_map(cast, (given.args, given.kwargs))
    return replace(given, args=args, kwargs=kwargs)


def _given(model: Any, inputs: Any, kwargs: Any, dynamic_shapes: Any) -> Inputs:
    """The user's inputs, or what is found on the model; what was said besides is added to it."""
    given = as_inputs(inputs, kwargs) or found_on(model.exported if isinstance(model, Program) else model)
    given = taken(model, given) if given is not None and is_loader(inputs) else given
    if given is None:
        raise InputError(
            f"no example inputs are known for {type(model).__name__}",
            hint='give inputs=(x,) in Python, or --input "float32[batch,3,224,224]" on the command line',
        )
    return given if dynamic_shapes is None else replace(given, dynamic_shapes=dynamic_shapes)


def _names(passes: Any) -> list[str]:
    """The requested passes, each once; ``"all"`` stands for all of them."""
    asked = [passes] if isinstance(passes, str) else list(passes) if isinstance(passes, Iterable) else []
    if not asked or not all(isinstance(each, str) for each in asked):
        raise NormfuseError(
            "name the passes to run, such as passes=['pre_rmsnorm']", hint=f"there are {', '.join(all_passes())}"
        )
    return list(dict.fromkeys(name for each in asked for name in (ALL if each == "all" else [each])))


def _claim(name: str) -> Claim:
    return Claim[one_of(str(name).lower(), [each.name.lower() for each in Claim], "claim").upper()]


def _kinds(program: Program) -> dict[str, int]:
    return dict(analyze(program).kinds)


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage] = self.laps.get(stage, 0.0) + now - self._last
        self._last = now
