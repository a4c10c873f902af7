"""What a batch of a loader is to a model: one rule for everything that takes data.

A tensor is the first input, a mapping is keyword inputs, and a tuple or list is positional ones. Loaders of training data give
labels as well, which must not end in an optional argument of a forward: of a tuple that has more than the forward requires,
what it requires is taken, and the first entry where it requires nothing. A forward of ``*args`` takes all. A program has the
inputs that it was traced with: a tuple that has an entry for each, keywords too, is taken whole, of a longer one the first.
What is left out is told; optional inputs are named, with mappings or `Inputs`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from normfuse.errors import NormfuseWarning
from normfuse.sources.inputs import Inputs, call_of


def as_batch(content: Any) -> Inputs:
    """One batch, as a loader gives it: a mapping is keywords, a tuple or list positional inputs, all else one input."""
    if isinstance(content, Inputs):
        return content
    return Inputs(*call_of(content if isinstance(content, Tensor | tuple | list | Mapping) else (content,)))


def taken(model: Any, batch: Inputs) -> Inputs:
    """A batch of a loader as a model is called with it; its ``left_out`` tells what is no input.

    Args:
        model: a module, an `ExportedProgram`, a `Program`; or how many inputs an exported file has.
        batch: positional and keyword inputs, and further examples.
    """
    places = _Places(("",) * model) if isinstance(model, int) else _places(model)
    more = tuple(_taken(places, each) for each in batch.more)
    first = _taken(places, batch)
    return replace(first, more=more, left_out=next((each.left_out for each in (first, *more) if each.left_out), None))


def warn_of(batch: Inputs) -> bool:
    """Tell what was left out where there is no report, if an optional argument might have been meant; whether that was so."""
    tells = bool(batch.left_out) and OPTIONAL in str(batch.left_out)
    if tells:
        warnings.warn(str(batch.left_out), NormfuseWarning, stacklevel=3)
    return tells


OPTIONAL = "name optional inputs in mappings"


@dataclass(frozen=True)
class _Places:
    """The positional inputs of a model.

    Attributes:
        required: their names; of a program, one for each that it was traced with.
        optional: names of those that have a default.
        named: keyword inputs that a program was traced with.
        any: it takes any number.
    """

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    any: bool = False


def _places(model: Any) -> _Places:
    spec = getattr(model, "_in_spec", None) or getattr(
        getattr(getattr(model, "exported", model), "call_spec", None), "in_spec", None
    )
    if spec is not None:  # a program
        args, *kwargs = spec.children()
        return _Places(("",) * args.num_children, named=tuple(kwargs[0].context if kwargs else ()))
    if not isinstance(model, nn.Module):
        return _Places(any=True)
    parameters = inspect.signature(model.forward).parameters.values()
    if any(each.kind is each.VAR_POSITIONAL for each in parameters):
        inner = getattr(model, "_orig_mod", getattr(model, "module", None))  # compiled, or of many devices
        return _places(inner) if isinstance(inner, nn.Module) else _Places(any=True)
    places = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    required = tuple(each.name for each in places if each.default is each.empty)
    return _Places(required, tuple(each.name for each in places if each.default is not each.empty))


def _taken(places: _Places, batch: Inputs) -> Inputs:
    given = len(batch.args)
    free = sum(name not in batch.kwargs for name in places.required)
    wanted = free if places.required or places.named or batch.kwargs else 1
    if places.any or given <= wanted:
        return batch
    if places.named and not batch.kwargs and given == wanted + len(places.named):
        return replace(batch, args=batch.args[:wanted], kwargs=dict(zip(places.named, batch.args[wanted:], strict=True)))
    might = [name for name in places.optional if name not in batch.kwargs][wanted - free :]
    said = f"of each batch of {given} the first {wanted} {'is an input' if wanted == 1 else 'are inputs'}; labels are none"
    told = f"{said}, {OPTIONAL} ({', '.join(might)})" if might else said
    return replace(batch, args=batch.args[:wanted], left_out=told)
