"""The smallest change that a comparison would have seen: what an agreement is worth.

One row of a few of the reference's stored tensors is scaled, and the same judge looks at the outputs. What a change does to
them is proportional to it as long as it is small, so one such run tells from which change on the judge would have said no; that
is then tried for the row that shows least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from normfuse.graph.parts import Part, Weights, any_filled, row_sizes
from normfuse.graph.program import Program
from normfuse.graph.views import arguments, aten
from normfuse.proof.evidence import Agreement, Sensitivity, Verdict

Judge = Callable[[Sequence[Tensor]], Agreement]
"""Told the outputs of a model, whether they agree with those of the reference."""

SAMPLED = 3
"""Tensors of which a row is changed, a run each."""

TRIED = 0.1
"""A row is changed by so much at first, relative."""

CLEARLY = 2.0
"""What is said to show is so many times the least that would."""

TRIES = 3
"""Of the least change that shows, until one does: the dearer samples of the noise are not asked for every change."""


def sensitivity(
    program: Program,
    names: Sequence[str],
    outputs: Callable[[Weights], Sequence[Tensor]],
    judge: Judge,
) -> Sensitivity | None:
    """The smallest change of a row that ``judge`` would have seen; None where no row could be sampled.

    Args:
        program: the reference.
        names: stored tensors of it, which may have rows or not.
        outputs: of the reference, with other weights.
        judge: what was asked whether the two models agree.
    """
    sampled = _spread(list(dict.fromkeys(name for name in names if _has_rows(program, name))))
    rows = {name: _middle(program.tensor(name)) for name in sampled}

    def off(name: str, change: float) -> Agreement:
        return judge(outputs(partial(_one_row_off, name, rows[name], change)))

    shown = {name: least for name in sampled if (least := _least(off(name, TRIED)))}
    if not shown:
        return Sensitivity(TRIED, 0, len(sampled)) if sampled else None
    hardest = max(shown, key=lambda name: shown[name])
    change = shown[hardest]
    for _ in range(TRIES):
        change = min(CLEARLY * change, TRIED)
        found = off(hardest, change)
        if found.verdict is Verdict.DISPROVEN:
            return Sensitivity(change, len(shown), len(sampled))
        change /= max(found.error / found.allowed, 1e-3)
    return None


def _least(found: Agreement) -> float:
    """The least change that the judge sees, where it sees `TRIED`; else 0."""
    return TRIED * found.allowed / found.error if found.verdict is Verdict.DISPROVEN else 0.0


def _spread(names: Sequence[str]) -> list[str]:
    """The first, the last and some between."""
    count = min(SAMPLED, len(names))
    return [names[round(place * (len(names) - 1) / max(count - 1, 1))] for place in range(count)]


def _has_rows(program: Program, name: str) -> bool:
    """Whether a tensor has a row that every input reads; of an embedding's table, it reads some."""
    if name not in set(program.stored.values()):
        return False
    node, value = program.reader_of(name), program.tensor(name)
    tables = [each.target is aten.embedding.default and arguments(each)["weight"] is node for each in node.users]
    there = value.is_floating_point() and value.dim() > 0 and not value.is_meta  # a new tensor of a plan has a formula only
    return there and bool(node.users) and not any(tables) and any_filled(value)


def _middle(value: Tensor) -> int:
    """The row whose size is in the middle of all that are not zero."""
    size = row_sizes(value)
    rows = size.argsort()[int((size == 0.0).sum()) :]
    return int(rows[len(rows) // 2])


def _one_row_off(wanted: str, row: int, change: float, name: str, value: Tensor, part: Part) -> Tensor:
    """A row scaled."""
    place = row - (part.start if part.axis == 0 else 0)
    if name != wanted or not 0 <= place < len(value):
        return value
    changed = value.clone()
    changed[place] *= 1.0 + change
    return changed
