"""Planning for the live modules: what has no place on them is planned without."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from torch import nn

from normfuse.analysis.choice import EVERYTHING, Choice
from normfuse.analysis.facts import Facts
from normfuse.analysis.obstacles import Why
from normfuse.errors import CannotApply, NormfuseWarning, Reason
from normfuse.graph.edits import Reroute, SetTensor
from normfuse.graph.findings import Claim, Finding, Refusal, Rewrite
from normfuse.graph.nodes import draws
from normfuse.graph.ops.norms import operator_norm
from normfuse.graph.program import Program
from normfuse.modules.graph_diff import Unplaced
from normfuse.modules.placement import Adaptation, adapt
from normfuse.modules.unread_tensors import call_of
from normfuse.planning.planner import Plan, plan_and_apply
from normfuse.planning.registry import Pass, find

HINT = "rewrite the traced program instead: normfuse.rewrite(model, ...)"
FOR_CLASS = "a traced program can hold it: -o OUT.pt2 (in Python, rewrite(..., same_class=False))"
"""What to do about what a model's own class cannot hold."""


@dataclass(frozen=True)
class ModulePlan:
    """A plan that can be made on modules.

    Attributes:
        program: what the plan was made for, a trace of the model.
        plan: the plan.
        changes: what it means for the model's modules.
    """

    program: Program
    plan: Plan
    changes: Adaptation


def plan_for_modules(
    program: Program,
    passes: Sequence[str],
    allow: Claim,
    model: nn.Module,
    *,
    choice: Choice = EVERYTHING,
    same_keys: bool = False,
    stored: AbstractSet[str] | None = None,
    hint: str = HINT,
) -> ModulePlan:
    """A plan of which every rewrite can be made on the model's modules; the others are refused (NF104).

    Args:
        program: the trace of the model.
        passes: names of passes.
        allow: the weakest claim that may run.
        model: the model.
        choice: the norms that may be rewritten.
        same_keys: as for `adapt`.
        stored: as for `adapt`.
        hint: what to do about those that cannot be made.
    """
    excluded: dict[tuple[str, str], str] = {}
    while True:
        mine = [_without(find(name), excluded, hint) for name in passes]
        chosen, after = plan_and_apply(program, mine, allow=allow, in_place=True, choice=choice)
        changes = adapt(program, after, model, same_keys=same_keys, stored=stored)
        blamed: dict[tuple[str, str], str] = {}
        for each in changes.unplaced:
            for wanted in _blamed(chosen, each):
                blamed.setdefault(wanted, str(each.obstacle))
        if not changes.unplaced:
            return ModulePlan(program, chosen, changes)
        if not blamed.keys() - excluded.keys():
            raise _cannot_place(program, changes, hint)
        excluded |= blamed


def placed(
    program: Program,
    plan: Plan,
    model: nn.Module,
    hint: str,
    *,
    same_keys: bool = False,
    stored: AbstractSet[str] | None = None,
) -> Adaptation:
    """The changes of modules that a plan means, which can all be made.

    Args:
        program: the trace of the model, which the plan is for.
        plan: the plan.
        model: the model.
        hint: what to do where it cannot be made.
        same_keys: as for `adapt`.
        stored: as for `adapt`.

    Raises:
        CannotApply: part of it has no place on modules.
    """
    changes = adapt(program, plan.apply(program), model, same_keys=same_keys, stored=stored)
    if changes.unplaced:
        raise _cannot_place(program, changes, hint)
    return changes


def _cannot_place(program: Program, changes: Adaptation, hint: str) -> CannotApply:
    """The error for changes that have no place on modules, which says why."""
    return CannotApply([f"{program.site(each.obstacle.at)}: {each.obstacle}" for each in changes.unplaced], hint=hint)


def _without(each: Pass, excluded: Mapping[tuple[str, str], str], hint: str) -> Pass:
    """A pass that refuses its rewrites of some norms."""
    mine = {node: reason for (name, node), reason in excluded.items() if name == each.name}

    def propose(program: Program, facts: Facts) -> Iterator[Finding]:
        for finding in each.propose(program, facts):
            reason = next((mine[site.node] for site in getattr(finding, "sites", ()) if site.node in mine), None)
            if reason is None:
                yield finding
            elif isinstance(finding, Rewrite):
                why = f"{reason} ({finding.because})"
                yield from (Refusal(each.name, site, "NF104", why, hint=hint) for site in finding.sites)

    return replace(each, propose=propose)


def _blamed(chosen: Plan, unplaced: Unplaced) -> Iterator[tuple[str, str]]:
    """(Pass, norm) of the rewrites that want what has no place."""
    at, name = unplaced.obstacle.at, unplaced.obstacle.at.name
    rewrites = [each for each in chosen.rewrites if (each.pass_name, str(each.sites[0])) == unplaced.origin]
    if unplaced.obstacle.code is Why.OTHER_FORM:
        rewrites = [
            r for r in chosen.rewrites if any(isinstance(e, SetTensor) and e.name in unplaced.obstacle.detail for e in r.edits)
        ]
    rewrites = rewrites or [r for r in chosen.rewrites if any(isinstance(e, Reroute) and e.node == name for e in r.edits)]
    rewrites = rewrites or [r for r in chosen.rewrites if name in r.region]
    rewrites = rewrites or [r for r in chosen.rewrites if any(user.name in r.region for user in at.users)]
    for each in rewrites:
        yield from ((each.pass_name, site.node) for site in each.sites)


def require_rewrites(made: ModulePlan) -> None:
    """Raise where there is nothing to make.

    Raises:
        CannotApply: with the reasons of all refusals.
    """
    chosen = made.plan
    if not chosen.rounds:
        reasons = [Reason(f"{each.site}: {each.code}: {each.reason}", _hint(made.program, each)) for each in chosen.refusals]
        names = ", ".join(chosen.passes)
        nothing = Reason(f"{names} found nothing to do", "normfuse.inspect(model) shows every norm and what each pass would do")
        raise CannotApply(reasons or [nothing])


def _hint(program: Program, refusal: Refusal) -> str:
    """What to do about a refusal; where it does not say, what explains it."""
    if _meets_dropout(program, refusal):
        return "set the dropout's p to 0; or call deploy, for which the model is as in evaluation mode"
    return refusal.hint or f"`normfuse explain {refusal.code}` tells what it needs"


def _meets_dropout(program: Program, refusal: Refusal) -> bool:
    """Whether what is in the way, or what the norm reads, is other numbers each time."""
    at, site = (program.nodes.get(each.node) for each in (refusal.at or refusal.site, refusal.site))
    norm = operator_norm(site) if site is not None else None
    return any(draws(call_of(each)) for each in (at, norm.x if norm else None) if each is not None)


def warn_of_what_stays(chosen: Plan) -> None:
    """Warn of what was left out because modules have no place for it; `inspect` tells of all other refusals."""
    left = [each for each in chosen.refusals if each.code == "NF104"]
    if left:
        names = ", ".join(str(each.site) for each in left[:3]) + (", …" if len(left) > 3 else "")
        warnings.warn(f"{len(left)} norms stay as they are ({names}): {left[0].reason}", NormfuseWarning, stacklevel=4)
