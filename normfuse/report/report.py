"""A plan with its evidence: what the user keeps. Data and text; printing is the command line's.

A report must fit a terminal, so norms that share a fate share an entry, under a name such as ``blocks.0-11.norm1-2``;
`Report.to_dict` has every norm by itself. What matters most comes last, where the prompt is: counts, then evidence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import RenderableType
from rich.text import Text

from normfuse.escaping import escaped, json_text
from normfuse.planning.planner import Plan
from normfuse.proof.evidence import Evidence
from normfuse.report.evidence_text import evidence_lines
from normfuse.report.text import norms_table, refusals_lines, rewrites_lines


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
        notes: what the user should know of how the model was traced.
    """

    model: str
    plan: Plan
    evidence: Evidence
    norms_before: Mapping[str, int]
    norms_after: Mapping[str, int]
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

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
            "notes": list(self.notes),
            "seconds": {stage: round(value, 3) for stage, value in self.seconds.items()},
        }

    def _rewrites(self) -> Iterator[dict[str, Any]]:
        for group, rewrite in enumerate(self.plan.rewrites):
            for site, was in zip(rewrite.sites, rewrite.was, strict=True):
                yield {
                    "pass": rewrite.pass_name,
                    **site.to_dict(),
                    "was": was,
                    "becomes": rewrite.becomes,
                    "claim": rewrite.claim.name.lower(),
                    "group": group,
                    "because": rewrite.because,
                }

    def to_json(self) -> str:
        """The report as JSON text."""
        return json_text(self.to_dict())

    def render(self) -> Iterator[RenderableType]:
        """The report for a terminal, top down: rewrites, refusals, norms, evidence."""
        self = escaped(self)
        yield Text(f"{self.model}: {', '.join(self.plan.passes)}", style="bold")
        yield ""
        if rewrites := list(self.plan.rewrites):
            yield from rewrites_lines(rewrites)
            yield ""
        if self.plan.refusals:
            yield from refusals_lines(self.plan.refusals)
            yield ""
        if self.idle_passes:
            yield Text(f"rewrote nothing: {', '.join(self.idle_passes)}", style="yellow")
            yield ""
        yield norms_table(self.norms_before, self.norms_after)
        if rewrites:  # what was not changed needs no proof
            yield ""
            yield from evidence_lines(self.evidence)
        yield from (Text(f"note: {note}", style="dim") for note in self.notes)
