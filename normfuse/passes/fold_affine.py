"""Fold the gain and the shift of norms into the layers that read them, and value biases into output projections.

What
    LayerNorm, RMSNorm and GroupNorm end with y = γ⊙x̂ + β, which all their readers can do in their own weights: query, key and
    value, gate and up, the cross-attention of every decoder layer, experts and their router, the head. What is left is the
    norm alone. On live modules the norm keeps its tensors, a gain of ones and β/γ where a reader has no bias, so that what is
    saved of the model is right in its own class. Where something between lets a scale through but no shift (a window
    padded with zeros, a padding convolution), the gain is folded and β/γ stays. A gain written as (1 + w) is one like any
    other. Two norms that have become the same function of the same value become one (GPT-NeoX).

    The bias of an attention's value projection, be it the model's or made of a norm's shift, is added to every result of the
    attention, because its weights sum to one. It goes into the bias of the output projection, so the values need none.

Formula
    W ← W diag(γ),  b ← b + Wβ (with the W from before; a bias is made where there is none).
    Softmax(S)(V + 1bᵀ)Wₒᵀ + bₒ = Softmax(S)V Wₒᵀ + (bₒ + Wₒb).

Needs
    Gain and shift along one axis, from stored tensors. All readers, however far, are linear layers or convolutions whose
    weights nobody else reads. For a value bias an output projection that has a bias, or the addition would only move.

Refuses
    NF501  A reader of the norm cannot take its gain: it is no linear layer, its weight is shared or tied, or somebody
           returns the norm's output. Hint for a tied head: untie it if memory allows; it is not copied silently.
    NF502  The norm's gain is no stored vector along one axis: it covers several axes, or is computed from the input
           (adaptive norms), so it is not a change of the readers' weights.
    NF503  The attention's mask comes from the input, or closes every key to some query: such a query gets zeros from
           scaled_dot_product_attention, not a mean of the values, so that the value bias must stay where it is. A mask that
           is the same for all inputs, a causal attention and a softmax written out are no obstacle.

Claim
    rounding: the same function of real numbers.

Reference
    Ashkboos et al.: SliceGPT, 2024, §3.2; Jiang et al.: Pre-RMSNorm and Pre-CRMSNorm Transformers, 2023, §3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch.fx import Node

from normfuse.analysis.affine import Affine, constant, forms, maximal, moved
from normfuse.analysis.attention import is_mean
from normfuse.analysis.facts import Facts
from normfuse.analysis.obstacles import Obstacle, Why, told
from normfuse.graph.edits import Edit, NewTensor, Reroute, SetTensor
from normfuse.graph.expressions import Call, Expression, Ref
from normfuse.graph.findings import NO_NORM, Claim, Finding, Refusal, Rewrite
from normfuse.graph.ops.lookup import keeps, rank, times_read
from normfuse.graph.ops.row import Keeps
from normfuse.graph.program import Program
from normfuse.graph.views import Norm, NormKind, arguments, aten, dtype, is_tensor
from normfuse.transforms.constant_norms import makes_tensors
from normfuse.transforms.draft import Absorbed, column, new_tensor
from normfuse.transforms.into_readers import into_readers, well_conditioned

NORMS = ("layer_norm", "rms_norm", "group_norm")


def fold_affine(program: Program, facts: Facts) -> Iterator[Finding]:
    """Propose a rewrite per norm with a gain or a shift, per norm that repeats another, per value bias; or say why not."""
    everything = dict(maximal(forms(facts)))
    for norm, *repeated in _functions(facts):
        yield from (_repeated(program, other, norm) for other in repeated)
        for value, form, core in _affines(facts, norm, everything) if not repeated else ():  # first it is one, then folded
            yield _fold(program, facts, norm, value, form, core, everything)
    for node in program.graph.find_nodes(op="call_function", target=aten.linear.default):
        if is_tensor(arguments(node)["bias"]):
            yield from _bias_of_values(program, facts, node)


def _functions(facts: Facts) -> Iterable[list[Norm]]:
    """The norms that are adaptive, those together that are one function of one value."""
    same: dict[tuple[object, ...], list[Norm]] = {}
    for norm in facts.norms:
        if norm.kind in (NormKind.LAYER_NORM, NormKind.RMS_NORM, NormKind.GROUP_NORM, NormKind.STD_NORM):
            by_operator = norm.out.target, str(norm.out.args), str(norm.out.kwargs)
            proven = "by hand", norm.kind, norm.x, norm.axes, norm.eps, norm.gain, dtype(norm.out)
            same.setdefault(proven if norm.by_hand else by_operator, []).append(norm)
    return same.values()


def _affines(facts: Facts, norm: Norm, everything: dict[Node, Affine]) -> Iterator[tuple[Node, Affine | None, Expression]]:
    """The affine that a norm ends with: the value, its form, and what computes the norm alone."""
    in_one_call = norm.kind in NORMS and not norm.by_hand and norm.inner == {norm.out}
    if in_one_call and (norm.gain is not None or norm.shift is not None):
        yield norm.out, _of_operator(facts, norm), _without(norm)
        return
    for value, form in everything.items():
        if form.axis is not None and (_uncast(form.base) is norm.out or (norm.by_hand and form.base in norm.inner)):
            yield value, form, moved(form)


def _uncast(node: Node) -> Node:
    """What a value was before it was cast: norms that compute in float32 multiply their gain to what they have cast back."""
    while keeps(node) is Keeps.CAST:
        node = arguments(node)["self"]
    return node


def _of_operator(facts: Facts, norm: Norm) -> Affine | None:
    """Gain and shift of an operator, if they are stored vectors along one axis."""
    given = [node for node in (norm.gain, norm.shift) if node is not None]
    if any(node not in facts.constant or rank(node) != 1 for node in given):
        return None
    *_, axis = norm.channels
    scale, shift = (None if node is None else constant(facts, node) for node in (norm.gain, norm.shift))
    return None if scale is shift is None else Affine(norm.x, (), axis, scale, shift, norm.inner)


def _without(norm: Norm, shift: Expression | None = None) -> Call:
    """The norm's operator without its gain, and with another shift or none."""
    named = {**arguments(norm.out), "weight": None, "eps": norm.eps}
    if "bias" in named:
        named["bias"] = shift
    named.pop("cudnn_enable", None)
    named.pop("cudnn_enabled", None)
    return Call.of(norm.out.target, [*named.values()])


