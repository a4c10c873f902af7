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
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from normfuse.analysis.facts import analyze
from normfuse.errors import NormfuseError, first_line, one_of
from normfuse.graph.edits import SetTensor
from normfuse.graph.interpreter import Weights, run
from normfuse.graph.program import Program
from normfuse.graph.views import dtype, is_tensor, shape
from normfuse.planning.planner import Plan
from normfuse.proof.cases import Case
from normfuse.proof.coverage import Coverage, Missing, counts
from normfuse.proof.evidence import MARGIN, Agreement, Evidence, Rounding, Structure, Verdict, verdict_of
from normfuse.proof.input_conditions import narrower
from normfuse.proof.judging import Judged, judged
from normfuse.proof.reference import reference_of
from normfuse.proof.sensitivity import sensitivity
from normfuse.proof.steps import Steps, jumping, notes_of_own_dtype
from normfuse.proof.trial_run import trial_run

NUDGE = 1e-15
DRAWS = 2
LUCK = 1e3
"""No noise is measured so many times too small by chance."""
FLOOR = 2.0**-46
"""64 roundings of a float64: what other orders of a sum may differ by where no weight and no input has a part in it."""

Progress = Callable[[str, int, int], None]
"""Told (what, done, total)."""

Samples = Sequence[Sequence[Tensor]]
"""The outputs of a model under noise, once for each draw."""

Runner = Callable[[Case], Sequence[Tensor]]
"""The outputs of a model on a case."""


# -- the proof of a plan -----------------------------------------------------------------------------------------------


LEVELS = ("full", "structure", "none")


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
        hint = "verify='structure' (--verify structure) proves its form only"
        raise NormfuseError("the model does not run: its weights are on the meta device", hint=hint)
    trials = [Trial(case.name, case, None) for case in cases]
    trials += [Trial(name, trials[0].case, change) for name, change in _other_weights(plan).items()]
    reference, notes = reference_of(original, plan, [each.case.flat for each in trials if each.weights is None], distances)
    so_far = Evidence(level, structure, notes=notes)
    return _measure(original, reference, rewritten, trials, _changed(plan), progress, so_far)


@dataclass(frozen=True)
class Trial:
    """Inputs and, where not the model's own, weights."""

    name: str
    case: Case
    weights: Weights | None


def _other_weights(plan: Plan) -> dict[str, Weights]:
    """Changes of all weights that put the norms on trial: formulas must hold for any weights, not for these alone.

    A model's own weights can hide a mistake (a bias that happens to be zero, an eps far below the variance), and a model
    that reads token ids offers no other way to give its norms a large mean or next to no variance.
    """
    changed = set(_changed(plan))

    def shifted(name: str, value: Tensor) -> Tensor:
        return value + value.std() if value.numel() > 1 else value

    def shrunk(name: str, value: Tensor) -> Tensor:
        return value * 1e-3 if name in changed else value

    def redrawn(name: str, value: Tensor) -> Tensor:
        # factors are positive, so that a variance stays one
        return value * torch.exp(0.5 * _noise(name, value)) + (0.1 * value.std() if value.numel() > 1 else 0.0)

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


