"""Fold LayerNorms whose deviation σ is a stored number until no norm and no mean-subtraction is left.

What
    A model that was trained on while its LayerNorms were removed (`normfuse.stripping`) computes (x - mean x)/σ ⊙ γ + β with
    a stored σ, which is linear. Gain and shift go into the layers that read it, and so does the mean-subtraction, as any linear
    layer can take the mean of its input away in its own weight. Where a reader is no such layer, the writers of x are centred
    instead if that leaves fewer mean-subtractions. What is left of a norm that cannot go is one multiplication, one addition
    and its mean-subtraction. The module's class does not matter: the arithmetic is read from the graph.

Formula
    W ← (W diag(γ/σ)) C₀,  b ← b + Wβ (with the W from before; a bias is made where there is none), C₀ = I - 11ᵀ/d.

Needs
    σ stored, and not updated by the forward pass; or an eps that swallows the variance, as in published checkpoints: v + ε
    rounds to ε while v < ε·2⁻²⁵ in float32, in which torch's operator also works for bfloat16 (ε·2⁻⁵⁴ in float64), and σ = √ε.
    v is measured on the example inputs and on the hostile variants that the proof makes of them; the proof measures it again.
    All readers, however far, are linear layers or convolutions whose weights nobody else reads. A norm that
    still measures its input is another function without it: `normfuse.strip` measures on data what that costs, and removes the
    largest set of norms that stays within a bound.

Refuses
    NF601  The norm is a LayerNorm that measures its own input, so it is not linear. Train the model on with
           `normfuse.stripping.Recovery`, or let `normfuse.strip` (normfuse strip) remove, on data of yours, those that cost
           little; that result is approximate and never made unasked.
    NF602  The norm may be in the published format of LayerNorm-free checkpoints, an eps so large (10¹²) that the variance
           vanishes beside it, and nothing was measured that says so: verify in full, on example inputs. `normfuse.strip` reads
           it as it is meant, and measures.
    NF603  The norm is in the published format and in float16, where such an eps is infinite, and so are gains that make up
           for it. Convert the checkpoint from float32 or bfloat16.
    NF604  The mean-subtraction of a removed norm stays: a reader of it is no linear layer of its own, such as a tied head
           (untie it if memory allows), or the first token has a σ of its own, which is no change of weights.
    NF605  A removal without recovery was asked for (`normfuse.strip`), and nothing is known of the norm's deviation: it is
           not in the calibration file. Calibrate the same model.

Claim
    rounding: the same function of real numbers; where eps swallows the variance, of those that the stored dtype computes with,
    for variances up to the limit that is told. Where some v is above the limit and none above ε: approximate, within the
    bound 1 - 1/√(1 + v/ε) that is told. With σ from a calibration: approximate.

Reference
    Baroni et al.: Transformers Don't Need LayerNorm at Inference Time, 2025, §3 and appendix (folding).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch.fx import Node

from normfuse.analysis.affine import Affine, forms
from normfuse.analysis.facts import Facts
from normfuse.analysis.obstacles import Obstacle, told
from normfuse.graph.edits import Edit, Reroute
from normfuse.graph.expressions import Ref
from normfuse.graph.findings import NO_NORM, Claim, Finding, Refusal, Rewrite
from normfuse.graph.ops.lookup import rank
from normfuse.graph.program import Program
from normfuse.graph.views import Norm, NormKind, dtype
from normfuse.transforms.constant_norms import dissolve
from normfuse.transforms.draft import Absorbed
from normfuse.transforms.mean_subtraction import MeanSubtraction, as_norm, blind, centrings, into_weights
from normfuse.transforms.swallowed_variance import linear, off_by, swallowed_up_to
from normfuse.transforms.zero_mean import Region, center

PUBLISHED_EPS = 1e8
"""The least eps that is told to be meant to swallow the variance where nothing was measured."""

NORMS = ("layer_norm",)


def strip_layernorm(program: Program, facts: Facts) -> Iterator[Finding]:
    """Propose one rewrite per stored σ, then one per mean-subtraction; refuse every norm that measures its input."""
    for norm in facts.norms:
        if norm.kind == NormKind.LAYER_NORM:
            yield _measuring(facts, norm)
    every = centrings(facts)
    found = _along_channels(forms(facts), every) if every else {}
    scaled = {form.base: form for form in found.values() if form.scale is not None or form.shift is not None}
    outs = {each.out for each in every}
    gains = list(dissolve(facts, "strip_layernorm", found, lambda form, _: form.base in outs))
    yield from gains
    if not gains:
        yield from _centrings(program, facts, every, scaled)


def _measuring(facts: Facts, norm: Norm) -> Finding:
    """What is said of a LayerNorm: linear as it is stored, where its eps swallows the variances that it meets."""
    site = facts.program.site(norm.out)
    if overflows(norm):
        hint = "convert the checkpoint from float32 or bfloat16"
        return Refusal("strip_layernorm", site, "NF603", f"an eps of {norm.eps:g} overflows float16", hint=hint)
    if facts.variance_of is None and is_published(norm):
        program = "a program can do without it, the model's class cannot: normfuse.rewrite(..., same_class=False), -o OUT.pt2"
        hint = program if facts.in_place else "verify in full, or normfuse.strip (normfuse strip) reads it"
        reason = f"an eps of {norm.eps:g} may swallow the variance, and nothing was measured"
        return Refusal("strip_layernorm", site, "NF602", reason, hint=hint)
    variance = None if facts.variance_of is None else facts.variance_of(norm)
    if variance is None:
        hint = "train it on with normfuse.stripping.Recovery, or let normfuse.strip measure what its removal costs"
        return Refusal("strip_layernorm", site, "NF601", "its deviation is measured on each input", hint=hint)
    limit = swallowed_up_to(norm)
    met = f"variances reach {variance:.3g} on the example inputs and on what the proof makes of them"
    if variance < limit:
        because = f"its eps of {norm.eps:g} swallows variances up to {limit:.3g}, and {met}"
        return _stored(facts.program, norm, norm.eps**0.5, because, Claim.ROUNDING)
    bound = off_by(norm, variance)
    because = f"its eps of {norm.eps:g} stands for a stored deviation up to {bound:.1e}, relative: {met}"
    return _stored(facts.program, norm, norm.eps**0.5, because, Claim.APPROXIMATE)


def is_published(norm: Norm) -> bool:
    """Whether a norm is in the published format: LayerNorm with an eps beside which the variance vanishes."""
    return norm.kind == NormKind.LAYER_NORM and norm.eps >= PUBLISHED_EPS


def overflows(norm: Norm) -> bool:
    """Whether a norm's eps is infinite in its dtype, float16, which cannot hold gains that make up for such an eps either."""
    return norm.eps > torch.finfo(torch.float16).max and any(
        each is not None and dtype(each) == torch.float16 for each in (norm.x, norm.gain, norm.shift)
    )


