"""Evidence for a terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from normfuse.escaping import escaped
from normfuse.proof.differences import Difference
from normfuse.proof.evidence import COMPARED, Evidence, Verdict, level_verdict
from normfuse.report.text import plain_table


def evidence_lines(evidence: Evidence) -> Iterator[RenderableType]:
    """The three levels of evidence, a line each."""
    evidence = escaped(evidence)
    grid = Table.grid(padding=(0, 2))
    if evidence.structure is not None:
        problems = "; ".join(evidence.structure.problems) or "outputs and norms are as promised"
        _level(grid, "structure", Verdict.PROVEN if evidence.structure.ok else Verdict.DISPROVEN, problems)
    if evidence.algebra:
        worst = max(evidence.algebra, key=lambda each: (each.verdict is Verdict.DISPROVEN, each.error / each.allowed))
        regions = "of regions, each by itself" if evidence.level == "regions" else ""
        said = (
            f"error {evidence.error:.1e} (own noise {evidence.noise:.1e}) on {len(evidence.algebra)} cases {regions}".rstrip()
        )
        if worst.verdict is Verdict.DISPROVEN:
            said += f"; worst on '{worst.case}': {worst.error:.1e}, allowed {worst.allowed:.1e}"
        elif evidence.sensitivity:
            said += f"; {evidence.sensitivity}"
        _level(grid, "algebra", level_verdict(evidence.algebra), said)
    if evidence.rounding and level_verdict(evidence.algebra) is not Verdict.DISPROVEN:
        own = next((each for each in evidence.rounding if each.verdict is Verdict.DISPROVEN), evidence.rounding[0])
        ratio = f"{own.ratio:.2f} times the original's" if math.isfinite(own.ratio) else "the original has none"
        said = f"{ratio} ({own.before:.1e} before, {own.after:.1e} after)"
        _level(grid, "rounding", own.verdict, said if math.isfinite(own.before) else "not run in the stored dtype")
    if evidence.objections or evidence.called:
        said = next(iter(evidence.objections), f"what is written, loaded back, on {', '.join(evidence.called)}")
        _level(grid, "called", Verdict.DISPROVEN if evidence.objections else Verdict.PROVEN, said)
    if grid.rows:
        yield grid
    if evidence.level not in COMPARED:
        yield Text(f"not proven: the verification level is '{evidence.level}'", style="yellow")
    elif evidence.missing:
        yield Text(f"not proven: {evidence.missing.reason}", style="yellow")
    for note, times in Counter(evidence.notes).items():
        yield Text(f"note: {note}" + (f" ({times} times)" if times > 1 else ""), style="dim")


def differences_table(differences: Iterable[Difference]) -> Table:
    """How far two models' outputs are apart on the inputs as given, a row per output and way of running."""
    table = plain_table("output", "run", "max abs", "mean abs", "max rel", "ulps", "cosine", "top-1", "ratio")
    for each in differences:
        sizes = (each.max_abs, each.mean_abs, each.max_rel)
        agreed = "—" if each.top1 is None else f"{each.top1:.1%}"
        ratio = "—" if each.ratio is None else f"{each.ratio:.2f}"
        cells = (*(f"{size:.1e}" for size in sizes), f"{each.ulps:.3g}", f"{each.cosine:.9f}", agreed, ratio)
        table.add_row(str(each.output), each.run or "as a user would", *cells)
    return table


_SAID = {
    Verdict.PROVEN: ("ok", "green"),
    Verdict.DISPROVEN: ("FAILED", "red"),
    Verdict.NOT_COMPARED: ("not compared", "yellow"),
}


def _level(grid: Table, level: str, verdict: Verdict, said: str) -> None:
    grid.add_row(Text(level, "bold"), Text(*_SAID[verdict]), Text(said))
