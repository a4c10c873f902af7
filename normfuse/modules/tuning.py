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

from normfuse.analysis.facts import Facts
from normfuse.errors import CannotApply, NormfuseError, NormfuseWarning, Reason, TraceError
from normfuse.graph.edits import NewTensor, Reroute, SetTensor
from normfuse.graph.expressions import Formula, reads
from normfuse.graph.findings import Claim, Finding, Refusal, Rewrite
from normfuse.graph.program import Program, Trains, at_inference
from normfuse.modules.graph_diff import Unplaced
from normfuse.modules.parametrize import bake, install, own_classes, put_back, settle, undo
from normfuse.modules.placement import Adaptation, Change, adapt, both, input_of, stored_names
from normfuse.modules.record import GIVEN_UP, RECORD, Recipe, Rewritten, home_of, own, rewritten
from normfuse.planning.planner import Plan, plan
from normfuse.planning.registry import Pass, find
from normfuse.proof.cases import Case, cases_for
from normfuse.proof.equivalence import compare, live_side, program_side
from normfuse.proof.evidence import Evidence, checked
from normfuse.proof.fidelity import traced
from normfuse.proof.proving import Progress, prove
from normfuse.sources.inputs import Inputs

HINT = "rewrite the traced program instead: normfuse.rewrite(model, ...)"


# -- planning for modules ----------------------------------------------------------------------------------------------


def plan_for_modules(program: Program, passes: Sequence[str], allow: Claim, model: nn.Module) -> tuple[Plan, Adaptation]:
    """A plan of which every rewrite can be made on the model's modules; the others are refused (NF104)."""
    excluded: dict[tuple[str, str], str] = {}
    while True:
        chosen = plan(program, [_without(find(name), excluded) for name in passes], allow=allow, in_place=True)
        adaptation = adapt(program, chosen.apply(program), model)
        blamed: dict[tuple[str, str], str] = {}
        for each in adaptation.unplaced:
            for wanted in _blamed(chosen, each):
                blamed.setdefault(wanted, each.reason)
        if not adaptation.unplaced:
            return chosen, adaptation
        if not blamed.keys() - excluded.keys():
            raise CannotApply([f"{program.site(each.node)}: {each.reason}" for each in adaptation.unplaced], hint=HINT)
        excluded |= blamed


def _without(each: Pass, excluded: Mapping[tuple[str, str], str]) -> Pass:
    """A pass that refuses its rewrites of some norms."""
    mine = {node: reason for (name, node), reason in excluded.items() if name == each.name}

    def propose(program: Program, facts: Facts) -> Iterator[Finding]:
        for finding in each.propose(program, facts):
            reason = next((mine[site.node] for site in getattr(finding, "sites", ()) if site.node in mine), None)
            if reason is None:
                yield finding
            elif isinstance(finding, Rewrite):
                why = f"{reason} ({finding.because})"
                yield from (Refusal(each.name, site, "NF104", why, hint=HINT) for site in finding.sites)

    return replace(each, propose=propose)


def _blamed(chosen: Plan, unplaced: Unplaced) -> Iterator[tuple[str, str]]:
    """(Pass, norm) of the rewrites that want what has no place."""
    name = unplaced.node.name
    rewrites = [each for each in chosen.rewrites if (each.pass_name, str(each.sites[0])) == unplaced.origin]
    rewrites = rewrites or [r for r in chosen.rewrites if any(isinstance(e, Reroute) and e.node == name for e in r.edits)]
    rewrites = rewrites or [r for r in chosen.rewrites if name in r.region]
    for each in rewrites:
        yield from ((each.pass_name, site.node) for site in each.sites)


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
    for name in adaptation.settled:
        together({place_of(model, name)[0], "the rest"})
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
    records = _Records(program, model, guarded)
    formulas = {**adaptation.formulas, **{name: adaptation.neutral[name] for name in adaptation.settled}}
    for name, formula in formulas.items():
        for module, attribute in records.places(name):
            like = adaptation.biases.get(name, name).rpartition(".")[2] if name in adaptation.biases else attribute
            records.of(module).tensors[attribute] = records.recipe(module, formula, like)
    for name in adaptation.neutral.keys() - adaptation.settled:
        for module, attribute in records.places(name):
            records.of(module).neutral[attribute] = records.recipe(module, adaptation.neutral[name], attribute)
    for name, home in adaptation.lent.items():
        (module, attribute), (layer, bias) = place_of(model, home), place_of(model, name)
        records.of(module).neutral[attribute] = records.recipe(module, adaptation.formulas[name], attribute)
        records.of(layer).lent[bias] = module, attribute
    for path, change in adaptation.changes.items():
        records.change(model.get_submodule(path), change)
    for name in adaptation.leaving:
        for module, attribute in records.places(name):
            records.of(module).spare.append((module, home_of(module, attribute), attribute))
    records.install()


