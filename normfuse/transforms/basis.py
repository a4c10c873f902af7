"""Two ways to store a vector x of d entries whose mean is zero as d - 1 numbers.

Each is a pair of linear maps: y = Px is stored, x = Ly is meant, and LPx = x wherever x has zero mean. Stored tensors that
write such a vector become PC₀W, those that read it WL, and the norm's root is that of x, computed from y.

Compressed
    y is x without its last entry, which is minus the sum of the others. ‖x‖² = Σy² + (Σy)² (Jiang et al. 2023, §3.3).
Rotated
    y = Qᵀx with QᵀQ = I and Qᵀ1 = 0, so ‖x‖² = ‖y‖² and an ordinary RMSNorm over d - 1 entries serves. Q is all but the last
    column of the Householder reflection I - 2vvᵀ/‖v‖² with v = 1/√d + e_d, which sends 1/√d to -e_d. With r = √d:
    (Qᵀx)ᵢ = xᵢ - Σx/(r(r+1)) - x_d/(r+1);  (Qy)ᵢ = yᵢ - Σy/(r(r+1)) and (Qy)_d = -Σy/r.
    As Qᵀ takes the mean away by itself, writers become QᵀW; and as L is Q, what is done to readers is the same map.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Protocol, cast

from normfuse.graph.expressions import FLOAT32, Call, Expression, Formula
from normfuse.transforms.maps import ChangeOfBasis


class Basis(ChangeOfBasis, Protocol):
    """How the zero-mean vectors of one axis are stored in one entry less.

    What is `written` need not have zero mean before, and what is `read` is multiplied with the *normalized* vectors.
    """

    @property
    def becomes(self) -> str:
        """What the norms are called that read them."""

    def narrowed(self, x: Expression, axis: int, d: int, half: bool) -> Expression:
        """What stores x less its mean; ``half`` where x is of a half precision, in which no sum is taken."""

    def widened(self, y: Expression, axis: int, d: int, half: bool) -> Expression:
        """The d entries that are meant."""

    def normalized(self, y: Expression, axis: int, rank: int, d: int, eps: float, half: bool) -> Expression:
        """What is stored of the RMSNorm of the d entries that are meant, up to what `read` makes up for."""


@dataclass(frozen=True)
class Compressed:
    """All entries but the last."""

    becomes: str = "crms_norm"
    resizes: bool = True

    def written(self, of: Formula, dim: int, d: int) -> Formula:
        """See `ChangeOfBasis.written`."""
        return _first(_uncentered(of, dim).centered(dim), dim, d)

    def read(self, of: Formula, dim: int, d: int) -> Formula:
        """See `ChangeOfBasis.read`: column i less the last one, as the last entry is minus the sum of the others."""
        return _first(of, dim, d) - _last(of, dim, d)

    def narrowed(self, x: Expression, axis: int, d: int, half: bool) -> Expression:
        """See `Basis.narrowed`."""
        mean = Call("mean.dim", (x, (axis,), True), FLOAT32 if half else ())
        return _like(_first(x, axis, d) - mean, x, half)

    def widened(self, y: Expression, axis: int, d: int, half: bool) -> Expression:
        """See `Basis.widened`."""
        return Call("cat.default", ((y, _like(-_sum(y, axis, half), y, half)), axis))

    def normalized(self, y: Expression, axis: int, rank: int, d: int, eps: float, half: bool) -> Expression:
        """See `Basis.normalized`: y / √((Σy² + (Σy)²)/d + ε)."""
        wide = Call("_to_copy.default", (y,), FLOAT32) if half else y
        total, squares = _sum(wide, axis), _sum(wide * wide, axis)
        root = Call("rsqrt.default", ((squares + total * total) * (1.0 / d) + eps,))
        return _like(wide * root, y, half)


@dataclass(frozen=True)
class Rotated:
    """Coordinates in an orthonormal basis of the zero-mean vectors."""

    becomes: str = "rms_norm"
    resizes: bool = True

    def written(self, of: Formula, dim: int, d: int) -> Formula:
        """See `ChangeOfBasis.written`: Qᵀ along ``dim``."""
        of = _uncentered(of, dim)
        by_sum, by_last = _shares(d)
        less = Call("sub.Tensor", (_first(of, dim, d), _sum(of, dim)), (("alpha", by_sum),))
        return Call("sub.Tensor", (less, _last(of, dim, d)), (("alpha", by_last),))

    def read(self, of: Formula, dim: int, d: int) -> Formula:
        """See `ChangeOfBasis.read`: Q on the other side, times √(d/(d-1)), as the root is over d - 1 entries."""
        return self.written(of, dim, d) * sqrt(d / (d - 1.0))

    def narrowed(self, x: Expression, axis: int, d: int, half: bool) -> Expression:
        """See `Basis.narrowed`."""
        by_sum, by_last = _shares(d)
        return _like(_first(x, axis, d) - (_sum(x, axis, half) * by_sum + _last(x, axis, d) * by_last), x, half)

    def widened(self, y: Expression, axis: int, d: int, half: bool) -> Expression:
        """See `Basis.widened`."""
        total = _sum(y, axis, half)
        by_sum, _ = _shares(d)
        return _like(Call("cat.default", ((y - total * by_sum, total * (-1.0 / sqrt(d))), axis)), y, half)

    def normalized(self, y: Expression, axis: int, rank: int, d: int, eps: float, half: bool) -> Expression:
        """See `Basis.normalized`: rms_norm with ε' = ε·d/(d-1); torch's is over the last axis and accumulates in float32."""
        last = rank - 1
        along = y if axis == last else Call("transpose.int", (y, axis, last))
        scaled = Call("rms_norm.default", (along, (d - 1,), None, eps * d / (d - 1.0)))
        return scaled if axis == last else Call("transpose.int", (scaled, axis, last))


def _first(of: Expression, dim: int, d: int) -> Call:
    return Call("slice.Tensor", (of, dim, 0, d - 1))


def _last(of: Expression, dim: int, d: int) -> Call:
    return Call("slice.Tensor", (of, dim, d - 1, d))


def _uncentered(of: Formula, dim: int) -> Formula:
    """A stored tensor before it was centred along ``dim``, if that was the last that was done to it."""
    match of:
        case Call("center", (inner,), (("dim", own),)) if own == dim:
            return cast("Formula", inner)
        case _:
            return of


def _shares(d: int) -> tuple[float, float]:
    """What Qᵀ takes away of the sum of all entries, and of the last one: 1/(r(r+1)) and 1/(r+1)."""
    return 1.0 / (sqrt(d) * (sqrt(d) + 1.0)), 1.0 / (sqrt(d) + 1.0)


def _sum(x: Expression, axis: int, half: bool = False) -> Call:
    return Call("sum.dim_IntList", (x, (axis,), True), FLOAT32 if half else ())


def _like(value: Call, like: Expression, half: bool) -> Call:
    return Call("type_as.default", (value, like)) if half else value
