"""What a comparison has really seen: outputs that are NaN everywhere, empty, or the same for all inputs are no evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normfuse.proof.differences import same_bits

GIVE_OTHERS = "give inputs on which the outputs are numbers: --inputs FILE on the command line, inputs= in Python"


@dataclass(frozen=True)
class Missing:
    """Why an answer is neither yes nor no.

    Attributes:
        reason: what was not compared, as a sentence.
        hint: what to give instead.
    """

    reason: str
    hint: str


def counts(outputs: Sequence[Tensor]) -> tuple[int, int]:
    """How many entries are finite, and how many there are."""
    return sum(int(torch.isfinite(each).sum()) for each in outputs), sum(each.numel() for each in outputs)


class Coverage:
    """What the cases together show of each output of a model.

    An output is seen where an entry of it is finite on inputs of the user's own, and where it moves: with the inputs of
    another case, or as its weights are nudged. What never moves would agree with any model that gives the same constant.
    """

    def __init__(self) -> None:
        self._first: Sequence[Tensor] | None = None
        self._finite: list[bool] = []
        self._moved: list[bool] = []
        self._cases = 0

    def add(self, truth: Sequence[Tensor], nudged: Sequence[Tensor], *, given: bool) -> None:
        """Take in one case.

        Args:
            truth: the outputs of the reference.
            nudged: the same after its weights were nudged.
            given: the inputs are the user's own.
        """
        if self._first is None:
            self._first = truth
            self._finite = self._moved = [False] * len(truth)
        self._cases += 1
        if given:
            self._finite = [seen or bool(torch.isfinite(each).any()) for seen, each in zip(self._finite, truth, strict=False)]
        both = zip(self._moved, truth, nudged, self._first, strict=False)
        self._moved = [seen or not (same_bits(each, noisy) and same_bits(each, first)) for seen, each, noisy, first in both]

    def missing(self) -> Missing | None:
        """What the cases do not show; None where they show all outputs."""
        if self._first is None:
            return Missing("nothing was compared: no case could be run", GIVE_OTHERS)
        if not self._first:
            return Missing("nothing was compared: the model gives no tensor", "compare a model that returns its results")
        filled = [place for place, each in enumerate(self._first) if each.numel()]
        if not filled:
            return Missing("nothing was compared: the outputs have no entries", f"{GIVE_OTHERS} and there is one at least")
        unseen = [place for place in filled if not self._finite[place]]
        if unseen:
            which = "every output" if unseen == filled else f"output {unseen[0]}"
            return Missing(f"nothing was compared: {which} is NaN or infinite everywhere", GIVE_OTHERS)
        floating = any(self._first[place].is_floating_point() for place in filled)
        if not any(self._moved) and (floating or self._cases > 1):
            reason = "nothing was compared: the outputs are the same whatever the inputs and the weights are"
            return Missing(reason, "give inputs, or compare an inner part of the model, whose outputs depend on its weights")
        return None
