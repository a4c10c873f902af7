"""Wrong rewrites made from right ones: each mutant is a plan with one of the mistakes that published tools make.

A mutant is data like the plan that it comes from, so the same proof judges both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from normfuse.graph.edits import Edit, NewTensor, Reroute, SetTensor
from normfuse.graph.expressions import Call, Formula, Number, Read, Ref
from normfuse.graph.program import Program
from normfuse.planning.planner import Plan


@dataclass(frozen=True)
class Mutant:
    """A plan that is wrong in one place.

    Attributes:
        mistake: what was done wrong.
        edit: the edit that is wrong now, as it was.
        plan: the wrong plan.
    """

    mistake: str
    edit: Edit
    plan: Plan

    def __str__(self) -> str:
        return f"{self.mistake}: {str(self.edit)[:120]}"


def mutants(plan: Plan, program: Program) -> Iterator[Mutant]:
    """Every mutant of a plan that could be told from it."""
    edits = [edit for rewrite in plan.rewrites for edit in rewrite.edits]
    for edit in edits:
        if isinstance(edit, (SetTensor, NewTensor)):
            shape = _shape(program, edit)
            if shape is None:
                continue
            for mistake, change in FORMULAS.items():
                if (wrong := change(edit, shape)) is not None and wrong != edit:
                    yield Mutant(mistake, edit, _replaced(plan, edit, wrong))
        elif isinstance(edit, Reroute):
            for mistake, wrong_ in _miswired(edit):
                yield Mutant(mistake, edit, _replaced(plan, edit, wrong_))
    yield from _swapped(plan, program, edits)


def _replaced(plan: Plan, edit: Edit, by: Edit) -> Plan:
    rounds = tuple(
        tuple(replace(each, edits=tuple(by if e == edit else e for e in each.edits)) for each in rewrites)
        for rewrites in plan.rounds
    )
    return replace(plan, rounds=rounds)


def _shape(program: Program, edit: SetTensor | NewTensor) -> tuple[int, ...] | None:
    """Sizes of a tensor that is stored in the original program; None for one that only the plan makes."""
    names = set(program.tensor_names())
    return tuple(program.tensor(edit.name).shape) if edit.name in names else None


# -- a stored tensor is computed wrongly -------------------------------------------------------------------------------

Change = Callable[[Any, tuple[int, ...]], Edit | None]


def _skipped(edit: SetTensor, shape: tuple[int, ...]) -> Edit | None:
    """One reader is forgotten, a head stays tied, a bias is not centred: the tensor stays what it was."""
    return replace(edit, formula=Read(edit.name)) if isinstance(edit, SetTensor) else None


def _half_done(edit: SetTensor, shape: tuple[int, ...]) -> Edit | None:
    half = Call("mul.Tensor", (Call("add.Tensor", (edit.formula, Read(edit.name))), Number(0.5)))
    return replace(edit, formula=half) if isinstance(edit, SetTensor) else None


def _dropped(edit: SetTensor, shape: tuple[int, ...]) -> Edit | None:
    return replace(edit, formula=Call("mul.Tensor", (edit.formula, Number(0.0)))) if len(shape) == 1 else None


def _one_channel(edit: SetTensor, shape: tuple[int, ...]) -> Edit | None:
    if not shape or shape[0] < 2:
        return None
    first = Call("mul.Tensor", (Call("slice.Tensor", (edit.formula, 0, 0, 1)), Number(1.001)))
    return replace(edit, formula=Call("cat.default", ((first, Call("slice.Tensor", (edit.formula, 0, 1, shape[0]))), 0)))


def _wrong_axis(edit: SetTensor, shape: tuple[int, ...]) -> Edit | None:
    if len(shape) < 2 or shape[0] != shape[1]:
        return None
    turned = _turned(edit.formula)
    return replace(edit, formula=turned) if turned != edit.formula else None


def _turned(formula: Formula) -> Formula:
    """Along the other of the first two axes, which are of one size."""
    match formula:
        case Call("center" | "scale" | "shift", (of, *by), (("dim", 0 | 1 as dim),)):
            return replace(formula, args=(_turned(of), *by), kwargs=(("dim", 1 - dim),))
        case _:
            return formula


FORMULAS: dict[str, Change] = {
    "not changed": _skipped,
    "changed by half": _half_done,
    "bias dropped": _dropped,
    "one channel scaled by 1.001": _one_channel,
    "wrong axis": _wrong_axis,
}


# -- the graph is wired wrongly ----------------------------------------------------------------------------------------


def _miswired(edit: Reroute) -> Iterator[tuple[str, Edit]]:
    by = edit.by
    if not isinstance(by, Call):
        return
    if "norm" in by.op:
        for place, value in enumerate(by.args):
            if isinstance(value, float):
                for name, eps in (("eps × 10", value * 10), ("eps of another default", 1e-6 if value != 1e-6 else 1e-5)):
                    yield name, replace(edit, by=replace(by, args=_with(by.args, place, eps)))
    for place, value in enumerate(by.args):
        if place > 0 and isinstance(value, (Call, Ref)) and re.match("(add|mul)", by.op):
            yield f"{by.op.partition('.')[0]} left out", replace(edit, by=by.args[0])


def _with(args: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    return (*args[:place], value, *args[place + 1 :])


def _swapped(plan: Plan, program: Program, edits: list[Edit]) -> Iterator[Mutant]:
    """Two tensors of one shape take each other's values, as q and k do when rows of a fused weight are mistaken."""
    by_shape: dict[tuple[int, ...], list[SetTensor]] = {}
    for edit in edits:
        if isinstance(edit, SetTensor) and (shape := _shape(program, edit)):
            by_shape.setdefault(shape, []).append(edit)
    for alike in by_shape.values():
        for one, other in pairwise(alike):
            if one.name != other.name:
                swapped = _replaced(plan, one, replace(one, formula=other.formula))
                yield Mutant("swapped", one, _replaced(swapped, other, replace(other, formula=one.formula)))
