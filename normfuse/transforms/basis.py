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
from typing import Protocol

from normfuse.graph.edits import Call, Expression
from normfuse.graph.formula import Apply, Centered, Formula
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
        centred = of if isinstance(of, Centered) and of.dim == dim else Centered(of, dim)
        return Apply("slice.Tensor", (centred, dim, 0, d - 1))

    def read(self, of: Formula, dim: int, d: int) -> Formula:
        """See `ChangeOfBasis.read`: column i less the last one, as the last entry is minus the sum of the others."""
        return Apply("sub.Tensor", (_first(of, dim, d), _last(of, dim, d)))

    def narrowed(self, x: Expression, axis: int, d: int, half: bool) -> Expression:
        """See `Basis.narrowed`."""
        mean = Call("mean.dim", (x, (axis,), True), "float32" if half else None)
        return _like(Call("sub.Tensor", (Call("slice.Tensor", (x, axis, 0, d - 1)), mean)), x, half)

    def widened(self, y: Expression, axis: int, d: int, half: bool) -> Expression:
        """See `Basis.widened`."""
        last = Call("neg.default", (_sum(y, axis, half),))
        return Call("cat.default", ((y, _like(last, y, half)), axis))

    def normalized(self, y: Expression, axis: int, rank: int, d: int, eps: float, half: bool) -> Expression:
        """See `Basis.normalized`: y / √((Σy² + (Σy)²)/d + ε)."""
        wide = Call("_to_copy.default", (y,), "float32") if half else y
        total = Call("sum.dim_IntList", (wide, (axis,), True))
        squares = Call("sum.dim_IntList", (Call("mul.Tensor", (wide, wide)), (axis,), True))
        both = Call("add.Tensor", (squares, Call("mul.Tensor", (total, total))))
        root = Call("rsqrt.default", (Call("add.Tensor", (Call("mul.Tensor", (both, 1.0 / d)), eps)),))
        return _like(Call("mul.Tensor", (wide, root)), y, half)


@dataclass(frozen=True)
class Rotated:
    """Coordinates in an orthonormal basis of the zero-mean vectors."""

    becomes: str = "rms_norm"
    resizes: bool = True

    def written(self, of: Formula, dim: int, d: int) -> Formula:
        """See `ChangeOfBasis.written`: Qᵀ along ``dim``."""
        of = of.of if isinstance(of, Centered) and of.dim == dim else of
        by_sum, by_last = 1.0 / (sqrt(d) * (sqrt(d) + 1.0)), 1.0 / (sqrt(d) + 1.0)
        total = Apply("sum.dim_IntList", (of, (dim,), True))
        less = Apply("sub.Tensor", (_first(of, dim, d), total), (("alpha", by_sum),))
        return Apply("sub.Tensor", (less, _last(of, dim, d)), (("alpha", by_last),))

    def read(self, of: Formula, dim: int, d: int) -> Formula:
        """See `ChangeOfBasis.read`: Q on the other side, times √(d/(d-1)), as the root is over d - 1 entries."""
        return Apply("mul.Tensor", (self.written(of, dim, d), sqrt(d / (d - 1.0))))

    def narrowed(self, x: Expression, axis: int, d: int, half: bool) -> Expression:
        """See `Basis.narrowed`."""
        first, last = (Call("slice.Tensor", (x, axis, *ends)) for ends in ((0, d - 1), (d - 1, d)))
        by_sum = Call("mul.Tensor", (_sum(x, axis, half), 1.0 / (sqrt(d) * (sqrt(d) + 1.0))))
        by_last = Call("mul.Tensor", (last, 1.0 / (sqrt(d) + 1.0)))
        return _like(Call("sub.Tensor", (first, Call("add.Tensor", (by_sum, by_last)))), x, half)

    def widened(self, y: Expression, axis: int, d: int, half: bool) -> Expression:
        """See `Basis.widened`."""
        total = _sum(y, axis, half)
        first = Call("sub.Tensor", (y, Call("mul.Tensor", (total, 1.0 / (sqrt(d) * (sqrt(d) + 1.0))))))
        last = Call("mul.Tensor", (total, -1.0 / sqrt(d)))
        return _like(Call("cat.default", ((first, last), axis)), y, half)

    def normalized(self, y: Expression, axis: int, rank: int, d: int, eps: float, half: bool) -> Expression:
        """See `Basis.normalized`: rms_norm with ε' = ε·d/(d-1); torch's is over the last axis and accumulates in float32."""
        last = rank - 1
        along = y if axis == last else Call("transpose.int", (y, axis, last))
        scaled = Call("rms_norm.default", (along, (d - 1,), None, eps * d / (d - 1.0)))
        return scaled if axis == last else Call("transpose.int", (scaled, axis, last))


def _first(of: Formula, dim: int, d: int) -> Formula:
    return Apply("slice.Tensor", (of, dim, 0, d - 1))


def _last(of: Formula, dim: int, d: int) -> Formula:
    return Apply("slice.Tensor", (of, dim, d - 1, d))


def _sum(x: Expression, axis: int, half: bool) -> Call:
    return Call("sum.dim_IntList", (x, (axis,), True), "float32" if half else None)


def _like(value: Call, like: Expression, half: bool) -> Call:
    return Call("type_as.default", (value, like)) if half else value
