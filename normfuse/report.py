"""A plan with its evidence: what the user keeps. Data and text; printing is the command line's."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from normfuse.evidence import Evidence
from normfuse.planner import Plan


@dataclass(frozen=True)
class Report:
    """What was rewritten, what was refused and why, and the evidence.

    Attributes:
        model: how the user named the model.
        plan: the plan.
        evidence: what the verification found.
        norms_before: norms by kind.
        norms_after: norms by kind.
        seconds: time spent by stage.
    """

    model: str
    plan: Plan
    evidence: Evidence
    norms_before: Mapping[str, int]
    norms_after: Mapping[str, int]
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def idle_passes(self) -> tuple[str, ...]:
        """Requested passes that rewrote nothing."""
        busy = {rewrite.pass_name for rewrite in self.plan.rewrites}
        return tuple(name for name in self.plan.passes if name not in busy)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types; one entry in ``rewrites`` for every norm that was changed."""
        from normfuse import __version__

        return {
            "normfuse": __version__,
            "torch": torch.__version__,
            "model": self.model,
            "passes": list(self.plan.passes),
            "idle_passes": list(self.idle_passes),
            "norms": {"before": dict(self.norms_before), "after": dict(self.norms_after)},
            "rewrites": list(self._rewrites()),
            "edits": [
                {"group": group, "edit": str(edit)}
                for group, rewrite in enumerate(self.plan.rewrites)
                for edit in rewrite.edits
            ],
            "refusals": [refusal.to_dict() for refusal in self.plan.refusals],
            "evidence": self.evidence.to_dict(),
            "seconds": {stage: round(value, 3) for stage, value in self.seconds.items()},
        }

    def _rewrites(self) -> Iterator[dict[str, Any]]:
        for group, rewrite in enumerate(self.plan.rewrites):
            for site in rewrite.sites:
                yield {
                    "pass": rewrite.pass_name,
                    **site.to_dict(),
                    "was": rewrite.was,
                    "becomes": rewrite.becomes,
                    "claim": rewrite.claim.name.lower(),
                    "group": group,
                    "because": rewrite.because,
                }

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def render(self) -> Iterator[Table | Text]:
        """The report for a terminal, top down: norms, rewrites, refusals, evidence."""
        yield Text(f"{self.model}: {' '.join(self.plan.passes)}", style="bold")
        yield norms_table(self.norms_before, self.norms_after)
        for group, rewrite in enumerate(self.plan.rewrites):
            yield _group_table(group, rewrite)
        for name in self.idle_passes:
            yield Text(f"{name} rewrote nothing.", style="yellow")
        if self.plan.refusals:
            yield refusals_table(self.plan)
        yield from evidence_lines(self.evidence)


def norms_table(before: Mapping[str, int], after: Mapping[str, int]) -> Table:
    """Norms by kind, before and after."""
    table = Table("norm", "before", "after", title="Norms", title_justify="left")
    for kind in sorted({*before, *after}):
        table.add_row(kind, str(before.get(kind, 0)), str(after.get(kind, 0)))
    return table


def _group_table(group: int, rewrite: Any) -> Table:
    table = Table("norm", "was", "becomes", "source", title_justify="left")
    table.title = f"Rewrite {group + 1} ({rewrite.pass_name}): {rewrite.because}"
    for site in rewrite.sites:
        table.add_row(str(site), rewrite.was, rewrite.becomes, site.source)
    return table


def refusals_table(plan: Plan) -> Table:
    """Every refusal; `normfuse explain CODE` tells more."""
    table = Table("norm", "code", "reason", title="Refused", title_justify="left")
    for refusal in plan.refusals:
        reason = refusal.reason + (f"\n→ {refusal.hint}" if refusal.hint else "")
        table.add_row(str(refusal.site), refusal.code, reason)
    return table


def evidence_lines(evidence: Evidence) -> Iterator[Text]:
    """The three levels of evidence, a line each."""
    if evidence.structure is not None:
        problems = "; ".join(evidence.structure.problems) or "outputs and norms are as promised"
        yield _line("structure", evidence.structure.ok, problems)
    if evidence.algebra:
        worst = max(evidence.algebra, key=lambda each: each.error / each.allowed)
        said = f"float64 error {evidence.error:.1e} (own noise {evidence.noise:.1e}) on {len(evidence.algebra)} cases"
        said += "" if worst.ok else f"; worst on '{worst.case}': {worst.error:.1e}, allowed {worst.allowed:.1e}"
        yield _line("algebra", all(each.ok for each in evidence.algebra), said)
    if evidence.rounding:
        own = evidence.rounding[0]
        ratio = "none in either" if math.isnan(own.ratio) else f"{own.ratio:.2f} times the original's"
        yield _line("rounding", True, f"{ratio} ({own.before:.1e} before, {own.after:.1e} after, in the stored dtype)")
    if evidence.level != "full":
        yield Text(f"verification level: {evidence.level}", style="yellow")
    for note, times in Counter(evidence.notes).items():
        yield Text(f"note: {note}" + (f" ({times} times)" if times > 1 else ""), style="dim")


def _line(level: str, ok: bool, said: str) -> Text:
    return Text.assemble((f"{level:9} ", "bold"), ("ok    " if ok else "FAILED", "green" if ok else "red"), f" {said}")
