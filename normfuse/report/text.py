"""Rewrites, refusals and norms for a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

from normfuse.escaping import escaped
from normfuse.graph.findings import Refusal, Rewrite
from normfuse.graph.program import Site
from normfuse.modules.written_back import Written
from normfuse.report.sites import grouped, sites_text


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
    for by_pass in grouped(rewrites, key=lambda each: each.pass_name):
        yield Text(f"Rewritten by {by_pass[0].pass_name}", style="bold")
        grid = _entries()
        for same in grouped(by_pass, key=lambda each: (_kinds(each), each.becomes, _pattern(each.because))):
            sites = [site for each in same for site in each.sites]
            what = Text.assemble((f"{_kinds(same[0])} → {same[0].becomes}", "green"), f"  {sites_text(sites)}")
            grid.add_row(str(len(sites)), what + _reason(same[0].because, sites[0], of_many=len(same) > 1))
        yield grid


def _kinds(rewrite: Rewrite) -> str:
    return ", ".join(dict.fromkeys(rewrite.was))


def refusals_lines(refusals: Iterable[Refusal]) -> Iterator[RenderableType]:
    """What was refused, and why; sites refused for the same reason are one entry."""
    for by_pass in grouped(refusals, key=lambda each: each.pass_name):
        yield Text.assemble((f"Refused by {by_pass[0].pass_name}", "bold"), ("  (normfuse explain CODE tells more)", "dim"))
        grid = _entries()
        for same in grouped(by_pass, key=lambda each: (each.code, _pattern(each.reason), each.hint)):
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


def written_lines(written: Written) -> Iterator[Text]:
    """Which tensors of the written files differ from the original's, how many do not, and what their class computes."""
    changed, kept, dropped = written.changed, written.kept, written.dropped
    tensors = "tensor" if len(changed) == 1 else "tensors"
    yield Text.assemble((f"{len(changed)} {tensors} changed", "green"), escaped(f"  {sites_text(changed)}"))
    yield Text(f"{kept} as they were, byte for byte", style="dim")
    if dropped:
        yield Text(escaped(f"{len(dropped)} left out, which the code beside them has no use for: {sites_text(dropped)}"))
    yield from (Text(f"note: {note}", style="dim") for note in escaped(written.notes))
    if written.evidence:
        cases = written.evidence.algebra
        said = f"  what is written, opened in its own class: error {written.evidence.error:.1e} on {len(cases)} cases"
        yield Text.assemble(("called", "bold"), "  ", ("ok", "green"), said)
