"""What a comparison found, as data: three levels, a row per case. `normfuse.proof.measuring` fills it in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from normfuse.errors import NotCompared, VerificationFailed
from normfuse.proof.coverage import Missing
from normfuse.proof.differences import Difference

MARGIN = 32.0
"""The noise is a measured sample of a random quantity, and centring changes a weight by up to a few roundings, not one."""


COMPARED = ("full", "regions")
"""Levels that compare what is computed: of the whole model, or of each region of a rewrite."""


class Verdict(StrEnum):
    """An answer; only `PROVEN` is a yes."""

    PROVEN = "proven"
    DISPROVEN = "disproven"
    NOT_COMPARED = "not compared"


def verdict_of(agrees: bool, compared: int = 1) -> Verdict:
    """The verdict on outputs of which so many entries could be compared."""
    return Verdict.DISPROVEN if not agrees else Verdict.PROVEN if compared else Verdict.NOT_COMPARED


@dataclass(frozen=True)
class Structure:
    """Level 1.

    Attributes:
        ok: whether the rewritten program has the promised form.
        problems: what differs, in plain English.
        norms_before: norms by kind in the original.
        norms_after: norms by kind in the rewritten program.
    """

    ok: bool
    problems: tuple[str, ...]
    norms_before: dict[str, int]
    norms_after: dict[str, int]


@dataclass(frozen=True)
class Agreement:
    """One case of level 2 or 3; all figures are relative to the size of the entries around the one that is worst.

    Attributes:
        case: the inputs' name.
        error: the difference that is largest for what is allowed.
        allowed: what noise explains there.
        verdict: whether every output agrees.
        compared: how many entries of the outputs are finite.
        entries: how many there are.
        noise: the model's own there.
        relative: the largest difference of any entry, over the largest entry of its output.
    """

    case: str
    error: float
    allowed: float
    verdict: Verdict
    compared: int
    entries: int
    noise: float = math.nan
    relative: float = math.inf

    @property
    def ok(self) -> bool:
        """Whether it is proven."""
        return self.verdict is Verdict.PROVEN


@dataclass(frozen=True)
class Rounding:
    """Level 3 for one case.

    Attributes:
        case: the inputs' name.
        before: error of the original in its stored dtype, against the float64 truth, relative.
        after: error of the rewritten program, as it is written, likewise.
        verdict: whether the second is explained by the roundings of the weights and of the arithmetic.
    """

    case: str
    before: float
    after: float
    verdict: Verdict

    @property
    def ok(self) -> bool:
        """Whether it is proven."""
        return self.verdict is Verdict.PROVEN

    @property
    def ratio(self) -> float:
        """How many times larger the rounding error became; nan where neither has one."""
        if self.before == 0.0:
            return math.nan if self.after == 0.0 else math.inf
        return self.after / self.before


@dataclass(frozen=True)
class Sensitivity:
    """The smallest change of the reference that the comparison would have seen.

    Attributes:
        change: of one row of a stored tensor, relative: what was tried, and showed, for the row that shows least.
        shown: how many of the sampled rows show; none even with ``change`` if 0.
        sampled: how many tensors a row was taken from.
    """

    change: float
    shown: int
    sampled: int

    def __str__(self) -> str:
        size = f"{100.0 * self.change:.2g} %" if self.change >= 1e-4 else f"{self.change:.0e}"
        if not self.shown:
            return f"a row off by {size} would not show"
        rows = "a row" if self.shown == self.sampled else f"a row of {self.shown} of {self.sampled} sampled tensors"
        return f"{rows} off by {size} would show"


@dataclass(frozen=True)
class Evidence:
    """What `prove` and `compare` found.

    Attributes:
        level: ``full``, ``regions``, ``structure`` or ``none``.
        structure: level 1, where a plan was proven.
        algebra: level 2, a row per case.
        rounding: level 3, a row per case.
        notes: cases that could not be run, and why.
        differences: of two models, the outputs on the inputs as given, in every measure.
        runtimes: of two models, what ran each.
        objections: in sentences, what calls as a user makes them showed against equivalence: inputs that one takes and the
            other refuses, or other outputs than those that were proven.
        called: of what is written, loaded back: the cases on which it was called as a user calls it.
        unchanged: nothing was rewritten, so that there is nothing to compare.
        missing: what was asked for and could not be compared; None where all was.
        sensitivity: the smallest change that the algebra level would have seen; None where it could not be told.
    """

    level: str = "full"
    structure: Structure | None = None
    algebra: tuple[Agreement, ...] = ()
    rounding: tuple[Rounding, ...] = ()
    notes: tuple[str, ...] = field(default=())
    differences: tuple[Difference, ...] = ()
    runtimes: tuple[str, ...] = ()
    objections: tuple[str, ...] = ()
    called: tuple[str, ...] = ()
    unchanged: bool = False
    missing: Missing | None = None
    sensitivity: Sensitivity | None = None

    @property
    def verdict(self) -> Verdict:
        """Proven, disproven, or not compared: whether the two are one function."""
        formed = self.structure is None or self.structure.ok
        if not formed or self.objections or _disproven(self.algebra) or _disproven(self.rounding):
            return Verdict.DISPROVEN
        if self.unchanged:
            return Verdict.PROVEN
        return Verdict.NOT_COMPARED if self.level not in COMPARED or self.missing else Verdict.PROVEN

    @property
    def ok(self) -> bool:
        """Whether the two are proven to be one function."""
        return self.verdict is Verdict.PROVEN

    @property
    def error(self) -> float:
        """The largest algebra error of all cases, each relative to the entries around it; 0 where nothing was changed."""
        return max((each.error for each in self.algebra), default=0.0)

    @property
    def relative(self) -> float:
        """The largest algebra error of all cases, relative to the largest entry of the output."""
        return max((each.relative for each in self.algebra), default=0.0)

    @property
    def noise(self) -> float:
        """The model's own float64 noise on the case where it is largest."""
        return max((each.noise for each in self.algebra), default=math.nan)

    @property
    def ratio(self) -> float:
        """The rounding ratio on the user's own inputs."""
        return self.rounding[0].ratio if self.rounding else math.nan

    def require(self) -> Evidence:
        """Itself when equivalent.

        Raises:
            VerificationFailed: it is not.
            NotCompared: nothing was compared, or the evidence is of a level that compares nothing.
        """
        if not self.ok:
            raise failed(self, self)
        return self

    def complaint(self) -> str:
        """The first thing that contradicts equivalence or is missing, as a sentence."""
        if self.structure is not None and not self.structure.ok:
            return f"the result does not have the promised form: {self.structure.problems[0]}"
        if self.objections:
            return self.objections[0]
        wrong = [each for each in self.algebra if each.verdict is Verdict.DISPROVEN]
        if wrong:
            bad = max(wrong, key=lambda each: each.error / each.allowed)
            return (
                f"outputs differ by {bad.error:.1e} (relative) on the case '{bad.case}', where noise explains {bad.allowed:.1e}"
            )
        rough = next((each for each in self.rounding if each.verdict is Verdict.DISPROVEN), None)
        if rough is not None:
            return f"after rounding, outputs differ by {rough.after:.1e} on '{rough.case}', the original by {rough.before:.1e}"
        return self.missing.reason if self.missing else f"nothing was compared: the verification level is '{self.level}'"

    def to_dict(self) -> dict[str, Any]:
        """The evidence as JSON types (no NaN, no infinity)."""
        data: dict[str, Any] = {
            "ok": self.ok,
            "verdict": self.verdict,
            "missing": self.missing.reason if self.missing else None,
            "level": self.level,
            "structure": asdict(self.structure) if self.structure else None,
            "algebra": [{**asdict(each), "ok": each.ok} for each in self.algebra],
            "rounding": [{**asdict(each), "ok": each.ok, "ratio": each.ratio} for each in self.rounding],
            "error": self.error,
            "noise": self.noise,
            "rounding_ratio": self.ratio,
            "sensitivity": asdict(self.sensitivity) if self.sensitivity else None,
            "notes": list(self.notes),
            "objections": list(self.objections),
            "called": list(self.called),
            "differences": [asdict(each) for each in self.differences],
            "runtimes": list(self.runtimes),
        }
        return {key: _finite(value) for key, value in data.items()}


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _disproven(rows: Sequence[Agreement] | Sequence[Rounding]) -> bool:
    return any(each.verdict is Verdict.DISPROVEN for each in rows)


