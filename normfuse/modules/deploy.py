"""From a model and a plan to the same model with other weights, in place and proven: `deploy`, `apply_to`, and the way back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from normfuse.analysis.choice import Choice
from normfuse.errors import CannotApply, NormfuseError
from normfuse.graph.findings import Claim
from normfuse.graph.program import Program
from normfuse.modules.make_live import make_live
from normfuse.modules.module_plan import (
    ModulePlan,
    placed,
    plan_for_modules,
    require_rewrites,
    warn_of_what_stays,
)
from normfuse.modules.parametrize import bake, commit, put_back, undo
from normfuse.modules.ranks import of_first, require_one_plan, together
from normfuse.modules.record import rewritten, was_changed
from normfuse.modules.reference import Reference
from normfuse.planning.planner import Plan
from normfuse.proof.evidence import COMPARED
from normfuse.proof.fidelity import traced
from normfuse.proof.measuring import Progress
from normfuse.sources.inputs import Inputs


def deploy_modules(
    model: nn.Module,
    passes: Sequence[str],
    given: Inputs,
    *,
    allow: Claim,
    choice: Choice,
    level: str,
    keep: bool,
    progress: Progress | None,
) -> None:
    """Rewrite a model in place, its weights evaluated, and prove it; see `normfuse.deploy`."""
    require_plain(model, "deploy")
    with put_back(model), together(model):
        given = of_first(model, given)
        before = was_changed(model)
        bake(model)
        program = traced(model, given, check=level in COMPARED).with_own_handles()
        made = plan_for_modules(program, passes, allow, model, choice=choice)
        if not made.plan.rounds and before:
            return  # another deploy has left nothing to do
        require_rewrites(made)
        _make(made, model, Reference(program, given, level, progress))
    commit(model, keep=keep)
    warn_of_what_stays(made.plan)


def apply_plan(model: nn.Module, plan: Plan, given: Inputs, *, keep: bool) -> None:
    """Make a plan on the model that it was made for; see `Result.apply_to`."""
    require_plain(model, "apply_to")
    with put_back(model), together(model):
        given = of_first(model, given)
        restore_modules(model)
        program = Program.trace(model, given.args, given.kwargs, given.dynamic_shapes).with_own_handles()
        hint = f"normfuse.deploy(model, {list(plan.passes)}) plans for modules; or save the result itself: result.save(path)"
        _make(ModulePlan(program, plan, placed(program, plan, model, hint)), model, Reference(program, given, "full"))
    commit(model, keep=keep)


def _make(made: ModulePlan, model: nn.Module, reference: Reference) -> None:
    """Make a plan on modules, prove it, and evaluate it."""
    require_one_plan(model, made.plan)
    saved_is_the_model = not was_changed(model) or reference.is_what_is_saved(model)
    make_live(made.program, made.changes, model, {})
    reference.prove(model, made.plan)
    bake(model)
    if saved_is_the_model:
        reference.prove_saved(model, made.changes)


def evaluate_formulas(model: nn.Module, *, keep: bool) -> None:
    """Put the values of a tuned model's formulas in the place of its tensors.

    Raises:
        NormfuseError: no module of it reads formulas.
    """
    if not any(record.tensors for _, record in rewritten(model)):
        raise NormfuseError("this model is not tuned, so there is nothing to evaluate", hint="name the passes to deploy")
    with put_back(model), together(model):
        bake(model)
    commit(model, keep=keep)


def restore_modules(model: nn.Module) -> None:
    """The model as it was; see `normfuse.restore`.

    Raises:
        NormfuseError: its own tensors were not kept.
    """
    if not undo(model):
        raise NormfuseError(
            "this model was deployed without keeping its own weights, so they cannot be put back",
            hint="deploy(model, ..., keep=True) keeps them, at the price of their memory",
        )


def require_plain(model: nn.Module, doing: str) -> None:
    """Raise where a model is wrapped in what calls another one.

    Raises:
        CannotApply: with what to give instead.
    """
    name = type(model).__name__
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise CannotApply([f"the model is wrapped in {name}"], hint=f"normfuse.{doing} takes what is inside: model.module")
    if any(type(each).__name__ == "FullyShardedDataParallel" for each in model.modules()):
        hint = "use torch.distributed.fsdp.fully_shard, or rewrite it before it is wrapped"
        raise CannotApply(["the model is wrapped in FullyShardedDataParallel, which flattens its parameters"], hint=hint)
    if hasattr(model, "_orig_mod"):
        hint = f"normfuse.{doing} takes what is inside, model._orig_mod; compile it again afterwards"
        raise CannotApply([f"the model is compiled ({name})"], hint=hint)
    if isinstance(model, torch.jit.ScriptModule):
        raise CannotApply(["the model is a TorchScript program, which has no modules to change"], hint="give the nn.Module")
