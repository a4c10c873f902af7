"""The columns of the table of operators: what may be known of one, and the answers that there are.

Every row answers every column. "No" is an answer too, and says why (`No`), so that what is missing is missing on purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, TypeAlias, TypeVar

from torch.fx import Node

from normfuse.graph.views import NormKind

Carried: TypeAlias = tuple[tuple[Node, int], ...] | None
Carrying: TypeAlias = Callable[[Node, dict[str, Any], int], Carried]
"""Told of a call, its arguments and an axis of its result."""
Hiding: TypeAlias = Callable[[Node, dict[str, Any], Node], frozenset[int]]
"""Told of a call, its arguments and one of its operands."""
Condition: TypeAlias = Callable[[dict[str, Any]], bool]
"""Told of a call's arguments."""
Following: TypeAlias = Callable[[Node, dict[str, Any], int], bool]
"""Told of a call, its arguments and an axis of its result."""


@dataclass(frozen=True)
class No:
    """The answer "no", and why."""

    why: str

    def __bool__(self) -> Literal[False]:
        """It is false."""
        return False


class Keeps(Enum):
    """How a result consists of the entries of the call's first operand, unchanged."""

    COPY = "every entry at its place"
    CAST = "every entry at its place, in another dtype"
    RESHAPE = "every entry in row-major order, in other axes"
    PERMUTE = "every entry, the axes in another order"
    EXPAND = "every entry, repeated along axes of size one and along new ones"
    REPEAT = "every entry, repeated"
    PICK = "some of the entries, or all of them in another order"
    LOOKUP = "the entries that an index names"


MOVES = frozenset({Keeps.COPY, Keeps.RESHAPE, Keeps.PERMUTE})
"""Every entry once, in its own dtype."""
SAME = MOVES | {Keeps.CAST}
"""Every entry once."""


class Computes(Enum):
    """What is computed: entry by entry down to `CHOICE`, of all entries along axes further on."""

    SUM = "self + alpha * other"
    DIFFERENCE = "self - alpha * other"
    PRODUCT = "self * other"
    QUOTIENT = "self / other"
    ALGEBRAIC = "another rational function"
    ROOT = "a power, which may be a root"
    CHOICE = "one of two entries, as a mask says"
    STATISTIC = "a mean, a sum, a variance or a norm, which the order of the entries does not change"
    DEVIATION = "the root of a variance"
    SOFTMAX = "positive weights with the sum one along `dim`"
    FILL = "the same entry everywhere"


ALGEBRAIC = frozenset(
    {Computes.SUM, Computes.DIFFERENCE, Computes.PRODUCT, Computes.QUOTIENT, Computes.ALGEBRAIC, Computes.ROOT}
)
"""Rational functions and roots, entry by entry: two of them that agree on generic numbers agree everywhere."""
ENTRYWISE = ALGEBRAIC | {Computes.CHOICE}
STATISTICS = frozenset({Computes.STATISTIC, Computes.DEVIATION})
ROOTS = frozenset({Computes.ROOT, Computes.DEVIATION})


@dataclass(frozen=True)
class Layer:
    """A product of a value's channels with a weight, and a bias: the names of these operands.

    Attributes:
        transposed: whether the weight has the channels that enter first; or the name of the argument that says so.
    """

    transposed: bool | str
    value: str = "input"
    weight: str = "weight"
    bias: str = "bias"


@dataclass(frozen=True)
class Product:
    """A matrix product: the names of its factors, and of a term that is added or None."""

    value: str
    weight: str
    term: str | None = None


@dataclass(frozen=True)
class Mean:
    """Sums of values along the axis before their last, with weights of the call's own making: the name of the values."""

    values: str


@dataclass(frozen=True)
class Normalization:
    """A norm of ``input`` with a gain ``weight``, a shift ``bias`` where there is one, and an ``eps``.

    Attributes:
        kind: what it computes.
        axes: those that statistics are taken over, told of the call's arguments.
    """

    kind: NormKind
    axes: Callable[[dict[str, Any]], tuple[int, ...]]


@dataclass(frozen=True)
class Sized:
    """The call says the sizes of its result, one for each axis, in the argument of this name."""

    argument: str


@dataclass(frozen=True)
class Operator:
    """One row: what is known of an operator.

    Attributes:
        carries: which operands, each along which of its own axes, a linear map M along an axis of the result must be applied to
            instead: M(op(x, …)) = op(Mx, …). () where the result has zero mean for no reason; None where M does not pass.
        hides: the axes of an operand along which a shift of it leaves the result as it is; `everything` where the call reads
            no entry at all.
        shift: whether a constant that is added to all carried operands along the carried axis is added to the result; or when.
        keeps: how the result consists of the first operand's entries.
        computes: what is computed, where passes need to know.
        role: the names of factors, where the call is a product that passes fold into; or the norm that it is.
        width: whether the result may get another size along a carried axis: with its operands, when, or where sizes are said.
    """

    carries: Carrying | No
    hides: Hiding | No
    shift: Literal[True] | Condition | No
    keeps: Keeps | No
    computes: Computes | No
    role: Layer | Product | Mean | Normalization | No
    width: Literal[True] | Sized | Following | No


_Rule = TypeVar("_Rule", bound=Carrying | No)

TABLE: dict[Any, Operator] = {}
"""The rows by operator; read by `normfuse.graph.ops.lookup` and `normfuse.graph.ops.sizes`."""


def operators(*targets: Any, **columns: Any) -> Callable[[_Rule], _Rule]:
    """Give operators a row with these columns: the one that is decorated, or called with `No`, is `Operator.carries`."""

    def add(carries: _Rule) -> _Rule:
        TABLE.update(dict.fromkeys(targets, Operator(carries, **columns)))
        return carries

    return add


def everything(node: Node, a: dict[str, Any], operand: Node) -> frozenset[int]:
    """Every axis of an operand is hidden: the call asks for its shape or dtype and reads no entry."""
    value = operand.meta.get("val")
    return frozenset(range(max(getattr(value, "ndim", 0), 1)))


NO_MAP = No("no linear map along an axis of its result is one of its operands")
SEEN = No("a shift of an operand is seen in its result")
SCALES = No("a shift is changed on its way")
ONCE = No("it adds, so that it takes a shift once and not with each operand")
COMPUTED = No("its entries are computed")
JOINS = No("its entries are those of several operands")
PLAIN = No("it computes nothing that passes ask for")
NO_WEIGHT = No("it is no product that passes fold into")
INDEXED = No("an index or a mask among its operands is as wide as the result, and stays so")
NOT_CARRIED = No("no axis is carried")

WITHOUT_ROW = {
    "nan_to_num": "a bound on single entries: a shift of one that is infinite is lost",
    "nansum": "skips entries by their value",
    "clamp": "a bound on single entries",
    "relu": "a bound on single entries",
    "amax": "picks entries by their value",
    "sort": "moves entries by their value",
    "median": "picks entries by their value",
    "cumprod": "multiplies the entries of one operand",
    "index_reduce": "multiplies or bounds entries",
    "scatter_reduce": "multiplies or bounds entries",
    "as_strided": "its axes are memory, not the operand's",
    "cross": "mixes the three entries of its axis, and is a product of both operands",
    "fft_fft": "its results are complex, which no stored tensor is made of",
    "fft_rfft": "its results are complex, which no stored tensor is made of",
    "fft_irfft": "its operands are complex, which no stored tensor is made of",
    "kron": "an axis of the result is two of the operands'",
    "cdist": "distances: no axis of the result is a feature",
}
"""Operators that were thought of and have no row, each with the reason."""
