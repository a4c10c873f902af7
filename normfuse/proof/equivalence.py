"""Evidence that two models, each in its own runtime, are one function up to rounding.

Neither side is trusted. The truth is computed from the reference in the widest dtype to be had: a program in float64, an
ONNX file in the widest that ONNX Runtime has kernels for. What the other side may differ by is measured on the
reference: its own error in its stored dtype, and what one rounding of every weight does to it. Where both are said to hold
the same weights (a file against the program that it was written from) only the arithmetic may differ, in the width in
which the other side ran.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from normfuse.errors import InputError, NormfuseError, first_line
from normfuse.proof.agreement import agreement, rounded
from normfuse.proof.calling import Answer, answer
from normfuse.proof.cases import Case
from normfuse.proof.differences import Difference, difference, distances, identical
from normfuse.proof.evidence import Agreement, Evidence, Rounding, Verdict
from normfuse.proof.measuring import Measured, Progress, evidence_of
from normfuse.proof.noise import DRAWS, Samples
from normfuse.proof.sides import Side

WITHOUT_TRUTH = (
    "neither model is a program or an ONNX file, so there is nothing to compute the truth from; "
    "compare each with the .pt2 or .onnx file that it was made from"
)


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
    so_far = Evidence(notes=(*a.notes, *b.notes), runtimes=(a.runtime, b.runtime))
    return evidence_of(list(cases), _Pair(a, b, same_weights).measured, so_far, progress)


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


@dataclass(frozen=True)
class _Pair:
    """Two sides, and whether they hold the very same weights."""

    a: Side
    b: Side
    same_weights: bool

    def measured(self, case: Case, first: bool) -> Measured:
        """Levels 2 and 3 of a case; and of the first all figures, and how small a change would show."""
        a = self.a
        calls = [answer(partial(side.called or next(iter(side.runs.values())), case)) for side in (a, self.b)]
        if objection := self._objection(case, *calls):
            return Measured(Evidence(objections=(objection,)))
        try:
            runs = self._runs(case, *calls)
        except Exception as error:
            if first:
                raise NormfuseError(f"the models do not run: {first_line(error)}") from error
            return Measured(Evidence(notes=(f"not run on '{case.name}': {first_line(error)}",)))
        sampled = cache(partial(a.rounding, case)) if a.rounding else None  # dear: taken once, and only if it is asked for
        excused = sampled if self.b.wide is None else None  # nothing but arithmetic in the stored dtype is to be had of it
        judge = partial(agreement, case.name, runs.truth, samples=runs.noise, more=excused, jumps=a.jumps)
        agreed = judge(runs.wide)
        more = sampled if agreed.verdict is not Verdict.DISPROVEN else None
        evidence = Evidence(
            algebra=(agreed,),
            rounding=tuple(self._rounded(case, runs, agreed, more)),
            differences=tuple(_figures(case, runs)) if first else (),
            sensitivity=a.sensitive(case, judge) if first and a.sensitive and agreed.ok else None,
        )
        return Measured(evidence, runs.truth, runs.shaken[0])

    def _objection(self, case: Case, one: Answer, other: Answer) -> str | None:
        """What calls as users make them show against equivalence: one side refuses what the other takes.

        An exported file has no guards, and the reference may refuse sizes that its ranges allow for what else it asks.

        Raises:
            InputError: both refuse the user's own inputs.
        """
        a, b = self.a, self.b
        if one.refuses and other.refuses and case.given and (a.called or b.called):
            hint = "give inputs on which the models themselves run"
            raise InputError(f"both models refuse these inputs: {one.refusal}", hint=hint)
        refusal = "{} refuses the inputs '{}', which {} takes: {}"
        if other.refuses and one.outputs is not None and b.called:
            return refusal.format(b.name, case.name, a.name, other.refusal)
        if one.refuses and other.outputs is not None and a.called and case.given:
            return refusal.format(a.name, case.name, b.name, one.refusal)
        return None

    def _runs(self, case: Case, one: Answer, other: Answer) -> _Runs:
        """The runs of a case on which neither side objects; ``one`` and ``other`` are their calls."""
        a, b = self.a, self.b
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
        if self.same_weights:  # only arithmetic in the width of the other may differ
            assert a.own is not None, "only a program is known to have the same weights"
            noise = [a.own(case, width), *(a.nudged(case, torch.finfo(width).eps, draw) for draw in range(DRAWS))]
        called = None if one.outputs is None or identical(one.outputs, usual) else one.outputs
        return _Runs(usual, called, truth, shaken, noise, wide, got)

    def _rounded(self, case: Case, runs: _Runs, agreed: Agreement, more: Callable[[], Samples] | None) -> Iterator[Rounding]:
        """A row for each way in which the other is run, and for the reference as it is called."""
        own = partial(self.b.rounding, case) if self.b.rounding and agreed.ok else None
        ways = {f"{case.name}, {how}" if how else case.name: outputs for how, outputs in runs.got.items()}
        if runs.called is not None:
            ways[f"{case.name}, {self.a.name} as it is called"] = runs.called
        for name, outputs in ways.items():
            yield rounded(name, runs.truth, runs.usual, outputs, runs.shaken, more, jumps=self.a.jumps, own=own)


def _figures(case: Case, runs: _Runs) -> list[Difference]:
    own = distances(runs.truth, runs.usual)
    found = [
        difference(case.name, how, place, truth, got, before)
        for how, outputs in runs.got.items()
        for place, (truth, got, before) in enumerate(zip(runs.truth, outputs, own, strict=False))
    ]
    return [each for each in found if each]
