"""Fold every norm, and every other affine along an axis, that is a constant at inference.

What
    All of `conv_bn`, `unified_norm` and `prepbn`, and whatever else is y = a⊙x + c along one axis with a and c computed from
    stored tensors: LayerScale, ActNorm, frozen BatchNorms in arithmetic, EvoNorm without its activation. Where it can be
    absorbed neither by what writes x nor by what reads y, several steps become one multiplication and one addition. Of every
    norm that stays, it says why.

Formula
    Writer: W ← diag(a)W, b ← a⊙b + c.  Reader: W ← W diag(a), b ← b + Wc.

Needs
    As `conv_bn`, `unified_norm` and `prepbn`.

Refuses
    NF311  The norm's statistics come from each input (LayerNorm, RMSNorm, GroupNorm, InstanceNorm and its half of IBN,
           Region Norm, UnMix-TNS, BatchNorm without running statistics), so there is nothing constant to fold. For a
           LayerNorm try pre_rmsnorm; for a BatchNorm train with running statistics and call eval() before tracing.

Claim
    rounding: the same function of real numbers.

Reference
    You et al., 2023 (ConvBN); Yang et al., 2022 (Unified Normalization); Guo et al., 2024 (SLAB).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from normfuse.absorb import LAYERS
from normfuse.affine import Affine, forms
from normfuse.dissolve import dissolve
from normfuse.facts import Facts
from normfuse.findings import Finding, Refusal
from normfuse.program import Program
from normfuse.recognize import MEANS, ROOTS
from normfuse.views import Norm


def offline_norm(program: Program, facts: Facts) -> Iterator[Finding]:
    """Propose one rewrite per affine value; refuse each norm whose statistics come from its input."""
    found = forms(facts)
    for norm in facts.norms:
        if norm.out not in found:
            yield Refusal("offline_norm", program.site(norm.out), "NF311", "its statistics come from each input")
    for root in facts.program.graph.nodes:
        if root.target in ROOTS and _is_adaptive(facts, root):
            yield Refusal("offline_norm", program.site(root), "NF311", "it takes a root of statistics that come from each input")

    def is_offline(form: Affine, norms: list[Norm]) -> bool:
        within = (facts.norm_at[node] for node in form.inner if node in facts.norm_at)
        return form.axis is not None and all(norm in norms for norm in within)  # the gain of another norm is its own

    yield from dissolve(program, facts, "offline_norm", is_offline)


def _is_adaptive(facts: Facts, root: Node) -> bool:
    """Whether a root is one of means over the input, outside the norms that are known: a norm that we have no name for."""
    seen = [root]
    for node in seen:
        if node in facts.constant or node in facts.norm_at:
            continue
        if node.target in MEANS:
            return True
        near = node.all_input_nodes if node.target not in LAYERS and len(seen) < _NEAR else ()
        seen.extend(each for each in near if each not in seen)
    return False


_NEAR = 32  # nodes between a mean and the root of it; the statistics of test-time norms have some ten
