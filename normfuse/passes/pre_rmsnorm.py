"""Turn LayerNorms into RMSNorms where their input can be given zero mean by changing weights.

What
    ``layer_norm(x)`` becomes ``rms_norm(x)`` with the same gain, shift and eps, for every norm whose input's mean nobody
    else can see. The mean is removed where it is written: in linear and convolution weights and biases, embedding and
    position tables, LayerScale included. Where one writer cannot be centred but many norms read its stream, one explicit
    mean-subtraction is inserted.

Formula
    LN(x) = RMS(C₀x) with C₀ = I - 11ᵀ/d, so for every writer W, b of x:  W ← C₀W,  b ← C₀b.

Needs
    Over one axis: no reader of x, however far, sees its mean along that axis, and every writer of x can be centred, or
    one explicit mean-subtraction serves at least two norms.

Refuses
    NF201  Somebody else sees the mean of the norm's input. A head, a gate, a convolution or a returned hidden state reads
           the same stream as the norm, so its mean cannot be removed without changing what that reader sees. Hint: if it is
           a returned hidden state that nobody needs, export the model without it.
    NF202  The input is written by an operation that cannot be centred, such as an activation or a depthwise convolution,
           and an explicit mean-subtraction would serve this norm alone, so it would cost what it saves.
    NF203  The norm is over several axes, or over one whose size is dynamic. Removing a joint mean, or the mean of as many
           entries as the caller pleases, is not a change of the writers' weights.
    NF204  The norm is over values joined along its axis (concatenated tokens, patch merging) or over parts of them. The
           joint mean keeps the differences of the parts' means, so centring each part would change the result.
    NF205  The input is made of another norm's output, as in post-norm. That output has a mean that depends on the data,
           because the gain weighs the channels, and the layers that read it see that mean; no weight can remove it. Only a
           pre-norm stretch behind it can be converted, behind one explicit mean-subtraction.
    NF206  A weight that writes the input is shared with a reader that sees its mean, such as a tied head, and an explicit
           mean-subtraction would not serve two norms. The weight is not copied silently. Hint: untie it if memory allows.
    NF207  The input comes straight from the caller; its mean is the caller's.
    NF208  The input is scaled channel by channel, and centring does not pass such a scale. A stored scale (LayerScale) is
           folded into the writers behind it first; that is not possible where the scale depends on the data (a gate, as in
           adaLN-Zero), changes from call to call, or where somebody else reads the unscaled value.
    NF209  A tensor that writes the input is updated by the program itself, so it cannot be replaced by a centred one.
    NF210  The norm adds eps to the deviation, (x - mean x)/(σ + ε), as the Annotated Transformer does. RMSNorm has its eps
           under the root, which is another function. Its gain and shift can be folded (fold_affine).

Claim
    rounding: the same function of real numbers.

Reference
    Jiang, Gu, Zhu, Pan: Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers, 2023, §3.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch.fx import Node

from normfuse.analysis.facts import Facts
from normfuse.analysis.fixed_weights import why_fixed
from normfuse.analysis.obstacles import Obstacle, Why, named
from normfuse.graph.edits import Reroute, SetTensor
from normfuse.graph.expressions import Call, Expression, Ref
from normfuse.graph.findings import Claim, Finding, Refusal, Rewrite
from normfuse.graph.ops.lookup import keeps, rank
from normfuse.graph.ops.row import SAME
from normfuse.graph.program import Program
from normfuse.graph.views import Norm, NormKind, arguments, dtype, shape
from normfuse.transforms.zero_mean import Region, center

NORMS = ("layer_norm",)


def pre_rmsnorm(program: Program, facts: Facts) -> Iterator[Finding]:
    """Propose one rewrite per region of norms that share writers, and a refusal for every other LayerNorm."""
    layer_norms = [norm for norm in facts.norms if norm.kind == NormKind.LAYER_NORM]
    for norm in layer_norms:
        if len(norm.axes) != 1:
            yield _refuse(program, norm, "NF203", f"it normalizes over {len(norm.axes)} axes together")
        elif not _fixed(norm):
            yield _refuse(program, norm, "NF203", "it normalizes over an axis of dynamic size")
    for norm in facts.norms:
        if norm.kind == NormKind.STD_NORM:
            yield _refuse(program, norm, "NF210", "it adds eps to the deviation, which no RMSNorm does")
    centering = center(facts, [norm for norm in layer_norms if len(norm.axes) == 1 and _fixed(norm)])
    for region in centering.regions:
        yield _rewrite(program, region)
    norms = frozenset(norm.out for norm in facts.every_norm)
    for norm, obstacle in centering.blocked:
        yield _explain(facts, norm, obstacle, norms)


def _fixed(norm: Norm) -> bool:
    return isinstance(shape(norm.x)[norm.axes[0]], int)


def _rewrite(program: Program, region: Region) -> Rewrite:
    paid = len(region.centered_copies)
    writers = sum(isinstance(edit, SetTensor) for edit in region.edits)
    because = f"nobody else sees the mean of their inputs; {writers} stored tensors are centred" + (
        f" and {paid} explicit mean-subtraction{'s' if paid > 1 else ''} inserted" if paid else ""
    )
    return Rewrite(
        pass_name="pre_rmsnorm",
        sites=tuple(program.site(norm.out) for norm in region.norms),
        was=(NormKind.LAYER_NORM,) * len(region.norms),
        becomes="rms_norm",
        edits=(*region.edits, *(_as_rms(norm, region) for norm in region.norms)),
        region=frozenset(node.name for node in region.nodes),
        claim=Claim.ROUNDING,
        because=because,
    )


def _as_rms(norm: Norm, region: Region) -> Reroute:
    (axis,) = norm.axes
    last = rank(norm.x) - 1
    x = Ref(region.centered_copies.get((norm.x, axis), norm.x.name))
    gain = Ref(norm.gain.name) if norm.gain is not None else None
    inside = gain if norm.gain is not None and rank(norm.gain) == 1 and axis == last else None
    # torch's rms_norm is over the last axis; it accumulates in float32 where x is narrower
    along: Expression = x if axis == last else Call("transpose.int", (x, axis, last))
    scaled: Expression = Call("rms_norm.default", (along, (shape(norm.x)[axis],), inside, norm.eps))
    scaled = scaled if axis == last else Call("transpose.int", (scaled, axis, last))
    if gain is not inside:
        scaled = Call("mul.Tensor", (scaled, gain))
    if norm.shift is not None:
        scaled = scaled + Ref(norm.shift.name)
    if any(dtype(each) != dtype(norm.out) for each in (norm.x, norm.gain, norm.shift) if each is not None):
        scaled = Call("type_as.default", (scaled, x))  # layer_norm keeps the dtype of x, arithmetic would promote
    return Reroute(norm.out.name, scaled)


def _refuse(program: Program, norm: Norm, code: str, reason: str, **more: Any) -> Refusal:
    return Refusal("pre_rmsnorm", program.site(norm.out), code, reason, **more)


_ALONE = "; an explicit mean-subtraction there would serve too few norms to pay"


def _explain(facts: Facts, norm: Norm, obstacle: Obstacle, norms: frozenset[Node]) -> Refusal:
    program = facts.program
    at, witness = program.site(obstacle.at), obstacle.witness
    writer = _called(obstacle.at)
    tensor = program.stored.get(obstacle.at.name, "")
    returned = witness is not None and witness.op == "output"
    reader = "the caller (it is an output of the model)" if returned or witness is None else _named(program, witness)
    hint = ""
    is_weight = obstacle.at in program.constant and obstacle.code in (Why.GATE, Why.UNCENTRED)
    fixed = why_fixed(facts, obstacle.at) if is_weight else None
    match obstacle.code:
        case _ if fixed is not None:
            code, reason = "NF202", f"its input is written by the weight {named(program, fixed.at)}, which {fixed}{_ALONE}"
        case Why.SEEN if _source(obstacle.at) in norms and witness is not None and _reads(witness, obstacle.at):
            code = "NF205"
            reason = f"its input is made of another norm's output ({program.site(_source(obstacle.at))}), whose gain gives it"
            reason += f" a mean, and {reader} sees that mean"
        case Why.SEEN:
            code, reason = "NF201", f"{reader} sees the mean of '{at.node}', which this norm's input is made of"
            hint = "if nobody needs that output, trace the model without it" if returned else ""
        case Why.TIED:
            code, reason = "NF206", f"the weight '{tensor}' is also read by {reader}, which sees its mean{_ALONE}"
            hint = "untie the weight in the model if the memory of a second copy is acceptable"
        case Why.UPDATED:
            code, reason = "NF209", f"'{tensor}' is updated by the program itself"
        case Why.INPUT:
            code, reason = "NF207", f"its mean comes from the caller's input '{at.node}'{_ALONE}"
        case Why.JOINED:
            code, reason = "NF204", f"its input is joined or split along the norm's axis ({writer} in {at})"
        case Why.NORM:
            code, reason = "NF205", f"its input is written by another norm ({at}), whose gain gives it a mean{_ALONE}"
        case Why.GATE:
            code = "NF208"
            reason = f"its input is scaled channel by channel ({at}) by values that its writers cannot take up{_ALONE}"
        case _:
            code, reason = "NF202", f"its input is written by {writer} ({at}), which cannot be centred{_ALONE}"
    return _refuse(program, norm, code, reason, at=at, hint=hint)


def _reads(reader: Node, value: Node) -> bool:
    return any(_source(operand) is _source(value) for operand in reader.all_input_nodes)


def _source(node: Node) -> Node:
    """The node behind casts, dropouts and other views of the same value."""
    while keeps(node) in SAME and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _named(program: Program, node: Any) -> str:
    site = program.site(node)
    return f"{_called(node)} in {site}" + (f" ({site.source})" if site.source else "")


def _called(node: Node) -> str:
    """What users call an operator."""
    if node.target is operator.getitem and isinstance(node.args[0], Node):
        return _called(node.args[0])
    name = str(node.target).removeprefix("aten.").split(".")[0]
    if "conv" in name and arguments(node)["groups"] != 1:
        return f"grouped {name}"
    return _USUAL_NAMES.get(name, name)


_USUAL_NAMES = {
    "_unsafe_view": "reshape", "view": "reshape", "_to_copy": "to", "_native_batch_norm_legit_no_training": "batch_norm",
    "_native_batch_norm_legit": "batch_norm", "native_layer_norm": "layer_norm", "addmm": "linear",
}  # fmt: skip
