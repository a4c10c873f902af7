"""Whether a trace is the module that it was made from.

All that is planned and proven is about the trace. torch.export follows one call: what a module decides in Python is decided
once and for all, and constants that it computes outside of torch are what they were. So the module and its trace are called
with the same inputs, with others of the same shapes, and with other sizes of dynamic dims, on the same random numbers. Where
they differ nothing is planned (`docs/decisions/0012-the-trace-is-the-module.md`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.export.graph_signature import ConstantArgument
from torch.utils import _pytree as pytree

from normfuse.errors import InputError, TraceError, first_line
from normfuse.graph.interpreter import flat_inputs, run
from normfuse.graph.program import Program, Trains
from normfuse.proof.calling import called_once
from normfuse.proof.cases import Case, other_sizes, other_values
from normfuse.proof.differences import distances, identical
from normfuse.proof.equivalence import compare
from normfuse.proof.evidence import Verdict
from normfuse.proof.randomness import drawn
from normfuse.proof.sides import called_side, program_side
from normfuse.proof.trial_run import GIVE_FITTING, lacks_kernel, trial_run
from normfuse.proof.undisturbed import undisturbed
from normfuse.sources.inputs import Inputs

RANDOM = "two calls of the model differ: its outputs are random, and were compared on the same random numbers"
UNCOMPARED = "the model draws its random numbers in another order than its trace, so the two could not be compared"
UNTRACED = (
    "what a forward decides in Python (a counter, a random number of Python's or NumPy's, torch.compiler.is_exporting()) is "
    "fixed in a trace; decide in torch, or pass the program that is meant: torch.export.export(model, inputs)"
)

_SEED = 12021
"""Of the first case; no seed that a tracer would set."""


def traced(module: nn.Module, given: Inputs, *, trains: Trains | None = None, check: bool = True) -> Program:
    """The trace of a module, compared with the module itself, which is left as it was.

    Args:
        module: the model.
        given: what it is called with.
        trains: as for `Program.trace`.
        check: run both and compare; False to run nothing.

    Raises:
        TraceError: torch.export could not trace it, or the trace is another function.
        InputError: the module does not run on these inputs.
    """
    with undisturbed(module):
        program = Program.trace(module, given.args, given.kwargs, given.dynamic_shapes, trains=trains)
    if not check or any(program.tensor(name).is_meta for name in program.stored.values()):
        return program
    return _Comparison(program, module, trains).made(flat_inputs(program, given.args, given.kwargs))


@dataclass(frozen=True)
class _Called:
    """What a call gave: tensors, then the state that it updated; and what else it returned, by its place."""

    tensors: list[Tensor]
    others: dict[int, Any]


@dataclass(frozen=True)
class _Comparison:
    program: Program
    module: nn.Module
    trains: Trains | None

    def made(self, flat: Sequence[Any]) -> Program:
        """The program with what is to be told of it.

        Raises:
            TraceError: it is another function than the module.
            InputError: the module does not run on the user's inputs.
        """
        notes: list[str] = []
        cases = [Case("as given", tuple(flat), given=True), *other_values(self.program, flat), *other_sizes(self.program, flat)]
        for seed, case in enumerate(cases, start=_SEED):
            try:
                theirs = self._module(case, seed)
            except Exception as error:  # a forward raises anything
                if not case.given:
                    continue
                if lacks_kernel(error):
                    return self._noted(f"the trace was not compared with the model: {first_line(error)}")
                trial_run(self.program, flat)  # which knows what to write instead
                raise InputError(f"the model does not run on these inputs: {first_line(error)}", hint=GIVE_FITTING) from error
            notes += self._judged(case, seed, theirs)
        return self._noted(*dict.fromkeys(notes))

    def _noted(self, *notes: str) -> Program:
        return replace(self.program, notes=(*self.program.notes, *notes))

    def _judged(self, case: Case, seed: int, theirs: _Called) -> list[str]:
        """What to tell of one case."""
        ours = self._trace(case, seed, theirs)
        if _same(theirs, ours):
            varies = case.given and drawn(self.program.graph) and not _same(theirs, self._module(case, _SEED - 1))
            return [RANDOM] if varies else []
        if drawn(self.program.graph):
            again = self._module(case, _SEED - 1)
            if not _same(theirs, again):  # both are random
                return [UNCOMPARED]
        if self._agrees(case, seed, grad=False):
            return []
        if self._agrees(case, seed, grad=True):  # torch's own fast paths give zeros for padding
            return ["under torch.no_grad() the model takes another path than with gradients; the trace is that with gradients"]
        raise TraceError(self._difference(case, theirs, ours), hint=UNTRACED)

    def _module(self, case: Case, seed: int, *, grad: bool = False) -> _Called:
        """What the module gives."""
        args, kwargs = pytree.tree_unflatten(list(case.flat), self.program.exported.call_spec.in_spec)
        leaves, state = called_once(self.module, self.program, args, kwargs, trains=self.trains, seed=seed, grad=grad)
        tensors = [each for each in leaves if isinstance(each, Tensor)]
        return _Called([*tensors, *state], {p: each for p, each in enumerate(leaves) if not isinstance(each, Tensor)})

    def _trace(self, case: Case, seed: int, theirs: _Called) -> _Called:
        """What the trace gives."""
        specs = [spec for spec in self.program.exported.graph_signature.output_specs if spec.kind.name == "USER_OUTPUT"]
        others = {place: spec.arg.value for place, spec in enumerate(specs) if isinstance(spec.arg, ConstantArgument)}
        sizes = {place: each for place, each in theirs.others.items() if place not in others and isinstance(each, int)}
        try:
            return _Called(run(self.program, case.flat, seed=seed), others | sizes)
        except Exception as error:
            what = f"the trace of {type(self.module).__name__} does not run on '{case.name}', where the model does"
            raise TraceError(f"{what}: {first_line(error)}", hint=UNTRACED) from error

    def _agrees(self, case: Case, seed: int, *, grad: bool) -> bool:
        """Whether rounding explains the difference: kernels of torch may compute in another order than the trace."""
        theirs = self._module(case, seed, grad=grad)
        ours = self._trace(case, seed, theirs)
        if _same(theirs, ours):
            return True
        if theirs.others != ours.others or list(map(_form, theirs.tensors)) != list(map(_form, ours.tensors)):
            return False
        side = called_side(type(self.module).__name__, lambda _: theirs.tensors)
        with contextlib.suppress(Exception):
            return compare(program_side("the trace", self.program), side, [case]).verdict is not Verdict.DISPROVEN
        return False

    def _difference(self, case: Case, theirs: _Called, ours: _Called) -> str:
        name = type(self.module).__name__
        if list(map(_form, theirs.tensors)) != list(map(_form, ours.tensors)):
            return f"the trace of {name} is not the model: on '{case.name}' it gives other shapes or dtypes"
        if theirs.others != ours.others:
            return f"the trace of {name} is not the model: on '{case.name}' it returns {ours.others}, the model {theirs.others}"
        errors = distances(theirs.tensors, ours.tensors)
        worst = max(range(len(errors)), key=errors.__getitem__)
        return (
            f"the trace of {name} is not the model: on '{case.name}' output {worst} differs by {errors[worst]:.1e} (relative)"
        )


def _form(value: Tensor) -> tuple[Any, ...]:
    return value.dtype, tuple(value.shape)


def _same(one: _Called, other: _Called) -> bool:
    """Whether two calls gave the same, bit for bit."""
    return one.others == other.others and identical(one.tensors, other.tensors)
