"""Run an ONNX file in ONNX Runtime, and see what its own optimisation makes of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from normfuse.errors import ExportError, InputError, NormfuseError
from normfuse.exporters import onnx_float64, onnx_precision
from normfuse.exporters.onnx_signature import ports
from normfuse.proof.artifacts import Artifact, Port, Run
from normfuse.sources.atomic import scratch
from normfuse.sources.packages import package

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
    with scratch() as folder:
        _session(path, True, save_as=folder / "optimized.onnx")
        graph = ir.load(folder / "optimized.onnx").graph
        return dict(sorted(Counter(node.op_type for node in graph.all_nodes()).items()))


def open_artifact(path: str | Path, *, provider: str = "CPU") -> Artifact:
    """An ONNX file in ONNX Runtime: with its graph optimizations, without them, wider, and with nudged weights.

    A bfloat16 file that ONNX Runtime has no kernels for runs in float32 only, from the same weights.

    Args:
        path: the file.
        provider: what is to run it, such as ``CPU`` or ``CUDA``; it is an error if ONNX Runtime takes another one.

    Raises:
        MissingExtra: onnxscript or onnxruntime is not installed.
        ExportError: ONNX Runtime cannot load the file, or not with this provider.
    """
    try:
        return _artifact(Path(path), provider)
    except NormfuseError:
        raise
    except Exception as error:  # what the file holds fits no schema, and onnx_ir says so with whatever it likes
        raise ExportError(f"{Path(path).name} is no valid ONNX file: {without_prefix(error)}") from error


def _artifact(path: Path, provider: str) -> Artifact:
    ort, model = package("onnxruntime", "cpu"), _read(path)
    held = onnx_precision.dtypes_of(model)
    runtime = f"ONNX Runtime {ort.__version__} ({provider})"
    try:
        session = _session(path, True, provider=provider)
    except ExportError:
        if not any(each.name == "BFLOAT16" for each in held):
            raise
        return _in_float32(path, ports(model), runtime, provider)
    slow = cache(lambda: _session(path, False, provider=provider))
    runs: dict[str, Run] = {
        "": lambda inputs: _tensors(session, inputs),
        "without graph optimizations": lambda inputs: _tensors(slow(), inputs),
    }
    wide, widened = _widened(path, provider, onnx_precision.wider(model))
    notes = (_norms_note(path),) if provider == "CPU" else ()
    inner = partial(_inner, path, provider, wide)
    return Artifact(path.name, runtime, ports(model), runs, widened, _nudged(path, provider, wide), notes, inner)


def _widened(path: Path, provider: str, candidates: Sequence[Any]) -> tuple[Any, Run | None]:
    """The first of these dtypes that the model can be run in, and the model in it; None where there is none."""
    for wide in candidates:
        try:
            return wide, _changed(path, provider, wide=wide)
        except ExportError:
            continue
    return None, None


def _in_float32(path: Path, inputs: tuple[Port, ...], runtime: str, provider: str) -> Artifact:
    single, double = package("onnx_ir", "onnx").DataType.FLOAT, package("onnx_ir", "onnx").DataType.DOUBLE
    runs: dict[str, Run] = {"in float32": _changed(path, provider, optimized=True, wide=single)}
    wide, widened = _widened(path, provider, (double, single))
    note = "ONNX Runtime has no kernels for this bfloat16 file: it was run in float32, from the same weights"
    return Artifact(path.name, runtime, inputs, runs, widened, _nudged(path, provider, wide), (note,))


def _nudged(path: Path, provider: str, wide: Any) -> Run:
    made = cache(lambda: _changed(path, provider, wide=wide, nudged=True))
    return lambda inputs: made()(inputs)


def _inner(path: Path, provider: str, wide: Any) -> tuple[tuple[str, ...], Run]:
    """The names of a file's floating values that have one, and a run that gives them before the outputs."""
    model = _read(path)
    package("onnx_ir.passes.common", "onnx").ShapeInferencePass()(model)
    made = (value for node in model.graph for value in node.outputs if value.name and not value.is_graph_output())
    shown = [value for value in made if value.dtype is not None and value.dtype.is_floating_point()]
    outputs = list(model.graph.outputs)
    names = (*(value.name for value in shown), *(value.name for value in outputs))
    model.graph.outputs.clear()
    model.graph.outputs.extend([*shown, *outputs])
    if wide is not None:
        onnx_precision.widen(model, wide)
    run = _of(model, path.name, provider, wide)
    return names, lambda inputs: [*(values := run(inputs)), *values[len(shown) :]]