def _along_channels(found: dict[Node, Affine], every: tuple[MeanSubtraction, ...]) -> dict[Node, Affine]:
    """A scale by a number alone (a norm without gain) is one along the channels as well."""
    axes = {each.out: each.axis for each in every}
    return {
        value: replace(form, axis=axes[form.base]) if form.axis is None and not form.moves and form.base in axes else form
        for value, form in found.items()
    }


# -- mean-subtractions -------------------------------------------------------------------------------------------------


def _centrings(
    program: Program, facts: Facts, every: tuple[MeanSubtraction, ...], scaled: Mapping[Node, Affine]
) -> Iterator[Finding]:
    ways = {each: into_weights(facts, each) for each in every}
    stuck = {each for each, way in ways.items() if isinstance(way, Obstacle)}
    # only what was a norm: other mean-subtractions that cannot go are nobody's concern
    concerned = {each for each in stuck if each.out in scaled}
    regions = center(blind(facts, every), map(as_norm, every)).regions if concerned else ()
    gone: set[Node] = set()
    for region in regions:
        outs = {norm.out for norm in region.norms}
        if sum(each.out in outs for each in concerned) > len(region.centered_copies):
            gone |= outs
            yield _into_writers(program, region)
    for each, way in ways.items():
        if each.out in gone:
            continue
        if isinstance(way, Absorbed):
            yield _into_readers(program, each, way)
        elif each in concerned:
            yield _stays(program, each, way, scaled[each.out])


def _stays(program: Program, each: MeanSubtraction, way: Obstacle, form: Affine) -> Refusal:
    reason = told(program, way)
    if way.at in form.inner:
        reason = "its gain and shift could not be folded into what reads them, so its mean-subtraction stays before them"
    hint = "if a tied head reads it, untie the weight" if way.at in form.inner else ""
    return Refusal("strip_layernorm", program.site(each.out), "NF604", reason, program.site(way.at), hint)


def _into_readers(program: Program, each: MeanSubtraction, way: Absorbed) -> Rewrite:
    region = frozenset(node.name for node in (*way.nodes, *each.inner, each.x))
    because = "all layers that read it take the mean away in their weights"
    return _folded(program, (each.out,), (*way.edits, Reroute(each.out.name, Ref(each.x.name))), region, because)


def _into_writers(program: Program, region: Region) -> Rewrite:
    """The mean is taken away where it is written; x itself, or a centred copy of it, takes the place of x - mean x."""
    gone = (
        Reroute(norm.out.name, Ref(region.centered_copies.get((norm.x, norm.axes[0]), norm.x.name))) for norm in region.norms
    )
    nodes = frozenset(node.name for node in region.nodes)
    paid = len(region.centered_copies)
    because = "what writes its input is centred" + (
        f"; {paid} mean-subtraction{'s are' if paid > 1 else ' is'} left" * bool(paid)
    )
    return _folded(program, tuple(norm.out for norm in region.norms), (*region.edits, *gone), nodes, because)


def _folded(program: Program, outs: tuple[Node, ...], edits: tuple[Edit, ...], region: frozenset[str], because: str) -> Rewrite:
    sites = tuple(map(program.site, outs))
    was = ("mean-subtraction",) * len(outs)
    return Rewrite("strip_layernorm", sites, was, "folded", edits, region, Claim.ROUNDING, because)


# -- without recovery --------------------------------------------------------------------------------------------------


def with_sigmas(sigmas: Mapping[str, float], because: Mapping[str, str]) -> Callable[[Program, Facts], Iterator[Finding]]:
    """A proposer that gives LayerNorms a stored σ: an approximate rewrite, to be measured before it is believed.

    Args:
        sigmas: σ by the name of the norm's node.
        because: where σ comes from, by the same names.
    """

    def propose(program: Program, facts: Facts) -> Iterator[Finding]:
        for norm in facts.norms:
            if norm.out.name in sigmas and norm.kind == NormKind.LAYER_NORM and norm.axes == (rank(norm.x) - 1,):
                yield _stored(program, norm, sigmas[norm.out.name], because[norm.out.name], Claim.APPROXIMATE)

    return propose


def _stored(program: Program, norm: Norm, sigma: float, because: str, claim: Claim) -> Rewrite:
    by = linear(norm, sigma)
    region = frozenset(node.name for node in (*norm.inner, norm.x))
    site, edit = program.site(norm.out), Reroute(norm.out.name, by)
    return Rewrite("strip_layernorm", (site,), (norm.kind,), NO_NORM, (edit,), region, claim, because)
