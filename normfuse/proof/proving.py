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

from collections.abc import Iterable
from dataclasses import replace

from normfuse.analysis.facts import analyze
from normfuse.errors import NormfuseError, one_of
from normfuse.graph.program import Program
from normfuse.graph.views import dtype, is_tensor, shape
from normfuse.planning.planner import Plan
from normfuse.proof.by_regions import can_be_cut, proven_by_regions
from normfuse.proof.cases import Case
from normfuse.proof.evidence import COMPARED, Evidence, Structure
from normfuse.proof.input_conditions import narrower
from normfuse.proof.measuring import Progress, evidence_of
from normfuse.proof.reference import reference_of
from normfuse.proof.steps import notes_of_own_dtype
from normfuse.proof.trial_run import trial_run
from normfuse.proof.trials import FORM_ONLY, Proof, Trial, as_stored, changed_by, other_weights

LEVELS = ("full", "regions", "structure", "none")


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
        level: ``full``; ``regions`` to prove each region of the rewrite by itself; or ``structure`` to run nothing.
        progress: called with (what, done, total).
    """
    structure = _structure(original, promised or rewritten, plan)
    if level not in COMPARED or not structure.ok or not plan.rounds:
        return Evidence(level, structure, unchanged=not plan.rounds)
    if any(original.tensor(name).is_meta for name in original.stored.values() if name not in original.formulas):
        raise NormfuseError("the model does not run: its weights are on the meta device", hint=FORM_ONLY)
    tried = list(cases)
    reference, notes = reference_of(original, plan, [each.flat for each in tried])
    so_far = Evidence(level, structure, notes=notes)
    if level == "regions" and reference is original and can_be_cut(original, rewritten):
        return proven_by_regions(original, rewritten, changed_by(plan), tried, so_far, progress)
    trials = [Trial(each.name, each.flat, each.given) for each in tried]
    trials += [Trial(name, trials[0].flat, weights=change) for name, change in other_weights(changed_by(plan)).items()]
    usual = trial_run(original, trials[0].flat)
    proof = Proof(original, reference, rewritten, as_stored(rewritten), changed_by(plan), usual)
    evidence = evidence_of(trials, proof.measured, so_far, progress)
    return replace(evidence, notes=(*evidence.notes, *notes_of_own_dtype(proof.in_own_dtype)))


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
