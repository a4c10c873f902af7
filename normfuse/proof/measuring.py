"""The cases of a comparison, one after the other: what is measured on each becomes rows of one evidence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar

from torch import Tensor

from normfuse.proof.cases import Case
from normfuse.proof.coverage import Coverage, Missing
from normfuse.proof.evidence import Agreement, Evidence, Rounding, Verdict

C = TypeVar("C", bound=Case)

Progress = Callable[[str, int, int], None]
"""Told (what, done, total)."""


@dataclass(frozen=True)
class Measured:
    """One case.

    Attributes:
        evidence: what was found on it alone.
        truth: the outputs of the reference; None where the case was not run.
        nudged: the same after the weights were nudged.
    """

    evidence: Evidence
    truth: Sequence[Tensor] | None = None
    nudged: Sequence[Tensor] = ()


_ROWS = ("algebra", "rounding", "notes", "differences", "objections")
"""What each case adds to."""


def evidence_of(
    cases: Sequence[C], measure: Callable[[C, bool], Measured], so_far: Evidence, progress: Progress | None
) -> Evidence:
    """What the cases show together.

    Args:
        cases: inputs to compare on, the user's own first.
        measure: measures a case, and is told whether it is the first.
        so_far: what is known before; its verdicts and notes come first.
        progress: called with (what, done, total).
    """
    found, coverage = [so_far], Coverage()
    for done, case in enumerate(cases):
        if progress:
            progress(f"proving: {case.name}", done, len(cases))
        each = measure(case, done == 0)
        found.append(each.evidence)
        if each.truth is not None:
            coverage.add(each.truth, each.nudged, given=case.given or done == 0)
    rows: dict[str, Any] = {name: tuple(chain.from_iterable(getattr(each, name) for each in found)) for name in _ROWS}
    rows["notes"] += _notes_of(rows["algebra"])
    sensitivity = next((each.sensitivity for each in found if each.sensitivity), None)
    return replace(so_far, **rows, missing=coverage.missing() or _not_rounded(rows["rounding"]), sensitivity=sensitivity)


def _not_rounded(rows: Sequence[Rounding]) -> Missing | None:
    """Why the rounding level is no yes on the inputs as given; None if it is one, or a no."""
    if rows and rows[0].verdict is Verdict.NOT_COMPARED:
        reason = "the rounding level was not compared: in its stored dtype the model overflows, or does not run on this machine"
        return Missing(reason, "convert the model to float32 first")
    return None


def _notes_of(rows: Sequence[Agreement]) -> tuple[str, ...]:
    """What a reader should know of how much was compared."""
    empty = [row.case for row in rows if not row.compared]
    partly = [row for row in rows if 0 < row.compared < row.entries]
    notes = []
    if empty and len(empty) < len(rows):
        notes.append(f"not a number in the original's outputs to compare on: {', '.join(empty)}")
    if partly:
        least = min(partly, key=lambda row: row.compared / row.entries)
        share = f"{least.compared} of {least.entries} entries are finite on '{least.case}' and were compared as numbers"
        notes.append(f"{share}; the others must be NaN or infinite in the same places")
    return tuple(notes)
