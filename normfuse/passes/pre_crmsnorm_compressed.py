"""Store the zero-mean residual stream of d entries without its last one; norms become CRMSNorm, as in the paper.

What
    As ``pre_crmsnorm``, with another basis: the entry that is left out is minus the sum of the others. The norm becomes
    arithmetic that no runtime has a kernel for, so it is the slower form; it is here because it is the published one.

Formula
    Writers W ← C₀W without their last row, readers W ← W diag(gain), each column less the last one, which goes; the norm is
    y = x / √((Σx² + (Σx)²)/d + eps), with d one more than there are entries (`normfuse.nn.CRMSNorm`).

Needs
    As ``pre_crmsnorm``.

Refuses
    As ``pre_crmsnorm``, with its codes NF401 to NF406. Readers are less well conditioned here: an error in Σx enters every
    entry of √d larger weights, so that half precisions lose more than with ``pre_crmsnorm``.

Claim
    rounding: the same function of real numbers.

Reference
    Jiang, Gu, Zhu, Pan: Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers, 2023, §3.3.
"""

from __future__ import annotations

from collections.abc import Iterator

from normfuse.analysis.facts import Facts
from normfuse.graph.findings import Finding
from normfuse.graph.program import Program
from normfuse.transforms.basis import Compressed
from normfuse.transforms.width import propose

NORMS = ("layer_norm", "rms_norm")


def pre_crmsnorm_compressed(program: Program, facts: Facts) -> Iterator[Finding]:
    """Propose one rewrite per stream of norms, and a refusal for every norm with a zero-mean input that stays as wide."""
    return propose(program, facts, "pre_crmsnorm_compressed", Compressed())
