"""Fold every norm, and every other affine along an axis, that is a constant at inference.

What
    All of `conv_bn`, `unified_norm` and `prepbn`, and whatever else is y = a⊙x + c along one axis with a and c computed from
    stored tensors: LayerScale, ActNorm, frozen BatchNorms in arithmetic, EvoNorm without its activation. Where it can be
    absorbed neither by what writes x nor by what reads y, several steps become one multiplication and one addition. Weights
    that are computed from stored tensors at every call (weight norm, weight standardization) are stored. Of every norm that
    stays, it says why.

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

from normfuse.analysis.affine import Affine, forms, why_adaptive
from normfuse.analysis.facts import Facts
from normfuse.graph.findings import Claim, Finding, Refusal, Rewrite
from normfuse.graph.ops.lookup import computes, keeps, layer
from normfuse.graph.ops.row import ROOTS, SAME, STATISTICS, Computes
from normfuse.graph.program import Program
from normfuse.graph.views import Norm, arguments, aten
from normfuse.transforms.constant_norms import dissolve
from normfuse.transforms.draft import Draft


def offline_norm(program: Program, facts: Facts) -> Iterator[Finding]:
    """Propose one rewrite per affine value; refuse each norm whose statistics come from its input."""
    found = forms(facts)
    for norm in facts.norms:
        if norm.out not in found:
            yield Refusal("offline_norm", program.site(norm.out), "NF311", why_adaptive(facts, norm))
    for root in facts.program.graph.nodes:
        if _is_root(root) and _is_adaptive(facts, root) and _scales(facts, root):
            reason = "it scales by statistics that come from each input"
            yield Refusal("offline_norm", program.site(root), "NF311", reason)

    def is_offline(form: Affine, norms: list[Norm]) -> bool:
        within = (facts.norm_at[node] for node in form.inner if node in facts.norm_at)
        return form.axis is not None and all(norm in norms for norm in within)  # the gain of another norm is its own

    yield from dissolve(facts, "offline_norm", found, is_offline)
    yield from _computed_weights(program, facts)


def _computed_weights(program: Program, facts: Facts) -> Iterator[Rewrite]:
    """Weights that are computed from stored tensors at every call (weight norm, standardization) are stored."""
    for node in program.graph.nodes:
        if node not in facts.constant or node.op != "call_function" or not _is_weight(node):
            continue
        draft = Draft(facts)
        if _arithmetic(node) and draft.change(node, lambda formula: formula) is None:
            region, site = frozenset({node.name, *(reader.name for reader in node.users)}), program.site(node)
            because = "it depends on stored tensors alone"
            yield Rewrite(
                "offline_norm",
                (site,),
                ("computed weight",),
                "stored weight",
                tuple(draft.edits),
                region,
                Claim.ROUNDING,
                because,
            )


def _is_weight(node: Node) -> bool:
    return any(layer(reader) and arguments(reader)["weight"] is node for reader in node.users)


def _arithmetic(node: Node) -> bool:
    """Whether more than a view or a cast makes a value, of tensors that nobody else reads: otherwise storing it is a copy."""
    seen, computes = [node], False
    for each in seen:
        computes |= each.op == "call_function" and keeps(each) not in SAME
        seen.extend(inner for inner in each.all_input_nodes if inner not in seen)
    return computes and all(set(each.users) <= set(seen) for each in seen if each is not node)


def _is_root(node: Node) -> bool:
    return computes(node) in ROOTS and (node.target is not aten.pow.Tensor_Scalar or node.args[1] in (0.5, -0.5))


def _scales(facts: Facts, root: Node) -> bool:
    """Whether another value is multiplied or divided by what is made of a root; deviations may be features of their own."""
    seen = [root]
    for node in seen:
        for reader in node.users if len(seen) < _NEAR else ():
            others = [each for each in reader.all_input_nodes if each is not node and each not in facts.constant]
            if computes(reader) in (Computes.PRODUCT, Computes.QUOTIENT) and others:
                return True
            if not layer(reader) and reader not in seen:
                seen.append(reader)
    return False


def _is_adaptive(facts: Facts, root: Node) -> bool:
    """Whether a root is one of means over the input, outside the norms that are known: a norm that we have no name for."""
    seen = [root]
    for node in seen:
        if node in facts.constant or node in facts.norm_at:
            continue
        if computes(node) in STATISTICS:
            return True
        near = node.all_input_nodes if not layer(node) and len(seen) < _NEAR else ()
        seen.extend(each for each in near if each not in seen)
    return False


_NEAR = 32  # nodes between a mean and the root of it; the statistics of test-time norms have some ten
