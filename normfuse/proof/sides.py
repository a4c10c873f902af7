"""The two models of a comparison, each in its own runtime: a program, a model that can only be called, an exported file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

from normfuse.errors import InputError, listed
from normfuse.graph.interpreter import NARROW, flat_inputs, run
from normfuse.graph.literals import numbers_cut
from normfuse.graph.program import Program
from normfuse.proof.apart import coarser_inputs, nudges
from normfuse.proof.artifacts import Artifact, Port
from normfuse.proof.calling import ModelCall
from normfuse.proof.cases import Case
from normfuse.proof.evidence import Sensitivity
from normfuse.proof.noise import Samples, nudged, rounding_of, samples_of_rounding
from normfuse.proof.sensitivity import Judge, sensitivity
from normfuse.proof.steps import jumping

Runner = Callable[[Case], Sequence[Tensor]]
"""The outputs of a model on a case."""


@dataclass(frozen=True)
class Side:
    """One of two models on trial.

    Attributes:
        name: how the user named it.
        runtime: what runs it.
        runs: how it is run -> its outputs; the first is the way a user would run it.
        wide: the same weights with less rounding; None where the first of `runs` is all that can be had.
        nudged: the same after one rounding of every weight, of the size given or of the weights' dtype, another one for each
            draw; None if it cannot be had, and then this side is no reference.
        own: the outputs in arithmetic of a given width, with numbers as short as file formats have them; None if only `runs`
            can be had.
        rounding: samples of what arithmetic in the stored dtype does to the outputs; None if they cannot be had.
        jumps: it rounds or compares, so that a rounding may make a whole step.
        sensitive: the smallest change of its weights on a case that a judge sees; None if that cannot be had.
        notes: for the reader of the evidence.
        called: a program or a module as its user calls it, guards included, where `runs` has an inner form of it.
    """

    name: str
    runtime: str
    runs: Mapping[str, Runner]
    wide: Runner | None = None
    nudged: Callable[[Case, float | None, int], Sequence[Tensor]] | None = None
    own: Callable[[Case, torch.dtype], Sequence[Tensor]] | None = None
    rounding: Callable[[Case], Samples] | None = None
    jumps: bool = False
    sensitive: Callable[[Case, Judge], Sensitivity | None] | None = None
    notes: tuple[str, ...] = ()
    called: Runner | None = None


def program_side(
    name: str,
    program: Program,
    *,
    calls: Program | None = None,
    call: ModelCall | None = None,
    state: bool = True,
    short: bool = False,
    other: Program | None = None,
) -> Side:
    """A program.

    Args:
        name: how the user named it.
        program: what runs.
        calls: the program whose inputs the cases are made of, where it is another.
        call: calls what the user has, which the program was made from.
        state: compare the tensors that it updates too, which a runtime does not give.
        short: the numbers of its code, such as a slope of 0.01, count as float32, which files hold. Torch's kernels outside
            float64 have them so too, and there the truth is computed with them; in float64 they are a part of the noise.
        other: the program that this one is compared with; both get inputs that the coarser one can hold, and only the weights
            that differ are noise, by roundings of the coarser one.
    """
    coarse = coarser_inputs(program, other) if other else None
    unit = max(rounding_of(each) for each in (program, other) if each)
    weights = nudges(program, other) if other else lambda size, draw: nudged(size or unit, draw=draw)
    rough = unit if unit > rounding_of(program) else None
    held = (*NARROW, torch.float64) if short else ()
    read = list(program.stored.values())
    outputs = None if state else sum(s.kind.name == "USER_OUTPUT" for s in program.exported.graph_signature.output_specs)

    def flat(case: Case) -> Sequence[Any]:
        values = [each.to(coarse) if coarse and is_float(each) else each for each in case.flat]
        if calls is None and coarse is None:
            return values
        args, kwargs = pytree.tree_unflatten(values, (calls or program).exported.call_spec.in_spec)
        return flat_inputs(program, args, kwargs, cast=True)

    def on(case: Case, **how: Any) -> Sequence[Tensor]:
        return run(program, flat(case), **how)[:outputs]

    def as_called(case: Case) -> Sequence[Tensor]:
        assert call is not None
        return on_cases(call, program)(replace(case, flat=tuple(flat(case))))[:outputs]

    return Side(
        name,
        f"PyTorch {torch.__version__}",
        {"": on},
        lambda case: on(case, wide=True, short=NARROW if short else ()),
        lambda case, size, draw: on(case, wide=True, short=held, weights=weights(size, draw)),
        lambda case, width: on(case, wide=True, width=width, short=held),
        lambda case: [each[:outputs] for each in samples_of_rounding(program, flat(case), size=rough)],
        jumping(program),
        lambda case, judge: sensitivity(
            program, read, lambda weights: on(case, wide=True, short=NARROW if short else (), weights=weights), judge
        ),
        _rounded_numbers(program) if short else (),
        as_called if call else None,
    )


def is_float(value: Any) -> bool:
    """Whether a value is a tensor of floats."""
    return isinstance(value, Tensor) and value.is_floating_point()


def _rounded_numbers(program: Program) -> tuple[str, ...]:
    """What to say of a program in float64 whose code has numbers that float32 does not hold."""
    found = [f"{number:g} of {node.name}" for node in program.graph.nodes for number in numbers_cut(node)]
    told = f"files hold the numbers of a model's code as float32, so they were compared so: {listed(found, 3)}"
    return (told,) if found else ()


def called_side(name: str, call: Runner) -> Side:
    """A model that can only be called."""
    return Side(name, f"PyTorch {torch.__version__}", {"": call})


def on_cases(call: ModelCall, program: Program) -> Runner:
    """A call with arguments, on cases whose inputs are those of a program."""

    def run_case(case: Case) -> Sequence[Tensor]:
        args, kwargs = pytree.tree_unflatten(list(case.flat), program.exported.call_spec.in_spec)
        return call(args, kwargs)

    return run_case


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
        (lambda case, size, draw: shaken(case)) if shaken else None,
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
    wanted = ", ".join(map(_port_text, artifact.inputs))
    if len(order) != len(names) or not all(
        _fits(theirs, ports[place]) for theirs, place in zip(artifact.inputs, order, strict=True)
    ):
        given = ", ".join(_port_text(port) for port in ports if port is not None)
        raise InputError(f"{artifact.name} takes the inputs {wanted}; the other model takes {given}")
    return order


def _fits(port: Port, other: Port | None) -> bool:
    if other is None or port.dtype != other.dtype:
        return False
    if port.shape is None or other.shape is None:
        return True
    pairs = zip(port.shape, other.shape, strict=False)
    return len(port.shape) == len(other.shape) and all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))


def _port_text(port: Port) -> str:
    sizes = "…" if port.shape is None else ", ".join("?" if size is None else str(size) for size in port.shape)
    return f"{port.name}: {str(port.dtype).removeprefix('torch.')}[{sizes}]"