def _fold(
    program: Program, facts: Facts, norm: Norm, value: Node, form: Affine | None, core: Expression, others: dict[Node, Affine]
) -> Finding:
    if form is None:
        return Refusal("fold_affine", program.site(norm.out), "NF502", "its gain is no stored vector along one axis")
    whole = into_readers(facts, form, value, others)
    fits = isinstance(whole, Absorbed) and not (facts.in_place and makes_tensors(whole))
    parts = form.scale is not None and (form.shift is not None or facts.in_place)
    if not fits and parts and form.scale is not None and well_conditioned(program, form.scale):
        part = into_readers(facts, replace(form, shift=None), value, {})
        if isinstance(part, Absorbed):
            kept = _kept_shift(facts, norm, value, form, core)
            because = f"the gain is folded into all layers that read it; the shift stays: {_told(program, whole)}"
            return _rewrite(program, norm, form, part, kept, because)
    if isinstance(whole, Absorbed) and (fits or form.scale is not None):
        gone = (Reroute(value.name, core),)
        return _rewrite(program, norm, form, whole, gone, "gain and shift are folded into all layers that read it")
    return _refused(program, norm, whole)


def _told(program: Program, whole: Absorbed | Obstacle) -> str:
    """Why a shift is not folded."""
    return told(program, whole) if isinstance(whole, Obstacle) else "a layer that reads it has no bias"