class _Records:
    """The records that modules get, or that grow where modules were deployed before."""

    def __init__(self, program: Program, model: nn.Module, guarded: Mapping[nn.Module, list[nn.Module]]) -> None:
        self.program, self.model, self.guarded = program, model, guarded
        self.made: dict[nn.Module, Rewritten] = {}

    def of(self, module: nn.Module) -> Rewritten:
        if module not in self.made:
            before = module.__dict__.get(RECORD)
            fresh = Rewritten() if before is None else replace(before, home=dict(before.home))
            self.made[module] = replace(
                fresh, tensors={}, neutral={}, lent={}, spare=[], guards=list(self.guarded.get(module, ())), _formings={}
            )
        return self.made[module]

    def places(self, name: str) -> Iterator[tuple[nn.Module, str]]:
        """Where a tensor is held, under each of its names."""
        return (place_of(self.model, each) for each in names_of(self.program, name))

    def recipe(self, module: nn.Module, formula: Formula, like: str) -> Recipe:
        """How a module forms a tensor; it learns where what the formula reads is held."""
        names = tuple(dict.fromkeys(reads(formula)))
        self._find(module, names)
        return Recipe(formula, names, like)

    def change(self, module: nn.Module, change: Change) -> None:
        record = self.of(module)
        made = both(record.change, change)
        if made is None:
            raise CannotApply([f"{type(module).__name__} was changed before in a way that this one cannot follow"], hint=HINT)
        record.change = made
        self._find(module, stored_names(change.by))

    def _find(self, module: nn.Module, names: Iterable[str]) -> None:
        places = {name: place_of(self.model, name) for name in names}
        self.of(module).home |= {
            name: (None if held is module else held, own_name) for name, (held, own_name) in places.items()
        }

    def install(self) -> None:
        patched = [type(module).__name__ for module in self.made if "forward" in module.__dict__]
        if patched:
            raise CannotApply([f"{each} has a forward of its own on the instance" for each in patched], hint=HINT)
        for module, record in self.made.items():
            install(module, record)


# -- tune, deploy, restore ---------------------------------------------------------------------------------------------


def tuned(
    model: nn.Module, passes: Sequence[str], given: Inputs, *, allow: Claim, level: str, progress: Progress | None
) -> None:
    """Rewrite a model in place, in live mode, and prove it; see `normfuse.tune`."""
    require_plain(model, "tune")
    with put_back(model):
        restored(model)
        program = traced(model, given, trains=_nowhere, check=level == "full")
        chosen, adaptation = plan_for_modules(program, passes, allow, model)
        _require_rewrites(chosen)
        guarded = guards(program, chosen, adaptation, model)
        training = _as_it_trains(model, given, {guard for each in guarded.values() for guard in each})
        chosen, adaptation = plan_for_modules(training, passes, allow, model)
        _require_rewrites(chosen)
        attach(training, adaptation, model, guards(training, chosen, adaptation, model))
        _prove(program, chosen, model, given, level, progress, _nowhere)
        original = program.with_own_handles()
        with put_back(model, always=True):
            bake(model)
            _prove_stock(original, adaptation, model, given, level, _nowhere)
    _tell(chosen)


def deployed(
    model: nn.Module, passes: Sequence[str], given: Inputs, *, allow: Claim, level: str, keep: bool, progress: Progress | None
) -> None:
    """Rewrite a model in place, its weights evaluated, and prove it; see `normfuse.deploy`."""
    require_plain(model, "deploy")
    with put_back(model):
        before = is_deployed(model)
        bake(model)
        program = traced(model, given, check=level == "full")
        chosen, adaptation = plan_for_modules(program, passes, allow, model)
        if not chosen.rounds and before:
            return  # another deploy has left nothing to do
        _require_rewrites(chosen)
        _make(program, chosen, adaptation, model, given, level, progress)
    settle(model, keep=keep)
    _tell(chosen)


def applied(model: nn.Module, chosen: Plan, given: Inputs, *, keep: bool) -> None:
    """Make a plan on the model that it was made for; see `Result.apply_to`."""
    require_plain(model, "apply_to")
    with put_back(model):
        restored(model)
        program = Program.trace(model, given.args, given.kwargs, given.dynamic_shapes)
        adaptation = adapt(program, chosen.apply(program), model)
        if adaptation.unplaced:
            hint = (
                f"normfuse.deploy(model, {list(chosen.passes)}) plans for modules; or save the result itself: result.save(path)"
            )
            raise CannotApply([f"{program.site(each.node)}: {each.reason}" for each in adaptation.unplaced], hint=hint)
        _make(program, chosen, adaptation, model, given, "full", None)
    settle(model, keep=keep)


