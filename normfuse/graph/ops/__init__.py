"""What is known of every operator: a row each, in a file per family (see `normfuse.graph.ops.carrying`)."""

from normfuse.graph.ops import axes, elementwise, picking, products, sums

__all__ = ["axes", "elementwise", "picking", "products", "sums"]
