"""What was written, proven region by region: its tensors are what the plan says, and its class computes the same of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor, nn
from torch.export import ExportedProgram

from normfuse.graph.blocks import rounded
from normfuse.graph.expressions import Formula, reads
from normfuse.graph.program import Program
from normfuse.proof.by_regions import can_be_cut, proven_by_regions
from normfuse.proof.cases import cases_for
from normfuse.proof.coverage import Missing
from normfuse.proof.differences import same_bits
from normfuse.proof.evidence import Evidence
from normfuse.proof.fidelity import traced
from normfuse.proof.measuring import Progress
from normfuse.sources.inputs import Inputs
from normfuse.sources.mapped import let_go
from normfuse.sources.source import Source


def compared_by_regions(
    original: Program, formulas: Mapping[str, Formula], again: Source, given: Inputs, progress: Progress | None
) -> Evidence:
    """The evidence that what was written, in its own class, is the original.

    Each tensor that the class reads has, bit for bit, the value that its formula gives, or that it had; and the trace of the
    class, with the formulas in the place of these tensors, is proven to be the original.

    Args:
        original: the trace of the model that was brought.
        formulas: what became of its tensors.
        again: what was written, opened.
        given: what it is called with.
        progress: called with (what, done, total).
    """
    assert isinstance(again.model, nn.Module)
    written = traced(again.model, given)
    known = _formulas(original, written, formulas)
    objections = tuple(_other_tensors(original, written, known))
    so_far = Evidence("regions", objections=objections, notes=written.notes)
    if objections:
        return so_far
    planned = Program(_over(original, written), known)
    if not can_be_cut(original, planned):
        missing = Missing("nothing was compared: what was written draws other random numbers", "verify with the level 'full'")
        return replace(so_far, missing=missing)
    return proven_by_regions(original, planned, known.keys(), list(cases_for(original, given)), so_far, progress)


def _formulas(original: Program, written: Program, formulas: Mapping[str, Formula]) -> dict[str, Formula]:
    """Formulas by the names of the written program, which may be others of the same tensor."""
    held = set(original.tensor_names())
    known: dict[str, Formula] = {}
    for name in written.stored.values():
        names = (name, *original.twins(name)) if name in held else ()
        formula = next((formulas[each] for each in names if each in formulas), None)
        if formula is not None:
            known[name] = formula
    return known


def _other_tensors(original: Program, written: Program, formulas: Mapping[str, Formula]) -> Iterator[str]:
    """What to say of tensors that are not what the plan says."""
    held = set(original.tensor_names())
    for name in written.stored.values():
        value = written.tensor(name)
        if name not in held:
            yield f"what was written reads a tensor '{name}', which the original does not have"
        elif not same_bits(value, _expected(original, name, formulas.get(name))):
            yield f"the tensor '{name}' that was written is not what the plan says"
        for each in (value, *(original.tensor(read) for read in (name, *reads(formulas.get(name))) if read in held)):
            let_go(each)


def _expected(original: Program, name: str, formula: Formula | None) -> Tensor:
    before = original.tensor(name)
    return before if formula is None else rounded(formula, original.tensor, before.dtype)


def _over(original: Program, written: Program) -> ExportedProgram:
    """The written program over the original's tensors."""
    homes = [
        {name: original.tensor(name) if name in written.stored.values() else each for name, each in home.items()}
        for home in (written.exported.state_dict, written.exported.constants)
    ]
    return written.rebuilt(written.exported.graph_module, written.graph, *homes)