def level_verdict(rows: Sequence[Agreement] | Sequence[Rounding]) -> Verdict:
    """The verdict of one level, a row per case: that of the inputs as given, unless another case is disproven."""
    if _disproven(rows):
        return Verdict.DISPROVEN
    return rows[0].verdict if rows else Verdict.NOT_COMPARED


def checked(evidence: Evidence, report: Any = None) -> Evidence:
    """The evidence, if it proves what its level was asked to prove: all, the form only, or nothing.

    Args:
        evidence: what was found.
        report: what the error carries instead of the evidence.

    Raises:
        VerificationFailed: something contradicts equivalence.
        NotCompared: a comparison was asked for and there was nothing to compare.
    """
    if evidence.verdict is Verdict.DISPROVEN or (evidence.level in COMPARED and not evidence.ok):
        raise failed(evidence, report or evidence)
    return evidence


def failed(evidence: Evidence, report: Any) -> VerificationFailed:
    """The error that carries a report whose evidence is not ok."""
    if evidence.verdict is Verdict.NOT_COMPARED:
        hint = evidence.missing.hint if evidence.missing else "verify with the level 'full'"
        if evidence.structure is not None:
            hint += "; nothing was written; verify='structure' (--verify structure) proves the form only"
        return NotCompared(evidence.complaint(), report, hint=hint)
    rounded = _disproven(evidence.rounding) and not _disproven(evidence.algebra)
    report_it = "nothing was written; please report this model"
    hint = "nothing was written: the stored dtype cannot hold the new weights; convert the model to float32 first"
    return VerificationFailed(evidence.complaint(), report, hint=hint if rounded else report_it)
