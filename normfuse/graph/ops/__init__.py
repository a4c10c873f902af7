"""What is known of every operator: a row each (`row`), in a file per family; `lookup`, `sizes` and `rounding` ask for it."""

from normfuse.graph.ops import axes, elementwise, norms, picking, products, sums

__all__ = ["axes", "elementwise", "norms", "picking", "products", "sums"]
