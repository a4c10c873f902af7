"""`normfuse passes`: the list."""

from __future__ import annotations

import rich_click as click
from rich.text import Text

from normfuse.cli.console import tell
from normfuse.cli.options import with_answer


@click.command()
@with_answer
def passes(as_json: bool) -> int:
    """List the passes."""
    from normfuse.planning.registry import passes
    from normfuse.report.text import plain_table

    table = plain_table("pass", "what it does")
    for each in passes().values():
        table.add_row(Text(each.name, "bold"), Text(each.summary + (f" ({each.package})" if each.package else "")))
    data = [
        {"name": each.name, "summary": each.summary, "codes": list(each.codes)}
        | ({"package": each.package} if each.package else {})
        for each in passes().values()
    ]
    return tell(as_json, {"passes": data}, table)
