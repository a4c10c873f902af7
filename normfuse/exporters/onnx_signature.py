"""What an ONNX file is called with: names, dtypes and sizes of its inputs, and the tables that they index."""

from __future__ import annotations

from typing import Any

import torch

from normfuse.errors import ExportError
from normfuse.proof.artifacts import Port

FOLLOWED = {"Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Transpose", "Expand", "Slice"}
"""Operators whose result holds the entries of their first input."""


def ports(model: Any) -> tuple[Port, ...]:
    """The inputs of an ``onnx_ir.Model`` that a caller gives; in old files, stored tensors are among the graph's inputs too.

    Raises:
        ExportError: an input is no tensor of torch, such as a string.
    """
    given = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    return tuple(Port(value.name, _dtype(value), _sizes(value), _rows_indexed(value)) for value in given)


def _dtype(value: Any) -> torch.dtype:
    name = str(value.dtype.numpy().name) if value.dtype is not None else "nothing that it names"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ExportError(f"the input '{value.name}' is a tensor of {name}, which torch does not have")
    return dtype


def _sizes(value: Any) -> tuple[int | str | None, ...] | None:
    return None if value.shape is None else tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


def _rows_indexed(value: Any) -> int | None:
    """The rows of the smallest stored table that a value indexes, through casts and views."""
    sizes = []
    for node, place in value.uses():
        table = node.inputs[0]
        if node.op_type == "Gather" and place == 1 and table is not None and table.const_value is not None:
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
            sizes.append(int(table.const_value.shape[axis]))
        elif node.op_type in FOLLOWED and place == 0:
            sizes += [rows] if (rows := _rows_indexed(node.outputs[0])) is not None else []
    return min(sizes, default=None)
