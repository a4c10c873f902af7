"""Whether the outputs of two models agree on one case: the rows of evidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from normfuse.proof.coverage import counts
from normfuse.proof.differences import distances
from normfuse.proof.evidence import MARGIN, Agreement, Rounding, Verdict, verdict_of
from normfuse.proof.judging import Judged, judged
from normfuse.proof.noise import Samples

LUCK = 1e3
"""No noise is measured so many times too small by chance."""
FLOOR = 2.0**-46
"""64 roundings of a float64: what other orders of a sum may differ by where no weight and no input has a part in it."""


def agreement(
    case: str,
    truth: Sequence[Tensor],
    got: Sequence[Tensor],
    samples: Samples,
    more: Callable[[], Samples] | None = None,
    *,
    jumps: bool = False,
    luck: float = LUCK,
) -> Agreement:
    """The row of one case.

    Args:
        case: its name.
        truth: the outputs of the reference.
        got: those of the other.
        samples: those of the reference under noise, several times.
        more: further samples, which are dear: taken only where the others, which may be small by luck, do not explain ``got``.
        jumps: a rounding may make a whole step of some entry, so that the largest step anywhere explains one here.
        luck: how far ``samples`` may be off for ``more`` to be asked for.
    """
    compared, entries = counts(truth)
    if len(truth) != len(got):
        return Agreement(case, math.inf, FLOOR, Verdict.DISPROVEN, compared, entries)

    def judge(samples: Samples) -> list[Judged]:
        every = list(zip(*samples, strict=False)) or [()] * len(truth)
        return [judged(t, g, drawn, FLOOR) for t, g, drawn in zip(truth, got, every, strict=True)]

    found = judge(samples)
    if more is not None and 1.0 < max((each.excess for each in found), default=0.0) < (math.inf if jumps else luck):
        drawn = more()
        found = [min(pair, key=lambda each: each.excess) for pair in zip(found, judge(drawn), strict=True)]
        if jumps:
            steps = [max(each) for each in zip(*(distances(truth, outputs) for outputs in drawn), strict=True)]
            errors = zip(found, distances(truth, got), steps, strict=True)
            found = [Judged(x, MARGIN * y, y) if not each.agrees and x <= MARGIN * y else each for each, x, y in errors]
    worst = max(found, key=lambda each: (not each.agrees, each.excess), default=Judged(0.0, FLOOR))
    verdict = verdict_of(all(each.agrees for each in found), compared)
    relative = max(distances(truth, got), default=0.0)
    return Agreement(case, worst.error, worst.allowed, verdict, compared, entries, worst.noise, relative)


def rounded(
    name: str,
    truth: Sequence[Tensor],
    usual: Sequence[Tensor],
    got: Sequence[Tensor],
    samples: Samples = (),
    more: Callable[[], Samples] | None = None,
    *,
    jumps: bool = False,
    own: Callable[[], Samples] | None = None,
) -> Rounding:
    """The row of one case in the stored dtypes. The reference's own error there is a sample of what another may have.

    Args:
        name: of the case.
        truth: the outputs of the reference, hardly rounded.
        usual: those of the reference in its stored dtype.
        got: those of the other in its own.
        samples: those of the reference under noise.
        more: as for `agreement`; asked for however small the others are, as a float64 model's own error is zero.
        jumps: as for `agreement`.
        own: samples of the other's own arithmetic, which are asked for where it is off by few roundings.
    """
    seen = _spared(truth, usual, got)
    row = agreement(name, truth, seen, [usual, *samples], more, jumps=jumps, luck=math.inf)
    if own is not None and not row.ok and _few_roundings(truth, got):
        row = agreement(name, truth, seen, own())
    nothing = counts(truth)[0] > 0 and counts(usual)[0] == 0  # all of it overflows, so that it is no yes
    verdict = Verdict.NOT_COMPARED if nothing and row.ok else row.verdict
    before, after = (max(distances(truth, each), default=0.0) for each in (usual, got))
    return Rounding(name, before, after, verdict)


def _spared(truth: Sequence[Tensor], usual: Sequence[Tensor], got: Sequence[Tensor]) -> list[Tensor]:
    """``got``, with the truth where the reference itself overflows in its stored dtype: there it tells nothing of the other."""
    if len(got) != len(truth) or any(g.shape != t.shape for g, t in zip(got, truth, strict=True)):
        return list(got)
    over = [torch.isfinite(t) & ~torch.isfinite(u) for t, u in zip(truth, usual, strict=True)]
    return [torch.where(o, t, g.to(t.dtype)) if o.any() else g for o, t, g in zip(over, truth, got, strict=True)]


def _few_roundings(truth: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    """Whether outputs are off by no more than another order of the same steps may cost."""
    units = [torch.finfo(each.dtype).eps if each.is_floating_point() else 0.0 for each in outputs]
    return all(error <= MARGIN * unit for error, unit in zip(distances(truth, outputs), units, strict=False))