def _measure(
    stored: Program,
    a: Program,
    b: Program,
    trials: Sequence[Trial],
    changed: Sequence[str],
    progress: Progress | None,
    so_far: Evidence,
) -> Evidence:
    """The rows of all trials: ``a`` is what ``stored`` computes without rounding, as `reference_of` has it."""
    algebra: list[Agreement] = []
    rounding: list[Rounding] = []
    notes = [*so_far.notes]
    own: set[str] = set()
    baked, coverage = b.baked(), Coverage()
    usual = trial_run(stored, trials[0].case.flat)
    for done, trial in enumerate(trials):
        name, flat, weights = trial.name, trial.case.flat, trial.weights
        if progress:
            progress(name, done, len(trials))
        steps = Steps()
        try:
            truth = run(a, flat, wide=True, weights=weights, beside=steps.written())
        except Exception as error:
            if done == 0:  # the user's own inputs must run
                hint = "verify='structure' (--verify structure) proves its form only"
                raise NormfuseError(f"the model does not run in float64: {first_line(error)}", hint=hint) from error
            notes.append(f"the original does not run on '{name}': {first_line(error)}")
            continue
        samples = [_shaken(a, flat, weights, draw, steps) for draw in range(DRAWS)]
        got = run(b, flat, wide=True, weights=weights, beside=steps.followed())
        own |= steps.own.keys()
        coverage.add(truth, samples[0], given=trial.case.given and weights is None)
        judge = partial(agreement, name, truth, samples=samples, more=cache(partial(_sampled, a, flat, weights, steps)))
        algebra.append(judge(got))
        if done == 0 and algebra[0].ok:
            outputs = partial(_otherwise, a, flat, steps)
            so_far = replace(so_far, sensitivity=sensitivity(a, changed, outputs, judge))
        if weights is None:
            try:
                before, after = usual if done == 0 and usual is not None else run(stored, flat), run(baked, flat)
            except RuntimeError as error:  # an operator that this machine does not have in half precision
                rounding.append(Rounding(name, math.nan, math.nan, Verdict.NOT_COMPARED))
                notes.append(f"not run in the stored dtype on '{name}': {first_line(error)}")
            else:
                failed = algebra[-1].verdict is Verdict.DISPROVEN
                rounding.append(rounded_alike(name, a, flat, truth, before, after, failed=failed))
    notes += [*notes_of(algebra), *notes_of_own_dtype(own)]
    missing = coverage.missing() or not_rounded(rounding)
    return replace(so_far, algebra=tuple(algebra), rounding=tuple(rounding), notes=tuple(notes), missing=missing)


def rounded_alike(
    name: str,
    a: Program,
    flat: Sequence[Any],
    truth: Sequence[Tensor],
    usual: Sequence[Tensor],
    rewritten: Sequence[Tensor],
    *,
    failed: bool = False,
) -> Rounding:
    """Level 3 on one case. Samples are dear, so none are taken where another level has ``failed``; else however small the one
    is, as a float64 model's own is zero.
    """
    before, after = (max(distances(truth, each), default=0.0) for each in (usual, rewritten))
    more = None if failed else partial(samples_of_rounding, a, flat)
    judgement = agreement(name, truth, spared(truth, usual, rewritten), [usual], more, jumps=jumping(a), luck=math.inf)
    return Rounding(name, before, after, unless_none(usual, truth, judgement.verdict))


def unless_none(usual: Sequence[Tensor], truth: Sequence[Tensor], verdict: Verdict) -> Verdict:
    """The verdict, but no yes where all numbers overflow in the reference's stored dtype."""
    nothing = counts(truth)[0] > 0 and counts(usual)[0] == 0
    return Verdict.NOT_COMPARED if nothing and verdict is Verdict.PROVEN else verdict


def spared(truth: Sequence[Tensor], usual: Sequence[Tensor], got: Sequence[Tensor]) -> list[Tensor]:
    """``got``, with the truth where the reference itself overflows in its stored dtype: there it tells nothing of the other."""
    if len(got) != len(truth) or any(g.shape != t.shape for g, t in zip(got, truth, strict=True)):
        return list(got)
    over = [torch.isfinite(t) & ~torch.isfinite(u) for t, u in zip(truth, usual, strict=True)]
    return [torch.where(o, t, g.to(t.dtype)) if o.any() else g for o, t, g in zip(over, truth, got, strict=True)]


def _shaken(program: Program, flat: Sequence[Any], weights: Weights | None, draw: int, steps: Steps) -> list[Tensor]:
    """The outputs in float64 after the inputs and the weights were nudged."""
    changed = nudged(NUDGE, weights, draw)
    return run(program, _nudged_inputs(flat, draw), wide=True, weights=changed, beside=steps.measured())


def _sampled(program: Program, flat: Sequence[Any], weights: Weights | None, steps: Steps) -> Samples:
    return samples_of_rounding(program, flat, size=NUDGE, weights=weights, steps=steps)


def _otherwise(program: Program, flat: Sequence[Any], steps: Steps, weights: Weights) -> list[Tensor]:
    """The outputs in float64 with other weights."""
    return run(program, flat, wide=True, weights=weights, beside=steps.followed())


