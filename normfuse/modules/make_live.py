"""Changes are put on modules, all of them or none: they read formulas from then on (live mode)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from torch import nn

from normfuse.errors import CannotApply
from normfuse.graph.expressions import Formula, reads
from normfuse.graph.program import Program
from normfuse.modules.module_plan import HINT
from normfuse.modules.parametrize import install
from normfuse.modules.placement import Adaptation, Change, both, stored_names
from normfuse.modules.record import RECORD, Recipe, Rewritten, home_of, own


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


def make_live(program: Program, changes: Adaptation, model: nn.Module, guards: Mapping[nn.Module, list[nn.Module]]) -> None:
    """Make the changes, in live mode; nothing is changed unless everything can be.

    Args:
        program: the trace of the model that they were planned for.
        changes: what to make.
        model: the model.
        guards: changed module → the modules whose training mode turns its change off.
    """
    records = _Records(program, model, guards)
    formulas = {**changes.formulas, **{name: changes.neutral[name] for name in changes.neutralized}}
    for name, formula in formulas.items():
        for module, attribute in records.places(name):
            like = changes.biases.get(name, name).rpartition(".")[2] if name in changes.biases else attribute
            records.of(module).tensors[attribute] = records.recipe(module, formula, like)
    for name in changes.neutral.keys() - changes.neutralized:
        for module, attribute in records.places(name):
            records.of(module).neutral[attribute] = records.recipe(module, changes.neutral[name], attribute)
    for name, home in changes.lent.items():
        (module, attribute), (layer, bias) = place_of(model, home), place_of(model, name)
        records.of(module).neutral[attribute] = records.recipe(module, changes.formulas[name], attribute)
        records.of(layer).lent[bias] = module, attribute
    for path, change in changes.changes.items():
        records.change(model.get_submodule(path), change)
    for name in changes.leaving:
        for module, attribute in records.places(name):
            records.of(module).spare.append((module, home_of(module, attribute), attribute))
    records.install()


class _Records:
    """The records that modules get, or that grow where modules were deployed before."""

    def __init__(self, program: Program, model: nn.Module, guards: Mapping[nn.Module, list[nn.Module]]) -> None:
        self.program, self.model, self.guards = program, model, guards
        self.made: dict[nn.Module, Rewritten] = {}

    def of(self, module: nn.Module) -> Rewritten:
        if module not in self.made:
            before = module.__dict__.get(RECORD)
            fresh = Rewritten() if before is None else replace(before, home=dict(before.home))
            self.made[module] = replace(
                fresh, tensors={}, neutral={}, lent={}, spare=[], guards=list(self.guards.get(module, ())), _formings={}
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
