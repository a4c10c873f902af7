"""From a model and a plan to a rewritten model, in place and proven: `tune`, `deploy`, `restore` and `Result.apply_to`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normfuse.edits import NewTensor, Reroute, SetTensor
from normfuse.errors import CannotApply, NormfuseError, NormfuseWarning, TraceError
from normfuse.facts import Facts
from normfuse.findings import Claim, Finding, Refusal, Rewrite
from normfuse.formula import Formula, reads
from normfuse.inputs import Inputs
from normfuse.live.comparison import Unplaced
from normfuse.live.eager import VALUE, Adaptation, Change, adapt, input_of, stored_names
from normfuse.live.instances import bake, forget, install, undo
from normfuse.live.records import Recipe, Rewritten, home_of, own, rewritten
from normfuse.planner import Plan, plan
from normfuse.program import Program, Trains, at_inference
from normfuse.proof.cases import Case, cases_for
from normfuse.proof.equivalence import compare, live_side, program_side
from normfuse.proof.evidence import checked
from normfuse.proof.fidelity import traced
from normfuse.proof.proving import Progress, prove
from normfuse.registry import Pass, find

HINT = "rewrite the traced program instead: normfuse.rewrite(model, ...)"


# -- planning for modules ----------------------------------------------------------------------------------------------


def plan_for_modules(program: Program, passes: Sequence[str], allow: Claim, model: nn.Module) -> tuple[Plan, Adaptation]:
    """A plan of which every rewrite can be made on the model's modules; the others are refused (NF104)."""
    excluded: dict[str, str] = {}
    while True:
        chosen = plan(program, [_without(find(name), excluded) for name in passes], allow=allow)
        adaptation = adapt(program, chosen.apply(program), model)
        blamed = {site.node: each.reason for each in adaptation.unplaced for site in _blamed(chosen, each)}
        if not adaptation.unplaced:
            return chosen, adaptation
        if not blamed.keys() - excluded.keys():
            raise CannotApply([f"{program.site(each.node)}: {each.reason}" for each in adaptation.unplaced], hint=HINT)
        excluded |= blamed


def _without(each: Pass, excluded: Mapping[str, str]) -> Pass:
    """A pass that refuses the rewrites of some norms."""

    def propose(program: Program, facts: Facts) -> Iterator[Finding]:
        for finding in each.propose(program, facts):
            reason = next((excluded[site.node] for site in getattr(finding, "sites", ()) if site.node in excluded), None)
            if reason is None:
                yield finding
            elif isinstance(finding, Rewrite):
                why = f"{reason} ({finding.because})"
                yield from (Refusal(each.name, site, "NF104", why, hint=HINT) for site in finding.sites)

    return replace(each, propose=propose)


def _blamed(chosen: Plan, unplaced: Unplaced) -> Iterator[Any]:
    """The norms of the rewrites that want what has no place."""
    name = unplaced.node.name
    rewrites = [each for each in chosen.rewrites if (each.pass_name, str(each.sites[0])) == unplaced.origin]
    rewrites = rewrites or [r for r in chosen.rewrites if any(isinstance(e, Reroute) and e.node == name for e in r.edits)]
    rewrites = rewrites or [r for r in chosen.rewrites if name in r.region]
    for each in rewrites:
        yield from each.sites


# -- which modules must not be training --------------------------------------------------------------------------------