def not_rounded(rows: Sequence[Rounding]) -> Missing | None:
    """Why the rounding level is no yes on the inputs as given; None if it is one, or a no."""
    if rows and rows[0].verdict is Verdict.NOT_COMPARED:
        reason = "the rounding level was not compared: in its stored dtype the model overflows, or does not run on this machine"
        return Missing(reason, "convert the model to float32 first")
    return None


def agreement(
    case: str,
    truth: Sequence[Tensor],
    got: Sequence[Tensor],
    samples: Samples,
    more: Callable[[], Samples] | None = None,
    *,
    jumps: bool = False,
    luck: float = LUCK,
) -> Agreement:
    """The row of one case.

    Args:
        case: its name.
        truth: the outputs of the reference.
        got: those of the other.
        samples: those of the reference under noise, several times.
        more: further samples, which are dear: taken only where the others, which may be small by luck, do not explain ``got``.
        jumps: a rounding may make a whole step of some entry, so that the largest step anywhere explains one here.
        luck: how far ``samples`` may be off for ``more`` to be asked for.
    """
    compared, entries = counts(truth)
    if len(truth) != len(got):
        return Agreement(case, math.inf, FLOOR, Verdict.DISPROVEN, compared, entries)

    def judge(samples: Samples) -> list[Judged]:
        every = list(zip(*samples, strict=False)) or [()] * len(truth)
        return [judged(t, g, drawn, FLOOR) for t, g, drawn in zip(truth, got, every, strict=True)]

    found = judge(samples)
    if more is not None and 1.0 < max((each.excess for each in found), default=0.0) < (math.inf if jumps else luck):
        drawn = more()
        found = [min(pair, key=lambda each: each.excess) for pair in zip(found, judge(drawn), strict=True)]
        if jumps:
            steps = [max(each) for each in zip(*(distances(truth, outputs) for outputs in drawn), strict=True)]
            errors = zip(found, distances(truth, got), steps, strict=True)
            found = [Judged(x, MARGIN * y, y) if not each.agrees and x <= MARGIN * y else each for each, x, y in errors]
    worst = max(found, key=lambda each: (not each.agrees, each.excess), default=Judged(0.0, FLOOR))
    verdict = verdict_of(all(each.agrees for each in found), compared)
    relative = max(distances(truth, got), default=0.0)
    return Agreement(case, worst.error, worst.allowed, verdict, compared, entries, worst.noise, relative)


def notes_of(rows: Sequence[Agreement]) -> list[str]:
    """What a reader should know of how much was compared."""
    empty = [row.case for row in rows if not row.compared]
    partly = [row for row in rows if 0 < row.compared < row.entries]
    notes = []
    if empty and len(empty) < len(rows):
        notes.append(f"not a number in the original's outputs to compare on: {', '.join(empty)}")
    if partly:
        least = min(partly, key=lambda row: row.compared / row.entries)
        share = f"{least.compared} of {least.entries} entries are finite on '{least.case}' and were compared as numbers"
        notes.append(f"{share}; the others must be NaN or infinite in the same places")
    return notes


# -- noise and distance ------------------------------------------------------------------------------------------------


def rounding_of(program: Program) -> float:
    """One rounding of the coarsest dtype in which a program stores tensors."""
    dtypes = {program.tensor(name).dtype for name in program.stored.values()}
    return max((torch.finfo(each).eps for each in dtypes if each.is_floating_point), default=2.0**-52)


def nudged(size: float, weights: Weights | None = None, draw: int = 0) -> Weights:
    """A change of all weights by a relative ``size``, on top of another; for one ``draw`` the same one in every run."""

    def nudge(name: str, value: Tensor) -> Tensor:
        value = value if weights is None else weights(name, value)
        return value * (1.0 + size * kick(f"nudge {draw or ''}{name}", value))

    return nudge


