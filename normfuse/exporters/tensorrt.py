"""Build a TensorRT engine: on a machine with an NVIDIA GPU by TensorRT, on any other one ahead of time by TensorRT for RTX.

The engine is made of an ONNX file in a strongly typed network: the program's dtypes are the engine's. Opset 20 is the default,
which every TensorRT 10 reads; from opset 23 attention is one operator, for which TensorRT has no float32 kernel: it may take it
apart again.

TensorRT for RTX builds without a GPU, for compute capabilities 7.5, 8.0, 8.6, 8.9, 12.0 and 12.1. It has none for 9.0 (H100,
H200). Running an engine needs a GPU of a kind that it was built for.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normfuse.errors import ExportError, InputError
from normfuse.exporters import engine_kernels, onnx
from normfuse.exporters.engine_kernels import Kernel, NormKernels
from normfuse.exporters.onnx_walk import nodes_of
from normfuse.graph.interpreter import flat_inputs, user_inputs
from normfuse.graph.program import Program, Site
from normfuse.graph.views import is_tensor, shape
from normfuse.proof.artifacts import Artifact, Port
from normfuse.sources.atomic import scratch, write_atomically
from normfuse.sources.packages import package

UNBOUNDED = 8
"""A profile needs a largest size: where the program has none, this many times the example's."""

Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""The smallest, the usual and the largest shape of an input."""


@dataclass(frozen=True)
class EngineInfo:
    """What was built.

    Attributes:
        path: the engine's file.
        builder: what built it, such as ``TensorRT-RTX 1.7.1``.
        capabilities: compute capabilities that it is for, such as ``8.9``; empty where the builder chose them.
        profiles: dynamic input -> the smallest, the usual and the largest shape that the engine takes.
        kernels: the engine's kernels in order; None where the builder's log does not tell.
        norms: the kernels of each norm; None likewise.
    """

    path: Path
    builder: str
    capabilities: tuple[str, ...]
    profiles: Mapping[str, Range]
    kernels: tuple[Kernel, ...] | None
    norms: tuple[NormKernels, ...] | None

    def __str__(self) -> str:
        """A line for a report."""
        count = "" if self.kernels is None else f", {len(self.kernels)} kernels"
        return f"{self.builder}{count}: {engine_kernels.in_words(self.norms)}"


@dataclass(frozen=True)
class Support:
    """What TensorRT says of one node.

    Attributes:
        op: the ONNX operator.
        node: the ONNX node's name.
        site: where in the model it comes from; None for a node that torch.onnx added.
        supported: whether TensorRT takes it.
        reason: NVIDIA's own words where it does not.
    """

    op: str
    node: str
    site: Site | None
    supported: bool
    reason: str = ""

    def __str__(self) -> str:
        """A line for a report."""
        return f"{self.op}{_where(self.node, self.site)}: {self.reason or ('supported' if self.supported else 'not supported')}"


def export(
    program: Program,
    path: str | Path,
    *,
    opset: int = 20,
    capabilities: Sequence[str] = (),
    sizes: Mapping[str, Sequence[int]] | None = None,
) -> EngineInfo:
    """Build an engine.

    Args:
        program: the program; its stored dtypes are the engine's.
        path: the file to write.
        opset: of the ONNX file between.
        capabilities: compute capabilities to build for ahead of time, such as ``("8.6", "8.9", "12.0")``. When empty, TensorRT
            builds for the GPU of this machine; without one, TensorRT for RTX builds for 8.0, 8.6, 8.9 and 12.0 and later.
        sizes: dynamic dim -> its smallest, usual and largest size; those of the program's ranges and examples when None.

    Raises:
        MissingExtra: neither tensorrt (with a GPU) nor tensorrt_rtx is there.
        ExportError: ONNX or TensorRT refuses the program; names the node.
        InputError: ``sizes`` names no dim, or a range is empty.
    """
    trt = _builder(capabilities)
    wanted = [_capability(trt, each) for each in capabilities]
    program, path = onnx.prepared(program, opset), Path(path)
    log = _log(trt)
    with scratch() as folder:
        info = onnx.export(program, folder / "model.onnx", opset=opset)
        profiles = _profiles(program, info, sizes or {})
        builder = trt.Builder(log)
        network, parser = _parsed(trt, builder, log, info)  # the parser owns the weights
        config = _config(trt, builder, wanted, profiles)
        engine = builder.build_serialized_network(network, config)
        del parser
    if engine is None:
        raise _refused(log.errors(), info.sites)
    content = bytes(engine)
    found = engine_kernels.from_log(log.lines) or _inspected(trt, log, content)
    write_atomically(path, lambda file: file.write_bytes(content))
    norms = None if found is None else engine_kernels.of_norms(program, info.sites, found)
    return EngineInfo(path, _title(trt), tuple(map(_dotted, capabilities)), profiles, found, norms)


def dry_run(program: Program, *, opset: int = 20) -> list[Support]:
    """What TensorRT says of every node of the ONNX file, without building an engine.

    Raises:
        MissingExtra: neither tensorrt (with a GPU) nor tensorrt_rtx is there.
        ExportError: torch.onnx refuses the program; names the node.
    """
    trt, ir = _builder(()), package("onnx_ir", "onnx")
    log = _log(trt)
    with scratch() as folder:
        info = onnx.export(program, folder / "model.onnx", opset=opset)
        builder = trt.Builder(log)
        network = _network(trt, builder)  # the parser does not keep it alive
        parser = trt.OnnxParser(network, log)
        parser.parse_from_file(str(info.path))
        errors = [parser.get_error(place) for place in range(parser.num_errors)]
        nodes = [(node.op_type, node.name or "") for node in nodes_of(ir.load(info.path))]
    reasons = {error.node_name(): str(error.desc()) for error in errors}
    known = {op: bool(parser.supports_operator(op)) for op, _ in nodes}
    return [
        Support(op, name, info.sites.get(name), known[op] and name not in reasons, reasons.get(name, "")) for op, name in nodes
    ]


# -- building ----------------------------------------------------------------------------------------------------------


def _builder(capabilities: Sequence[str]) -> Any:
    """TensorRT where it is installed and there is a GPU for it, else TensorRT for RTX."""
    if not capabilities and importlib.util.find_spec("tensorrt") is not None and _gpus():
        return package("tensorrt", "tensorrt")
    return package("tensorrt_rtx", "tensorrt-rtx")


def _gpus() -> int:
    """How many NVIDIA GPUs the driver has, whether torch was built for them or not."""
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
    except OSError:
        return 0
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def _title(trt: Any) -> str:
    return f"{'TensorRT-RTX' if trt.__name__ == 'tensorrt_rtx' else 'TensorRT'} {trt.__version__}"


def _log(trt: Any) -> Any:
    """A logger that keeps what NVIDIA's libraries say; its class exists only where they do."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.seen: list[tuple[Any, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.seen.append((severity, message))

        @property
        def lines(self) -> list[str]:
            return [message for _, message in self.seen]

        def errors(self) -> list[str]:
            return [message for severity, message in self.seen if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)]

    return Log()


