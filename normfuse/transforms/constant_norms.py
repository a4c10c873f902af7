"""What the passes for norms with stored statistics share: a value that is affine is dissolved in the layers around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch.fx import Node

from normfuse.analysis.affine import Affine, maximal, moved
from normfuse.analysis.facts import Facts
from normfuse.analysis.obstacles import told
from normfuse.graph.edits import Edit, NewTensor, Reroute
from normfuse.graph.expressions import Call
from normfuse.graph.findings import NO_NORM, Claim, Rewrite
from normfuse.graph.ops.lookup import keeps
from normfuse.graph.ops.row import MOVES
from normfuse.graph.views import Norm
from normfuse.transforms.draft import Absorbed, scale_shift
from normfuse.transforms.into_readers import into_readers, well_conditioned
from normfuse.transforms.into_writers import into_writers

WRITERS = "folded into the layers that write its input"
READERS = "folded into the layers that read its output"
HALF = "its scale is folded, its shift is left as one addition"
LEFT = "left as one multiplication and one addition"


def dissolve(
    facts: Facts, pass_name: str, found: dict[Node, Affine], chosen: Callable[[Affine, list[Norm]], bool]
) -> Iterator[Rewrite]:
    """One rewrite per maximal affine value that is chosen.

    Args:
        facts: of the program.
        pass_name: who proposes.
        found: its `forms`.
        chosen: told the form of a value and the norms in it.
    """
    everything = dict(maximal(found))
    gone: set[Node] = set()
    for value, form in everything.items():
        if value in gone:
            continue  # a rewrite before this one dissolves it; should that be refused, the next round asks again
        inside = [norm for norm in facts.norms if norm.out in form.inner]
        if chosen(form, inside):
            decided = _decide(facts, value, form, everything)
            if decided is not None and (inside or not facts.in_place or not makes_tensors(decided[0])):
                gone |= decided[0].values
                yield _rewrite(facts, pass_name, value, form, *decided)


def _decide(
    facts: Facts, value: Node, form: Affine, everything: dict[Node, Affine]
) -> tuple[Absorbed, tuple[Edit, ...], str] | None:
    gone: tuple[Edit, ...] = (Reroute(value.name, moved(form)),)
    before = into_writers(facts, form, value)
    if isinstance(before, Absorbed):
        return before, gone, WRITERS
    behind = into_readers(facts, form, value, everything)
    if isinstance(behind, Absorbed):
        return behind, gone, READERS
    program = facts.program
    stopped = f"{told(program, before)}; {told(program, behind)}"
    if form.scale is not None and form.shift is not None:
        half = into_writers(facts, replace(form, shift=None), value)
        if isinstance(half, Absorbed):
            return half, scale_shift(facts, replace(form, scale=None), value), f"{HALF}: {stopped}"
        half = into_readers(facts, replace(form, shift=None), value, {})
        if isinstance(half, Absorbed) and well_conditioned(program, form.scale):
            left = replace(form, scale=None, shift=Call("div.Tensor", (form.shift, form.scale)))
            return half, scale_shift(facts, left, value), f"{HALF}: {stopped}"
    if _steps(facts, form) <= (form.scale is not None) + (form.shift is not None):
        return None  # it is no more than one multiplication and one addition already
    nothing = Absorbed((), frozenset())
    return nothing, scale_shift(facts, form, value), f"{LEFT}: {stopped}"


def makes_tensors(absorbed: Absorbed) -> bool:
    """Whether it needs tensors that the model did not have."""
    return any(isinstance(edit, NewTensor) for edit in absorbed.edits)


def _steps(facts: Facts, form: Affine) -> int:
    """Operations that compute the value at run time; a norm counts for more than it could be replaced by."""
    if any(norm.out in form.inner for norm in facts.norms):
        return 3
    return sum(keeps(node) not in MOVES for node in form.inner)


def _rewrite(
    facts: Facts,
    name: str,
    value: Node,
    form: Affine,
    absorbed: Absorbed,
    gone: tuple[Edit, ...],
    because: str,
) -> Rewrite:
    nodes = absorbed.nodes | form.inner | {form.base}
    norms = [norm for norm in facts.norms if norm.out in form.inner or (absorbed.values and norm.out in absorbed.nodes)]
    site = facts.program.site
    sites = tuple(site(norm.out) for norm in norms) or (site(value),)
    was, becomes = (tuple(norm.kind for norm in norms), NO_NORM) if norms else (("affine",), "folded")
    region = frozenset(node.name for node in nodes)
    return Rewrite(name, sites, was, becomes, (*absorbed.edits, *gone), region, Claim.ROUNDING, because)