def _kept_shift(facts: Facts, norm: Norm, value: Node, form: Affine, core: Expression) -> tuple[Edit, ...]:
    """β/γ behind the norm alone: in the operator where it takes a bias, as an addition elsewhere.

    It takes the place of β where nobody else reads that, so that the norm keeps its tensors.
    """
    assert form.axis is not None
    if form.shift is None:
        return (Reroute(value.name, core),)
    entries = Call("div.Tensor", (form.shift, form.scale))
    in_operator = norm.out is value and norm.out.target is aten.layer_norm.default
    if in_operator and norm.shift is not None and facts.editable(norm.shift) and times_read(norm.shift) == 1:
        own = SetTensor(facts.program.stored[norm.shift.name], entries)
        return own, Reroute(value.name, _without(norm, Ref(norm.shift.name)))
    formed = entries if in_operator else column(entries, form.axis, value)
    new, read = new_tensor(facts, f"normfuse_{value.name}_shift", formed, value)
    return new, Reroute(value.name, _without(norm, read) if in_operator else core + read)


def _rewrite(program: Program, norm: Norm, form: Affine, absorbed: Absorbed, gone: tuple[Edit, ...], because: str) -> Rewrite:
    region = frozenset(node.name for node in absorbed.nodes | form.inner | norm.inner | {form.base})
    sites, edits = (program.site(norm.out),), (*absorbed.edits, *gone)
    return Rewrite("fold_affine", sites, (norm.kind,), norm.kind, edits, region, Claim.ROUNDING, because)


def _refused(program: Program, norm: Norm, whole: Absorbed | Obstacle) -> Refusal:
    at = program.site(whole.at) if isinstance(whole, Obstacle) else None
    hint = "untie it if memory allows" if isinstance(whole, Obstacle) and whole.code is Why.READ_AGAIN else ""
    return Refusal("fold_affine", program.site(norm.out), "NF501", _told(program, whole), at, hint)


def _repeated(program: Program, norm: Norm, same: Norm) -> Rewrite:
    edits = (Reroute(norm.out.name, Ref(same.out.name)),)
    region = frozenset({norm.out.name, same.out.name})
    because = f"it is the same function of the same value as '{program.site(same.out)}'"
    claim = Claim.ROUNDING if norm.by_hand else Claim.EXACT  # one function may be spelled in two ways
    return Rewrite("fold_affine", (program.site(norm.out),), (norm.kind,), NO_NORM, edits, region, claim, because)


def _bias_of_values(program: Program, facts: Facts, layer: Node) -> Iterator[Finding]:
    """A layer's bias that goes through attention into the biases of all layers behind it."""
    x, weight, bias = (arguments(layer)[name] for name in ("input", "weight", "bias"))
    entries = constant(facts, bias) if rank(bias) == 1 else None
    if entries is None:
        return
    form = Affine(x, (), rank(layer) - 1, None, entries, frozenset({layer}))
    absorbed = into_readers(facts, form, layer, {})
    if isinstance(absorbed, Obstacle):
        if absorbed.code is Why.MASKED:
            at, hint = program.site(absorbed.at), "leave the mask out where all keys are meant"
            yield Refusal("fold_affine", program.site(layer), "NF503", told(program, absorbed), at, hint)
        return
    attended = any(is_mean(facts, node) for node in absorbed.nodes)
    if attended and not any(isinstance(edit, NewTensor) for edit in absorbed.edits):
        gone = Reroute(layer.name, Call("linear.default", (Ref(x.name), Ref(weight.name))))
        region = frozenset(node.name for node in absorbed.nodes | {layer, x})
        because = "attention takes means of its values: their bias is in the output projection's"
        sites, edits = (program.site(layer),), (*absorbed.edits, gone)
        yield Rewrite("fold_affine", sites, ("value bias",), "folded", edits, region, Claim.ROUNDING, because)