def _changed(path: Path, provider: str, *, optimized: bool = False, wide: Any = None, nudged: bool = False) -> Run:
    """The same model with nudged weights, in a wider dtype, or both."""
    model = _read(path)
    sizes = onnx_precision.roundings(model)  # of the dtypes that are stored, not of the wider ones
    if wide is not None:
        onnx_precision.widen(model, wide)
    if nudged:
        onnx_precision.nudge(model, sizes)
    return _of(model, path.name, provider, wide, optimized)


def _of(model: Any, name: str, provider: str, wide: Any, optimized: bool = False) -> Run:
    """How to run a model that was changed, on inputs of the file's own dtypes."""
    opened = partial(_opened, name=name, optimized=optimized, provider=provider)
    run = onnx_float64.assembled(model, opened) if wide == package("onnx_ir", "onnx").DataType.DOUBLE else opened(model)
    return lambda inputs: run(_as_wide(inputs, wide))


def _opened(model: Any, *, name: str, optimized: bool, provider: str) -> Run:
    with scratch() as folder:
        package("onnx_ir", "onnx").save(model, folder / name, external_data="weights")
        session = _session(folder / name, optimized, provider=provider)
    return partial(_tensors, session)


def _read(path: Path) -> Any:
    try:
        return package("onnx_ir", "onnx").load(path)
    except NormfuseError:
        raise
    except Exception as error:  # protobuf's own exceptions among them
        raise ExportError(f"{path.name} is no ONNX file: {without_prefix(error)}") from error


def _as_wide(inputs: Sequence[torch.Tensor], wide: Any) -> list[torch.Tensor]:
    if wide is None:
        return list(inputs)
    dtype = getattr(torch, wide.numpy().name)
    return [x.to(torch.promote_types(x.dtype, dtype)) if x.is_floating_point() else x for x in inputs]


def _tensors(session: Any, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [as_tensor(array) for array in _call(session, [as_array(value) for value in inputs])]


def _norms_note(path: Path) -> str:
    norms = ", ".join(f"{count} {op}" for op, count in fused_ops(path).items() if "Norm" in op)
    return f"ONNX Runtime runs {norms or 'no norm'}"


def _session(path: str | Path, optimized: bool, save_as: Path | None = None, provider: str = "CPU") -> Any:
    ort = package("onnxruntime", "cpu")
    options, level = ort.SessionOptions(), ort.GraphOptimizationLevel
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    if save_as is not None:
        options.optimized_model_filepath = str(save_as)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
    try:
        session = ort.InferenceSession(str(path), options, providers=[f"{provider}ExecutionProvider"])
    except Exception as error:  # one class per status, none of them public
        raise ExportError(f"ONNX Runtime cannot load {Path(path).name}: {without_prefix(error)}") from error
    if session.get_providers()[0] != f"{provider}ExecutionProvider":  # it falls back to the CPU without a word
        hint = "normfuse[gpu] brings CUDA; it and normfuse[cpu] exclude each other"
        raise ExportError(f"ONNX Runtime chose {session.get_providers()[0]} instead of its {provider} provider", hint=hint)
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
        raise blame(f"ONNX Runtime cannot run this: {without_prefix(error)}") from error
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


def as_tensor(array: Array) -> torch.Tensor:
    """An array of ONNX Runtime as a tensor."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))  # a copy: ONNX Runtime may reuse what it lent


def without_prefix(error: BaseException) -> str:
    """The first line of a runtime's error, without its own prefix."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", line)
