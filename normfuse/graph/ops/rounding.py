"""Operators without a row whose results are no smooth functions of numbers: known by name, whatever the overload."""

from __future__ import annotations

from torch.fx import Node

from normfuse.graph.nodes import operator_name
from normfuse.graph.views import aten

_GRIDS = frozenset({"round", "floor", "ceil", "trunc", "sign"})
_STEPS = _GRIDS | {
    "frac", "sgn", "heaviside", "remainder", "fmod", "floor_divide", "sort", "topk", "max", "min", "median", "mode", "kthvalue",
}  # fmt: skip
_BITS = frozenset({aten.view.dtype, aten.nextafter.default, aten.frexp.Tensor})


def rounds(node: Node) -> bool:
    """Whether a call puts values on a grid: a weight that is quantized so keeps its quantizer, and is never stored as it is."""
    return operator_name(node).partition(".")[0] in _GRIDS or "quantize" in str(node.target)


def has_steps(node: Node) -> bool:
    """Whether the result of a call jumps though it is a float; all whose results are integers of floats do."""
    divides = node.target is aten.div.Tensor_mode and node.kwargs.get("rounding_mode") is not None
    return operator_name(node).partition(".")[0] in _STEPS or rounds(node) or divides


def reads_bits(node: Node) -> bool:
    """Whether a call reads the bits of a number, which are others in float64."""
    return node.target in _BITS
