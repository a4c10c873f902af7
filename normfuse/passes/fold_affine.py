"""Fold the gain and the shift of norms into the layers that read them.

What
    LayerNorm, RMSNorm and GroupNorm end with y = γ⊙x̂ + β, which all their readers can do in their own weights: query, key and
    value, gate and up, the cross-attention of every decoder layer, experts and their router, the head. What is left is the
    norm alone. Where something between lets a scale through but no shift (a window padded with zeros, a padding
    convolution), the gain is folded and β/γ stays. A gain written as (1 + w) is one like any other. Two norms that have
    become the same function of the same value become one (GPT-NeoX).

Formula
    W ← W diag(γ),  b ← b + Wβ (with the W from before; a bias is made where there is none).

Needs
    Gain and shift along one axis, from stored tensors. All readers, however far, are linear layers or convolutions whose
    weights nobody else reads.

Refuses
    NF501  A reader of the norm cannot take its gain: it is no linear layer, its weight is shared or tied, or somebody
           returns the norm's output. Hint for a tied head: untie it if memory allows; it is not copied silently.
    NF502  The norm's gain is no stored vector along one axis: it covers several axes, or is computed from the input
           (adaptive norms), so it is not a change of the readers' weights.

Claim
    rounding: the same function of real numbers.

Reference
    Ashkboos et al.: SliceGPT, 2024, §3.2; Jiang et al.: Pre-RMSNorm and Pre-CRMSNorm Transformers, 2023, §3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch.fx import Node

from normfuse.absorb import Absorbed, Obstacle, column, new_tensor
from normfuse.affine import Affine, constant, forms, maximal, moved
from normfuse.dissolve import told
from normfuse.edits import Call, Edit, Expression, Ref, Reroute, literal
from normfuse.facts import Facts
from normfuse.findings import NO_NORM, Claim, Finding, Refusal, Rewrite
from normfuse.formula import Apply
from normfuse.program import Program
from normfuse.readers import into_readers, well_conditioned
from normfuse.rules import rank
from normfuse.views import Norm, arguments, aten

_PLAIN = {aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default}


def fold_affine(program: Program, facts: Facts) -> Iterator[Finding]:
    """Propose one rewrite per norm with a gain or a shift, and one per norm that repeats another; or say why not."""
    everything = dict(maximal(forms(facts)))
    first: dict[tuple[object, ...], Norm] = {}
    for norm in facts.norms:
        if norm.out.target in _PLAIN and norm.gain is None and norm.shift is None:
            same = first.setdefault((norm.out.target, str(norm.out.args), str(norm.out.kwargs)), norm)
            if same is not norm:
                yield _repeated(program, norm, same)
        if norm.kind in ("layer_norm", "rms_norm", "group_norm"):
            for value, form, core in _affines(facts, norm, everything):
                yield _fold(program, facts, norm, value, form, core, everything)


def _affines(facts: Facts, norm: Norm, everything: dict[Node, Affine]) -> Iterator[tuple[Node, Affine | None, Expression]]:
    """The affine that a norm ends with: the value, its form, and what computes the norm alone."""
    if norm.out.target in _PLAIN and (norm.gain is not None or norm.shift is not None):
        yield norm.out, _of_operator(facts, norm), _without(norm)
        return
    for value, form in everything.items():
        if form.axis is not None and (form.base is norm.out or (norm.by_hand and form.base in norm.inner)):
            yield value, form, moved(form)


def _of_operator(facts: Facts, norm: Norm) -> Affine | None:
    """Gain and shift of an operator, if they are stored vectors along one axis."""
    given = [node for node in (norm.gain, norm.shift) if node is not None]
    if any(node not in facts.constant or rank(node) != 1 for node in given):
        return None
    axis = 1 if norm.kind == "group_norm" else rank(norm.out) - 1
    scale, shift = (None if node is None else constant(facts, node) for node in (norm.gain, norm.shift))
    return None if scale is shift is None else Affine(norm.x, (), axis, scale, shift, norm.inner)


def _without(norm: Norm, shift: Expression | None = None) -> Call:
    """The norm's operator without its gain, and with another shift or none."""
    named = {**arguments(norm.out), "weight": None, "eps": norm.eps}
    if "bias" in named:
        named["bias"] = shift
    named.pop("cudnn_enable", None)
    named.pop("cudnn_enabled", None)
    op = str(norm.out.target).removeprefix("aten.")
    return Call(op, tuple(each if isinstance(each, Ref | Call) else literal(each) for each in named.values()))


def _fold(
    program: Program, facts: Facts, norm: Norm, value: Node, form: Affine | None, core: Expression, others: dict[Node, Affine]
) -> Finding:
    if form is None:
        return Refusal("fold_affine", program.site(norm.out), "NF502", "its gain is no stored vector along one axis")
    whole = into_readers(facts, form, value, others)
    if isinstance(whole, Absorbed):
        gone = (Reroute(value.name, core),)
        return _rewrite(program, norm, form, whole, gone, "gain and shift are folded into all layers that read it")
    if form.scale is not None and form.shift is not None and well_conditioned(program, form.scale):
        part = into_readers(facts, replace(form, shift=None), value, {})
        if isinstance(part, Absorbed):
            kept = _kept_shift(facts, norm, value, form, core)
            because = f"the gain is folded into all layers that read it; the shift stays: {told(program, whole)}"
            return _rewrite(program, norm, form, part, kept, because)
    return _refused(program, norm, whole)


def _kept_shift(facts: Facts, norm: Norm, value: Node, form: Affine, core: Expression) -> tuple[Edit, ...]:
    """β/γ behind the norm alone: in the operator where it takes a bias, as an addition elsewhere."""
    assert form.axis is not None
    entries = Apply("div.Tensor", (form.shift, form.scale))
    in_operator = norm.out is value and norm.out.target is aten.layer_norm.default
    formed = entries if in_operator else column(entries, form.axis, value)
    new, read = new_tensor(facts, f"normfuse_{value.name}_shift", formed, value)
    return new, Reroute(value.name, _without(norm, read) if in_operator else Call("add.Tensor", (core, read)))


def _rewrite(program: Program, norm: Norm, form: Affine, absorbed: Absorbed, gone: tuple[Edit, ...], because: str) -> Rewrite:
    region = frozenset(node.name for node in absorbed.nodes | form.inner | norm.inner | {form.base})
    sites, edits = (program.site(norm.out),), (*absorbed.edits, *gone)
    return Rewrite("fold_affine", sites, (norm.kind,), norm.kind, edits, region, Claim.ROUNDING, because)


def _refused(program: Program, norm: Norm, obstacle: Obstacle) -> Refusal:
    hint = "untie it if memory allows" if "more than once" in obstacle.why else ""
    site = program.site(norm.out)
    return Refusal("fold_affine", site, "NF501", told(program, obstacle), program.site(obstacle.at), hint)


def _repeated(program: Program, norm: Norm, same: Norm) -> Rewrite:
    edits = (Reroute(norm.out.name, Ref(same.out.name)),)
    region = frozenset({norm.out.name, same.out.name})
    because = f"it is the same function of the same value as '{program.site(same.out)}'"
    return Rewrite("fold_affine", (program.site(norm.out),), (norm.kind,), NO_NORM, edits, region, Claim.EXACT, because)
