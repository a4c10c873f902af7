"""Fold RepBN, which is what PRepBN (SLAB) has become when its training is over, into the layers around it.

What
    RepBN(x) = BN(x) + αx is affine along the channels at inference, with the BatchNorm's running statistics. It is folded
    into all layers that read it (pre-norm), or into those that write x; on a post-norm stream its scale travels through the
    sums to the head. Transposes around the BatchNorm go with it. The module's class does not matter: BatchNorm, product and
    sum are read from the graph.

Formula
    a = γ/√(σ̂² + ε) + α,  c = β - γμ̂/√(σ̂² + ε).  Writer: W ← diag(a)W, b ← a⊙b + c (the published merge of a patch embedding
    forgets α⊙b).  Reader: W ← W diag(a), b ← b + Wc.

Needs
    The model in evaluation mode, and λ at 0: a PRepBN evaluates its RepBN alone, so one that is folded in mid-training
    gives what the model gives in evaluation mode then, which is not what it was trained for.

Refuses
    NF303  The BatchNorm of a RepBN has no running statistics, or is in training mode, so its statistics come from
           each input; or the program updates them between calls.

Claim
    rounding: the same function of real numbers.

Reference
    Guo et al.: SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch
    Normalization, 2024, §3.2, eq. 4 to 6.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from normfuse.analysis.affine import Affine, forms, why_adaptive
from normfuse.analysis.facts import Facts
from normfuse.graph.findings import Finding, Refusal
from normfuse.graph.ops.lookup import keeps
from normfuse.graph.ops.row import MOVES
from normfuse.graph.program import Program
from normfuse.graph.views import Norm, NormKind, aten
from normfuse.transforms.constant_norms import dissolve

NORMS = ("batch_norm",)


def prepbn(program: Program, facts: Facts) -> Iterator[Finding]:
    """Propose one rewrite per sum of a BatchNorm and its input, or say why it stays."""
    batch_norms = [norm for norm in facts.norms if norm.kind == NormKind.BATCH_NORM]
    found = forms(facts) if batch_norms else {}
    for norm in batch_norms:
        if norm.out not in found and _is_rep(norm):
            yield Refusal("prepbn", program.site(norm.out), "NF303", why_adaptive(facts, norm))
    if batch_norms:
        yield from dissolve(facts, "prepbn", found, _has_sum)


def _has_sum(form: Affine, norms: list[Norm]) -> bool:
    """Whether a BatchNorm is added to a multiple of its own input."""
    return any(norm.kind == NormKind.BATCH_NORM and _is_rep(norm) for norm in norms)


def _is_rep(norm: Norm) -> bool:
    """Whether what a BatchNorm gives is added to what it was given, views aside."""
    out = _past_views(norm.out)
    sums = [reader for reader in out.users if reader.target is aten.add.Tensor]
    return any(_source(norm.x) is _source(other) for total in sums for other in total.all_input_nodes if other is not out)


def _past_views(node: Node) -> Node:
    while len(node.users) == 1 and keeps(reader := next(iter(node.users))) in MOVES:
        node = reader
    return node


def _source(node: Node) -> Node:
    """What a value is a view or a multiple of."""
    while keeps(node) in MOVES or node.target is aten.mul.Tensor:
        node = next((each for each in node.all_input_nodes if each.op == "call_function"), node.all_input_nodes[0])
    return node
