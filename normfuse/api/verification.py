"""`normfuse.verify`: whether two models, in whatever form they are, are one function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from normfuse.api.opening import Given, Model, brought, to_program
from normfuse.api.result import Result
from normfuse.errors import InputError
from normfuse.escaping import is_text
from normfuse.exporters import aoti
from normfuse.exporters.targets import opener_of
from normfuse.graph.interpreter import flat_inputs
from normfuse.graph.nodes import draws
from normfuse.graph.program import Program, quiet
from normfuse.proof import bisection
from normfuse.proof.artifacts import Artifact, Port
from normfuse.proof.bisection import Parting
from normfuse.proof.calling import ModelCall, call_of_module, call_of_program
from normfuse.proof.cases import Case, cases_for, cases_of, further
from normfuse.proof.equivalence import WITHOUT_TRUTH, compare
from normfuse.proof.evidence import Evidence, Verdict
from normfuse.proof.measuring import Progress
from normfuse.proof.randomness import uncompared
from normfuse.proof.sides import artifact_side, ports_of, program_side
from normfuse.proof.trial_run import trial_run
from normfuse.sources.batches import taken
from normfuse.sources.inputs import Inputs, as_inputs, is_loader
from normfuse.sources.source import Source
from normfuse.sources.specs import DynamicDim, Spec, from_specs


def verify(
    a: Model,
    b: Model,
    inputs: Given = None,
    kwargs: dict[str, Any] | None = None,
    *,
    trust_pickle: bool = False,
    progress: Progress | None = None,
) -> Evidence:
    """Evidence that two models are one function up to the rounding of their weights.

    Args:
        a: the reference: an `nn.Module`, a program, or a path: of one of these, of an ``.onnx`` file, of OpenVINO's
            ``.xml``, of an ExecuTorch ``.pte``, of a TensorRT engine, of an AOTInductor package. Each runs in its own runtime.
        b: the same.
        inputs: example positional inputs, or a loader of several examples, as for `rewrite`; found on the models when None, or
            drawn for the inputs that an exported file names.
        kwargs: example keyword inputs.
        trust_pickle: as for `rewrite`; an AOTInductor package, which is native code, runs only with it.
        progress: called with (what, done, total).

    Returns:
        The evidence; its ``verdict`` is the answer: proven, disproven or not compared; its ``ok`` is whether it is the first.

    Raises:
        InputError: the models do not take the same inputs.
        MissingExtra: a runtime is not installed; the message names the pip command.
        NormfuseError: neither model can serve as the reference, or one does not run.
    """
    left, right = (opened(each, trust=trust_pickle) if is_exported(each) else each for each in (a, b))  # type: ignore[arg-type]
    if isinstance(left, Artifact) and isinstance(right, Artifact):
        return _of_artifacts(left, right, inputs, kwargs, progress)
    if isinstance(left, Artifact):  # the program is the reference on either side
        left, right, a, b = right, left, b, a
    assert not isinstance(left, Artifact)
    left = brought(left, trust_pickle)
    _, program, given = to_program(left, inputs, kwargs, None, trust_pickle, fit=True)
    given = _fitted(program, given)
    call, (name, others_name) = _call_of(left, program), _names(a, b)
    tried, flat = cases_for(program, given), flat_inputs(program, given.args, given.kwargs)
    if isinstance(right, Artifact):
        if missing := uncompared(program, None, flat):
            return Evidence(missing=missing)
        reference = program_side(name, program, call=call, state=False, short=True)
        return _noted(compare(reference, artifact_side(right, ports_of(program)), tried, progress=progress), given)
    right = brought(right, trust_pickle)
    _, other, _ = to_program(right, replace(given, dynamic_shapes=None), None, None, trust_pickle, fit=True)
    for each in (program, other):
        trial_run(each, flat_inputs(each, given.args, given.kwargs, cast=True))  # raises where it does not take them
    if missing := uncompared(program, other, flat):
        return Evidence(missing=missing)
    sides = (
        program_side(name, program, call=call, other=other),
        program_side(others_name, other, calls=program, call=_call_of(right, other), other=program),
    )
    return _noted(compare(*sides, tried, progress=progress), given)


def _noted(evidence: Evidence, given: Inputs) -> Evidence:
    return replace(evidence, notes=(*evidence.notes, *given.notes))


def _fitted(program: Program, given: Inputs) -> Inputs:
    """The inputs in the dtypes that a program was traced with."""
    flat = flat_inputs(program, given.args, given.kwargs, cast=True)
    args, kwargs = pytree.tree_unflatten(flat, program.exported.call_spec.in_spec)
    return replace(given, args=args, kwargs=kwargs, more=tuple(_fitted(program, each) for each in given.more))


def _call_of(model: nn.Module | ExportedProgram | Program | Result | Source, program: Program) -> ModelCall | None:
    """How its user calls a model.

    None for a module that draws random numbers, perhaps in another order than its trace: it was compared with that already.
    """
    model = model.model if isinstance(model, Source) else model
    if not isinstance(model, nn.Module):
        with quiet():
            return call_of_program(model.module(), program)
    if isinstance(model, torch.jit.ScriptModule):  # which was compared with its program already
        return None
    return None if any(map(draws, program.graph.nodes)) else call_of_module(model, program)


def assert_equivalent(a: Model, b: Model, inputs: Given = None, **options: Any) -> Evidence:
    """For tests: the evidence of `verify`, which must be ok.

    Args:
        a: as for `verify`.
        b: as for `verify`.
        inputs: as for `verify`.
        options: further keyword arguments of `verify`.

    Raises:
        AssertionError: the models are not one function, or nothing was compared; the message has the worst cases.
    """
    evidence = verify(a, b, inputs, **options)
    if not evidence.ok:
        wrong = Verdict.DISPROVEN
        rows = [f"  {row.case}: {row.error:.1e}, allowed {row.allowed:.1e}" for row in evidence.algebra if row.verdict is wrong]
        rows += [f"  {row.case}: {row.after:.1e} in its own dtype" for row in evidence.rounding if row.verdict is wrong]
        answer = f"{_name(b)} is not {'' if evidence.verdict is wrong else 'proven to be '}{_name(a)}"
        raise AssertionError("\n".join([f"{answer}: {evidence.complaint()}", *rows]))
    return evidence


def bisect(
    a: Model, b: Model, inputs: Given = None, kwargs: dict[str, Any] | None = None, *, trust_pickle: bool = False
) -> Parting | None:
    """The first node where two programs part on the given inputs; None where their outputs agree.

    Args:
        a: as for `verify`. An ONNX file is asked for its inner values.
        b: the same; one of them is a program or a module.
        inputs: as for `verify`.
        kwargs: as for `verify`.
        trust_pickle: as for `verify`.

    Raises:
        InputError: neither is a program, or one is an exported file whose inner values cannot be seen.
    """
    if is_exported(a):  # the program is the reference on either side
        a, b = b, a
    if is_exported(a):
        raise InputError("two exported files have no graph to go back in", hint="bisect each with the program it was made from")
    artifact = opened(b, trust=trust_pickle) if is_exported(b) else None  # type: ignore[arg-type]
    if artifact and artifact.inner is None:
        raise InputError(f"{_name(b)} shows no inner values", hint="bisect the programs, or their ONNX file")
    _, one, given = to_program(a, inputs, kwargs, None, trust_pickle)
    flat = flat_inputs(one, given.args, given.kwargs)
    if artifact and artifact.inner:
        names, run = artifact.inner()
        shown = artifact_side(replace(artifact, runs={"": run}), ports_of(one))
        return bisection.bisect_file(one, names, shown.runs[""](Case("as given", tuple(flat))), flat)
    _, other, _ = to_program(b, replace(given, dynamic_shapes=None), None, None, trust_pickle)
    return bisection.bisect(one, other, flat)


def is_exported(model: Model) -> bool:
    """Whether a path names a file that only a runtime can open; nothing of it is executed."""
    if not isinstance(model, (str, Path)):
        return False
    target = opener_of(model)
    return target is not None and (target.name != "aoti" or aoti.is_aoti(model))


def opened(model: str | Path, *, trust: bool = False) -> Artifact:
    """An exported file in its runtime.

    Args:
        model: its path.
        trust: run native code that it holds.

    Raises:
        InputError: there is no such file.
        MissingExtra: the runtime is not installed.
        ExportError: the file cannot be opened.
    """
    path = Path(model)
    if not path.is_file():
        raise InputError(f"there is no file {path}", hint="check the path")
    if not is_text(path):
        raise InputError(f"{path} is not UTF-8, and no runtime opens such a name", hint="rename the file")
    target = opener_of(path)
    assert target is not None, "the caller asks of files that `is_exported` knows"
    return aoti.open_artifact(path, trust=trust) if target.name == "aoti" else target.opened(path)


def _of_artifacts(left: Artifact, right: Artifact, inputs: Given, kwargs: Any, progress: Progress | None) -> Evidence:
    """Two exported files; the reference is the one whose weights can be nudged."""
    if left.nudged is None:
        left, right = right, left
    if left.nudged is None or left.inputs is None:
        raise InputError(WITHOUT_TRUTH)
    given = as_inputs(inputs, kwargs) or _drawn(left.inputs)
    given = taken(len(left.inputs), given) if is_loader(inputs) else given
    placed = partial(_placed, left.inputs)
    tried = [*cases_of(placed(given), [port.limit for port in left.inputs]), *further(given, placed)]
    reference, other = (artifact_side(each, left.inputs) for each in (left, right))
    return _noted(compare(reference, other, tried, progress=progress), given)


def _placed(ports: Sequence[Port], given: Inputs) -> list[Any]:
    """The inputs in the order of the ports."""
    values = [*given.args, *(given.kwargs[port.name] for port in ports[len(given.args) :] if port.name in given.kwargs)]
    if len(values) != len(ports):
        names = ", ".join(port.name for port in ports)
        raise InputError(f"the file wants {len(ports)} inputs ({names}), not these {len(values)}")
    return values


def _drawn(ports: Sequence[Port]) -> Inputs:
    specs = []
    for port in ports:
        if port.shape is None:
            raise InputError(f"the file does not tell the shape of its input '{port.name}'", hint="give the inputs")
        dims = tuple(
            size if isinstance(size, int) else DynamicDim(str(size or f"dim{place}"), 2, None, None)
            for place, size in enumerate(port.shape)
        )
        specs.append(Spec(None, port.dtype, dims))
    limits: dict[int | str, int] = {place: port.limit for place, port in enumerate(ports) if port.limit is not None}
    return from_specs(specs, index_limits=limits)


def _names(a: Model, b: Model) -> tuple[str, str]:
    """What to call two models, which may be of one class."""
    one, other = _name(a), _name(b)
    return (one, other) if one != other else ("the first model", "the second model")


def _name(model: Model) -> str:
    if isinstance(model, Source):
        return model.name
    return str(model) if isinstance(model, (str, Path)) else type(model).__name__
