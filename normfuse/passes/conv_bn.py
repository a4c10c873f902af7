"""Fold BatchNorms with running statistics into the layers around them (Deploy mode).

What
    A BatchNorm in evaluation mode is y = a⊙x + c along its channel axis, with a and c computed from stored tensors. It is
    folded into the layers that write x, or else into all layers that read y; what cannot be folded is left as one
    multiplication and one addition. Arithmetic around it that is affine along the same axis (RepBN's BN(x) + αx, a frozen
    scale, LayerScale) goes with it.

Formula
    a = γ/√(σ̂² + ε),  c = β - a⊙μ̂.  Writer: W ← diag(a)W, b ← a⊙b + c.  Reader: W ← W diag(a), b ← b + Wc.

Needs
    Running statistics. For a writer: nobody else reads x, and every stored tensor on the way is read once. For readers: all
    of them are linear layers or convolutions, without zero padding where c is not zero.

Refuses
    NF301  The BatchNorm has no running statistics, or is in training mode: its statistics come from each batch.

Claim
    rounding: the same function of real numbers.

Reference
    You et al.: Tune mode ConvBN blocks for efficient transfer learning, 2023, §3 (Deploy mode).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from normfuse.absorb import Absorbed, into_readers, into_writers, scale_shift
from normfuse.affine import Affine, forms, maximal, moved
from normfuse.edits import Edit, Reroute
from normfuse.facts import Facts
from normfuse.findings import NO_NORM, Claim, Finding, Refusal, Rewrite
from normfuse.program import Program
from normfuse.views import Norm, dtype


def conv_bn(program: Program, facts: Facts) -> Iterator[Finding]:
    """Propose one rewrite per BatchNorm (with the affine arithmetic around it), or say why it stays."""
    batch_norms = [norm for norm in facts.norms if norm.kind == "batch_norm"]
    found = forms(facts) if batch_norms else {}
    for norm in batch_norms:
        if norm.out not in found:
            yield Refusal("conv_bn", program.site(norm.out), "NF301", "its statistics come from each batch")
    for value, form in maximal(found):
        inside = [norm for norm in batch_norms if norm.out in form.inner]
        if inside:
            yield _decide(program, facts, value, form, inside)


def _decide(program: Program, facts: Facts, value: Node, form: Affine, norms: list[Norm]) -> Finding:
    sites = tuple(program.site(norm.out) for norm in norms)
    dissolved: tuple[Edit, ...] = (Reroute(value.name, moved(form)),)
    absorbed, because = into_writers(facts, form, value), "folded into the layers that write its input"
    if not isinstance(absorbed, Absorbed):
        absorbed, because = into_readers(facts, form, value), "folded into the layers that read its output"
    if not isinstance(absorbed, Absorbed):
        like = next(name for node, name in program.stored.items() if dtype(program.nodes[node]) == dtype(value))
        absorbed, because = Absorbed((), frozenset()), "left as one multiplication and one addition"
        dissolved = scale_shift(form, value, like)
    region = frozenset(node.name for node in absorbed.nodes | form.inner | {form.base})
    return Rewrite(
        "conv_bn", sites, "batch_norm", NO_NORM, (*absorbed.edits, *dissolved), region, Claim.ROUNDING, because
    )
