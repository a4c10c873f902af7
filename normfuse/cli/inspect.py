"""`normfuse inspect`: every norm, and what each pass would do with it."""

from __future__ import annotations

import rich_click as click

from normfuse.cli.console import tell, working
from normfuse.cli.options import Source, with_answer, with_source


@click.command()
@click.argument("model")
@with_source
@with_answer
def inspect(model: str, source: Source, as_json: bool) -> int:
    """List every norm of MODEL: its kind, who sees the mean of its input, and what each pass would do with it."""
    with working("loading and tracing"):
        from normfuse import api

        held = source.opened(model)
        inspection = api.inspect(held, source.inputs(held))
    return tell(as_json, inspection.to_dict(), *inspection.render())
