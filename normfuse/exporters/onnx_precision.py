"""The same ONNX model in a wider dtype, or with other weights: `normfuse.exporters.onnxruntime` runs it beside the file.

A float16 file computed in float32, from the same weights, shows what rounding hides. Everything that names a narrow dtype is
changed: stored tensors (their values stay), types of values, targets of casts, constants; in subgraphs and functions too.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from normfuse.exporters.onnx_walk import graphs_of, nodes_of, values_of
from normfuse.sources.packages import package

DTYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "stash_type", "softmax_precision")
"""Attributes that hold a dtype as a number."""
FLOAT32_BY_DEFAULT = {"RandomNormal": "dtype", "RandomUniform": "dtype", "HannWindow": "output_datatype",
                      "HammingWindow": "output_datatype", "BlackmanWindow": "output_datatype"}  # fmt: skip


def wider(model: Any) -> list[Any]:
    """The dtypes to compute a model in where it is to be wider than it is, the widest first."""
    halves = {_dtypes().FLOAT16, _dtypes().BFLOAT16}
    return [_dtypes().DOUBLE, *([_dtypes().FLOAT] if dtypes_of(model) & halves else [])]


def dtypes_of(model: Any) -> set[Any]:
    """Every dtype of a stored tensor or value of an ``onnx_ir.Model``."""
    held = {value.dtype for value in values_of(model)} | {tensor.dtype for _, tensor, _ in _tensors(model)}
    return held - {None}


def widen(model: Any, wide: Any) -> None:
    """Make every floating dtype narrower than ``wide`` of an ``onnx_ir.Model`` that one, in place."""
    ir = package("onnx_ir", "onnx")
    narrow = {each for each in (_dtypes().FLOAT16, _dtypes().BFLOAT16, _dtypes().FLOAT) if each.bitwidth < wide.bitwidth}
    for _, tensor, put in list(_tensors(model)):
        if tensor.dtype in narrow:
            put(ir.tensor(tensor.numpy().astype(wide.numpy()), dtype=wide, name=tensor.name))
    for value in values_of(model):
        if value.dtype in narrow:
            value.dtype = wide
    for node in nodes_of(model):
        _widen_attributes(node, narrow, wide)


def roundings(model: Any) -> dict[str, float]:
    """The relative size of one rounding, of every stored floating tensor of more than one entry, by name."""
    finfo = package("ml_dtypes", "onnx").finfo
    tensors = ((name, tensor) for name, tensor, _ in _tensors(model))
    return {
        name: float(finfo(tensor.dtype.numpy()).eps)
        for name, tensor in tensors
        if tensor.dtype.is_floating_point() and tensor.size > 1
    }


def nudge(model: Any, sizes: Mapping[str, float]) -> None:
    """Change stored tensors by relative changes of these sizes times a standard normal number, in place.

    The numbers are the same ones for the same name in every run. A model that is widened first keeps small changes.
    """
    ir = package("onnx_ir", "onnx")
    for name, tensor, put in list(_tensors(model)):
        if name in sizes:
            values = tensor.numpy()
            noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(values.shape)
            nudged = values.astype(np.float64) * (1.0 + sizes[name] * noise)
            put(ir.tensor(nudged.astype(values.dtype), dtype=tensor.dtype, name=tensor.name))


def _dtypes() -> Any:
    return package("onnx_ir", "onnx").DataType


def _tensors(model: Any) -> Iterator[tuple[str, Any, Callable[[Any], None]]]:
    """Every stored tensor, also those in attributes: its name, itself, and what puts another one in its place."""
    ir = package("onnx_ir", "onnx")
    for graph in graphs_of(model):
        for name, value in getattr(graph, "initializers", {}).items():
            yield name, value.const_value, partial(setattr, value, "const_value")
    for node in nodes_of(model):
        for name, attribute in node.attributes.items():
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():

                def put(tensor: Any, node: Any = node, name: str = name) -> None:
                    node.attributes[name] = ir.AttrTensor(name, tensor)

                yield f"{node.outputs[0].name}.{name}", attribute.as_tensor(), put


def _widen_attributes(node: Any, narrow: set[Any], wide: Any) -> None:
    """Dtypes that are named by number, and constants that are float32 without saying so."""
    ir = package("onnx_ir", "onnx")
    for name in DTYPE_ATTRIBUTES:
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.type == ir.AttributeType.INT and not attribute.is_ref():
            named = ir.DataType(attribute.as_int())
            node.attributes[name] = ir.AttrInt64(name, int(wide if named in narrow else named))
    if _dtypes().FLOAT not in narrow:
        return
    if node.op_type in FLOAT32_BY_DEFAULT:
        node.attributes.setdefault(FLOAT32_BY_DEFAULT[node.op_type], ir.AttrInt64(FLOAT32_BY_DEFAULT[node.op_type], int(wide)))
    if node.op_type == "ConstantOfShape" and "value" not in node.attributes:
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.zeros(1), dtype=wide))
    for name in ("value_float", "value_floats"):
        if node.op_type == "Constant" and name in node.attributes:
            numbers = np.asarray(node.attributes.pop(name).value, dtype=np.float32)
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(numbers.astype(wide.numpy()), dtype=wide))
