"""A plan made on what somebody brought: the same files, in which only the tensors differ that the plan changes.

Nothing is written unless the model's own class can hold the plan. What was written is opened again as its owner will open it,
strictly, and compared with the original; only then it takes its place.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from normfuse.errors import InputError
from normfuse.graph.program import Program
from normfuse.modules.module_plan import FOR_CLASS, placed
from normfuse.modules.placement import Adaptation
from normfuse.modules.recipe import Recipe, formulas_of, recipe_of
from normfuse.modules.spread import write_spread
from normfuse.modules.swapped_norms import swaps
from normfuse.modules.written_regions import compared_by_regions
from normfuse.planning.planner import Plan
from normfuse.proof.calling import call_of_module
from normfuse.proof.cases import cases_for
from normfuse.proof.differences import same_bits
from normfuse.proof.equivalence import compare
from normfuse.proof.evidence import COMPARED, Evidence, checked
from normfuse.proof.fidelity import traced
from normfuse.proof.measuring import Progress
from normfuse.proof.sides import program_side
from normfuse.sources.atomic import new_folder, proven_first
from normfuse.sources.inputs import Inputs
from normfuse.sources.mapped import is_unwritten
from normfuse.sources.modeling_code import WITHOUT, Centring, SwappedNorm, add_code, stock_name, unheld
from normfuse.sources.ranks import joined
from normfuse.sources.source import Source, Stored
from normfuse.sources.tensor_files import open_weights
from normfuse.sources.transformers_folder import CONFIG, open_transformers, read_config


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        path: the folder or the file.
        changed: names of the tensors in the files that differ from the original's.
        kept: how many others there are, whose bytes are the original's.
        evidence: that the model's own class computes the same of it; None where the proof was not asked for.
        dropped: names of tensors that code beside the others does without.
        notes: what whoever loads a part of it should know, as sentences.
    """

    path: Path
    changed: tuple[str, ...]
    kept: int
    evidence: Evidence | None
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The listing as JSON types."""
        evidence = self.evidence.to_dict() if self.evidence else None
        data = {"changed": list(self.changed), "kept": self.kept, "dropped": list(self.dropped), "evidence": evidence}
        return {**data, "notes": list(self.notes)}


def write_back(
    source: Source,
    original: Program,
    plan: Plan,
    given: Inputs,
    path: Path,
    *,
    as_code: bool = False,
    level: str = "full",
    progress: Progress | None = None,
) -> Written:
    """Write what was brought, with the plan made on its tensors.

    Args:
        source: what was brought.
        original: the trace of its model.
        plan: a plan for it.
        given: what the model is called with.
        path: where to write; for a folder nothing may be there yet.
        as_code: write a modeling file with RMSNorm beside the tensors of a transformers folder.
        level: how what was written is compared with the original: ``full`` or ``regions``; not at all with any other.
        progress: called with (what, done, total).

    Raises:
        CannotApply: the model's class cannot hold part of the plan; nothing is written.
        InputError: it cannot be written there, or the model was changed since it was opened.
        VerificationFailed: what was written computes something else; it is not kept.
    """
    stored, model = source.stored, source.model
    if stored is None or not isinstance(model, nn.Module):
        raise InputError(f"{source.name} is no folder or checkpoint, so what is written of it is a program", hint="-o OUT.pt2")
    stored.check_name(path)
    _check_as_read(source.name, stored, model)
    changes = placed(original, plan, model, FOR_CLASS, same_keys=True, stored=stored.as_they_are)
    code = _code(stored, model, changes) if as_code else None
    recipe = recipe_of(original, changes, stored, code.unheld if code else ())
    with _in_place(stored, path, source, recipe, code, progress) as (written, changed):
        again = code.open(written) if code else stored.opened(written)
        evidence = None
        if level == "regions" and not code:
            evidence = checked(compared_by_regions(original, formulas_of(changes), again, given, progress))
        elif level in COMPARED:
            evidence = checked(_compared(original, again, given, progress))
    kept = len(stored.weights.names) - len(changed) - len(recipe.dropped)
    notes = tuple(_of_the_base(model, stored, changed))
    return Written(path, tuple(sorted(changed)), kept, evidence, tuple(sorted(recipe.dropped)), notes)


def _check_as_read(name: str, stored: Stored, model: nn.Module) -> None:
    """Refuse a model that was changed since it was opened: what is written is made of its files."""
    for tensor_name, tensor in model.state_dict().items():
        for key in stored.keys.get(tensor_name, ())[:1]:
            if not is_unwritten(tensor) and not same_bits(tensor, stored.weights.tensor(stored.weights.names[key])):
                said = f"'{tensor_name}' was changed since {name} was opened, and what is written is made of the files"
                raise InputError(said, hint="save the model, open what was saved, and rewrite that")


@dataclass(frozen=True)
class _Code:
    """A modeling file in the making."""

    model: nn.Module
    norms: list[SwappedNorm]
    centrings: list[Centring]

    @property
    def unheld(self) -> frozenset[str]:
        return unheld(self.model, self.norms)

    def write(self, folder: Path) -> None:
        add_code(folder, self.model, self.norms, self.centrings)

    def open(self, folder: Path) -> Source:
        """The folder with the class that was just written into it."""
        config = read_config(folder / CONFIG)
        return open_transformers(str(folder), folder, config, open_weights(folder), folder, trust_remote_code=True)


def _code(stored: Stored, model: nn.Module, changes: Adaptation) -> _Code:
    if not stored.is_folder or not (stored.path / CONFIG).is_file():
        raise InputError(f"{stored.path} is no folder of transformers, beside whose tensors code could be", hint=WITHOUT)
    stock_name(model)
    return _Code(model, *swaps(changes, model))


def _of_the_base(model: nn.Module, stored: Stored, changed: Collection[str]) -> Iterator[str]:
    """What to say where the head has changed: the model below it, which AutoModel loads alone, gives something else then."""
    base = getattr(model, "base_model_prefix", None)
    if not isinstance(base, str) or not isinstance(getattr(model, base or "-", None), nn.Module):
        return
    held = {name: {stored.weights.names[key] for key in keys} for name, keys in stored.keys.items()}
    inside = set[str]().union(*(keys for name, keys in held.items() if name.startswith(f"{base}.")))
    outside = sorted(name for name, keys in held.items() if keys & set(changed) - inside)  # a tied head is the base's own
    if outside:
        yield (
            f"'{outside[0]}' has taken something over from '{base}': the folder is one for {type(model).__name__}, and "
            f"'{base}' alone, as AutoModel loads it, gives other hidden states (--keep its last norm if you need them)"
        )


@contextmanager
def _in_place(
    stored: Stored, path: Path, source: Source, recipe: Recipe, code: _Code | None, progress: Progress | None
) -> Iterator[tuple[Path, set[str]]]:
    """What is written, before it takes its place, and the names in the files of the tensors that have changed."""
    changed = set[str]()

    def write(target: Path) -> None:
        for file in stored.beside:
            shutil.copyfile(file, target / file.name)
        changed.update(write_spread(stored, recipe, target, progress))
        if code:
            code.write(target)

    parts = [each.name for each in stored.weights.files]
    made = (
        new_folder(path, write, goes_on_with=parts, helped=joined() > 1)
        if stored.is_folder
        else proven_first(path, write, never_over=source.files)
    )
    with made as written:
        yield written, changed


def _compared(program: Program, again: Source, given: Inputs, progress: Progress | None) -> Evidence:
    """The evidence that what was written, in its own class, is the original."""
    assert isinstance(again.model, nn.Module)
    other = traced(again.model, given)
    call = call_of_module(again.model, other)
    sides = (
        program_side("the original", program, other=other),
        program_side("what was written", other, calls=program, call=call, other=program),
    )
    return compare(*sides, cases_for(program, given), progress=progress)
