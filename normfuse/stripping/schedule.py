"""When each norm is removed: the published order, from the number of layers, a first step and three gaps.

Reference
    Baroni et al., arXiv 2507.02559, 2025, §3 and its configurations; the table is in `tests/stripping/test_schedule.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from normfuse.errors import NormfuseError

Kind: TypeAlias = Literal["mlp", "main", "values", "final", "end_of_text", "first_token"]
"""What is removed: the norm before an MLP; of the norm before an attention the path of queries and keys, then that of values;
the last norm; the σ that tokens which end a text, and then the first token, have for themselves."""


@dataclass(frozen=True, order=True)
class Event:
    """One removal.

    Attributes:
        step: the optimizer step at whose beginning it happens, from 0.
        layer: the layer concerned, from 0; 0 where it concerns none.
        kind: what is removed.
    """

    step: int
    layer: int
    kind: Kind


@dataclass(frozen=True)
class Schedule:
    """Steps at which norms are removed, block by block: all MLP norms, all QK paths, all V paths, the final norm.

        mlp(i) = start + i·g₁,  main(i) = start + L·g₁ + i·g₂,  values(i) = start + L·(g₁ + g₂) + i·g₃,
        final = start + L·(g₁ + g₂ + g₃),  end of text 2 steps and first token 12 steps later.

    Attributes:
        layers: L.
        start: the step of the first removal; at least one step must measure σ before it.
        gaps: steps between two layers: for MLP norms g₁, QK paths g₂ and V paths g₃. 0 removes all layers at once.

    Raises:
        NormfuseError: no layers, a first step below 1, or a gap below 0.
    """

    layers: int
    start: int
    gaps: tuple[int, int, int]

    def __post_init__(self) -> None:
        if self.layers < 1 or self.start < 1 or len(self.gaps) != 3 or min(self.gaps) < 0:
            hint = "at least one layer, a start of 1 or later (σ is measured before), and three gaps that are not negative"
            raise NormfuseError(f"no schedule begins at step {self.start} with gaps {self.gaps}", hint=hint)

    def __iter__(self) -> Iterator[Event]:
        """Every removal, in order."""
        first, kinds = self.start, ("mlp", "main", "values")
        for kind, gap in zip(kinds, self.gaps, strict=True):
            yield from (Event(first + layer * gap, layer, kind) for layer in range(self.layers))  # type: ignore[arg-type]
            first += self.layers * gap
        yield Event(first, 0, "final")
        yield Event(first + 2, 0, "end_of_text")
        yield Event(first + 12, 0, "first_token")

    @property
    def last(self) -> int:
        """The step of the last norm's removal."""
        return self.start + self.layers * sum(self.gaps)

    def steps(self, kind: Kind) -> list[int]:
        """The steps at which things of one kind are removed."""
        return [event.step for event in self if event.kind == kind]
