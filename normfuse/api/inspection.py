"""`normfuse.inspect`: every norm of a model, and what each pass would do with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from normfuse.analysis.facts import Facts, analyze
from normfuse.api.opening import Given, Model, to_program
from normfuse.escaping import escaped
from normfuse.graph.findings import Refusal
from normfuse.graph.program import Program, Site
from normfuse.graph.views import Norm, NormKind
from normfuse.planning.planner import Plan, plan, site_in
from normfuse.planning.registry import ALL
from normfuse.report.text import norms_table, plain_table, refusals_lines


@dataclass(frozen=True)
class Inspection:
    """Every norm of a model, and what each pass would do with it.

    Attributes:
        model: how the user named the model.
        norms: a row per norm, as JSON types.
        counts: norms by kind.
        plan: what all passes together would do.
    """

    model: str
    norms: tuple[dict[str, Any], ...]
    counts: Mapping[str, int]
    plan: Plan

    def to_dict(self) -> dict[str, Any]:
        """The inspection as JSON types."""
        return {"model": self.model, "counts": dict(self.counts), "norms": list(self.norms)}

    def render(self) -> Iterator[RenderableType]:
        """The inspection for a terminal: a row per norm, then the reasons, then the counts."""
        self = escaped(self)
        yield Text(self.model, style="bold")
        yield ""
        if not self.norms:
            yield Text("no norms found")
            return
        table = plain_table("norm", "kind", "axis", "eps", "mean seen by", "would be")
        for row in self.norms:
            fates = _fates(row["passes"].values(), row["kind"])
            axes = ",".join(map(str, row["axes"]))
            cells = (row["site"], row["kind"], axes, f"{row['eps']:g}", row["seen_by"] or "—", fates or "—")
            table.add_row(*map(Text, cells))
        yield table
        yield ""
        if self.plan.refusals:
            yield from refusals_lines(self.plan.refusals)
            yield ""
        yield norms_table(self.counts, self.plan.norms_after(self.counts))


def inspect(
    model: Model,
    inputs: Given = None,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    *,
    trust_pickle: bool = False,
) -> Inspection:
    """Every norm of a model: kind, axis, who else sees its input's mean, and what each pass would do.

    Args:
        model: as for `rewrite`.
        inputs: as for `rewrite`.
        kwargs: as for `rewrite`.
        dynamic_shapes: as for `rewrite`.
        trust_pickle: as for `rewrite`.
    """
    name, program, _ = to_program(model, inputs, kwargs, dynamic_shapes, trust_pickle)
    plans = {each: plan(program, [each]) for each in ALL}
    facts = analyze(program)
    rows = [_row(program.site(norm.out), norm, plans, _seen_by(program, facts, norm)) for norm in facts.norms]
    rows += [_row(site_in(body, norm.out), norm, plans, None) for body, norm in facts.norms_in_bodies]
    return Inspection(name, tuple(rows), dict(facts.kinds), plan(program, list(plans)))


def _seen_by(program: Program, facts: Facts, norm: Norm) -> str | None:
    """A reader that sees the mean of what a LayerNorm normalizes."""
    witness = facts.first_sight(norm.x, norm.axes[0]) if norm.kind == NormKind.LAYER_NORM and len(norm.axes) == 1 else None
    return None if witness is None else "the caller" if witness.op == "output" else str(program.site(witness))


def _row(site: Site, norm: Norm, plans: Mapping[str, Plan], seen_by: str | None) -> dict[str, Any]:
    return {
        **site.to_dict(),
        "kind": norm.kind,
        "by_hand": norm.by_hand,
        "axes": list(norm.channels if norm.kind in (NormKind.BATCH_NORM, NormKind.OFFLINE_NORM) else norm.axes),
        "eps": norm.eps,
        "gain": norm.gain is not None,
        "shift": norm.shift is not None,
        "seen_by": seen_by,
        "passes": {each: fate for each, chosen in plans.items() if (fate := _fate(chosen, site.node))},
    }


def _fate(chosen: Plan, node: str) -> str | None:
    for rewrite_ in chosen.rewrites:
        if any(site.node == node for site in rewrite_.sites):
            return f"becomes {rewrite_.becomes}"
    refusal: Refusal | None = next((each for each in chosen.refusals if each.site.node == node), None)
    return f"refused, {refusal.code}: {refusal.reason}" if refusal else None


def _fates(every: Iterable[str], kind: str) -> str:
    """What a norm would be; where it stays what it is, the codes of the refusals."""
    becomes = [each for each in every if each.startswith("becomes ") and each != f"becomes {kind}"]
    return ", ".join(dict.fromkeys(map(_short, becomes or every)))


def _short(fate: str) -> str:
    return fate.removeprefix("becomes ").removeprefix("refused, ").partition(":")[0]
