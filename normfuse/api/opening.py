"""What the user has, as a program with the inputs that it is called with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from normfuse.api.result import Result
from normfuse.errors import InputError, NormfuseError
from normfuse.graph.program import Program
from normfuse.proof.fidelity import traced
from normfuse.proof.torchscript import traced_script
from normfuse.proof.undisturbed import undisturbed
from normfuse.sources.batches import taken
from normfuse.sources.call_signature import require_names, what_forward_takes
from normfuse.sources.found_inputs import found_on
from normfuse.sources.inputs import Inputs, as_inputs, is_loader
from normfuse.sources.opened import open as open_source
from normfuse.sources.source import Source

Given: TypeAlias = tuple[Any, ...] | list[Any] | dict[str, Any] | torch.Tensor | Inputs | Iterable[Any] | None
"""Example inputs: positional ones in a tuple or list, one tensor, keyword ones in a dict; None to find them on the model."""


Model: TypeAlias = nn.Module | ExportedProgram | Program | Result | Source | str | Path
"""Anything that normfuse takes for a model; a path is loaded without executing a stranger's code."""

Tracer: TypeAlias = Callable[[nn.Module, Inputs], Program]


def served(result: Result) -> Result:
    """The result itself, if it is one to serve.

    Raises:
        NormfuseError: it is live, and its graph may be that of a model in training.
    """
    if result.mode == "live":
        hint = "rewrite the model itself, whose parameters are trained with it: normfuse.rewrite(model, passes) evaluates them"
        raise NormfuseError("a live program is for training: it is not exported or rewritten again", hint=hint)
    return result


def files_of(model: Model) -> tuple[Path, ...]:
    """Files that a result of this model must not overwrite."""
    if isinstance(model, Source):
        return model.files
    return model.sources if isinstance(model, Result) else (Path(model),) if isinstance(model, (str, Path)) else ()


def brought(model: Model, trust_pickle: bool) -> nn.Module | ExportedProgram | Program | Result | Source:
    """The model, or what its path names, opened."""
    return open_source(model, trust_pickle=trust_pickle) if isinstance(model, (str, Path)) else model


def to_program(
    model: Model,
    inputs: Given,
    kwargs: Any,
    dynamic_shapes: Any,
    trust_pickle: bool,
    trace: Tracer = traced,
    *,
    fit: bool = False,
) -> tuple[str, Program, Inputs]:
    """What the user has, as a program: its name for messages, the program, and the inputs that it is called with.

    Args:
        model: as for `rewrite`.
        inputs: as for `rewrite`.
        kwargs: as for `rewrite`.
        dynamic_shapes: as for `rewrite`.
        trust_pickle: as for `rewrite`.
        trace: makes a program of a module.
        fit: trace a module whose tensors are all of one floating dtype with inputs of that dtype.

    Raises:
        LoadError: the file cannot or may not be read.
        InputError: it is no model, or no example inputs are known, or they do not fit.
        TraceError: torch.export cannot trace it.
    """
    held = brought(model, trust_pickle)
    source = held if isinstance(held, Source) else None
    name, loaded = (source.name, source.model) if source else (type(held).__name__, held)
    if isinstance(loaded, Result):
        inputs = loaded.inputs if inputs is None else inputs
        loaded = loaded.program
    if not isinstance(loaded, (nn.Module, ExportedProgram, Program)):
        raise InputError(f"{name} is not a model", hint="pass an nn.Module, an ExportedProgram, or a path")
    given = inputs_for(loaded, inputs, kwargs, dynamic_shapes)
    if isinstance(loaded, nn.Module):
        given = _in_dtype_of(loaded, given) if fit else given
        program = traced_script(loaded, given) if isinstance(loaded, torch.jit.ScriptModule) else trace(loaded, given)
        return name, replace(program, notes=(*(source.notes if source else ()), *program.notes)), given
    return name, loaded if isinstance(loaded, Program) else Program.from_exported(loaded), given


def _in_dtype_of(module: nn.Module, given: Inputs) -> Inputs:
    held = {each.dtype for each in (*module.parameters(), *module.buffers()) if each.is_floating_point()}
    if len(held) != 1:
        return given
    (dtype,) = held

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    args, kwargs = pytree.tree_map(cast, (given.args, given.kwargs))
    return replace(given, args=args, kwargs=kwargs)


def _found_on(model: Any) -> Inputs | None:
    """What is found on a model; it is called to be sure, and is as it was afterwards."""
    with undisturbed(model) if isinstance(model, nn.Module) else contextlib.nullcontext():
        return found_on(model.exported if isinstance(model, Program) else model)


def inputs_for(model: Any, inputs: Any, kwargs: Any, dynamic_shapes: Any) -> Inputs:
    """The user's inputs, or what is found on the model; what was said besides is added to it."""
    given = as_inputs(inputs, kwargs) or _found_on(model)
    given = taken(model, given) if given is not None and is_loader(inputs) else given
    if given is None:
        raise InputError(
            f"no example inputs are known for {type(model).__name__}, which takes {what_forward_takes(model)}",
            hint='give inputs=(x,) in Python, or --input "float32[batch,3,224,224]" on the command line',
        )
    if isinstance(model, nn.Module):
        for each in (given, *given.more):
            require_names(model, each.args, each.kwargs)
    return given if dynamic_shapes is None else replace(given, dynamic_shapes=dynamic_shapes)