def _make(
    program: Program, chosen: Plan, adaptation: Adaptation, model: nn.Module, given: Inputs, level: str, progress: Any
) -> None:
    """Make a plan on modules, evaluate it, and prove it."""
    original = program.with_own_handles()
    stood = _stands(original, model, given) if is_deployed(model) else True
    attach(program, adaptation, model, {})
    _prove(program, chosen, model, given, level, progress)
    bake(model)
    if stood:
        _prove_stock(original, adaptation, model, given, level)


def require_plain(model: nn.Module, doing: str) -> None:
    """Raise where a model is wrapped in what calls another one.

    Raises:
        CannotApply: with what to give instead.
    """
    name = type(model).__name__
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise CannotApply([f"the model is wrapped in {name}"], hint=f"normfuse.{doing} takes what is inside: model.module")
    if hasattr(model, "_orig_mod"):
        hint = f"normfuse.{doing} takes what is inside, model._orig_mod; compile it again afterwards"
        raise CannotApply([f"the model is compiled ({name})"], hint=hint)
    if isinstance(model, torch.jit.ScriptModule):
        raise CannotApply(["the model is a TorchScript program, which has no modules to change"], hint="give the nn.Module")


def is_deployed(model: nn.Module) -> bool:
    """Whether a model was tuned or deployed before."""
    return any(RECORD in each.__dict__ or GIVEN_UP in each.__dict__ for each in model.modules())


def is_live(model: nn.Module) -> bool:
    """Whether a module of the model reads formulas."""
    return any(record.tensors for _, record in rewritten(model))


def baked(model: nn.Module, *, keep: bool) -> None:
    """A tuned model with its formulas evaluated."""
    with put_back(model):
        bake(model)
    settle(model, keep=keep)


def restored(model: nn.Module) -> None:
    """The model as it was; see `normfuse.restore`."""
    if not undo(model):
        raise NormfuseError(
            "this model was deployed without keeping its own weights, so they cannot be put back",
            hint="deploy(model, ..., keep=True) keeps them, at the price of their memory",
        )


def _require_rewrites(chosen: Plan) -> None:
    if not chosen.rounds:
        reasons = [Reason(f"{each.site}: {each.code}: {each.reason}", _hint(each)) for each in chosen.refusals]
        names = ", ".join(chosen.passes)
        nothing = Reason(f"{names} found nothing to do", "normfuse.inspect(model) shows every norm and what each pass would do")
        raise CannotApply(reasons or [nothing])


def _hint(refusal: Refusal) -> str:
    """What to do about a refusal; where it does not say, what explains it."""
    if "dropout" in refusal.reason:
        return "set the dropout's p to 0; or call deploy, for which the model is as in evaluation mode"
    return refusal.hint or f"`normfuse explain {refusal.code}` tells what it needs"


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
    """Trace the rewritten model again and prove it, then run it and compare."""
    if level == "none":
        return
    again = Program.trace(model, given.args, given.kwargs, given.dynamic_shapes, trains=trains)
    tried = list(cases_for(program, given))
    evidence = prove(program, again, chosen, tried, level=level, progress=progress)
    if evidence.ok and level == "full":
        called = live_side(type(model).__name__, _runner(program, model, trains))
        evidence = compare(program_side("traced", program, state=False), called, tried, progress=progress)
    checked(evidence)


def _prove_stock(
    program: Program, adaptation: Adaptation, model: nn.Module, given: Inputs, level: str, trains: Trains | None = None
) -> None:
    """Run the model's own classes on its new tensors, where they would load them, and compare."""
    keys_differ = adaptation.leaving or adaptation.biases.keys() - adaptation.lent.keys()
    if level == "full" and not keys_differ:
        checked(_compared_with_stock(program, model, given, trains))


def _stands(program: Program, model: nn.Module, given: Inputs) -> bool:
    """Whether the model's own classes compute the same of its tensors."""
    try:
        return _compared_with_stock(program, model, given).ok
    except Exception:  # a class that misses a tensor fails in any way
        return False


def _compared_with_stock(program: Program, model: nn.Module, given: Inputs, trains: Trains | None = None) -> Evidence:
    called = live_side(f"{type(model).__name__} as its class computes it", _runner(program, model, trains))
    with own_classes(model):
        return compare(program_side("traced", program, state=False), called, list(cases_for(program, given)))


def _runner(program: Program, model: nn.Module, trains: Trains | None) -> Any:
    """The live model on a case's inputs, its outputs in the order of the program's."""

    def run(case: Case) -> list[Tensor]:
        args, kwargs = pytree.tree_unflatten(list(case.flat), program.exported.call_spec.in_spec)
        with at_inference(model, trains), torch.no_grad():
            flat, _ = pytree.tree_flatten(model(*args, **kwargs))
        return [each for each in flat if isinstance(each, Tensor)]

    return run
