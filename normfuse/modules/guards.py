"""Modules whose statistics a formula reads: while one of them trains, what was folded into others is turned off."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from normfuse.graph.expressions import Formula, reads
from normfuse.graph.program import Program
from normfuse.graph.sharded import copied, whole
from normfuse.modules.make_live import names_of, place_of
from normfuse.modules.module_plan import ModulePlan
from normfuse.modules.placement import input_of
from normfuse.proof.undisturbed import seeded

_NO_STATISTICS = "no statistics"
"""In a group: what reads no statistics, and stays on whatever trains."""


def guards_of(made: ModulePlan, model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """Changed module → the modules whose training mode turns its change off.

    Those hold a buffer that a formula reads, and do something else when they train: a BatchNorm, not a frozen one.
    """
    statistics = _statistics(made, model)
    with whole(model):
        training = {module for module in statistics if _trains(made.program, module, model)}
    changed = [model.get_submodule(path) for path in made.changes.changes]
    found: dict[nn.Module, list[nn.Module]] = {}
    for group in _groups(made, model, statistics):
        held = group & training
        around = [module for module in changed if held & set(module.modules())]
        found |= {module: list(dict.fromkeys([*around, *held])) for module in group if isinstance(module, nn.Module)}
    return found


def _groups(made: ModulePlan, model: nn.Module, statistics: set[nn.Module]) -> list[set[Any]]:
    """What stands or falls together: rewrites that share a tensor or a module."""
    groups: list[set[Any]] = []

    def together(members: set[Any]) -> None:
        touched = [group for group in groups if group & members]
        groups[:] = [group for group in groups if group not in touched] + [members.union(*touched)]

    for each in made.plan.rewrites:
        held: set[Any] = set().union(*(_holders(edit.formula, model) for edit in each.formed))
        owners: set[Any] = {place_of(model, name)[0] for edit in each.formed for name in names_of(made.program, edit.name)}
        together(owners | (held or {_NO_STATISTICS}))
    for name in made.changes.neutralized:
        together({place_of(model, name)[0], _NO_STATISTICS})
    for path in made.changes.changes:
        module = model.get_submodule(path)
        inside: set[Any] = statistics & set(module.modules())
        together({module} | (inside or {_NO_STATISTICS}))
    return groups


def _statistics(made: ModulePlan, model: nn.Module) -> set[nn.Module]:
    return set().union(*(_holders(formula, model) for formula in made.changes.formulas.values()))


def _holders(formula: Formula, model: nn.Module) -> set[nn.Module]:
    """The modules that hold the buffers which a formula reads."""
    places = (place_of(model, name) for name in reads(formula))
    return {module for module, name in places if name in module._buffers}


def _trains(program: Program, module: nn.Module, model: nn.Module) -> bool:
    """Whether a module does something else in training mode than in evaluation mode."""
    like = input_of(program, next(path for path, each in model.named_modules() if each is module))
    if like is None:
        return True
    twin = copied(module)
    before = {name: value.clone() for name, value in twin.named_buffers()}
    try:
        with seeded(0), torch.no_grad():
            x = torch.randn([int(size) for size in like.shape], dtype=like.dtype, device=like.device)
            same = torch.equal(twin.eval()(x), twin.train()(x))
    except Exception:  # it does not train on such an input, so it does something else
        return True
    return not same or any(not torch.equal(value, before[name]) for name, value in twin.named_buffers())
