"""Store the zero-mean residual stream of d entries in d - 1, in an orthonormal basis, so that RMSNorm serves.

What
    A norm whose input has, or can be given, zero mean becomes ``rms_norm`` over one entry less. All that writes and reads the
    stream gets one row or column less: weights, biases, embeddings, positions, tokens, and every size on the way. Gain and
    shift of each norm are folded into all its readers; a layer without a bias gets one where the shift needs it. A reader that
    cannot change reads the stream through one explicit change of basis.

Formula
    With Q of d rows and d - 1 columns, QᵀQ = I and Qᵀ1 = 0 (a Householder reflection, see `normfuse.transforms.basis`): x = Qy,
    writers W ← QᵀW, b ← Qᵀb, readers W ← √(d/(d-1)) W diag(gain) Q, b ← b + W shift, and the norm is RMS over d - 1 entries,
    eps ← eps·d/(d-1). The mean that LayerNorm subtracts vanishes with Qᵀ. `pre_crmsnorm_compressed` has the paper's form.

Needs
    A norm over one axis, whose input `pre_rmsnorm` can give zero mean, or has given within the same plan or in the result that
    is rewritten further; and fewer explicit changes of basis than norms. Run ``pre_rmsnorm`` first: a norm that stays behind a
    change of basis cannot be converted later.

Refuses
    NF401  The norm's input cannot be given zero mean: somebody else sees the mean, or it is written by what cannot be centred.
           ``pre_rmsnorm`` refuses the norm too, and says more.
    NF402  The norm is over several axes, over one of dynamic size, or over less than three entries.
    NF403  Somebody who reads the norm's output cannot take the gain, the shift or the other basis: an output of the model, a
           weight that is tied or shared with another reader (a tied head), an activation, an addition of positions, zeros put
           around a shifted value. The norm stays as it is, and costs an explicit change of basis.
    NF404  The stream passes an operation whose result has no rule for another width, is made of a tensor that somebody else
           reads in full width, or meets a mask or gate that is expanded along the features; one that broadcasts is fine.
    NF405  As many explicit changes of basis would be left to compute at every call as there are norms that profit.
    NF406  The norm is an RMSNorm that a LayerNorm was turned into before the model was saved. All that writes its input was
           centred, and then rounded: what is left of the means is as small as rounding makes it, and not zero. A rewrite that
           takes it for zero would be another function, so none is made. Hint: run the pass on the original model, alone or
           in one plan with ``pre_rmsnorm``; in Python, a `Result` still knows its formulas and can be rewritten further.

    Refused by nobody, but not always worth it: d - 1 is odd where d is a multiple of 64, which matrix products are made for.
    On a CPU, torch took up to 1.5 times as long for a product that writes 63, 191 or 383 columns as for 64, 192 or 384, which
    is more than one part in d and a cheaper norm save: eager and compiled models became slower (1.00 to 1.2). ONNX Runtime
    packs its weights beforehand, and there the same models took 0.85 to 1.00 of the original's time, hardly less than with
    ``pre_rmsnorm``. `docs/crms_norm.md` has the tables. Where you do not export, use ``pre_rmsnorm``.

Claim
    rounding: the same function of real numbers.

Reference
    Jiang, Gu, Zhu, Pan: Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers, 2023, §3.3;
    the orthonormal basis is our own.
"""

from __future__ import annotations

from collections.abc import Iterator

from normfuse.analysis.facts import Facts
from normfuse.graph.findings import Finding
from normfuse.graph.program import Program
from normfuse.transforms.basis import Rotated
from normfuse.transforms.width import propose

NORMS = ("layer_norm", "rms_norm")


def pre_crmsnorm(program: Program, facts: Facts) -> Iterator[Finding]:
    """Propose one rewrite per stream of norms, and a refusal for every norm with a zero-mean input that stays as wide."""
    return propose(program, facts, "pre_crmsnorm", Rotated())
