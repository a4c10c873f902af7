"""Write an ExecuTorch program (``.pte``), for PyTorch's runtime on phones and small devices.

By default its portable kernels run everything; a partitioner of ExecuTorch's hands parts to a backend such as XNNPACK.
Dynamic dims need an upper end: memory is planned ahead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normfuse.errors import ExportError, InputError, first_line
from normfuse.exporters.lowering import evaluated
from normfuse.graph.program import Program, quiet
from normfuse.proof.artifacts import Artifact, Port
from normfuse.sources.atomic import write_atomically
from normfuse.sources.packages import package

# as PyTorch and ExecuTorch count dtypes
DTYPES = {0: torch.uint8, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.int64, 5: torch.float16, 6: torch.float32,
          7: torch.float64, 11: torch.bool, 15: torch.bfloat16}  # fmt: skip


@dataclass(frozen=True)
class ExecuTorchInfo:
    """What was written.

    Attributes:
        path: the file.
        kernels: kernel -> number of calls; ``executorch_call_delegate`` for what a backend runs.
        bytes: size of the file.
    """

    path: Path
    kernels: Mapping[str, int]
    bytes: int


def export(program: Program, path: str | Path, *, partitioners: Sequence[Any] = ()) -> ExecuTorchInfo:
    """Lower a program and write it.

    Args:
        program: the program.
        path: the file to write.
        partitioners: of ExecuTorch, such as ``[XnnpackPartitioner()]``.

    Raises:
        MissingExtra: executorch is not installed.
        ExportError: ExecuTorch cannot lower the program.
    """
    exir, path, exported = package("executorch.exir", "executorch"), Path(path), evaluated(program).exported
    _check(program)
    try:
        with quiet(), torch.no_grad():
            lowered = exir.to_edge_transform_and_lower(exported, partitioner=list(partitioners)).to_executorch()
    except Exception as error:  # each of its passes has its own
        hint = "every operator must be one of ExecuTorch's; ONNX and AOTInductor have more"
        raise ExportError(f"ExecuTorch cannot lower the program: {first_line(error)}", hint=hint) from error

    def write(file: Path) -> None:
        with file.open("wb") as stream:
            lowered.write_to_file(stream)

    write_atomically(path, write)
    calls = [node.target for node in lowered.exported_program().graph.nodes if node.op == "call_function"]
    counts = Counter(_name(target) for target in calls if _name(target) not in ("alloc", "getitem"))
    return ExecuTorchInfo(path, dict(sorted(counts.items())), path.stat().st_size)


def _check(program: Program) -> None:
    """Refuse what ExecuTorch would take and compute or size wrongly."""
    if any(program.tensor(name).dtype == torch.float64 for name in program.stored.values()):
        raise ExportError("ExecuTorch's norms compute float64 in float32", hint="convert the model to float32 first")
    for symbol, bounds in program.exported.range_constraints.items():
        if not bounds.upper.is_Integer:
            hint = "trace it with one: Dim('batch', max=64) in Python, batch=2:1-64 on the command line"
            raise ExportError(f"ExecuTorch plans memory ahead, and the dynamic dim {symbol} has no upper end", hint=hint)


def _name(target: Any) -> str:
    return str(getattr(target, "__name__", target)).removesuffix(".out")


def open_artifact(path: str | Path) -> Artifact:
    """A ``.pte`` file in ExecuTorch's runtime on this CPU.

    Raises:
        MissingExtra: executorch is not installed.
        ExportError: the file is no ExecuTorch program, or needs kernels or a backend that this runtime does not have.
    """
    path = Path(path)
    try:
        with quiet():
            program = package("executorch.runtime", "executorch").Runtime.get().load_program(path)
            method = program.load_method("forward").metadata
    except RuntimeError as error:
        hint = "normfuse export --to executorch writes one that the portable kernels run"
        raise ExportError(f"ExecuTorch cannot load {path.name}: {first_line(error)}", hint=hint) from error
    metas = [method.input_tensor_meta(place) for place in range(method.num_inputs())]
    ports = tuple(Port(f"input {place}", DTYPES[meta.dtype()], None) for place, meta in enumerate(metas))

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        for port, value in zip(ports, inputs, strict=False):
            if value.dtype != port.dtype:
                raise InputError(f"{path.name} takes {port.dtype} as {port.name}, not {value.dtype}")
        method = program.load_method("forward")  # its memory holds the outputs, so it must outlive them
        try:
            outputs = method.execute([value.detach().contiguous() for value in inputs])
        except RuntimeError as error:
            raise InputError(f"{path.name} does not run on these inputs: {first_line(error)}") from error
        return [value.clone() for value in outputs if isinstance(value, Tensor)]

    return Artifact(path.name, f"ExecuTorch {version('executorch')} (CPU)", ports, {"": run})
