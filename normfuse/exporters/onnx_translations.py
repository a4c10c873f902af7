"""How operators are spelled in ONNX where torch.onnx spells them otherwise than runtimes fuse them, or less exactly.

A number that float32 cannot hold is computed in the file from numbers that it can, so that the same file in float64 is the same
function to the last digit; runtimes evaluate it once, when they load the file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from normfuse.sources.packages import package

GELU_OPSET = 20
RMS_OPSET = 23


def translations(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """For ``torch.onnx.export``: operator -> what writes it."""
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.aten.rms_norm.default: _native_rms_norm if opset >= RMS_OPSET else _spelled_rms_norm,
        torch.ops.aten.log_sigmoid.default: _spelled_log_sigmoid,
        torch.ops.aten.log_sigmoid_forward.default: lambda self: (_spelled_log_sigmoid(self), self),
        torch.ops.aten.logit.default: _spelled_logit,
        torch.ops.aten.celu.default: _spelled_celu,
        torch.ops.aten.linalg_vector_norm.default: _spelled_vector_norm,
        torch.ops.aten.scaled_dot_product_attention.default: partial(_attention, _theirs_of_attention(opset)),
    }
    return table if opset >= GELU_OPSET else {**table, torch.ops.aten.gelu.default: _spelled_gelu}


def _spelled_gelu(self: Any, approximate: str = "none") -> Any:
    """``aten.gelu`` in small operators: x/2 (1 + erf(x/√2)), or x/2 (1 + tanh(√(2/π)(x + 0.044715 x³))) with π = 4 arctan 1."""
    ir, op = package("onnx_ir", "onnx"), package("onnxscript", "onnx").opset18

    def number(value: float) -> Any:
        return op.Constant(value=ir.tensor(value, dtype=self.dtype))

    if approximate == "none":
        gate = op.Erf(op.Div(self, op.Sqrt(number(2.0))))
    else:
        wide = _accumulator(self)  # float16 holds no 1000000
        two, one, parts, million = (op.Constant(value=ir.tensor(each, dtype=wide)) for each in (2.0, 1.0, 44715.0, 1e6))
        root, share = op.Sqrt(op.Div(one, op.Mul(two, op.Atan(one)))), op.Div(parts, million)
        if wide != self.dtype:
            root, share = op.Cast(root, to=self.dtype), op.Cast(share, to=self.dtype)
        cube = op.Mul(op.Mul(self, self), self)
        gate = op.Tanh(op.Mul(root, op.Add(self, op.Mul(share, cube))))
    return op.Mul(op.Mul(self, op.Add(gate, number(1.0))), number(0.5))


def _spelled_log_sigmoid(self: Any) -> Any:
    """``aten.log_sigmoid`` as −softplus(−x): the logarithm of a sigmoid is −∞ where the sigmoid is 0 in float32."""
    op = package("onnxscript", "onnx").opset18
    return op.Neg(op.Softplus(op.Neg(self)))


def _spelled_logit(self: Any, eps: float | None = None) -> Any:
    """``aten.logit`` with 1 − eps computed from eps."""
    ir, op = package("onnx_ir", "onnx"), package("onnxscript", "onnx").opset18
    one = op.Constant(value=ir.tensor(1.0, dtype=self.dtype))
    if eps is not None:
        least = op.Constant(value=ir.tensor(eps, dtype=self.dtype))
        self = op.Min(op.Max(self, least), op.Sub(one, least))
    return op.Log(op.Div(self, op.Sub(one, self)))


def _spelled_celu(self: Any, alpha: float = 1.0) -> Any:
    """``aten.celu`` as Celu, which is of float32 alone, in casts if need be; float64 is max(0, x) + min(0, α(eˣᐟᵅ − 1))."""
    ir, op = package("onnx_ir", "onnx"), package("onnxscript", "onnx").opset18
    if self.dtype != ir.DataType.DOUBLE:
        single = self.dtype == ir.DataType.FLOAT
        return op.Celu(self, alpha=alpha) if single else op.Cast(op.Celu(op.Cast(self, to=1), alpha=alpha), to=self.dtype)
    zero, one, scale = (op.Constant(value=ir.tensor(each, dtype=self.dtype)) for each in (0.0, 1.0, alpha))
    return op.Add(op.Max(self, zero), op.Min(op.Mul(scale, op.Sub(op.Exp(op.Div(self, scale)), one)), zero))


def _spelled_vector_norm(self: Any, ord: float = 2.0, dim: Any = None, keepdim: bool = False, dtype: int = -1) -> Any:
    """``aten.linalg_vector_norm``; a root of another degree is a power, whose exponent is computed from the degree."""
    ir, op = package("onnx_ir", "onnx"), package("onnxscript", "onnx").opset18
    if ord in (0.0, 1.0, 2.0, float("inf"), -float("inf")):
        theirs = package("onnxscript.function_libs.torch_lib.ops.linalg", "onnx").aten_linalg_vector_norm
        return theirs(self, ord, dim, keepdim, dtype)
    if dtype != -1:
        self = op.Cast(self, to=dtype)
    degree, one = (op.Constant(value=ir.tensor(each, dtype=self.dtype)) for each in (ord, 1.0))
    axes = [] if dim is None else [op.Constant(value_ints=list(dim))]
    total = op.ReduceSum(op.Pow(op.Abs(self), degree), *axes, keepdims=keepdim)
    return op.Pow(total, op.Div(one, degree))


def _theirs_of_attention(opset: int) -> Callable[..., Any]:
    if opset >= RMS_OPSET:
        newer: Callable[..., Any] = package(
            "torch.onnx._internal.exporter._torchlib.ops.nn", "onnx"
        ).aten_scaled_dot_product_attention_23
        return newer
    older: Callable[..., Any] = package("onnxscript.function_libs.torch_lib.ops.nn", "onnx").aten_scaled_dot_product_attention
    return older


def _attention(
    theirs: Callable[..., Any], query: Any, key: Any, value: Any, attn_mask: Any = None, *rest: Any, **options: Any
) -> Any:
    """``aten.scaled_dot_product_attention``; a query that may see no key, as in front of a text that is padded, gives zeros.

    torch.onnx masks with the smallest number, so that such a query gives the mean of all values.
    """
    ir, op = package("onnx_ir", "onnx"), package("onnxscript", "onnx").opset18
    y = theirs(query, key, value, attn_mask, *rest, **options)
    if attn_mask is None or attn_mask.dtype != ir.DataType.BOOL:
        return y
    sees = op.ReduceMax(op.Cast(attn_mask, to=query.dtype), op.Constant(value_ints=[-1]), keepdims=1)
    zero = op.Constant(value=ir.tensor(0.0, dtype=query.dtype))
    return op.Where(op.Cast(sees, to=ir.DataType.BOOL), y, zero)


def _spelled_rms_norm(input: Any, normalized_shape: Sequence[Any], weight: Any = None, eps: float | None = None) -> Any:
    """``aten.rms_norm`` in small operators; half precisions accumulate in float32, as in torch."""
    ir, op = package("onnx_ir", "onnx"), package("onnxscript", "onnx").opset18
    wide = _accumulator(input)
    fusible = wide != ir.DataType.DOUBLE
    x = input if input.dtype == wide else op.Cast(input, to=wide)
    square = op.Pow(x, op.Constant(value=ir.tensor(2.0, dtype=wide))) if fusible else op.Mul(x, x)
    mean = op.ReduceMean(square, op.Constant(value_ints=list(range(-len(normalized_shape), 0))), keepdims=1)
    # eps as a vector of one, for the reason in `_shield_small_numbers`
    y = op.Div(x, op.Sqrt(op.Add(mean, op.Constant(value=ir.tensor([_eps(eps, wide)], dtype=wide)))))
    if weight is not None:
        y = op.Mul(y, weight if weight.dtype == wide else op.Cast(weight, to=wide))
    elif fusible and len(normalized_shape) == 1:  # the fused operator has a weight
        y = op.Mul(y, _ones(x, wide, normalized_shape))
    return y if input.dtype == wide else op.Cast(y, to=input.dtype)


def _native_rms_norm(input: Any, normalized_shape: Sequence[Any], weight: Any = None, eps: float | None = None) -> Any:
    """``aten.rms_norm`` as RMSNormalization, which wants one dtype for the value and the weight."""
    wide = _accumulator(input)
    if wide == type(wide).DOUBLE or (weight is not None and weight.dtype != input.dtype):
        return _spelled_rms_norm(input, normalized_shape, weight, eps)
    scale = _ones(input, input.dtype, normalized_shape) if weight is None else weight
    op = package("onnxscript", "onnx").opset23
    return op.RMSNormalization(input, scale, axis=-len(normalized_shape), epsilon=_eps(eps, wide))


def _accumulator(value: Any) -> Any:
    return value.dtype if value.dtype.bitwidth >= 32 else type(value.dtype).FLOAT


def _eps(eps: float | None, accumulator: Any) -> float:
    """The default is the epsilon of the dtype that torch accumulates in: float32's for float16 and bfloat16."""
    return float(np.finfo(accumulator.numpy()).eps) if eps is None else eps


def _ones(x: Any, dtype: Any, normalized_shape: Sequence[Any]) -> Any:
    """A weight of ones; torch.onnx makes it a constant where the sizes are known."""
    ir, op = package("onnx_ir", "onnx"), package("onnxscript", "onnx").opset18
    return op.Expand(op.Constant(value=ir.tensor(1.0, dtype=dtype)), op.Shape(x, start=-len(normalized_shape)))
