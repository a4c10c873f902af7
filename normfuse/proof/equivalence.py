"""Evidence that two models, each in its own runtime, are one function up to rounding.

Neither side is trusted. The truth is computed from the reference in the widest dtype to be had: a program in float64, an
ONNX file in the widest that ONNX Runtime has kernels for. What the other side may differ by is measured on the
reference: its own error in its stored dtype, and what one rounding of every weight does to it. Where both are said to hold
the same weights (a file against the program that it was written from) only the arithmetic may differ, in the width in
which the other side ran.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

from normfuse.errors import InputError, NormfuseError, first_line, listed
from normfuse.graph.interpreter import NARROW, flat_inputs, run
from normfuse.graph.literals import numbers_cut
from normfuse.graph.program import Program
from normfuse.proof.apart import coarser_inputs, nudges
from normfuse.proof.artifacts import Artifact, Port
from normfuse.proof.calling import Answer, ModelCall, answer
from normfuse.proof.cases import Case
from normfuse.proof.coverage import Coverage
from normfuse.proof.differences import Difference, difference, identical
from normfuse.proof.evidence import MARGIN, Agreement, Evidence, Rounding, Sensitivity, Verdict
from normfuse.proof.proving import (
    DRAWS,
    Progress,
    Runner,
    Samples,
    agreement,
    distances,
    not_rounded,
    notes_of,
    nudged,
    rounding_of,
    samples_of_rounding,
    spared,
    unless_none,
)
from normfuse.proof.sensitivity import Judge, sensitivity
from normfuse.proof.steps import jumping

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


def live_side(name: str, call: Runner) -> Side:
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


def compare(
    a: Side, b: Side, cases: Iterable[Case], *, same_weights: bool = False, progress: Progress | None = None
) -> Evidence:
    """Evidence that two sides are one function.

    Args:
        a: the reference, which can be nudged.
        b: the other.
        cases: inputs to compare on.
        same_weights: ``b`` holds the very weights of ``a``, so that no rounding of weights excuses a difference.
        progress: called with (what, done, total).

    Raises:
        NormfuseError: neither side can be the reference, or a model does not run on the user's own inputs.
    """
    if a.nudged is None:
        raise NormfuseError(WITHOUT_TRUTH)
    algebra: list[Agreement] = []
    rounding: list[Rounding] = []
    figures: list[Difference] = []
    objections: list[str] = []
    notes = [*a.notes, *b.notes]
    everything, coverage, seen = list(cases), Coverage(), None
    for done, case in enumerate(everything):
        if progress:
            progress(case.name, done, len(everything))
        calls = _calls(a, b, case)
        if objection := _objection(a, b, case, *calls):
            objections.append(objection)
            continue
        try:
            runs = _runs(a, b, case, same_weights, *calls)
        except Exception as error:
            if done == 0:
                raise NormfuseError(f"the models do not run: {first_line(error)}") from error
            notes.append(f"not run on '{case.name}': {first_line(error)}")
            continue
        coverage.add(runs.truth, runs.shaken[0], given=case.given or done == 0)
        judge, sampled = _judge(a, b, case, runs)
        agreed, rows = _judged(a, b, case, runs, judge, sampled)
        algebra.append(agreed)
        rounding += rows
        if done == 0:
            figures += _figures(case, runs)
            seen = a.sensitive(case, judge) if a.sensitive and agreed.ok else None
    return Evidence(
        algebra=tuple(algebra),
        rounding=tuple(rounding),
        notes=(*notes, *notes_of(algebra)),
        differences=tuple(figures),
        runtimes=(a.runtime, b.runtime),
        objections=tuple(objections),
        missing=coverage.missing() or not_rounded(rounding),
        sensitivity=seen,
    )


def _calls(a: Side, b: Side, case: Case) -> tuple[Answer, Answer]:
    """What both sides give when they are called as their users call them."""
    one, other = (answer(partial(side.called or next(iter(side.runs.values())), case)) for side in (a, b))
    return one, other


def _objection(a: Side, b: Side, case: Case, one: Answer, other: Answer) -> str | None:
    """What calls show against equivalence: one side refuses what the other takes.

    An exported file has no guards, and the reference may refuse sizes that its ranges allow for what else it asks.

    Raises:
        InputError: both refuse the user's own inputs.
    """
    if one.refuses and other.refuses and case.given and (a.called or b.called):
        hint = "give inputs on which the models themselves run"
        raise InputError(f"both models refuse these inputs: {one.refusal}", hint=hint)
    refusal = "{} refuses the inputs '{}', which {} takes: {}"
    if other.refuses and one.outputs is not None and b.called:
        return refusal.format(b.name, case.name, a.name, other.refusal)
    if one.refuses and other.outputs is not None and a.called and case.given:
        return refusal.format(a.name, case.name, b.name, one.refusal)
    return None


@dataclass(frozen=True)
class _Runs:
    """The outputs of both sides on one case.

    Attributes:
        usual: of the reference in its stored dtype.
        called: of the reference as its user calls it, where these are others.
        truth: of the reference with as little rounding as can be had.
        shaken: of the reference after its weights were nudged, once for each draw.
        noise: what explains a difference of the other in little rounding.
        wide: of the other with as little rounding as can be had.
        got: how the other was run -> its outputs.
    """

    usual: Sequence[Tensor]
    called: Sequence[Tensor] | None
    truth: Sequence[Tensor]
    shaken: Samples
    noise: Samples
    wide: Sequence[Tensor]
    got: Mapping[str, Sequence[Tensor]]


def _runs(a: Side, b: Side, case: Case, same_weights: bool, one: Answer, other: Answer) -> _Runs:
    """The runs of a case on which neither side objects; ``one`` and ``other`` are the calls of ``a`` and ``b``."""
    assert a.nudged is not None
    if a.called and one.refuses:
        raise NormfuseError(f"{a.name} refuses them: {one.refusal}")
    usual = next(iter(a.runs.values()))(case) if a.called or one.outputs is None else one.outputs
    truth = a.wide(case) if a.wide else usual
    shaken = [a.nudged(case, None, draw) for draw in range(DRAWS)]
    first, *further = b.runs.items()
    got = {first[0]: first[1](case) if other.outputs is None else other.outputs}
    got |= {how: each(case) for how, each in further}
    wide = b.wide(case) if b.wide else next(iter(got.values()))
    width = next((each.dtype for each in wide if each.is_floating_point()), torch.float64)
    noise = shaken if width is torch.float64 and b.wide else [usual, *shaken]
    if same_weights:  # only arithmetic in the width of the other may differ
        assert a.own is not None, "only a program is known to have the same weights"
        noise = [a.own(case, width), *(a.nudged(case, torch.finfo(width).eps, draw) for draw in range(DRAWS))]
    called = None if one.outputs is None or identical(one.outputs, usual) else one.outputs
    return _Runs(usual, called, truth, shaken, noise, wide, got)


def _judge(a: Side, b: Side, case: Case, runs: _Runs) -> tuple[Judge, Callable[[], Samples] | None]:
    """What tells whether the two agree where little is rounded; and samples of the stored dtype's arithmetic."""
    sampled = cache(partial(a.rounding, case)) if a.rounding else None  # dear: taken once, and only if it is asked for
    excused = sampled if b.wide is None else None  # nothing but arithmetic in the stored dtype is to be had of it
    return partial(agreement, case.name, runs.truth, samples=runs.noise, more=excused, jumps=a.jumps), sampled


