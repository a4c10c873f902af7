"""Evidence that a plan kept the function. `normfuse.proof.equivalence` compares models that no plan connects.

A rewritten program is proven on three levels:

1. structure: the outputs keep their shapes and dtypes, every norm became what its rewrite promised, and nothing more is asked
   of the inputs: no guard, no dynamic size with a narrower range.
2. algebra: the original and the rewritten program both run in float64, the rewritten one from the same formulas without
   rounding. They must agree to the model's own float64 noise, measured by nudging its weights one part in 10¹⁵. A formula
   holds for any weights, so they are also compared with other weights, which give the norms a large mean, next to no
   variance, and biases where the model has none.
3. rounding: both run in their stored dtypes, as they would be written, each against the float64 truth; the report gives the
   ratio of the errors. More than the roundings of weights and arithmetic explain is a failure too.

Where a rewrite removes a norm because its eps swallows the variance in the stored dtype, which float64 does not show, the
reference of level 2 is the original without that variance (`normfuse.proof.reference`): only after the variance was measured to
be below that rounding on every case with the model's own weights. The original as it is stored is still what level 3 runs.

A rewrite that is wrong fails level 2 by many orders of magnitude, so nobody has to choose a tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from normfuse import limits
from normfuse.analysis.facts import analyze
from normfuse.errors import NormfuseError, first_line, one_of
from normfuse.graph.edits import SetTensor
from normfuse.graph.interpreter import run
from normfuse.graph.parts import Part, Weights, deviation
from normfuse.graph.program import Program
from normfuse.graph.views import dtype, is_tensor, shape
from normfuse.planning.planner import Plan
from normfuse.proof.agreement import agreement, rounded
from normfuse.proof.cases import Case
from normfuse.proof.evidence import Agreement, Evidence, Rounding, Structure, Verdict
from normfuse.proof.input_conditions import narrower
from normfuse.proof.measuring import Measured, Progress, evidence_of
from normfuse.proof.noise import DRAWS, NUDGE, normal, nudged, nudged_inputs, samples_of_rounding
from normfuse.proof.reference import reference_of
from normfuse.proof.sensitivity import sensitivity
from normfuse.proof.steps import Steps, jumping, notes_of_own_dtype
from normfuse.proof.trial_run import trial_run

LEVELS = ("full", "structure", "none")
FORM_ONLY = "verify='structure' (--verify structure) proves its form only"


def checked_level(name: str) -> str:
    """The name of a verification level, if it is one.

    Raises:
        InputError: there is none of that name.
    """
    return one_of(name, LEVELS, "verification level")


def prove(
    original: Program,
    rewritten: Program,
    plan: Plan,
    cases: Iterable[Case],
    *,
    promised: Program | None = None,
    level: str = "full",
    progress: Progress | None = None,
) -> Evidence:
    """Evidence that a plan kept the function.

    Args:
        original: the program that the plan was made for.
        rewritten: what is to run: ``plan.apply(original)``, its formulas not yet evaluated, or computed at every call.
        plan: the plan.
        cases: inputs to prove on.
        promised: ``plan.apply(original)`` where ``rewritten`` is something else; its norms are counted.
        level: ``full``, or ``structure`` to run nothing.
        progress: called with (what, done, total).
    """
    structure = _structure(original, promised or rewritten, plan)
    if level != "full" or not structure.ok or not plan.rounds:
        return Evidence(level, structure, unchanged=not plan.rounds)
    if any(original.tensor(name).is_meta for name in original.stored.values() if name not in original.formulas):
        raise NormfuseError("the model does not run: its weights are on the meta device", hint=FORM_ONLY)
    trials = [Trial(each.name, each.flat, each.given) for each in cases]
    reference, notes = reference_of(original, plan, [each.flat for each in trials])
    trials += [Trial(name, trials[0].flat, weights=change) for name, change in _other_weights(plan).items()]
    usual = trial_run(original, trials[0].flat)
    proof = _Proof(original, reference, rewritten, _as_stored(rewritten), _changed(plan), usual)
    evidence = evidence_of(trials, proof.measured, Evidence(level, structure, notes=notes), progress)
    return replace(evidence, notes=(*evidence.notes, *notes_of_own_dtype(proof.in_own_dtype)))


def _as_stored(program: Program) -> Program:
    """A program that runs in its stored dtype: its formulas evaluated once where what they give is small, else in each run."""
    size = sum(math.prod(shape(node)) * program.tensor(name).element_size() for name, node in _formed(program))
    return program.baked() if size <= limits.CHANGED_BYTES else program


def _formed(program: Program) -> Iterator[tuple[str, Node]]:
    return ((name, program.reader_of(name)) for name in program.formulas)


@dataclass(frozen=True)
class Trial(Case):
    """Inputs and, where not the model's own, weights."""

    weights: Weights | None = None


