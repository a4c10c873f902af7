"""What a program asks of its inputs."""

from __future__ import annotations

from collections.abc import Iterator

from normfuse.graph.interpreter import user_inputs
from normfuse.graph.program import Program
from normfuse.graph.views import shape


def narrower(original: Program, rewritten: Program) -> Iterator[str]:
    """What a rewritten program asks of its inputs, or leaves unasked, otherwise than the original."""
    old, new = original.exported, rewritten.exported
    for guard in dict.fromkeys((*old._guards_code, *new._guards_code)):
        if guard not in new._guards_code:
            yield f"a condition on the inputs was lost: {guard}"
        elif guard not in old._guards_code:
            yield f"a condition on the inputs was added: {guard}"
    for symbol, allowed in old.range_constraints.items():
        now = new.range_constraints.get(symbol, allowed)  # a file drops those that no value has; a fixed size shows below
        if now != allowed:
            yield f"the dynamic size {symbol} was of {allowed} and is of {now}"
    for a, b in zip(user_inputs(original), user_inputs(rewritten), strict=True):
        if a is not None and b is not None and str(shape(a)) != str(shape(b)):
            yield f"the input '{a.name}' was {list(shape(a))} and is {list(shape(b))}"
