"""From a model and passes to a model whose modules read formulas of their own parameters, in place and proven: `tune`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from normfuse.analysis.choice import Choice
from normfuse.errors import TraceError
from normfuse.graph.findings import Claim
from normfuse.graph.program import Program
from normfuse.modules.deploy import require_plain, restore_modules
from normfuse.modules.guards import guards_of
from normfuse.modules.make_live import make_live
from normfuse.modules.module_plan import plan_for_modules, require_rewrites, warn_of_what_stays
from normfuse.modules.parametrize import bake, put_back
from normfuse.modules.ranks import of_first, require_one_plan, together
from normfuse.modules.reference import Reference
from normfuse.proof.evidence import COMPARED
from normfuse.proof.fidelity import traced
from normfuse.proof.measuring import Progress
from normfuse.sources.inputs import Inputs


def tune_modules(
    model: nn.Module,
    passes: Sequence[str],
    given: Inputs,
    *,
    allow: Claim,
    choice: Choice,
    level: str,
    progress: Progress | None,
) -> None:
    """Rewrite a model in place, in live mode, and prove it; see `normfuse.tune`.

    It takes three traces, as they are of three functions. The model in evaluation: what the proof compares with, and what tells
    which statistics the rewrites read. The model in training, those statistics held fixed: what may be rewritten, as a dropout
    between a convolution and its BatchNorm forbids it, and no other graph shows what a forward does ``if self.training``. The
    rewritten modules: what they compute is proven, not what the plan says that they should.
    """
    require_plain(model, "tune")
    with put_back(model), together(model):
        given = of_first(model, given)
        restore_modules(model)
        # trace: as it is evaluated
        program = traced(model, given, trains=_nowhere, check=level in COMPARED).with_own_handles()
        # plan: twice, as what must be held fixed while the model trains is known by a plan
        first = plan_for_modules(program, passes, allow, model, choice=choice)
        require_rewrites(first)
        held = {guard for each in guards_of(first, model).values() for guard in each}
        made = plan_for_modules(_traced_in_training(model, given, held), passes, allow, model, choice=choice)
        require_rewrites(made)
        require_one_plan(model, made.plan)
        # make: the modules read formulas, or are what they were while a guard trains
        make_live(made.program, made.changes, model, guards_of(made, model))
        # prove: as it is called from now on, and as its own classes would load what it becomes when it is deployed
        reference = Reference(program, given, level, progress, _nowhere)
        reference.prove(model, made.plan)
        with put_back(model, always=True):
            bake(model)
            reference.prove_saved(model, made.changes)
    warn_of_what_stays(made.plan)


def _nowhere(module: nn.Module) -> bool:
    """No module trains: a live model is proven in evaluation mode, as its guards turn rewrites off where a module trains."""
    return False


def _traced_in_training(model: nn.Module, given: Inputs, held: set[nn.Module]) -> Program:
    """The model traced in training mode, but for the modules whose statistics the formulas hold fixed."""
    try:
        return Program.trace(model, given.args, given.kwargs, given.dynamic_shapes, trains=lambda module: module not in held)
    except TraceError as error:
        hint = "deploy does not need the training mode; use it, or set what depends on it (such as layerdrop) to zero"
        raise TraceError(f"in training mode, {error}", hint=hint) from error
