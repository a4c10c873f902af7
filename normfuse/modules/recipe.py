"""What a plan makes of stored tensors, by the names that they have in their files: data that needs no model to be applied."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from normfuse import strict_json
from normfuse.errors import CannotApply
from normfuse.graph.blocks import overwrite
from normfuse.graph.expressions import Formula, Read, formula_from_json, reads, substitute, to_json
from normfuse.graph.program import Program
from normfuse.modules.make_live import names_of
from normfuse.modules.module_plan import FOR_CLASS
from normfuse.modules.placement import Adaptation
from normfuse.sources.mapped import let_go
from normfuse.sources.safetensors_file import Change
from normfuse.sources.source import Stored


@dataclass(frozen=True)
class Recipe:
    """What becomes of stored tensors.

    Attributes:
        formulas: name in the files -> its new value, over names in the files.
        dropped: names in the files of tensors that leave.
        elsewhere: tensors that formulas read and that no file has in the form that the model has; a class made them anew.
    """

    formulas: Mapping[str, Formula]
    dropped: frozenset[str] = frozenset()
    elsewhere: Mapping[str, Tensor] = field(default_factory=dict)

    def changes(self, read: Callable[[str], Tensor]) -> dict[str, Change]:
        """What to make of each tensor.

        Args:
            read: gives the stored tensor of a name.
        """

        def held(name: str) -> Tensor:
            return self.elsewhere[name] if name in self.elsewhere else read(name)

        return {name: partial(_changed, formula, name, held) for name, formula in self.formulas.items()}

    def to_json(self) -> str:
        """The recipe as a text, without tensors."""
        formulas = {name: to_json(formula) for name, formula in self.formulas.items()}
        return json.dumps({"formulas": formulas, "dropped": sorted(self.dropped)})

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe that `to_json` wrote.

        Raises:
            ValueError: it is none, or has operators that do more than compute.
        """
        match strict_json.parsed(text):
            case {"formulas": dict(formulas), "dropped": dropped}:
                dropped = frozenset(strict_json.texts(dropped))
                return cls({name: formula_from_json(each) for name, each in formulas.items()}, dropped)
        raise ValueError("it is no recipe")


def _changed(formula: Formula, name: str, read: Callable[[str], Tensor], value: Tensor) -> bool:
    differs = overwrite(formula, name, value, read)
    for each in set(reads(formula)) - {name}:
        let_go(read(each))
    return differs


def formulas_of(changes: Adaptation) -> dict[str, Formula]:
    """What becomes of the tensors of a program; a new bias is what a norm lends to it."""
    return {changes.lent.get(name, name): formula for name, formula in {**changes.neutral, **changes.formulas}.items()}


def recipe_of(program: Program, changes: Adaptation, stored: Stored, without: Collection[str] = ()) -> Recipe:
    """What changes of modules mean for the files that their tensors came from.

    Args:
        program: the trace of the model that they were planned for.
        changes: the changes; they can all be held by the model's class.
        stored: how the model came.
        without: names of tensors that leave.

    Raises:
        CannotApply: a tensor changes that is stored in another form than the class has it.
    """
    values = formulas_of(changes)
    read = {name for formula in values.values() for name in reads(formula)}
    keys = {name: _keys(program, stored, name) for name in {*values, *read}}
    if homeless := [name for name in values if not keys[name] and not {*names_of(program, name)} <= {*without}]:
        why = f"'{min(homeless)}' is stored in another form than its class has it, so it cannot be changed there"
        raise CannotApply([why], hint=FOR_CLASS)
    in_files = {name: Read(found[0]) for name, found in keys.items() if found}
    dropped = frozenset(key for name in without for key in _in_files(stored, name))
    formulas = {
        key: substitute(formula, in_files) for name, formula in values.items() for key in keys[name] if key not in dropped
    }
    elsewhere = {name: program.tensor(name) for name in read if not keys[name]}
    return Recipe(formulas, dropped, elsewhere)


def _keys(program: Program, stored: Stored, name: str) -> list[str]:
    """Names in the files of a tensor of the program, which may have several names or be stored several times."""
    return list(dict.fromkeys(key for each in names_of(program, name) for key in _in_files(stored, each)))


def _in_files(stored: Stored, name: str) -> list[str]:
    return [stored.weights.names[each] for each in stored.keys.get(name, ())]