def _other_weights(plan: Plan) -> dict[str, Weights]:
    """Changes of all weights that put the norms on trial: formulas must hold for any weights, not for these alone.

    A model's own weights can hide a mistake (a bias that happens to be zero, an eps far below the variance), and a model
    that reads token ids offers no other way to give its norms a large mean or next to no variance.
    """
    changed = set(_changed(plan))
    known: dict[str, float] = {}

    def spread(name: str, part: Part) -> float:
        if name not in known:
            known[name] = deviation(part.whole) if part.whole.numel() > 1 else 0.0
        return known[name]

    def shifted(name: str, value: Tensor, part: Part) -> Tensor:
        return value + spread(name, part)

    def shrunk(name: str, value: Tensor, part: Part) -> Tensor:
        return value * 1e-3 if name in changed else value

    def redrawn(name: str, value: Tensor, part: Part) -> Tensor:
        # factors are positive, so that a variance stays one
        return value * torch.exp(0.5 * normal(name, value, part)) + 0.1 * spread(name, part)

    return {"weights with a mean": shifted, "writers of tiny variance": shrunk, "other weights": redrawn}


def _changed(plan: Plan) -> list[str]:
    """The stored tensors that a plan changes."""
    return [edit.name for rewrite in plan.rewrites for edit in rewrite.edits if isinstance(edit, SetTensor)]


def _structure(original: Program, rewritten: Program, plan: Plan) -> Structure:
    before = analyze(original).kinds
    after = analyze(rewritten).kinds
    expected = plan.norms_after(before)
    problems = [
        f"{expected[kind]} {kind} were promised and {after[kind]} are there"
        for kind in sorted(expected | after)
        if expected[kind] != after[kind]
    ]
    problems += _output_problems(original, rewritten)
    problems += narrower(original, rewritten)
    return Structure(not problems, tuple(problems), dict(before), dict(after))


def _output_problems(original: Program, rewritten: Program) -> list[str]:
    (old,), (new,) = original.graph.output_node().args, rewritten.graph.output_node().args
    problems = []
    for place, (a, b) in enumerate(zip(old, new, strict=True)):  # type: ignore[arg-type]
        if is_tensor(a) and (str(shape(a)) != str(shape(b)) or dtype(a) != dtype(b)):
            problems.append(f"output {place} changed its shape or dtype")
    return problems


@dataclass(frozen=True)
class _Proof:
    """What is measured on each trial.

    Attributes:
        stored: the original as it is.
        reference: what it computes without rounding, as `reference_of` has it.
        rewritten: what is to run.
        baked: the same, to be run as it is stored.
        changed: the stored tensors that differ.
        usual: the original's outputs on the first trial; None where this machine lacks a kernel.
        in_own_dtype: operators that ran in their own dtype so far.
    """

    stored: Program
    reference: Program
    rewritten: Program
    baked: Program
    changed: Sequence[str]
    usual: Sequence[Tensor] | None
    in_own_dtype: set[str] = field(default_factory=set)

    def measured(self, trial: Trial, first: bool) -> Measured:
        """Levels 2 and 3 of a trial, and of the first how small a change would show."""
        flat, weights, steps = trial.flat, trial.weights, Steps()
        try:
            truth = run(self.reference, flat, wide=True, weights=weights, beside=steps.written())
        except Exception as error:
            if first:  # the user's own inputs must run
                raise NormfuseError(f"the model does not run in float64: {first_line(error)}", hint=FORM_ONLY) from error
            return Measured(Evidence(notes=(f"the original does not run on '{trial.name}': {first_line(error)}",)))
        shaken = [self._shaken(trial, draw, steps) for draw in range(DRAWS)]
        got = run(self.rewritten, flat, wide=True, weights=weights, beside=steps.followed())
        self.in_own_dtype.update(steps.own)
        more = cache(partial(samples_of_rounding, self.reference, flat, size=NUDGE, weights=weights, steps=steps))
        judge = partial(agreement, trial.name, truth, samples=shaken, more=more)
        agreed, seen = judge(got), None
        if first and agreed.ok:
            seen = sensitivity(self.reference, self.changed, partial(self._otherwise, flat, steps), judge)
        rounding, notes = self._rounded(trial, first, truth, agreed) if weights is None else ((), ())
        return Measured(Evidence(algebra=(agreed,), rounding=rounding, notes=notes, sensitivity=seen), truth, shaken[0])

    def _shaken(self, trial: Trial, draw: int, steps: Steps) -> list[Tensor]:
        """The outputs in float64 after the inputs and the weights were nudged."""
        weights = nudged(NUDGE, trial.weights, draw)
        return run(self.reference, nudged_inputs(trial.flat, draw), wide=True, weights=weights, beside=steps.measured())

    def _otherwise(self, flat: Sequence[Any], steps: Steps, weights: Weights) -> list[Tensor]:
        """The outputs in float64 with other weights."""
        return run(self.reference, flat, wide=True, weights=weights, beside=steps.followed())

    def _rounded(
        self, trial: Trial, first: bool, truth: Sequence[Tensor], agreed: Agreement
    ) -> tuple[tuple[Rounding], tuple[str, ...]]:
        """Level 3, and a note where it cannot be run. Samples are dear: none are taken where level 2 has failed."""
        flat = trial.flat
        try:
            usual = self.usual if first and self.usual is not None else run(self.stored, flat)
            after = run(self.baked, flat)
        except RuntimeError as error:  # an operator that this machine does not have in half precision
            note = f"not run in the stored dtype on '{trial.name}': {first_line(error)}"
            return (Rounding(trial.name, math.nan, math.nan, Verdict.NOT_COMPARED),), (note,)
        more = None if agreed.verdict is Verdict.DISPROVEN else partial(samples_of_rounding, self.reference, flat)
        return (rounded(trial.name, truth, usual, after, more=more, jumps=jumping(self.reference)),), ()
