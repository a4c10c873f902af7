"""What a proof measures on one set of inputs: the float64 algebra and the rounding of two programs."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from normfuse import limits
from normfuse.errors import NormfuseError, first_line
from normfuse.graph.edits import SetTensor
from normfuse.graph.interpreter import run
from normfuse.graph.parts import Part, Weights, deviation
from normfuse.graph.program import Program
from normfuse.graph.views import shape
from normfuse.planning.planner import Plan
from normfuse.proof.agreement import agreement, rounded
from normfuse.proof.cases import Case
from normfuse.proof.evidence import Agreement, Evidence, Rounding, Verdict
from normfuse.proof.measuring import Measured
from normfuse.proof.noise import DRAWS, NUDGE, normal, nudged, nudged_inputs, samples_of_rounding
from normfuse.proof.sensitivity import sensitivity
from normfuse.proof.steps import Steps, jumping

FORM_ONLY = "verify='structure' (--verify structure) proves its form only"


@dataclass(frozen=True)
class Trial(Case):
    """Inputs and, where not the model's own, weights; and whether it is run in the stored dtypes too."""

    weights: Weights | None = None
    rounded: bool = True


def other_weights(names: Collection[str]) -> dict[str, Weights]:
    """Changes of all weights that put the norms on trial: formulas must hold for any weights, not for these alone.

    A model's own weights can hide a mistake (a bias that happens to be zero, an eps far below the variance), and a model
    that reads token ids offers no other way to give its norms a large mean or next to no variance.
    """
    changed = set(names)
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


def changed_by(plan: Plan) -> list[str]:
    """The stored tensors that a plan changes."""
    return [edit.name for rewrite in plan.rewrites for edit in rewrite.edits if isinstance(edit, SetTensor)]


def as_stored(program: Program) -> Program:
    """A program that runs in its stored dtype: its formulas evaluated once where what they give is small, else in each run."""
    size = sum(math.prod(shape(node)) * program.tensor(name).element_size() for name, node in _formed(program))
    return program.baked() if size <= limits.CHANGED_BYTES else program


def _formed(program: Program) -> Iterator[tuple[str, Node]]:
    return ((name, program.reader_of(name)) for name in program.formulas)


@dataclass(frozen=True)
class Proof:
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
        rounding, notes = self._rounded(trial, first, truth, agreed) if weights is None and trial.rounded else ((), ())
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
