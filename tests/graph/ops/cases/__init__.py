"""A case for every row of the table, by what the operators do."""

from tests.graph.ops.calls import CASES, HIDING
from tests.graph.ops.cases import axes, elementwise, hiding, norms, picking, products, sums

__all__ = ["CASES", "HIDING", "axes", "elementwise", "hiding", "norms", "picking", "products", "sums"]