def _judged(
    a: Side, b: Side, case: Case, runs: _Runs, judge: Judge, sampled: Callable[[], Samples] | None
) -> tuple[Agreement, list[Rounding]]:
    """Whether the two agree where little is rounded, and in each way in which the other is run."""
    agreed = judge(runs.wide)
    excused = sampled if agreed.verdict is not Verdict.DISPROVEN else None
    before, rows = max(distances(runs.truth, runs.usual), default=0.0), []
    ways = {f"{case.name}, {how}" if how else case.name: outputs for how, outputs in runs.got.items()}
    if runs.called is not None:
        ways[f"{case.name}, {a.name} as it is called"] = runs.called
    for name, outputs in ways.items():
        seen = spared(runs.truth, runs.usual, outputs)
        row = agreement(name, runs.truth, seen, [runs.usual, *runs.shaken], excused, jumps=a.jumps, luck=math.inf)
        if b.rounding and agreed.ok and not row.ok and _few_roundings(runs.truth, outputs):
            row = agreement(name, runs.truth, seen, b.rounding(case))
        after = max(distances(runs.truth, outputs), default=0.0)
        rows.append(Rounding(name, before, after, unless_none(runs.usual, runs.truth, row.verdict)))
    return agreed, rows


def _few_roundings(truth: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    """Whether outputs are off by no more than another order of the same steps may cost."""
    units = [torch.finfo(each.dtype).eps if each.is_floating_point() else 0.0 for each in outputs]
    return all(error <= MARGIN * unit for error, unit in zip(distances(truth, outputs), units, strict=False))


def _figures(case: Case, runs: _Runs) -> list[Difference]:
    own = distances(runs.truth, runs.usual)
    found = [
        difference(case.name, how, place, truth, got, before)
        for how, outputs in runs.got.items()
        for place, (truth, got, before) in enumerate(zip(runs.truth, outputs, own, strict=False))
    ]
    return [each for each in found if each]
