"""A plan with its evidence: what the user keeps. Data and text; printing is the command line's.

A report must fit a terminal, so norms that share a fate share an entry, under a name such as ``blocks.0-11.norm1-2``;
`Report.to_dict` has every norm by itself. What matters most comes last, where the prompt is: counts, then evidence.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeAlias, TypeVar
from xml.etree import ElementTree as xml

import torch
from rich.console import Console, RenderableType
from rich.table import Column, Table
from rich.text import Text

from normfuse.escaping import escaped, json_text
from normfuse.findings import Refusal, Rewrite
from normfuse.planner import Plan
from normfuse.program import Site
from normfuse.proof.differences import Difference
from normfuse.proof.evidence import Evidence, Verdict, level_verdict

T = TypeVar("T")
Name: TypeAlias = tuple[tuple[str, ...], ...]


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


def norms_table(before: Mapping[str, int], after: Mapping[str, int]) -> Table:
    """Norms by kind, before and after."""
    table = plain_table("norms", "before", "after")
    table.columns[1].justify = table.columns[2].justify = "right"
    for kind in sorted({*before, *after}):
        table.add_row(kind, str(before.get(kind, 0)), str(after.get(kind, 0)))
    return table


def plain_table(*columns: str) -> Table:
    """A table without lines, that a pipe can read; give it `Text`, because text in brackets is markup to rich."""
    return Table(*(Column(each, overflow="fold") for each in columns), box=None, pad_edge=False, padding=(0, 1))


def rewrites_lines(rewrites: Iterable[Rewrite]) -> Iterator[RenderableType]:
    """What was rewritten; rewrites of one kind, for one reason, are one entry."""
    for by_pass in _grouped(rewrites, key=lambda each: each.pass_name):
        yield Text(f"Rewritten by {by_pass[0].pass_name}", style="bold")
        grid = _entries()
        for same in _grouped(by_pass, key=lambda each: (_kinds(each), each.becomes, _pattern(each.because))):
            sites = [site for each in same for site in each.sites]
            what = Text.assemble((f"{_kinds(same[0])} → {same[0].becomes}", "green"), f"  {sites_text(sites)}")
            grid.add_row(str(len(sites)), what + _reason(same[0].because, sites[0], of_many=len(same) > 1))
        yield grid


def _kinds(rewrite: Rewrite) -> str:
    return ", ".join(dict.fromkeys(rewrite.was))


def refusals_lines(refusals: Iterable[Refusal]) -> Iterator[RenderableType]:
    """What was refused, and why; sites refused for the same reason are one entry."""
    for by_pass in _grouped(refusals, key=lambda each: each.pass_name):
        yield Text.assemble((f"Refused by {by_pass[0].pass_name}", "bold"), ("  (normfuse explain CODE tells more)", "dim"))
        grid = _entries()
        for same in _grouped(by_pass, key=lambda each: (each.code, _pattern(each.reason), each.hint)):
            what = Text.assemble((same[0].code, "yellow"), f"  {sites_text(each.site for each in same)}")
            what += _reason(same[0].reason, same[0].site, of_many=len(same) > 1)
            grid.add_row(str(len(same)), what + (f"\nhint: {same[0].hint}" if same[0].hint else ""))
        yield grid


def _entries() -> Table:
    """A grid of a count and what there are so many of."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right", min_width=4)
    grid.add_column(overflow="fold")
    return grid


def _reason(reason: str, site: Site, *, of_many: bool) -> Text:
    return Text(f"\n{site}: {reason}" if of_many else f"\n{reason}")


def _pattern(sentence: str) -> str:
    """The sentence without its names in quotes and its numbers: equal for reasons that differ only in the place."""
    return re.sub(r"\d+", "0", re.sub(r"'[^']*'", "''", sentence))


