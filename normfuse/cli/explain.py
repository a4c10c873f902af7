"""`normfuse explain`: the manual of a pass, or the story of a refusal's code."""

from __future__ import annotations

from typing import Any

import rich_click as click
from rich.console import Console
from rich.text import Text

from normfuse.cli.console import tell
from normfuse.cli.options import with_answer
from normfuse.errors import InputError, did_you_mean


@click.command()
@click.argument("topic", metavar="PASS|CODE")
@with_answer
def explain(topic: str, as_json: bool) -> int:
    """Tell what a pass does and when it refuses, or what a refusal's code means."""
    from normfuse.planning.registry import codes, passes
    from normfuse.report.manual import wrapped

    code = topic.upper()
    if found := passes().get(topic):
        data: dict[str, Any] = {"pass": topic, "summary": found.summary, "manual": found.manual, "codes": found.codes}
        text = f"{topic}\n\n{found.manual}"
    elif code in codes():
        owner = next((name for name, each in passes().items() if code in each.codes), None)
        data = {"code": code, "pass": owner, "story": codes()[code]}
        text = f"{code}  ({owner or 'any pass'})\n\n{codes()[code]}"
    else:
        hint = did_you_mean(topic, [*passes(), *codes()], "see normfuse passes")
        raise InputError(f"there is no pass and no code '{topic}'", hint=hint)
    return tell(as_json, data, Text("\n".join(wrapped(text, min(Console().width, 120)))))
