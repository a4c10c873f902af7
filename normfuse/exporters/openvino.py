"""Write OpenVINO's files, ``.xml`` with the graph and ``.bin`` with the weights, by way of ONNX.

By way of ONNX because the file then has norms in the form that OpenVINO fuses (one RMS or MVN node each), and because its
reader of exported programs loses fixed sizes. Weights keep their dtype; OpenVINO's own habit is to store them in float16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normfuse.errors import ExportError, InputError
from normfuse.exporters import onnx
from normfuse.graph.program import Program
from normfuse.proof.artifacts import Artifact, Port, Run
from normfuse.sources.atomic import scratch, write_atomically
from normfuse.sources.packages import package

PRECISION = "INFERENCE_PRECISION_HINT"
NORM_LAYERS = ("RMS", "MVN", "BatchNormInference", "GroupNormalization", "NormalizeL2")
DTYPES = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "boolean": torch.bool,
          "i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8}  # fmt: skip


@dataclass(frozen=True)
class OpenVinoInfo:
    """What was written.

    Attributes:
        path: the ``.xml`` file.
        weights: the ``.bin`` file beside it.
        inputs: name -> type, such as ``float32[batch,3,224,224]``.
        norms: OpenVINO's norm operators after its CPU plugin compiled the file -> how many.
    """

    path: Path
    weights: Path
    inputs: Mapping[str, str]
    norms: Mapping[str, int]


def export(program: Program, path: str | Path, *, opset: int = 20) -> OpenVinoInfo:
    """Write a program for OpenVINO.

    Args:
        program: the program.
        path: the ``.xml`` file to write; its weights go to a ``.bin`` file beside it.
        opset: of the ONNX file between.

    Raises:
        MissingExtra: openvino or onnxscript is not installed.
        ExportError: ONNX or OpenVINO refuses the program.
        InputError: the file's name does not end in ``.xml``, or it cannot be written.
    """
    ov, path = package("openvino", "openvino"), Path(path)
    if any(program.tensor(name).dtype == torch.float64 for name in program.stored.values()):
        raise ExportError("OpenVINO computes float64 in float32", hint="convert the model to float32 first")
    if path.suffix != ".xml":
        raise InputError(f"OpenVINO's file is an .xml file, not {path.name}", hint=f"write {path.stem}.xml")
    with scratch() as folder:
        info = onnx.export(program, folder / "model.onnx", opset=opset)
        try:
            model = ov.convert_model(str(info.path))
            counts = _norms(_compiled(ov, model))
        except Exception as error:  # OpenVINO's C++ exceptions
            raise ExportError(f"OpenVINO cannot read the program: {_reason(error)}", hint="another opset may help") from error
        write_atomically(path, lambda file: ov.save_model(model, str(file), compress_to_fp16=False))
    return OpenVinoInfo(path, path.with_suffix(".bin"), info.inputs, counts)


def open_artifact(path: str | Path) -> Artifact:
    """An ``.xml`` file in OpenVINO on the CPU, in float32: left alone, it takes bfloat16 where the CPU has it.

    Raises:
        MissingExtra: openvino is not installed.
        ExportError: the file, or the ``.bin`` file beside it, cannot be read or run.
    """
    ov, path = package("openvino", "openvino"), Path(path)
    try:
        model = ov.Core().read_model(str(path))
        compiled = _compiled(ov, model)
    except Exception as error:  # OpenVINO's C++ exceptions
        hint = "its weights are in the .bin file of the same name, which must lie beside it"
        raise ExportError(f"OpenVINO cannot open {path.name}: {_reason(error)}", hint=hint) from error
    norms = ", ".join(f"{count} {name}" for name, count in _norms(compiled).items())
    preferred = ov.Core().get_property("CPU", PRECISION)
    notes = [f"OpenVINO runs {norms or 'no norm'}"]
    if preferred != ov.Type.f32:
        usual = f"left alone, it computes in {preferred.to_string()} on this CPU: set {PRECISION} to f32 to get these numbers"
        notes.append(f"compared in float32; {usual}")
    version = ov.get_version().split("-")[0]
    ports = tuple(_port(each) for each in model.inputs)
    return Artifact(path.name, f"OpenVINO {version} (CPU)", ports, {"": _run(ov, compiled, path.name)}, notes=tuple(notes))


def _compiled(ov: Any, model: Any) -> Any:
    return ov.Core().compile_model(model, "CPU", {PRECISION: "f32", "INFERENCE_NUM_THREADS": 1})


def _norms(compiled: Any) -> dict[str, int]:
    """What became of the norms, read off the graph that really runs."""
    kinds = Counter(str(node.get_rt_info()["layerType"].value) for node in compiled.get_runtime_model().get_ops())
    return {kind: kinds[kind] for kind in NORM_LAYERS if kinds[kind]}


def _port(value: Any) -> Port:
    dtype = DTYPES.get(value.element_type.get_type_name())
    if dtype is None:
        raise ExportError(f"the input '{value.any_name}' is of {value.element_type}, which torch does not have")
    return Port(value.any_name, dtype, tuple(None if dim.is_dynamic else dim.get_length() for dim in value.partial_shape))


def _run(ov: Any, compiled: Any, name: str) -> Run:
    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        request = compiled.create_infer_request()
        try:
            request.infer([_to(ov, value) for value in inputs])
        except Exception as error:  # OpenVINO's C++ exceptions
            raise InputError(f"{name} does not run on these inputs: {_reason(error)}") from error
        return [_from(request.get_output_tensor(place)) for place in range(len(compiled.outputs))]

    return run


def _to(ov: Any, value: Tensor) -> Any:
    value = value.detach().cpu().contiguous()
    if value.dtype == torch.bfloat16:  # NumPy has none: its bits
        return ov.Tensor(value.view(torch.uint16).numpy(), list(value.shape), ov.Type.bf16)
    return ov.Tensor(value.numpy())


def _from(value: Any) -> Tensor:
    dtype, data = DTYPES[value.element_type.get_type_name()], np.array(value.data)
    if dtype == torch.bfloat16:
        return torch.from_numpy(data.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(data)


def _reason(error: BaseException) -> str:
    """OpenVINO's exceptions begin with the place in its own source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return (reasons or lines or [type(error).__name__])[0]
