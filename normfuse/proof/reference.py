"""What the rewritten program is compared with in float64: the original, without variances that its stored dtype does not see.

A norm with eps = 10¹² in float32 computes with eps alone while its variance is below half a spacing of floats there. In
float64 the variance does count, so that float64 would tell of a difference that the model as it is stored does not have. No
plan is taken at its word: on every case the variance is measured here, and only a norm whose variance is swallowed on all of
them is linear in the reference. Any other stays what it is, and its removal is disproven; unless the removal was allowed as
approximate, when the difference it makes is measured and told.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from normfuse.graph.edits import Reroute
from normfuse.graph.findings import NO_NORM, Claim
from normfuse.graph.interpreter import run
from normfuse.graph.program import Program
from normfuse.planning.planner import Plan
from normfuse.proof.differences import distances
from normfuse.transforms.swallowed_variance import as_linear, largest_variances, over_last_axis, swallowed_up_to


def reference_of(original: Program, plan: Plan, cases: Sequence[Sequence[Any]]) -> tuple[Program, tuple[str, ...]]:
    """The reference of a proof, and what a reader should know of it.

    Args:
        original: the program that the plan was made for.
        plan: the plan.
        cases: flat inputs with the model's own weights, the user's first.
    """
    removed = _removed(plan)
    norms = [norm for norm in over_last_axis(original) if norm.out.name in removed]
    if not norms:
        return original, ()
    most = largest_variances(original, norms, cases)
    swallowed = [norm for norm in norms if norm.out.name in most and most[norm.out.name] < swallowed_up_to(norm)]
    rough = [norm for norm in norms if norm not in swallowed and removed[norm.out.name] is Claim.APPROXIMATE]
    notes = []
    if swallowed:
        share = max(most[norm.out.name] / swallowed_up_to(norm) for norm in swallowed)
        notes.append(
            f"eps swallows the variance of {len(swallowed)} norms on every case, which reaches {share:.1%} of what "
            "it swallows: the stored dtype computes without it, and so does the float64 reference"
        )
    reference = as_linear(original, [norm.out.name for norm in swallowed])
    if rough:
        sharp, reference = reference, as_linear(original, [norm.out.name for norm in (*swallowed, *rough)])
        off = max(distances(run(sharp, cases[0], wide=True), run(reference, cases[0], wide=True)), default=0.0)
        notes.append(
            f"approximate: without the variance of {len(rough)} norms the outputs on the inputs as given differ by {off:.1e}, "
            "relative; what was proven is that the rest is one function"
        )
    return reference, tuple(notes)


def _removed(plan: Plan) -> dict[str, Claim]:
    """Norms that became arithmetic where they stood, with the claim of that."""
    return {
        site.node: rewrite.claim
        for rewrite in plan.rewrites
        for site, was in zip(rewrite.sites, rewrite.was, strict=True)
        if was == "layer_norm" and rewrite.becomes == NO_NORM
        if any(isinstance(edit, Reroute) and edit.node == site.node for edit in rewrite.edits)
    }