def _grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """The items with equal keys together, in the order in which they come."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def sites_text(sites: Iterable[Site]) -> str:
    """Names of sites, those that differ only in one number as one: ``blocks.0-11.norm1-2, norm``."""
    # Text, numbers, text, … for every name; the numbers of names that are otherwise alike are merged, the last ones first.
    names: list[Name] = [tuple((part,) for part in re.split(r"(\d+)", site)) for site in dict.fromkeys(map(str, sites))]
    for place in reversed(range(1, max(map(len, names), default=0), 2)):
        alike = _grouped(names, key=lambda name: (len(name), name[:place], name[place + 1 :]))
        names = [_merged(same, place) for same in alike]
    return ", ".join("".join(_ranges(part) for part in name) for name in names)


def _merged(names: Sequence[Name], place: int) -> Name:
    first = names[0]
    if place >= len(first):  # names without a number there are alike only if they are the same
        return first
    numbers = {number for name in names for number in name[place]}
    return (*first[:place], tuple(sorted(numbers, key=int)), *first[place + 1 :])


def _ranges(numbers: Sequence[str]) -> str:
    """``0-3,7`` for 0, 1, 2, 3, 7."""
    if len(numbers) == 1:
        return numbers[0]
    runs = [list(run) for _, run in groupby(enumerate(map(int, numbers)), key=lambda pair: pair[1] - pair[0])]
    return ",".join(f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else f"{run[0][1]}" for run in runs)


def evidence_lines(evidence: Evidence) -> Iterator[RenderableType]:
    """The three levels of evidence, a line each."""
    evidence = escaped(evidence)
    grid = Table.grid(padding=(0, 2))
    if evidence.structure is not None:
        problems = "; ".join(evidence.structure.problems) or "outputs and norms are as promised"
        _level(grid, "structure", Verdict.PROVEN if evidence.structure.ok else Verdict.DISPROVEN, problems)
    if evidence.algebra:
        worst = max(evidence.algebra, key=lambda each: (each.verdict is Verdict.DISPROVEN, each.error / each.allowed))
        said = f"error {evidence.error:.1e} (own noise {evidence.noise:.1e}) on {len(evidence.algebra)} cases"
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
    if evidence.level != "full":
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


def html(lines: Iterable[RenderableType], title: str) -> str:
    """A page of its own with what a terminal would show."""
    console = Console(record=True, file=io.StringIO(), width=140, markup=False, emoji=False, highlight=False)
    console.print(Text(escaped(title), "bold"))
    for line in lines:
        console.print(line)
    return console.export_html(inline_styles=True)


_SAID = {
    Verdict.PROVEN: ("ok", "green"),
    Verdict.DISPROVEN: ("FAILED", "red"),
    Verdict.NOT_COMPARED: ("not compared", "yellow"),
}


def _level(grid: Table, level: str, verdict: Verdict, said: str) -> None:
    grid.add_row(Text(level, "bold"), Text(*_SAID[verdict]), Text(said))


def junit(evidence: Evidence, name: str) -> str:
    """The cases as JUnit XML, for CI systems: each as algebra, and as it runs in its own dtype.

    A case that shows nothing is skipped; where that leaves the question open, a case of its own is an error, since a CI takes
    a skipped test for a good one.
    """
    rows = [(each.case, each.verdict, f"outputs differ by {each.error:.1e}, allowed {each.allowed:.1e}")
            for each in evidence.algebra]  # fmt: skip
    rows += [(f"{each.case}, as stored", each.verdict, f"off by {each.after:.1e}, the reference by {each.before:.1e}")
             for each in evidence.rounding]  # fmt: skip
    rows += [("called as a user calls it", Verdict.DISPROVEN, each) for each in evidence.objections]
    told = [(label, _JUNIT[verdict], message) for label, verdict, message in rows]
    if evidence.verdict is Verdict.NOT_COMPARED:
        told.append(("anything was compared", "error", evidence.complaint()))
    name, told = escaped(name), escaped(told)
    tags = Counter(tag for _, tag, _ in told)
    counted = {"tests": len(told), "failures": tags["failure"], "errors": tags["error"], "skipped": tags["skipped"]}
    suite = xml.Element("testsuite", {"name": name, **{key: str(value) for key, value in counted.items()}})
    for label, tag, message in told:
        case = xml.SubElement(suite, "testcase", classname=name, name=label)
        if tag:
            said = "there was nothing to compare" if tag == "skipped" else message
            xml.SubElement(case, tag, message=said)
    xml.indent(suite)
    return xml.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


_JUNIT = {Verdict.PROVEN: "", Verdict.DISPROVEN: "failure", Verdict.NOT_COMPARED: "skipped"}
"""A verdict -> the tag that says so."""


def wrapped(manual: str, width: int) -> Iterator[str]:
    """The lines of a manual, its paragraphs filled anew for a terminal; everything else in them stays as written."""
    paragraphs = [""]
    last = ""
    for line in manual.splitlines():
        first_word = (line.split() or [""])[0]
        continues = len(last) + 1 + len(first_word) >= _FILLED and line.startswith(_hang(paragraphs[-1]) + first_word)
        if continues and first_word:  # it did not fit into the last line
            paragraphs[-1] += f" {line.strip()}"
        else:
            paragraphs.append(line)
        last = line
    for each in paragraphs[1:]:
        yield from textwrap.wrap(each, width, subsequent_indent=_hang(each), break_on_hyphens=False) or [""]


_FILLED = 110  # manuals are written in lines of 110 to 120 characters


def _hang(paragraph: str) -> str:
    """The indentation of a paragraph's lines after the first."""
    return " " * re.match(r" *(NF\d{3}  )?", paragraph).end()  # type: ignore[union-attr]
