"""Affine maps along one axis of a value: what the two walks carry.

A map is diagonal entries, a shift and a change of basis. Forward it says what a value is, given what is stored of it:
``v = scale ⊙ Lt + shift``. Backward it says what a value becomes: ``t = P(scale ⊙ v + shift)``. `Map.inverse` turns one into
the other. A change of basis is a pair (P, L) with LPv = v for every v that it is used for: centring, the d - 1 coordinates of
the vectors without a mean (`normfuse.transforms.basis`), a rotation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from normfuse.analysis.affine import product, total
from normfuse.graph.expressions import Call, Formula


class ChangeOfBasis(Protocol):
    """How vectors along one axis are stored: t = Pv, and v = Lt is meant."""

    @property
    def resizes(self) -> bool:
        """Whether t has another number of entries than v."""

    def written(self, of: Formula, dim: int, d: int) -> Formula:
        """P along ``dim`` of a stored tensor that writes v; of ``d`` entries there."""

    def read(self, of: Formula, dim: int, d: int) -> Formula:
        """L on the other side: a stored tensor that is multiplied with v along ``dim``, of ``d`` entries there."""


@dataclass(frozen=True)
class Centring:
    """P = L = C₀, which takes the mean away."""

    resizes: bool = False

    def written(self, of: Formula, dim: int, d: int) -> Formula:
        """See `ChangeOfBasis.written`."""
        return of.centered(dim)

    def read(self, of: Formula, dim: int, d: int) -> Formula:
        """See `ChangeOfBasis.read`: WC₀, as C₀ is symmetric."""
        return of.centered(dim)


@dataclass(frozen=True)
class Map:
    """``v = scale ⊙ Lt + shift`` of what is stored, or ``t = P(scale ⊙ v + shift)`` of what is to be stored.

    Attributes:
        scale: entries along the axis, or one entry; None for one.
        shift: likewise; None for zero.
        basis: P and L; None for the identity.
    """

    scale: Formula | None = None
    shift: Formula | None = None
    basis: ChangeOfBasis | None = None

    @property
    def linear(self) -> Map:
        """The map without its shift."""
        return replace(self, shift=None)

    @property
    def inverse(self) -> Map:
        """The map that undoes this one: P((v - shift) / scale) of v = scale ⊙ Lt + shift is t."""
        less = None if self.shift is None else -self.shift
        over = None if self.scale is None else Call("reciprocal.default", (self.scale,))
        return replace(self, scale=over, shift=None if less is None else product(less, over))

    @property
    def resizes(self) -> bool:
        """Whether what is stored has another number of entries than what is meant."""
        return self.basis is not None and self.basis.resizes

    def plus(self, shift: Formula | None) -> Map:
        """The map of ``v + shift``."""
        return replace(self, shift=total(self.shift, shift))

    def then(self, scale: Formula | None, shift: Formula | None) -> Map:
        """The map of ``scale ⊙ v + shift``."""
        moved = None if self.shift is None else product(self.shift, scale)
        return replace(self, scale=product(self.scale, scale), shift=total(moved, shift))

    # -- what becomes of stored tensors --------------------------------------------------------------------------------

    def read(self, weight: Formula, dim: int, d: int) -> Formula:
        """A weight that is multiplied with v along ``dim``, of ``d`` entries there: (W diag(scale)) L reads t."""
        scaled = weight if self.scale is None else weight.scaled(self.scale, dim)
        return scaled if self.basis is None else self.basis.read(scaled, dim, d)

    def written(self, of: Formula, dim: int, d: int) -> Formula:
        """A stored tensor that writes v along ``dim``, of ``d`` entries there: P(scale ⊙ W + shift) writes t."""
        scaled = of if self.scale is None else of.scaled(self.scale, dim)
        shifted = scaled if self.shift is None else scaled.shifted(self.shift, dim)
        return shifted if self.basis is None else self.basis.written(shifted, dim, d)