def samples_of_rounding(
    program: Program,
    flat: Sequence[Any],
    *,
    size: float | None = None,
    weights: Weights | None = None,
    steps: Steps | None = None,
) -> Samples:
    """The outputs in float64 after each weight and each value on the way was rounded once at random, several times.

    The error of one run is one sample, which can be small by luck. In Whisper's encoder one entry in half a million decides it,
    and programs that are one function were seen to differ in it by a factor of 24. Whole numbers are left alone: every
    arithmetic has them exactly, and masks are compared with them.

    Args:
        program: what is run.
        flat: its inputs, as `normfuse.graph.interpreter.flat_inputs` orders them.
        size: of a rounding, relative; None for that of the dtype in which a weight or a value is stored.
        weights: changes the weights first.
        steps: of the run that is the truth.
    """

    def through(node: Node, value: Any, draw: int) -> Any:
        return _rounded(value, dtype(node), f"{draw} {node.name}", size) if is_tensor(node) else value

    unit = rounding_of(program) if size is None else size
    return [
        run(program, _nudged_inputs(flat, draw, unit), wide=True, weights=nudged(unit, weights, draw),
            through=partial(through, draw=draw), beside=steps.measured() if steps else None)
        for draw in range(DRAWS, 2 * DRAWS + 1)
    ]  # fmt: skip


def _rounded(value: Tensor, stored: torch.dtype | None, name: str, size: float | None) -> Tensor:
    """A float64 value after one rounding, by default to the dtype that it is stored in."""
    if stored is None or not stored.is_floating_point or not value.is_floating_point():
        return value
    rounded = value * (1.0 + (torch.finfo(stored).eps if size is None else size) * kick(name, value))
    return torch.where(value == value.round(), value, rounded)


def _nudged_inputs(flat: Sequence[Any], draw: int, size: float = NUDGE) -> list[Any]:
    """A large mean in an input costs digits that no change of weights shows."""
    return [
        _rounded(value.double(), value.dtype, f"input {draw or ''}{place}", size)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for place, value in enumerate(flat)
    ]


def kick(name: str, like: Tensor) -> Tensor:
    """Numbers between ½ and 1½ of either sign, so that none is small by luck; the same ones for the same name."""
    drawn = torch.rand(like.shape, generator=_named(name, like), dtype=torch.float64, device=like.device) * 2.0 - 1.0
    return drawn + torch.where(drawn < 0.0, -0.5, 0.5)


def _noise(name: str, like: Tensor) -> Tensor:
    """Standard normal numbers, the same ones for the same name in every run."""
    return torch.randn(like.shape, generator=_named(name, like), dtype=torch.float64, device=like.device)


def _named(name: str, like: Tensor) -> torch.Generator:
    return torch.Generator(like.device).manual_seed(zlib.crc32(name.encode()))


def distances(truth: Sequence[Tensor], other: Sequence[Tensor]) -> list[float]:
    """`distance` of each output; one inf where there are more or fewer."""
    if len(truth) != len(other):
        return [math.inf]
    return [distance(a, b) for a, b in zip(truth, other, strict=True)]


def distance(truth: Tensor, other: Tensor) -> float:
    """The largest difference of two outputs relative to the largest finite entry of the first.

    NaN and infinity agree only with themselves in the same places; integer outputs must be equal. Returns inf where the
    outputs cannot be compared at all.
    """
    if truth.shape != other.shape:
        return math.inf
    if not truth.is_floating_point() and not truth.is_complex():
        return 0.0 if torch.equal(truth, other.to(truth.dtype)) else math.inf
    wide = torch.complex128 if truth.is_complex() else torch.float64
    truth, other = truth.to(wide), other.to(wide)
    finite = torch.isfinite(truth)
    if not torch.equal(finite, torch.isfinite(other)) or not _same_where(~finite, truth, other):
        return math.inf
    # a mask's finfo.min is no size of this output: beside 1e38 every other difference would vanish
    masked = finite & ((truth.abs() >= 1e30) | (truth.abs() == torch.finfo(torch.float16).max))
    plain = finite & ~masked
    scale = truth[plain].abs().max().item() if plain.any() else 0.0
    difference = (truth - other)[plain].abs().max().item() if plain.any() else 0.0
    behind_mask = ((truth - other)[masked].abs() / truth[masked].abs()).max().item() if masked.any() else 0.0
    return max(behind_mask, difference / scale if scale > 0.0 else (0.0 if difference == 0.0 else math.inf))


def _same_where(where: Tensor, a: Tensor, b: Tensor) -> bool:
    return torch.equal(a[where].nan_to_num(nan=7.0), b[where].nan_to_num(nan=7.0))
