"""The program that is written, as its users will have it: saved, loaded back, and called.

What was proven is a graph with formulas. What leaves is a file of torch's, with guards, ranges and constants of its own.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from normfuse.errors import InputError, first_line
from normfuse.graph.interpreter import run
from normfuse.graph.kept_tensors import own_state
from normfuse.graph.program import Program, quiet
from normfuse.proof.agreement import rounded
from normfuse.proof.calling import Answer, ModelCall, answer, call_of_program
from normfuse.proof.cases import Case, sizes_of_ranges
from normfuse.proof.differences import identical
from normfuse.proof.evidence import Evidence, Verdict
from normfuse.proof.input_conditions import narrower
from normfuse.proof.noise import samples_of_rounding
from normfuse.proof.randomness import is_random
from normfuse.proof.steps import jumping
from normfuse.proof.trial_run import GIVE_FITTING

SMALL = 2**12
"""Entries of a tensor up to which it is saved and loaded back itself; larger ones would be a third copy of the model."""


def called_as_written(original: Program, proven: Program, written: Program, flat: Sequence[Any], so_far: Evidence) -> Evidence:
    """The evidence, and what calls of the written program add to it: on the user's inputs and over the dynamic ranges.

    Args:
        original: the program before.
        proven: what the evidence is of.
        written: what leaves.
        flat: the user's inputs.
        so_far: the evidence.

    Raises:
        InputError: the original's own guards refuse the user's inputs.
    """
    with quiet():
        trial = _Trial(original, proven, written)
        for objection in narrower(original, Program(trial.loaded)):
            trial.objections.append(f"the written program is another to call: {objection}")
        for case in (Case("as given", tuple(flat), given=True), *sizes_of_ranges(original, flat)):
            trial.call(case)
    notes, objections = (*so_far.notes, *trial.notes), (*so_far.objections, *trial.objections)
    return replace(so_far, notes=notes, objections=objections, called=tuple(trial.called))


@dataclass
class _Trial:
    original: Program
    proven: Program
    written: Program
    called: list[str] = field(default_factory=list)
    objections: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def loaded(self) -> ExportedProgram:
        """The written program after a way through a file; as it is where torch can write neither it nor the original."""
        try:
            return loaded_back(self.written)
        except Exception as error:  # torch's writer and reader raise anything
            if _can_be_saved(self.original):
                self.objections.append(f"the written program cannot be saved and loaded back: {first_line(error)}")
            else:
                self.notes.append(f"torch cannot save this model, so it was called as it is in memory: {first_line(error)}")
            return self.written.exported

    @cached_property
    def _baked(self) -> Program:
        return self.proven.baked()

    @cached_property
    def _call(self) -> ModelCall:
        return call_of_program(self.loaded.module(), Program(self.loaded))

    @cached_property
    def _call_of_original(self) -> ModelCall:
        return call_of_program(own_state(self.original.baked()).exported.module(), self.original)

    def call(self, case: Case) -> None:
        """Call it on a case, and judge what it gives."""
        got = self._answer(lambda: self._call, case)
        if got.outputs is None:
            self._judge_refusal(case, got)
            return
        expected = answer(partial(run, self._baked, case.flat))
        if expected.outputs is None:
            self.notes.append(f"not compared on '{case.name}', where the written program runs: {expected.refusal}")
        elif identical(got.outputs, expected.outputs):
            self.called.append(case.name)
        elif is_random(self.proven, case.flat):
            self.notes.append(f"the written program draws its random numbers in another order: not compared on '{case.name}'")
        else:
            self._judge_outputs(case, got.outputs)

    def _answer(self, call: Callable[[], ModelCall], case: Case) -> Answer:
        args, kwargs = pytree.tree_unflatten(list(case.flat), self.original.exported.call_spec.in_spec)
        return answer(lambda: call()(args, kwargs))

    def _judge_refusal(self, case: Case, got: Answer) -> None:
        theirs = self._answer(lambda: self._call_of_original, case)
        if theirs.outputs is not None:
            self.objections.append(f"the written program refuses '{case.name}', which the original takes: {got.refusal}")
        elif case.given and theirs.refusal.startswith("Guard failed"):
            raise InputError(f"the original refuses these inputs when it is called: {theirs.refusal}", hint=GIVE_FITTING)
        else:
            self.notes.append(f"not called on '{case.name}', which the original does not take either: {theirs.refusal}")

    def _judge_outputs(self, case: Case, outputs: Sequence[Tensor]) -> None:
        """Other bits than the proven ones: the layout of a tensor may choose another kernel, which rounds otherwise."""
        truth, usual = run(self.original, case.flat, wide=True), run(self.original, case.flat)
        more = partial(samples_of_rounding, self.original, case.flat)
        row = rounded(case.name, truth, usual, outputs, more=more, jumps=jumping(self.original))
        if row.verdict is not Verdict.DISPROVEN:
            self.called.append(case.name)
            return
        how = f"off by {row.after:.1e}, the original by {row.before:.1e}" if math.isfinite(row.after) else "of another form"
        self.objections.append(f"the written program gives other outputs on '{case.name}' than were proven: {how}")


def _can_be_saved(program: Program) -> bool:
    try:
        loaded_back(program.baked())
    except Exception:
        return False
    return True


def loaded_back(program: Program) -> ExportedProgram:
    """What `torch.export.load` makes of a program that was saved, with its own large tensors and copies of what it updates.

    Args:
        program: its formulas evaluated.
    """
    exported, file = program.exported, io.BytesIO()
    light = [dict(_lightened(home)) for home in (exported.state_dict, exported.constants)]
    with quiet():
        torch.export.save(program.rebuilt(exported.graph_module, program.graph, *light), file)
        file.seek(0)
        loaded = torch.export.load(file)
    for home, lighter in ((loaded.state_dict, light[0]), (loaded.constants, light[1])):
        for name in home.keys() & lighter.keys():
            if isinstance(home[name], Tensor) and lighter[name] is not program.tensor(name):
                home[name] = program.tensor(name)
    return own_state(Program(loaded)).exported


def _lightened(tensors: Any) -> Iterator[tuple[str, Any]]:
    """Every tensor, or one of its form that takes no memory."""
    for name, value in tensors.items():
        plain = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_quantized
        if not plain or value.numel() <= SMALL:
            yield name, value
            continue
        empty = value.detach().new_zeros(()).expand(value.shape)
        yield name, nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
