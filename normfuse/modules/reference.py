"""What a model was before it is changed, and the proof that what became of it is the same function."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from normfuse.graph.program import Program, Trains
from normfuse.modules.parametrize import own_classes
from normfuse.modules.placement import Adaptation
from normfuse.planning.planner import Plan
from normfuse.proof.calling import call_of_module
from normfuse.proof.cases import cases_for
from normfuse.proof.equivalence import compare
from normfuse.proof.evidence import COMPARED, Evidence, checked
from normfuse.proof.measuring import Progress
from normfuse.proof.proving import prove
from normfuse.proof.sides import called_side, on_cases, program_side
from normfuse.sources.inputs import Inputs


@dataclass(frozen=True)
class Reference:
    """A model as it was.

    Attributes:
        program: its trace, with handles of its own, as the model's tensors are given other memory.
        given: what it is called with.
        level: as for `normfuse.rewrite`.
        progress: called with (what, done, total).
        trains: as for `Program.trace`.
    """

    program: Program
    given: Inputs
    level: str
    progress: Progress | None = None
    trains: Trains | None = None

    def prove(self, model: nn.Module, plan: Plan) -> None:
        """Trace the rewritten model and prove it, then call it and compare.

        What the plan made of the program is proven of the modules only by their own trace: a change may have been put in a
        wrong place, and the model's own weights, with which it is called, can hide it.

        Raises:
            VerificationFailed: it is another function.
        """
        if self.level == "none":
            return
        again = Program.trace(model, self.given.args, self.given.kwargs, self.given.dynamic_shapes, trains=self.trains)
        cases = list(cases_for(self.program, self.given))
        evidence = prove(self.program, again, plan, cases, level=self.level, progress=self.progress)
        if evidence.ok and self.level in COMPARED:
            evidence = self._compared(model, type(model).__name__, self.progress)
        checked(evidence)

    def prove_saved(self, model: nn.Module, changes: Adaptation) -> None:
        """Where what is saved of the model is loaded by its own classes: call these on its new tensors, and compare.

        Raises:
            VerificationFailed: they are another function.
        """
        other_names = changes.leaving or changes.biases.keys() - changes.lent.keys()
        if self.level in COMPARED and not other_names:
            checked(self._compared_as_saved(model))

    def is_what_is_saved(self, model: nn.Module) -> bool:
        """Whether the model's own classes compute the same of its tensors."""
        try:
            return self._compared_as_saved(model).ok
        except Exception:  # a class that misses a tensor fails in any way
            return False

    def _compared_as_saved(self, model: nn.Module) -> Evidence:
        with own_classes(model):
            return self._compared(model, f"{type(model).__name__} as its class computes it")

    def _compared(self, model: nn.Module, name: str, progress: Progress | None = None) -> Evidence:
        call = call_of_module(model, self.program, trains=self.trains, as_traced=False)
        called = called_side(name, on_cases(call, self.program))
        return compare(program_side("traced", self.program), called, cases_for(self.program, self.given), progress=progress)
