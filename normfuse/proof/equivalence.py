"""Evidence that two models, each in its own runtime, are one function up to rounding.

Neither side is trusted. The truth is computed from the reference in the widest dtype to be had: a program in float64, an
ONNX file in the widest that ONNX Runtime has kernels for. What the other side may differ by is measured on the
reference: its own error in its stored dtype, and what one rounding of every weight does to it. Where both are said to hold
the same weights (a file against the program that it was written from) only the arithmetic may differ, in the width in
which the other side ran.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

from normfuse.errors import InputError, NormfuseError, first_line
from normfuse.interpret import NARROW, flat_inputs, run
from normfuse.literals import numbers_cut
from normfuse.program import Program
from normfuse.proof.artifacts import Artifact, Port
from normfuse.proof.cases import Case
from normfuse.proof.coverage import Coverage
from normfuse.proof.differences import Difference, difference
from normfuse.proof.evidence import Agreement, Evidence, Rounding
from normfuse.proof.proving import (
    FLOOR,
    Progress,
    Runner,
    agreement,
    distances,
    noise_of_rounding,
    nudged,
    rounding_of,
    told_of,
)

WITHOUT_TRUTH = (
    "neither model is a program or an ONNX file, so there is nothing to compute the truth from; "
    "compare each with the .pt2 or .onnx file that it was made from"
)


@dataclass(frozen=True)
class Side:
    """One of two models on trial.

    Attributes:
        name: how the user named it.
        runtime: what runs it.
        runs: how it is run -> its outputs; the first is the way a user would run it.
        wide: the same weights with less rounding; None where the first of `runs` is all that can be had.
        nudged: the same after one rounding of every weight, of the size given or of the weights' dtype; None if it
            cannot be had, and then this side is no reference.
        own: the outputs in arithmetic of a given width, with numbers as short as file formats have them; None if only `runs`
            can be had.
        rounding: given the true outputs, how far arithmetic in the stored dtype may be from them; None if it cannot be had.
        notes: for the reader of the evidence.
    """

    name: str
    runtime: str
    runs: Mapping[str, Runner]
    wide: Runner | None = None
    nudged: Callable[[Case, float | None], Sequence[Tensor]] | None = None
    own: Callable[[Case, torch.dtype], Sequence[Tensor]] | None = None
    rounding: Callable[[Case, Sequence[Tensor]], list[float]] | None = None
    notes: tuple[str, ...] = ()


def program_side(name: str, program: Program, *, calls: Program | None = None, state: bool = True, short: bool = False) -> Side:
    """A program.

    Args:
        name: how the user named it.
        program: what runs.
        calls: the program whose inputs the cases are made of, where it is another.
        state: compare the tensors that it updates too, which a runtime does not give.
        short: the numbers of its code, such as a slope of 0.01, count as float32, which files hold. Torch's kernels outside
            float64 have them so too, and there the truth is computed with them; in float64 they are a part of the noise.
    """
    held = (*NARROW, torch.float64) if short else ()
    outputs = None if state else sum(s.kind.name == "USER_OUTPUT" for s in program.exported.graph_signature.output_specs)

    def flat(case: Case) -> Sequence[Any]:
        if calls is None:
            return case.flat
        args, kwargs = pytree.tree_unflatten(list(case.flat), calls.exported.call_spec.in_spec)
        return flat_inputs(program, args, kwargs)

    def on(case: Case, **how: Any) -> Sequence[Tensor]:
        return run(program, flat(case), **how)[:outputs]

    return Side(
        name,
        f"PyTorch {torch.__version__}",
        {"": on},
        lambda case: on(case, wide=True, short=NARROW if short else ()),
        lambda case, size: on(case, wide=True, short=held, weights=nudged(rounding_of(program) if size is None else size)),
        lambda case, width: on(case, wide=True, width=width, short=held),
        lambda case, truth: noise_of_rounding(program, flat(case), truth),
        notes=_rounded_numbers(program) if short else (),
    )


def _rounded_numbers(program: Program) -> tuple[str, ...]:
    """What to say of a program in float64 whose code has numbers that float32 does not hold."""
    found = [f"{number:g} of {node.name}" for node in program.graph.nodes for number in numbers_cut(node)]
    told = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    return (f"files hold the numbers of a model's code as float32, so they were compared so: {told}",) if found else ()


def live_side(name: str, call: Runner) -> Side:
    """A model that can only be called."""
    return Side(name, f"PyTorch {torch.__version__}", {"": call})


def artifact_side(artifact: Artifact, ports: Sequence[Port | None]) -> Side:
    """An exported model, on cases whose values are those of ``ports``, constants left out.

    Raises:
        InputError: it does not take these inputs.
    """
    order = _order(artifact, ports)

    def on(call: Callable[[Sequence[Tensor]], list[Tensor]]) -> Runner:
        return lambda case: call([case.flat[place] for place in order])

    runs = {how: on(each) for how, each in artifact.runs.items()}
    wide = on(artifact.widened) if artifact.widened else None
    shaken = on(artifact.nudged) if artifact.nudged else None
    return Side(
        artifact.name,
        artifact.runtime,
        runs,
        wide,
        (lambda case, _: shaken(case)) if shaken else None,
        notes=artifact.notes,
    )


def ports_of(program: Program) -> list[Port | None]:
    """The inputs of a program in the order of its cases; None for one that is a constant of the trace."""
    ports: list[Port | None] = []
    for spec in program.exported.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            value = None if isinstance(spec.arg, ConstantArgument) else program.nodes[spec.arg.name].meta.get("val")
            tensor = value if isinstance(value, Tensor) else torch.as_tensor(0 if value is None else int(value))
            shape = tuple(size if isinstance(size, int) else str(size) for size in tensor.shape)
            ports.append(None if value is None else Port(spec.arg.name, tensor.dtype, shape))
    return ports


def _order(artifact: Artifact, ports: Sequence[Port | None]) -> list[int]:
    """For each input of the artifact, the place of its value: by name if the names are the same, else by position."""
    there = [place for place, port in enumerate(ports) if port is not None]
    if artifact.inputs is None:
        return there
    by_name = {port.name: place for place, port in enumerate(ports) if port is not None}
    names = [port.name for port in artifact.inputs]
    order = [by_name[name] for name in names] if set(names) == set(by_name) else there
    wanted = ", ".join(map(_told, artifact.inputs))
    if len(order) != len(names) or not all(
        _fits(theirs, ports[place]) for theirs, place in zip(artifact.inputs, order, strict=True)
    ):
        given = ", ".join(_told(port) for port in ports if port is not None)
        raise InputError(f"{artifact.name} takes the inputs {wanted}; the other model takes {given}")
    return order


def _fits(port: Port, other: Port | None) -> bool:
    if other is None or port.dtype != other.dtype:
        return False
    if port.shape is None or other.shape is None:
        return True
    pairs = zip(port.shape, other.shape, strict=False)
    return len(port.shape) == len(other.shape) and all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))


def _told(port: Port) -> str:
    sizes = "…" if port.shape is None else ", ".join("?" if size is None else str(size) for size in port.shape)
    return f"{port.name}: {str(port.dtype).removeprefix('torch.')}[{sizes}]"


def compare(
    a: Side, b: Side, cases: Iterable[Case], *, same_weights: bool = False, progress: Progress | None = None
) -> Evidence:
    """Evidence that two sides are one function.

    Args:
        a: the reference, which can be nudged.
        b: the other.
        cases: inputs to compare on.
        same_weights: ``b`` holds the very weights of ``a``, so that no rounding of weights excuses a difference.
        progress: told (what, done, total).

    Raises:
        NormfuseError: neither side can be the reference, or a model does not run on the user's own inputs.
    """
    if a.nudged is None:
        raise NormfuseError(WITHOUT_TRUTH)
    algebra: list[Agreement] = []
    rounding: list[Rounding] = []
    figures: list[Difference] = []
    notes = [*a.notes, *b.notes]
    everything, coverage = list(cases), Coverage()
    for done, case in enumerate(everything):
        if progress:
            progress(case.name, done, len(everything))
        try:
            usual = next(iter(a.runs.values()))(case)
            truth = a.wide(case) if a.wide else usual
            own = distances(truth, usual)
            shaken = a.nudged(case, None)
            noise = _noise(truth, own, shaken)
            got = {how: each(case) for how, each in b.runs.items()}
            wide = b.wide(case) if b.wide else next(iter(got.values()))
            tight = _noise(truth, *_of_width(a, case, truth, wide)) if same_weights else noise
        except Exception as error:
            if done == 0:
                raise NormfuseError(f"the models do not run: {first_line(error)}") from error
            notes.append(f"not run on '{case.name}': {first_line(error)}")
            continue
        more: Callable[[], list[float]] = partial(a.rounding, case, truth) if a.rounding else list
        sampled = cache(more)  # dear: taken once, and only if it is asked for
        coverage.add(truth, shaken, given=case.given or done == 0)
        agreed = agreement(case.name, truth, distances(truth, wide), tight)
        if not agreed.ok and b.wide is None:  # nothing but arithmetic in the stored dtype is to be had of it
            agreed = agreement(case.name, truth, distances(truth, wide), _larger(tight, sampled()))
        algebra.append(agreed)
        for how, outputs in got.items():
            errors = distances(truth, outputs)
            name = f"{case.name}, {how}" if how else case.name
            judged = agreement(name, truth, errors, noise)
            if not judged.ok and agreed.ok:
                judged = agreement(name, truth, errors, _larger(noise, sampled()))
            rounding.append(Rounding(name, max(own, default=0.0), judged.error, judged.verdict))
            if done == 0:
                triples = enumerate(zip(truth, outputs, own, strict=False))
                told = (difference(case.name, how, place, x, y, before) for place, (x, y, before) in triples)
                figures += [each for each in told if each]
    return Evidence(
        algebra=tuple(algebra),
        rounding=tuple(rounding),
        notes=(*notes, *told_of(algebra)),
        differences=tuple(figures),
        runtimes=(a.runtime, b.runtime),
        missing=coverage.missing(),
    )


def _noise(truth: Sequence[Tensor], own: Sequence[float], shaken: Sequence[Tensor]) -> list[float]:
    return [max(x, y, FLOOR) for x, y in zip(own, distances(truth, shaken), strict=True)]


def _larger(noise: list[float], sampled: list[float]) -> list[float]:
    """The noise of each output with more samples of it; as it is where there are none."""
    return [max(pair) for pair in zip(noise, sampled, strict=True)] if sampled else noise


def _of_width(a: Side, case: Case, truth: Sequence[Tensor], got: Sequence[Tensor]) -> tuple[list[float], Sequence[Tensor]]:
    """What arithmetic in the width of ``got`` does to the reference: its error there, and one rounding of its weights."""
    width = next((each.dtype for each in got if each.is_floating_point()), torch.float64)
    assert a.nudged is not None
    assert a.own is not None, "only a program is known to have the same weights"
    return distances(truth, a.own(case, width)), a.nudged(case, torch.finfo(width).eps)