def _network(trt: Any, builder: Any) -> Any:
    return builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


def _parsed(trt: Any, builder: Any, log: Any, info: onnx.OnnxModelInfo) -> tuple[Any, Any]:
    """The network of an ONNX file, with its parser, which owns the weights."""
    network = _network(trt, builder)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(info.path)):
        error = parser.get_error(0)
        raise _refusal(f"{error.node_operator()}{_where(error.node_name(), info.sites.get(error.node_name()))}: {error.desc()}")
    for layer in map(network.get_layer, range(network.num_layers)):
        if layer.type.name == "ATTENTION_INPUT":  # there is no float32 kernel for attention in one piece
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
    return network, parser


def _config(trt: Any, builder: Any, capabilities: Sequence[Any], profiles: Mapping[str, Range]) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or nobody can tell what became of the norms
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for place, each in enumerate(capabilities):
            config.set_compute_capability(each, place)
    if profiles:
        profile = builder.create_optimization_profile()
        for name, shapes in profiles.items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
    return config


def _capability(trt: Any, text: str) -> Any:
    """A compute capability as TensorRT for RTX names it."""
    found = getattr(trt.ComputeCapability, f"SM{_dotted(text).replace('.', '')}", None)
    if found is None:
        known = [_dotted(name) for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
        hint = "TensorRT itself, ONNX Runtime's CUDA provider and PyTorch run on other GPUs"
        raise ExportError(f"TensorRT-RTX has no kernels for compute capability {text}; it has {', '.join(known)}", hint=hint)
    return found


def _dotted(text: str) -> str:
    """``sm_89``, ``SM89``, ``89`` and ``8.9`` are one capability."""
    digits = re.sub(r"\D", "", text)
    return f"{digits[:-1]}.{digits[-1]}" if len(digits) > 1 else text


def _profiles(program: Program, info: onnx.OnnxModelInfo, sizes: Mapping[str, Sequence[int]]) -> dict[str, Range]:
    """The shapes of every dynamic input, from the ranges that the program was traced with and its example inputs."""
    nodes = user_inputs(program)
    taken = [node for node in nodes if node is not None]
    if not any(isinstance(dim, torch.SymInt) for node in taken for dim in shape(node)):
        if sizes:
            raise InputError(f"there is no dynamic dim '{min(sizes)}': all sizes of this program are fixed")
        return {}
    if not program.exported.example_inputs:
        raise InputError("the program has dynamic dims and no example inputs, so their usual sizes are not known")
    given = flat_inputs(program, *program.exported.example_inputs)
    names, ranges = onnx.dim_names(program.exported), {}
    for node, example in zip(nodes, given, strict=True):
        for dim, size in zip(shape(node), example.shape, strict=True) if node is not None and is_tensor(node) else ():
            if isinstance(dim, torch.SymInt) and dim.node.expr.is_symbol:
                symbol = dim.node.expr
                ranges[symbol] = _range(program, symbol, int(size), sizes.get(names.get(str(symbol), str(symbol))))
    known = {names.get(str(symbol), str(symbol)) for symbol in ranges}
    if unknown := set(sizes) - known:
        raise InputError(f"there is no dynamic dim '{min(unknown)}'", hint=f"the dynamic dims are {', '.join(sorted(known))}")
    return {
        name: tuple(tuple(_size(dim, ranges, place) for dim in shape(node)) for place in range(3))  # type: ignore[misc]
        for name, node in zip(info.inputs, taken, strict=True)
        if any(isinstance(dim, torch.SymInt) for dim in shape(node))
    }


def _range(program: Program, symbol: Any, usual: int, asked: Sequence[int] | None) -> tuple[int, int, int]:
    if asked is not None:
        low, usual, high = asked
        if not 0 < low <= usual <= high:
            raise InputError(f"the sizes {tuple(asked)} of a dim must be positive and rise: smallest, usual, largest")
        return low, usual, high
    bounds = program.exported.range_constraints.get(symbol)
    upper = int(bounds.upper) if bounds is not None and bounds.upper.is_Integer else UNBOUNDED * usual
    return max(int(bounds.lower), 1) if bounds is not None else 1, usual, min(upper, 2**31 - 1)


def _size(dim: Any, ranges: Mapping[Any, tuple[int, int, int]], place: int) -> int:
    if not isinstance(dim, torch.SymInt):
        return int(dim)
    return int(dim.node.expr.subs({symbol: each[place] for symbol, each in ranges.items()}))


def _inspected(trt: Any, log: Any, engine: bytes) -> tuple[Kernel, ...] | None:
    """The kernels as the engine itself tells them; needs a GPU."""
    if not _gpus():
        return None
    loaded = trt.Runtime(log).deserialize_cuda_engine(engine)
    if loaded is None:
        return None
    layers = loaded.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return engine_kernels.from_inspector(layers)


# -- refusals ----------------------------------------------------------------------------------------------------------


def _where(node: str, site: Site | None) -> str:
    if not node:
        return ""
    return f", node {node}" + (f" of {site} ({site.source or 'source unknown'})" if site is not None else "")


def _refused(errors: Sequence[str], sites: Mapping[str, Site]) -> ExportError:
    """The first error of a build, with the place in the model of the first node that it names."""
    text = next(iter(errors), "it gave no reason")
    named = next((name for name in re.findall(r"[\w./]+", text) if name in sites), "")
    return _refusal(f"{text.strip()}{_where(named, sites.get(named))}")


def _refusal(text: str) -> ExportError:
    hint = "normfuse.exporters.tensorrt.dry_run says of every node whether TensorRT takes it; another opset may help"
    return ExportError(f"TensorRT refused: {' '.join(text.split())}", hint=hint)


# -- running -----------------------------------------------------------------------------------------------------------


def open_artifact(path: str | Path) -> Artifact:
    """An engine on the GPU of this machine. An engine holds compiled code: open only what you built or trust.

    Raises:
        MissingExtra: neither tensorrt nor tensorrt_rtx is installed.
        ExportError: there is no GPU, or the engine is not for this one or for this version of TensorRT.
    """
    path = Path(path)
    names = [name for name in ("tensorrt", "tensorrt_rtx") if importlib.util.find_spec(name) is not None]
    runtimes = [package(name, "tensorrt") for name in names] or [package("tensorrt_rtx", "tensorrt-rtx")]
    if not _gpus() or not torch.cuda.is_available():
        hint = "compare where there is one, or compare the ONNX file that it is built from: normfuse export --to onnx"
        raise ExportError(f"{path.name} is a TensorRT engine: it runs on an NVIDIA GPU, and none is usable here", hint=hint)
    errors: list[str] = []
    for trt in runtimes:
        log = _log(trt)
        engine = trt.Runtime(log).deserialize_cuda_engine(path.read_bytes())
        if engine is not None:
            return _artifact(path, trt, engine)
        errors += log.errors()
    hint = "build it again on this machine: normfuse export --to tensorrt"
    raise ExportError(f"{path.name} cannot be loaded: {next(iter(errors), 'TensorRT gave no reason')}", hint=hint)


def _artifact(path: Path, trt: Any, engine: Any) -> Artifact:
    names = [engine.get_tensor_name(place) for place in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    outputs = [name for name in names if name not in inputs]
    dtypes = {name: _torch_dtype(engine.get_tensor_dtype(name)) for name in names}
    sizes = {name: tuple(None if size < 0 else size for size in engine.get_tensor_shape(name)) for name in inputs}
    ports = tuple(Port(name, dtypes[name], sizes[name]) for name in inputs)
    context = engine.create_execution_context()

    def run(values: Sequence[Tensor]) -> list[Tensor]:
        held = {name: value.to("cuda").contiguous() for name, value in zip(inputs, values, strict=True)}
        for name, value in held.items():
            if not context.set_input_shape(name, tuple(value.shape)):
                raise InputError(f"the engine does not take {tuple(value.shape)} for '{name}'")
        for name in outputs:
            held[name] = torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtypes[name], device="cuda")
        for name, value in held.items():
            context.set_tensor_address(name, value.data_ptr())
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        if not context.execute_async_v3(stream.cuda_stream):
            raise ExportError(f"{path.name} failed while it ran")
        stream.synchronize()
        return [held[name].cpu() for name in outputs]

    return Artifact(path.name, f"{_title(trt)} ({torch.cuda.get_device_name()})", ports, {"": run})


def _torch_dtype(dtype: Any) -> torch.dtype:
    names = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
    return getattr(torch, names.get(dtype.name, dtype.name.lower()))  # type: ignore[no-any-return]
