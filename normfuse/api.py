"""The Python surface: `rewrite`, `inspect`, `verify`, `export`. Each is a few calls of the parts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from rich.console import RenderableType
from rich.text import Text
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind

from normfuse import tuning
from normfuse.cases import Case, cases
from normfuse.errors import InputError, NormfuseError
from normfuse.evidence import Evidence, failed
from normfuse.facts import analyze
from normfuse.findings import Claim, Refusal
from normfuse.inputs import Inputs, found_on
from normfuse.interpret import flat_inputs
from normfuse.loading import load, proven_first, write_atomically
from normfuse.planner import Plan, plan
from normfuse.program import Program
from normfuse.proving import Progress, Runner, checked_level, compare, compare_runtime, prove
from normfuse.registry import ALL
from normfuse.registry import passes as all_passes
from normfuse.report import Report, norms_table, plain_table, refusals_lines
from normfuse.views import Norm

Given: TypeAlias = tuple[Any, ...] | list[Any] | dict[str, Any] | torch.Tensor | Inputs | None
"""Example inputs: positional ones in a tuple or list, one tensor, keyword ones in a dict; None to find them on the model."""


@dataclass(frozen=True)
class Result:
    """A rewritten model.

    Attributes:
        program: the rewritten program, its new weights evaluated.
        report: what was done, refused and proven.
        inputs: the example inputs that it was proven on.
        sources: files that `save` must not overwrite.
    """

    program: Program
    report: Report
    inputs: Inputs
    sources: tuple[Path, ...] = ()

    def module(self) -> nn.Module:
        """A module that is called with the same arguments as the original."""
        return self.program.module()

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
        tuning.applied(model, self.report.plan, self.inputs, keep=keep)
        return model

    def save(self, path: str | Path) -> Path:
        """Write ``.pt2`` atomically; `torch.export.load` opens it without normfuse.

        Raises:
            InputError: the path is the input file, or its folder does not exist.
        """
        write_atomically(Path(path), self.program.save, never_over=self.sources)
        return Path(path)


Model: TypeAlias = nn.Module | ExportedProgram | Program | Result | str | Path
"""Anything that normfuse takes for a model; a path is loaded without executing a stranger's code."""


