"""Fold BatchNorms with running statistics into the layers around them (Deploy mode).

What
    A BatchNorm in evaluation mode is y = a⊙x + c along its channel axis, with a and c computed from stored tensors. It is
    folded into the layers that write x, or else into all layers that read y, however far; what cannot be folded is left as
    one multiplication and one addition. Arithmetic around it that is affine along the same axis (a frozen scale, LayerScale)
    goes with it. A BatchNorm that the model spells in arithmetic (FrozenBatchNorm2d) is one too, and so is an InstanceNorm
    with running statistics.

Formula
    a = γ/√(σ̂² + ε),  c = β - a⊙μ̂.  Writer: W ← diag(a)W, b ← a⊙b + c.  Reader: W ← W diag(a), b ← b + Wc.

Needs
    Running statistics. For a writer: nobody else reads x, and every stored tensor on the way is read once. For readers: all
    of them are linear layers or convolutions. Where c is not zero and a convolution pads with zeros, what c adds is stored
    as a map if that is no larger than the weight, and c stays as one addition before the convolution otherwise. A weight that
    is computed from integers or a mask keeps them: a factor of it takes the scale. What a quantizer writes is never replaced.

Refuses
    NF301  The BatchNorm has no running statistics, or is in training mode, so its statistics come from each input; or the
           program updates them between calls. Train it with running statistics (track_running_stats=True, the default)
           and call eval() before tracing.

Claim
    rounding: the same function of real numbers.

Reference
    You et al.: Tune mode ConvBN blocks for efficient transfer learning, 2023, §3 (Deploy mode).
"""

from __future__ import annotations

from collections.abc import Iterator

from normfuse.analysis.affine import Affine, forms, why_adaptive
from normfuse.analysis.facts import Facts
from normfuse.graph.expressions import Call
from normfuse.graph.findings import Finding, Refusal
from normfuse.graph.program import Program
from normfuse.graph.views import Norm, NormKind
from normfuse.transforms.constant_norms import dissolve

NORMS = ("batch_norm", "offline_norm")


def conv_bn(program: Program, facts: Facts) -> Iterator[Finding]:
    """Propose one rewrite per BatchNorm (with the affine arithmetic around it), or say why it stays."""
    if not facts.norms:
        return
    found = forms(facts)
    for norm in facts.norms:
        if norm.kind == NormKind.BATCH_NORM and norm.out not in found:
            yield Refusal("conv_bn", program.site(norm.out), "NF301", why_adaptive(facts, norm))
    yield from dissolve(facts, "conv_bn", found, _has_batch_norm)


def _has_batch_norm(form: Affine, norms: list[Norm]) -> bool:
    """A norm with stored statistics that subtracts a mean has arithmetic in its shift; Unified Norm has the bias as it is."""
    running = (NormKind.BATCH_NORM, NormKind.INSTANCE_NORM)  # here both have running statistics
    by_operator = any(norm.kind in running for norm in norms)
    return by_operator or (any(norm.kind == NormKind.OFFLINE_NORM for norm in norms) and _is_computed(form.shift))


def _is_computed(shift: object) -> bool:
    return isinstance(shift, Call) and (not shift.op.startswith(("flatten", "view")) or _is_computed(shift.args[0]))
