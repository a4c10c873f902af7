"""LayerNorms whose eps swallows the variance: v + eps rounds to eps in the dtype that the norm works in, so it is linear.

LayerNorm-free models are published as LayerNorms with ε = 10¹² and gains 10⁶/σ times as large. As stored, the norm computes
(x - mean x)/√ε ⊙ γ + β while v is below a quarter of the spacing of floats at ε: ε·2⁻²⁵ in float32. That is arithmetic, not a
list of such models; what v is, is measured, on the example inputs and on the hostile variants that the proof makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from normfuse.analysis.facts import analyze
from normfuse.graph.edits import Reroute, apply
from normfuse.graph.expressions import FLOAT32, Call, Expression, Ref
from normfuse.graph.interpreter import run
from normfuse.graph.ops.lookup import rank
from normfuse.graph.program import Program
from normfuse.graph.views import HALVES, Norm, NormKind, dtype

DUST = 2.0**-8
"""A norm whose gain does not bring its output to this size anywhere was not seen at work: its input was constant by chance."""


def swallowed_up_to(norm: Norm) -> float:
    """The variance below which v + eps rounds to eps; torch's own operator works in float32 for all narrower dtypes."""
    kinds = [dtype(node) for node in (norm.x, *norm.inner)]
    floats = [each for each in kinds if each is not None and each.is_floating_point]
    if not norm.by_hand:
        floats = [torch.float32 if each in HALVES else each for each in floats]
    return norm.eps * min(torch.finfo(each).eps for each in floats) / 4


def off_by(norm: Norm, variance: float) -> float:
    """How far 1/√(v + eps) is from 1/√eps, relative, for variances up to this one."""
    return 1.0 - (1.0 + variance / norm.eps) ** -0.5 if variance > 1e-8 * norm.eps else variance / (2.0 * norm.eps)


def over_last_axis(program: Program) -> list[Norm]:
    """The LayerNorms over the last axis alone."""
    return [norm for norm in analyze(program).norms if norm.kind == NormKind.LAYER_NORM and norm.axes == (rank(norm.x) - 1,)]


def largest_variances(program: Program, norms: Iterable[Norm], cases: Iterable[Sequence[Any]]) -> dict[str, float]:
    """The largest variance that each norm meets, by the name of its node; only of those where none is above eps.

    Args:
        program: that the norms are of.
        norms: over the last axis.
        cases: flat inputs, the user's own first; one on which the program does not run is left out.
    """
    left = {norm.out.name: norm for norm in norms}
    most = dict.fromkeys(left, 0.0)
    for place, flat in enumerate(cases):
        if not left:
            break
        try:
            seen = _variances(program, left, flat)
        except Exception:
            if place == 0:
                raise
            continue
        most = {name: max(most[name], seen.get(name, float("inf"))) for name in left}
        left = {name: norm for name, norm in left.items() if most[name] <= norm.eps}  # nan is not
    return {name: most[name] for name in left}


def _variances(program: Program, norms: Mapping[str, Norm], flat: Sequence[Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    readers = {reader: norm for norm in norms.values() for reader in norm.inner if norm.x in reader.all_input_nodes}

    def beside(node: Node, read: Sequence[Any], value: Any, own: bool) -> Any:
        norm = readers.get(node)
        if norm is not None and norm.out.name not in found:
            x: Tensor = read[node.all_input_nodes.index(norm.x)]
            found[norm.out.name] = float(x.detach().double().var(-1, correction=0).max()) if x.numel() else 0.0
        return value

    run(program, flat, wide=True, beside=beside)
    return found


def measured(program: Program, cases: Callable[[], Iterable[Sequence[Any]]]) -> Callable[[Norm], float | None]:
    """What `Facts.variance_of` is: the largest variance that a norm of a program meets; None where it measures its input.

    The model runs when it is first asked. A norm that was never seen at work, as its input was constant, is not known either.
    """

    @cache
    def every() -> dict[str, float]:
        norms = over_last_axis(program)
        if any(program.tensor(name).is_meta for name in program.stored.values()):
            return {}
        found = largest_variances(program, norms, cases())
        return {norm.out.name: found[norm.out.name] for norm in norms if _works(program, norm, found.get(norm.out.name, 0.0))}

    return lambda norm: every().get(norm.out.name)


def _works(program: Program, norm: Norm, variance: float) -> bool:
    stored = None if norm.gain is None else program.stored.get(norm.gain.name)
    gain = 1.0 if stored is None else float(program.tensor(stored).detach().double().abs().max())
    return norm.eps > 0.0 and gain * (variance / norm.eps) ** 0.5 >= DUST


def linear(norm: Norm, sigma: float) -> Expression:
    """(x - mean x)/σ ⊙ γ + β in place of a LayerNorm over the last axis."""
    x: Expression = Ref(norm.x.name)
    half = dtype(norm.x) in HALVES
    wide = Call("_to_copy.default", (x,), FLOAT32) if half else x
    value = (wide - Call("mean.dim", (wide, (rank(norm.x) - 1,), True))) / sigma
    if norm.gain is not None:
        value = value * Ref(norm.gain.name)
    if norm.shift is not None:
        value = value + Ref(norm.shift.name)
    return Call("_to_copy.default", (value,), (("dtype", str(dtype(norm.x)).removeprefix("torch.")),)) if half else value


def as_linear(program: Program, names: Collection[str]) -> Program:
    """The program with √eps for the deviation of LayerNorms over the last axis, by the names of their nodes."""
    chosen = [norm for norm in over_last_axis(program) if norm.out.name in names]
    return apply(program, [Reroute(norm.out.name, linear(norm, norm.eps**0.5)) for norm in chosen]) if chosen else program