def rewrite(
    model: Model,
    passes: str | Sequence[str],
    inputs: Given = None,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    *,
    verify: str = "full",
    allow: str = "rounding",
    trust_pickle: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Rewrite the norms of a trained model, and prove that its outputs stay the same.

    Args:
        model: an `nn.Module`, an `ExportedProgram`, a `Program`, or the path of a saved one. It is not changed.
        passes: names of passes, or ``"all"`` for those of `normfuse.registry.ALL`, which contain the others.
        inputs: example positional inputs; found on the model (timm, transformers, ``.pt2``) when None.
        kwargs: example keyword inputs.
        dynamic_shapes: as for `torch.export.export`.
        verify: ``full`` (structure, float64 algebra, rounding), ``structure`` (nothing is run), or ``none``.
        allow: the weakest claim that may run: ``exact``, ``rounding`` or ``approximate``.
        trust_pickle: load a pickled file with the full unpickler, which can run any code that the file holds.
        progress: told (what, done, total) while the proof runs.

    Returns:
        The rewritten program with its report; with no rewrite possible, the original and the reasons.

    Raises:
        LoadError: the file cannot or may not be read.
        InputError: no example inputs are known, or they do not fit.
        TraceError: torch.export cannot trace the model.
        VerificationFailed: the result is not equivalent; this would be a bug of normfuse.
    """
    checked_level(verify)
    clock = _Clock()
    name, original, given = _program(model, inputs, kwargs, dynamic_shapes, trust_pickle)
    clock.lap("trace")
    chosen = plan(original, _names(passes), allow=_claim(allow))
    rewritten = chosen.apply(original)
    clock.lap("plan")
    evidence = Evidence("none")
    if verify != "none":
        tried = cases(original, flat_inputs(original, given.args, given.kwargs))
        evidence = prove(original, rewritten, chosen, tried, level=verify, progress=progress)
    clock.lap("verify")
    counted = evidence.structure  # the proof has counted the norms already
    before, after = (counted.norms_before, counted.norms_after) if counted else (_kinds(original), _kinds(rewritten))
    report = Report(name, chosen, evidence, before, after, clock.laps, original.notes)
    if not evidence.ok:
        raise failed(evidence, report)
    baked = rewritten.baked()
    clock.lap("write")
    return Result(baked, report, given, (Path(model),) if isinstance(model, (str, Path)) else ())


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

    A tensor that nobody reads any more leaves the state dict; a layer may get a bias. Every other key stays.

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


def verify(
    a: Model,
    b: Model,
    inputs: Given = None,
    kwargs: dict[str, Any] | None = None,
    *,
    trust_pickle: bool = False,
    progress: Progress | None = None,
) -> Evidence:
    """Evidence that two models are one function up to the rounding of their weights.

    Args:
        a: the reference: an `nn.Module`, a program, or the path of one.
        b: the same, or the path of an ``.onnx`` file, which ONNX Runtime then runs.
        inputs: example positional inputs; found on the models when None.
        kwargs: example keyword inputs.
        trust_pickle: as for `rewrite`.
        progress: told (what, done, total).

    Returns:
        The evidence; its ``ok`` is the answer.
    """
    _, left, given = _program(a, inputs, kwargs, None, trust_pickle)
    flat = flat_inputs(left, given.args, given.kwargs)
    if isinstance(b, (str, Path)) and _is_onnx(Path(b)):
        return compare_runtime(left, _onnx_runner(left, Path(b)), cases(left, flat), progress=progress)
    _, right, _ = _program(b, replace(given, dynamic_shapes=None), None, None, trust_pickle)
    return compare(left, right, cases(left, flat), progress=progress)


def export(
    model: Model,
    path: str | Path,
    *,
    opset: int = 20,
    inputs: Given = None,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    trust_pickle: bool = False,
    progress: Progress | None = None,
) -> Evidence:
    """Write ONNX, run it in ONNX Runtime after its own optimisations, and compare.

    Args:
        model: as for `rewrite`; a `Result` brings its own inputs.
        path: the ``.onnx`` file to write.
        opset: the ONNX opset; RMSNorm is written in the form that ONNX Runtime fuses at that opset.
        inputs: as for `rewrite`.
        kwargs: as for `rewrite`.
        dynamic_shapes: as for `rewrite`.
        trust_pickle: as for `rewrite`.
        progress: told (what, done, total).

    Raises:
        InputError: the path is the model's own file, or its folder does not exist.
        MissingExtra: the packages for ONNX are not installed.
        ExportError: torch.onnx refused an operator.
        VerificationFailed: ONNX Runtime computes something else; nothing is written.
    """
    from normfuse.exporters import onnx, onnxruntime

    _, program, given = _program(model, inputs, kwargs, dynamic_shapes, trust_pickle)
    sources = model.sources if isinstance(model, Result) else (Path(model),) if isinstance(model, (str, Path)) else ()
    flat = flat_inputs(program, given.args, given.kwargs)

    def write(path: Path) -> None:
        onnx.export(program.baked().exported, path, opset=opset)

    with proven_first(Path(path), write, never_over=sources) as written:
        evidence = compare_runtime(program, _onnx_runner(program, written), cases(program, flat), progress=progress)
        if not evidence.ok:
            raise failed(evidence, evidence)
        ran = ", ".join(f"{count} {op}" for op, count in onnxruntime.fused_ops(written).items() if "Norm" in op)
    return replace(evidence, notes=(*evidence.notes, f"ONNX Runtime runs {ran or 'no norm'}"))


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
    name, program, _ = _program(model, inputs, kwargs, dynamic_shapes, trust_pickle)
    plans = {each: plan(program, [each]) for each in ALL}
    facts = analyze(program)
    rows = tuple(_row(program, norm, facts, plans) for norm in facts.norms)
    return Inspection(name, rows, dict(Counter(norm.kind for norm in facts.norms)), plan(program, list(plans)))


def _row(program: Program, norm: Norm, facts: Any, plans: Mapping[str, Plan]) -> dict[str, Any]:
    site = program.site(norm.out)
    witness = facts.first_sight(norm.x, norm.axes[0]) if norm.kind == "layer_norm" and len(norm.axes) == 1 else None
    return {
        **site.to_dict(),
        "kind": norm.kind,
        "by_hand": norm.by_hand,
        "axes": list(norm.axes),
        "eps": norm.eps,
        "gain": norm.gain is not None,
        "shift": norm.shift is not None,
        "seen_by": None if witness is None else ("the caller" if witness.op == "output" else str(program.site(witness))),
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


def _program(model: Model, inputs: Given, kwargs: Any, dynamic_shapes: Any, trust_pickle: bool) -> tuple[str, Program, Inputs]:
    name = str(model) if isinstance(model, (str, Path)) else type(model).__name__
    loaded = load(Path(model), trust_pickle=trust_pickle) if isinstance(model, (str, Path)) else model
    if isinstance(loaded, Result):
        inputs = loaded.inputs if inputs is None else inputs
        loaded = loaded.program
    if not isinstance(loaded, (nn.Module, ExportedProgram, Program)):
        raise InputError(f"{name} is not a model", hint="pass an nn.Module, an ExportedProgram, or a path")
    given = _given(loaded, inputs, kwargs, dynamic_shapes)
    if isinstance(loaded, nn.Module):
        return name, Program.trace(loaded, given.args, given.kwargs, given.dynamic_shapes), given
    return name, loaded if isinstance(loaded, Program) else Program.from_exported(loaded), given


def _given(model: Any, inputs: Any, kwargs: Any, dynamic_shapes: Any) -> Inputs:
    """The user's inputs, or what is found on the model; what was said besides is added to it."""
    if inputs is None and not kwargs:
        inputs = found_on(model.exported if isinstance(model, Program) else model)
        if inputs is None:
            raise InputError(
                f"no example inputs are known for {type(model).__name__}",
                hint='give inputs=(x,) in Python, or --input "float32[batch,3,224,224]" on the command line',
            )
    if isinstance(inputs, dict):
        inputs, kwargs = None, {**inputs, **(kwargs or {})}
    if not isinstance(inputs, Inputs):
        args = (inputs,) if isinstance(inputs, torch.Tensor) else () if inputs is None else inputs
        if not isinstance(args, (tuple, list)):
            raise InputError(f"inputs must be a tuple of tensors, not a {type(inputs).__name__}", hint="inputs=(x,)")
        inputs = Inputs(tuple(args), {}, None)
    given: Inputs = replace(inputs, kwargs={**inputs.kwargs, **(kwargs or {})})
    return given if dynamic_shapes is None else replace(given, dynamic_shapes=dynamic_shapes)


def _names(passes: Any) -> list[str]:
    """The requested passes, each once; ``"all"`` stands for all of them."""
    asked = [passes] if isinstance(passes, str) else list(passes or ())
    if not asked or not all(isinstance(each, str) for each in asked):
        raise NormfuseError(
            "name the passes to run, such as passes=['pre_rmsnorm']", hint=f"there are {', '.join(all_passes())}"
        )
    return list(dict.fromkeys(name for each in asked for name in (ALL if each == "all" else [each])))


def _claim(name: str) -> Claim:
    try:
        return Claim[name.upper()]
    except KeyError as error:
        raise NormfuseError(f"there is no claim '{name}'", hint="exact, rounding or approximate") from error


def _kinds(program: Program) -> dict[str, int]:
    return dict(Counter(norm.kind for norm in analyze(program).norms))


def _is_onnx(path: Path) -> bool:
    return path.suffix == ".onnx"


def _onnx_runner(program: Program, path: Path) -> Runner:
    from normfuse.exporters import onnxruntime

    specs = [spec for spec in program.exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]

    def run(case: Case) -> list[torch.Tensor]:
        pairs = zip(case.flat, specs, strict=True)
        given = [onnxruntime.as_array(value) for value, spec in pairs if not isinstance(spec.arg, ConstantArgument)]
        return [torch.from_numpy(each) for each in onnxruntime.run(path, given)]

    return run


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage], self._last = now - self._last, now
