"""Fold norms that divide by stored statistics: Unified Norm, PowerNorm, and whoever else writes them in arithmetic.

What
    At inference Unified Norm divides by the root of a running second moment and subtracts no mean: y = a⊙x + c along the
    channels, with a and c computed from stored tensors. It is folded into all layers that read y (pre-norm), or into those
    that write x; on a post-norm stream its scale travels through the sums to the head. The module's class does not matter:
    the arithmetic is read from the graph.

Formula
    a = w/√(v̂ + ε),  c = b.  Reader: W ← W diag(a), b ← b + Wc (made where there is none).  Post-norm, s = D t + e: readers
    W ← W D, b ← b + We; what is added is divided by D; norms on the way multiply D and dissolve.

Needs
    Statistics that are stored and not updated by the forward pass. Dividing by D needs entries without zeros that are less
    than 10⁴ apart.

Refuses
    Nothing. What cannot be folded is left as one multiplication and one addition, and the report says what stood in the
    way. `offline_norm` says of every other norm why it is not a constant.

Claim
    rounding: the same function of real numbers.

Reference
    Yang et al.: Unified Normalization for Accelerating and Stabilizing Transformers, 2022, §3 (inference).
"""

from __future__ import annotations

from collections.abc import Iterator

from normfuse.analysis.affine import Affine, forms
from normfuse.analysis.facts import Facts
from normfuse.graph.findings import Finding
from normfuse.graph.program import Program
from normfuse.graph.views import Norm, NormKind
from normfuse.transforms.constant_norms import dissolve

NORMS = ("offline_norm",)


def unified_norm(program: Program, facts: Facts) -> Iterator[Finding]:
    """Propose one rewrite per norm that divides by stored statistics."""
    if any(norm.kind == NormKind.OFFLINE_NORM for norm in facts.norms):
        yield from dissolve(facts, "unified_norm", forms(facts), _has_statistics)


def _has_statistics(form: Affine, norms: list[Norm]) -> bool:
    return any(norm.kind == NormKind.OFFLINE_NORM for norm in norms)
