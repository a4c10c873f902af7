"""Run an ONNX file in ONNX Runtime, and see what its own optimisation makes of it."""

from __future__ import annotations

import importlib
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from normfuse.errors import ExportError, InputError, MissingExtra

BFLOAT16 = 16  # as ONNX counts dtypes
Array = np.ndarray[Any, Any]


def run(path: str | Path, inputs: Sequence[Array] | Mapping[str, Array], *, optimized: bool = True) -> list[Array]:
    """Run a file in ONNX Runtime, on one thread of the CPU.

    Args:
        path: the file.
        inputs: in the file's order, or by name; bfloat16 as ``ml_dtypes.bfloat16``.
        optimized: let ONNX Runtime rewrite the graph first, as it does unless told otherwise.

    Raises:
        MissingExtra: onnxruntime is not installed.
        InputError: the inputs do not fit the file.
        ExportError: ONNX Runtime cannot run the file.
    """
    return _call(_session(path, optimized), inputs)


def fused_ops(path: str | Path) -> dict[str, int]:
    """Operator -> number of nodes after ONNX Runtime's own optimisation, so what really runs.

    Raises:
        MissingExtra: onnxscript or onnxruntime is not installed.
        ExportError: ONNX Runtime cannot load the file.
    """
    ir = package("onnx_ir", "onnx")
    with tempfile.TemporaryDirectory() as folder:
        _session(path, True, save_as=Path(folder) / "optimized.onnx")
        graph = ir.load(Path(folder) / "optimized.onnx").graph
        return dict(sorted(Counter(node.op_type for node in graph.all_nodes()).items()))


def _session(path: str | Path, optimized: bool, save_as: Path | None = None) -> Any:
    ort = package("onnxruntime", "cpu")
    options, level = ort.SessionOptions(), ort.GraphOptimizationLevel
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    if save_as is not None:
        options.optimized_model_filepath = str(save_as)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # one class per status, none of them public
        raise ExportError(f"ONNX Runtime cannot load {Path(path).name}: {first_line(error)}") from error
    if session.get_providers() != ["CPUExecutionProvider"]:
        raise ExportError(f"ONNX Runtime chose {session.get_providers()[0]} instead of its CPU provider")
    return session


def _call(session: Any, inputs: Sequence[Array] | Mapping[str, Array]) -> list[Array]:
    names = [value.name for value in session.get_inputs()]
    feed = dict(inputs) if isinstance(inputs, Mapping) else dict(zip(names, inputs, strict=False))
    if set(feed) != set(names) or len(inputs) != len(names):
        raise InputError(f"the file wants {len(names)} inputs ({', '.join(names)}), not these {len(inputs)}")
    try:
        values = session.run_with_ort_values(None, {name: _ort_value(array) for name, array in feed.items()})
    except Exception as error:  # one class per status, none of them public
        blame = InputError if "INVALID_ARGUMENT" in str(error) else ExportError
        raise blame(f"ONNX Runtime cannot run this: {first_line(error)}") from error
    return [_numpy(value) for value in values]


def _ort_value(array: Array) -> Any:
    """NumPy has no bfloat16 of its own, so ONNX Runtime takes its bits."""
    make, array = package("onnxruntime", "cpu").OrtValue, np.asarray(array, order="C")
    if array.dtype.name == "bfloat16":
        return make.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), onnx_element_type=BFLOAT16)
    return make.ortvalue_from_numpy(array)


def _numpy(value: Any) -> Array:
    if value.element_type() == BFLOAT16:
        return as_array(torch.utils.dlpack.from_dlpack(value._get_c_value()))
    return np.asarray(value.numpy())


def as_array(value: Any) -> Array:
    """A tensor (or a dynamic int, float or bool) as ONNX has it: complex as pairs, bfloat16 as ``ml_dtypes``."""
    if not isinstance(value, torch.Tensor):
        return np.asarray(value, dtype=np.float32 if isinstance(value, float) else None)
    value = value.detach().cpu().resolve_conj().contiguous()
    if value.is_complex():
        value = torch.view_as_real(value)
    if value.dtype is torch.bfloat16:
        return np.asarray(value.view(torch.uint16).numpy().view(package("ml_dtypes", "onnx").bfloat16))
    return np.asarray(value.numpy())


def first_line(error: BaseException) -> str:
    """The first line of a runtime's error, without its own prefix."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", line)


def package(name: str, extra: str) -> Any:
    """Import a package when it is needed, or say which extra brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtra(name, extra) from error