def guards(program: Program, chosen: Plan, adaptation: Adaptation, model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """Changed module → the modules whose training mode turns its change off.

    Those hold a buffer that a formula reads, and do something else when they train: a BatchNorm, not a frozen one. Rewrites
    that share a tensor or a module stand or fall together.
    """
    groups: list[set[Any]] = []

    def together(members: set[Any]) -> None:
        touched = [group for group in groups if group & members]
        groups[:] = [group for group in groups if group not in touched] + [members.union(*touched)]

    statistics = set().union(*(_holders(formula, model) for formula in adaptation.formulas.values()))
    for each in chosen.rewrites:
        made = [edit for edit in each.edits if isinstance(edit, (SetTensor, NewTensor))]
        held: set[Any] = set().union(*(_holders(edit.formula, model) for edit in made))
        owners: set[Any] = {place_of(model, twin)[0] for edit in made for twin in names_of(program, edit.name)}
        together(owners | (held or {"the rest"}))
    for path in adaptation.changes:
        module = model.get_submodule(path)
        inside: set[Any] = statistics & set(module.modules())
        together({module} | (inside or {"the rest"}))
    training = {module for module in statistics if _trains(program, module, model)}
    changed = [model.get_submodule(path) for path in adaptation.changes]
    found: dict[nn.Module, list[nn.Module]] = {}
    for group in groups:
        held = group & training
        around = [module for module in changed if held & set(module.modules())]
        found |= {module: list(dict.fromkeys([*around, *held])) for module in group if isinstance(module, nn.Module)}
    return found


def _holders(formula: Formula, model: nn.Module) -> set[nn.Module]:
    """The modules that hold the buffers which a formula reads."""
    places = (place_of(model, name) for name in reads(formula))
    return {module for module, name in places if name in module._buffers}


def _trains(program: Program, module: nn.Module, model: nn.Module) -> bool:
    """Whether a module does something else in training mode than in evaluation mode."""
    like = input_of(program, next(path for path, each in model.named_modules() if each is module))
    if like is None:
        return True
    twin = copy.deepcopy(module)
    x = torch.randn([int(size) for size in like.shape], dtype=like.dtype, device=like.device)
    before = {name: value.clone() for name, value in twin.named_buffers()}
    try:
        with torch.no_grad():
            same = torch.equal(twin.eval()(x), twin.train()(x))
    except Exception:  # it does not train on such an input, so it does something else
        return True
    return not same or any(not torch.equal(value, before[name]) for name, value in twin.named_buffers())


# -- putting it on the modules -----------------------------------------------------------------------------------------


def names_of(program: Program, name: str) -> list[str]:
    """All names of a stored tensor; a new one has its own alone."""
    return [name, *(program.twins(name) if name in set(program.tensor_names()) else ())]


def place_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a stored tensor, and its attribute there.

    Raises:
        CannotApply: no module does: the tensor is a constant of the trace, or the model is not the one that was traced.
    """
    folder, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(folder)
        own(module, attribute)
    except AttributeError as error:
        raise CannotApply([f"no module of this model holds '{name}'"]) from error
    return module, attribute


def attach(program: Program, adaptation: Adaptation, model: nn.Module, guarded: Mapping[nn.Module, list[nn.Module]]) -> None:
    """Make the changes, in live mode; nothing is changed unless everything can be."""
    records: dict[nn.Module, Rewritten] = {}

    def record_of(module: nn.Module) -> Rewritten:
        return records.setdefault(module, Rewritten(guards=list(guarded.get(module, ()))))

    def homes(names: Iterable[str], module: nn.Module) -> dict[str, tuple[nn.Module | None, str]]:
        places = {name: place_of(model, name) for name in names}
        return {name: (None if holder is module else holder, own_name) for name, (holder, own_name) in places.items()}

    for name, formula in adaptation.formulas.items():
        for each in names_of(program, name):
            module, attribute = place_of(model, each)
            like = adaptation.biases.get(name, each).rpartition(".")[2]
            recipe = Recipe(formula, tuple(dict.fromkeys(reads(formula))), like)
            record_of(module).tensors[attribute] = recipe
            record_of(module).home |= homes(recipe.names, module)
    for path, change in adaptation.changes.items():
        module = model.get_submodule(path)
        record_of(module).change = change
        record_of(module).home |= homes(stored_names(change.by), module)
        if change == Change("instead", VALUE):
            record_of(module).spare = list(_spare(adaptation, path, module))
    patched = [type(module).__name__ for module in records if "forward" in module.__dict__]
    if patched:
        raise CannotApply([f"{each} has a forward of its own on the instance" for each in patched])
    for module, record in records.items():
        install(module, record)


def _spare(adaptation: Adaptation, path: str, module: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """The tensors of a module that nobody reads once it has given way to its input."""
    for inner, holder in module.named_modules(prefix=path):
        for name in (*holder._parameters, *holder._buffers):
            if own(holder, name) is not None and f"{inner}.{name}".removeprefix(".") not in adaptation.read:
                yield holder, home_of(holder, name), name


# -- tune, deploy, restore ---------------------------------------------------------------------------------------------


def tuned(
    model: nn.Module, passes: Sequence[str], given: Inputs, *, allow: Claim, level: str, progress: Progress | None
) -> None:
    """Rewrite a model in place, in live mode, and prove it; see `normfuse.tune`."""
    restored(model)
    program = traced(model, given, trains=_nowhere, check=level == "full")
    chosen, adaptation = plan_for_modules(program, passes, allow, model)
    _require_rewrites(chosen)
    guarded = guards(program, chosen, adaptation, model)
    training = _as_it_trains(model, given, {guard for each in guarded.values() for guard in each})
    chosen, adaptation = plan_for_modules(training, passes, allow, model)
    _require_rewrites(chosen)
    guarded = guards(training, chosen, adaptation, model)
    attach(training, adaptation, model, guarded)
    _prove(program, chosen, model, given, level, progress, _nowhere)
    _tell(chosen)


def deployed(
    model: nn.Module, passes: Sequence[str], given: Inputs, *, allow: Claim, level: str, keep: bool, progress: Progress | None
) -> None:
    """Rewrite a model in place, its weights evaluated, and prove it; see `normfuse.deploy`."""
    restored(model)
    program = traced(model, given, check=level == "full")
    chosen, adaptation = plan_for_modules(program, passes, allow, model)
    _require_rewrites(chosen)
    attach(program, adaptation, model, {})
    _prove(program, chosen, model, given, level, progress)
    baked(model, keep=keep)
    _tell(chosen)


def applied(model: nn.Module, chosen: Plan, given: Inputs, *, keep: bool) -> None:
    """Make a plan on the model that it was made for; see `Result.apply_to`."""
    restored(model)
    program = Program.trace(model, given.args, given.kwargs, given.dynamic_shapes)
    adaptation = adapt(program, chosen.apply(program), model)
    if adaptation.unplaced:
        raise CannotApply([f"{program.site(each.node)}: {each.reason}" for each in adaptation.unplaced], hint=HINT)
    attach(program, adaptation, model, {})
    _prove(program, chosen, model, given, "full", None)
    baked(model, keep=keep)


def is_live(model: nn.Module) -> bool:
    """Whether a module of the model reads formulas."""
    return any(record.tensors for _, record in rewritten(model))


def baked(model: nn.Module, *, keep: bool) -> None:
    """A tuned model with its formulas evaluated."""
    bake(model)
    if not keep:
        forget(model)


def restored(model: nn.Module) -> None:
    """The model as it was; see `normfuse.restore`."""
    if not undo(model):
        raise NormfuseError(
            "this model was deployed without keeping its own weights, so they cannot be put back",
            hint="deploy(model, ..., keep=True) keeps them, at the price of their memory",
        )


def _require_rewrites(chosen: Plan) -> None:
    if not chosen.rounds:
        reasons = [f"{each.site}: {each.code}: {each.reason}" for each in chosen.refusals]
        raise CannotApply(reasons or [f"{', '.join(chosen.passes)} found nothing to do"])


def _tell(chosen: Plan) -> None:
    """A warning of what was left out because modules have no place for it; `inspect` tells of all other refusals."""
    left = [each for each in chosen.refusals if each.code == "NF104"]
    if left:
        names = ", ".join(str(each.site) for each in left[:3]) + (", …" if len(left) > 3 else "")
        warnings.warn(f"{len(left)} norms stay as they are ({names}): {left[0].reason}", NormfuseWarning, stacklevel=4)


def _as_it_trains(model: nn.Module, given: Inputs, held: set[nn.Module]) -> Program:
    """The model traced in training mode, but for the modules whose statistics the formulas hold fixed.

    A live rewrite must be right while the model trains: a dropout between a convolution and its BatchNorm, which an ordinary
    trace does not show, forbids it.
    """
    try:
        return Program.trace(model, given.args, given.kwargs, given.dynamic_shapes, trains=lambda module: module not in held)
    except TraceError as error:
        hint = "deploy does not need the training mode; use it, or set what depends on it (such as layerdrop) to zero"
        raise TraceError(f"in training mode, {error}", hint=hint) from error


# -- the proof ---------------------------------------------------------------------------------------------------------


def _nowhere(module: nn.Module) -> bool:
    """No module trains: a live model is proven in evaluation mode, as its guards turn rewrites off where a module trains."""
    return False


def _prove(
    program: Program,
    chosen: Plan,
    model: nn.Module,
    given: Inputs,
    level: str,
    progress: Progress | None,
    trains: Trains | None = None,
) -> None:
    """Trace the rewritten model again and prove it, then run it and compare; put the model back if it is another function."""
    try:
        if level == "none":
            return
        again = Program.trace(model, given.args, given.kwargs, given.dynamic_shapes, trains=trains)
        tried = list(cases_for(program, given))
        evidence = prove(program, again, chosen, tried, level=level, progress=progress)
        if evidence.ok and level == "full":
            called = live_side(type(model).__name__, _runner(program, model, trains))
            evidence = compare(program_side("traced", program, state=False), called, tried, progress=progress)
        checked(evidence)
    except BaseException:
        undo(model)
        raise


def _runner(program: Program, model: nn.Module, trains: Trains | None) -> Any:
    """The live model on a case's inputs, its outputs in the order of the program's."""

    def run(case: Case) -> list[Tensor]:
        args, kwargs = pytree.tree_unflatten(list(case.flat), program.exported.call_spec.in_spec)
        with at_inference(model, trains), torch.no_grad():
            flat, _ = pytree.tree_flatten(model(*args, **kwargs))
        return [each for each in flat if isinstance(each, Tensor)]

    return run
