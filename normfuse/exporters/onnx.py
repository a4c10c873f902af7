"""Write a program as an ONNX file.

Opsets 18 to 25 are written; 20 is the default, which every TensorRT 10 and every ONNX Runtime of the last years reads. 23 is
the first with RMSNormalization, and wants ONNX Runtime 1.23 or TensorRT 10.15.

Formulas and computed weights are evaluated first, and norms written by hand become operators (`normfuse.exporters.lowering`),
such as the (1 + w) norms of Gemma.

RMSNorm below opset 23 is spelled ``x / sqrt(mean(x²) + eps) * w``: ONNX Runtime fuses that into one
SimplifiedLayerNormalization, while torch's own spelling (``x * reciprocal(sqrt(…))``) stays seven nodes, slower than
the LayerNorm that it replaced. From opset 23 it is the native RMSNormalization. float64 is spelled at every opset and
so that nothing fuses it: that fusion drops a float64 eps (1e-5 is used instead), and the native operator rounds it.

The file holds no trace of the machine: of torch's metadata only ``namespace``, a node's module path, stays; our own
``normfuse`` says which pass made the node, and where. The same program gives the same bytes.
"""

from __future__ import annotations

import ast
import contextlib
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind

from normfuse.errors import ExportError, InputError, NormfuseWarning
from normfuse.exporters import onnx_translations
from normfuse.exporters.lowering import evaluated, in_float32, with_operators
from normfuse.exporters.onnx_walk import nodes_of, values_of
from normfuse.exporters.onnxruntime import Array, as_array, without_prefix
from normfuse.graph.program import Program, Site, quiet
from normfuse.sources.atomic import scratch, write_atomically
from normfuse.sources.packages import package

OLDEST_OPSET, NEWEST_OPSET = 18, 25
WIDE_GROUP_NORM_OPSET = 21
LARGEST_FILE = 1_900_000_000  # bytes of weights; a protobuf ends at 2 GiB
KEY = "normfuse"
ORIGIN = "normfuse node"
EXACT = {"Concat", "ConstantOfShape", "Expand", "Flatten", "Gather", "Identity", "Neg", "Pad", "Reshape", "Slice", "Split",
         "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where"}  # fmt: skip
"""Operators whose results are numbers that they were given."""


@dataclass(frozen=True)
class OnnxModelInfo:
    """What was written.

    Attributes:
        path: the file.
        opset: version of the standard operators.
        inputs: name -> type, such as ``float32[batch,3,224,224]``.
        outputs: name -> type.
        ops: operator -> number of nodes.
        data: the file beside it with the weights, when they are too large for one file.
        sites: name of a node of the file -> where in the model it comes from; known here alone, not in the file.
    """

    path: Path
    opset: int
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    ops: Mapping[str, int]
    data: Path | None
    sites: Mapping[str, Site] = field(default_factory=dict)


def export(
    program: Program | ExportedProgram,
    path: str | Path,
    *,
    opset: int = 20,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> OnnxModelInfo:
    """Write a program as an ONNX file; dynamic dims stay dynamic, under their names where torch still knows them.

    Args:
        program: the program, or a functional ``ExportedProgram`` (after ``run_decompositions({})``); it is not changed.
        path: the file to write; weights of more than ``LARGEST_FILE`` bytes go to ``<path>.data``.
        opset: version of the standard operators, 18 to 25.
        input_names: for the inputs in the order of `onnx_inputs`; the program's own names when None.
        output_names: for the outputs in order, None outputs left out; torch's names when None.

    Raises:
        MissingExtra: onnx or onnxscript is not installed.
        ExportError: ONNX, at this opset, cannot say the program; names the node.
    """
    for name in ("onnx", "onnxscript"):
        package(name, "onnx")
    program = prepared(program if isinstance(program, Program) else Program(program), opset)
    exported, path = program.exported, Path(path)
    _check_outputs(exported)
    model, sites = _convert(program, opset)
    _rename(model, model.graph.inputs, input_names or [spec.arg.name for spec in _inputs(exported)])
    _rename(model, model.graph.outputs, output_names or [value.name for value in model.graph.outputs])
    data = _save(model, path)
    inputs, outputs = ({v.name: _type(v) for v in values} for values in (model.graph.inputs, model.graph.outputs))
    return OnnxModelInfo(path, opset, inputs, outputs, _count(model), data, sites)


def prepared(program: Program, opset: int) -> Program:
    """The program that the file is made of: weights evaluated, norms as operators, half precisions accumulated in float32.

    LayerNormalization, RMSNormalization and from opset 21 GroupNormalization do so by themselves.
    """
    single = {"instance_norm"} if opset >= WIDE_GROUP_NORM_OPSET else {"instance_norm", "group_norm"}
    return in_float32(with_operators(evaluated(program)), single)


def onnx_inputs(exported: ExportedProgram, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> dict[str, Array]:
    """The arguments of a call as ONNX inputs, in the order of the file; None and constants are left out.

    Raises:
        InputError: the arguments are not nested as the example inputs were.
    """
    try:
        leaves = exported.call_spec.in_spec.flatten_up_to((tuple(args), dict(kwargs or {})))
    except (ValueError, KeyError) as error:
        raise InputError(f"the inputs do not fit the program: {without_prefix(error)}") from error
    names = [spec.arg.name for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    values = dict(zip(names, leaves, strict=True))
    return {spec.arg.name: as_array(values[spec.arg.name]) for spec in _inputs(exported)}


# -- the model ---------------------------------------------------------------------------------------------------------


def _check_outputs(exported: ExportedProgram) -> None:
    """Refuse what ONNX cannot return, and say what it cannot keep."""
    signature = exported.graph_signature
    for value in (spec.arg.value for spec in signature.output_specs if isinstance(spec.arg, ConstantArgument)):
        if value is not None:
            raise ExportError(f"the program returns {value!r}; an ONNX file returns tensors only")
    if state := sorted({**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}.values()):
        text = f"an ONNX file keeps no state: the program's updates of {', '.join(state)} are left out"
        warnings.warn(text, NormfuseWarning, stacklevel=3)


def _convert(program: Program, opset: int) -> tuple[Any, dict[str, Site]]:
    """The program as an ``onnx_ir.Model`` that holds nothing of this machine, and where its nodes come from."""
    exported = program.exported
    beyond = ExportError(f"torch.onnx does not write opset {opset}", hint="use opset 20")
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise beyond
    try:
        with quiet(), _tagged(exported):
            converted: Any = torch.onnx.export(
                exported,
                (),
                dynamo=True,
                opset_version=opset,
                verbose=False,
                optimize=False,
                custom_translation_table=onnx_translations.translations(opset),
            )
            _shield_small_numbers(converted.model)
            with _kept(converted.model, "BatchNormalization"):
                package("onnxscript.optimizer", "onnx").optimize_ir(converted.model, should_fold=_folded)
    except Exception as error:  # torch.onnx raises whatever its translations raise
        raise _in_plain_words(error, exported) from error
    if converted.model.opset_imports.get("") != opset:
        raise beyond
    converted.rename_axes(dim_names(exported))
    sites = _strip(converted.model, converted.exported_program, program)
    return converted.model, sites


def _shield_small_numbers(model: Any) -> None:
    """Make vectors of the scalars that torch.onnx's optimizer takes for 0 or 1 without their being it, such as an eps.

    It would drop ``+ 1e-12`` as it drops ``+ 0``, and a row of zeros would become NaN; it looks at scalars only.
    """
    ir = package("onnx_ir", "onnx")
    for node in [node for node in nodes_of(model) if node.op_type in ("Add", "Sub", "Mul", "Div")]:
        for index, value in enumerate(node.inputs):
            tensor, other = ir.convenience.get_const_tensor(value), node.inputs[1 - index]
            if tensor is None or tensor.shape.rank() or other.shape is None or not other.shape.rank():
                continue
            number = float(tensor.numpy())
            if any(number != taken and math.isclose(number, taken, rel_tol=1e-5, abs_tol=1e-8) for taken in (0, 1)):
                vector = ir.node("Constant", [], {"value": ir.tensor(tensor.numpy().reshape(1), dtype=tensor.dtype)})
                node.prepend(vector)
                node.replace_input_with(index, vector.outputs[0])


def _folded(node: Any) -> bool | None:
    """Let torch.onnx's optimizer compute constants as it likes, but no rounded ones: the file would hold other weights."""
    made = node.outputs[0].dtype
    if made is None or not made.is_floating_point() or node.op_type in EXACT:
        return None
    exact = node.op_type == "Cast" and (given := node.inputs[0].dtype) is not None and given.bitwidth < made.bitwidth
    return None if exact else False


@contextlib.contextmanager
def _kept(model: Any, op: str) -> Iterator[None]:
    """Hide an operator from torch.onnx's optimizer, which folds BatchNorms in float32: the file would hold other weights."""
    nodes = [node for node in nodes_of(model) if node.op_type == op and not node.domain]
    for node in nodes:
        node.domain = KEY
    yield
    for node in nodes:
        node.domain = ""


@contextlib.contextmanager
def _tagged(exported: ExportedProgram) -> Iterator[None]:
    """Put each node's name and ``meta["normfuse"]`` where torch's decompositions carry them along, for a while."""
    before = {node: node.meta.get("custom") for node in exported.graph.nodes if node.op == "call_function"}
    try:
        for node, custom in before.items():
            made = {KEY: ": ".join(map(str, node.meta[KEY]))} if KEY in node.meta else {}
            node.meta["custom"] = {**(custom or {}), ORIGIN: node.name, **made}
        yield
    finally:
        for node, custom in before.items():
            node.meta["custom"] = custom
            if custom is None:
                del node.meta["custom"]


def _strip(model: Any, translated: ExportedProgram, program: Program) -> dict[str, Site]:
    """Replace torch's metadata (stack traces, reprs) by the module path and our tag; gives what they told, by node."""
    tags = {node.name: node.meta.get("custom") or {} for node in translated.graph.nodes}
    sites: dict[str, Site] = {}
    for node in nodes_of(model):
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['']"))
        custom = tags.get(scopes[-1], {})
        origin = program.nodes.get(custom.get(ORIGIN, scopes[-1]))
        if node.name and origin is not None:
            sites[node.name] = program.site(origin)
        kept = {"namespace": node.metadata_props.get("namespace"), KEY: custom.get(KEY)}
        node.metadata_props.clear()
        node.metadata_props.update({key: value for key, value in kept.items() if value})
        node.doc_string = None
    for holder in (model, model.graph, *model.functions.values(), *values_of(model)):
        holder.metadata_props.clear()
        holder.doc_string = None
    return sites


def _count(model: Any) -> dict[str, int]:
    return dict(sorted(Counter(node.op_type for node in nodes_of(model)).items()))


def _inputs(exported: ExportedProgram) -> list[Any]:
    """The user's inputs as the file has them: without None and other constants."""
    specs = exported.graph_signature.input_specs
    return [s for s in specs if s.kind is InputKind.USER_INPUT and not isinstance(s.arg, ConstantArgument)]


def _rename(model: Any, values: Sequence[Any], names: Sequence[str]) -> None:
    """Name inputs or outputs; a value that already has such a name takes the old name in exchange."""
    if len(names) != len(values) or len(set(names)) != len(names):
        raise ExportError(f"{len(values)} distinct names are needed, for {', '.join(value.name for value in values)}")
    for value, name in zip(values, names, strict=True):
        for holder in [each for each in values_of(model) if each.name == name]:
            holder.name = value.name
        value.name = name


def dim_names(exported: ExportedProgram) -> dict[str, str]:
    """Symbol -> the name of its `torch.export.Dim`; known in the process that traced, a ``.pt2`` does not keep it."""
    sizes = [size for node in exported.graph.nodes for size in getattr(node.meta.get("val"), "shape", ())]
    env: Any = next((size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)), None)
    names, symbols = getattr(env, "source_name_to_debug_name", {}), getattr(env, "source_to_var", {})
    roots = {name: env.replace(symbols[source]) for source, name in names.items() if source in symbols}
    return {str(root): name for name, root in roots.items() if root.is_symbol}


def _type(value: Any) -> str:
    return f"{value.dtype.numpy().name}[{','.join(map(str, value.shape or ()))}]"


def _save(model: Any, path: Path) -> Path | None:
    """Write the file, checked, together with its data file if it needs one; gives the data file."""
    onnx, ir = package("onnx", "onnx"), package("onnx_ir", "onnx")
    large = sum(value.const_value.nbytes for value in model.graph.initializers.values()) > LARGEST_FILE
    data = path.with_name(path.name + ".data") if large else None

    def write(temporary: Path) -> None:
        with scratch(temporary.parent) as folder:
            staged = folder / path.name  # the data file's name goes into this one
            ir.save(model, staged, external_data=data and data.name)
            try:
                onnx.checker.check_model(str(staged), full_check=True)
            except Exception as error:  # the checker's exceptions are not public
                hint = "another opset may have it: bfloat16 mostly wants 22 or later"
                raise ExportError(f"torch.onnx made an invalid file: {without_prefix(error)}", hint=hint) from error
            if data is not None:
                os.replace(staged.with_name(data.name), temporary.with_name(data.name))
            staged.replace(temporary)

    write_atomically(path, write)
    return data


def _in_plain_words(error: BaseException, exported: ExportedProgram) -> ExportError:
    """One line for a chain of torch.onnx's exceptions, whose messages run over pages."""
    root, text = error, str(error)
    while root.__cause__ is not None:
        root = root.__cause__
    node = re.search(r"translating node %(\w+) :.*?call_function\[target=(?:torch\.ops\.)?([^\]]+)\]", text)
    if node is None:
        return ExportError(f"torch.onnx failed: {without_prefix(root)}")
    program = Program(exported)
    site = program.site(program.nodes[node[1]]) if node[1] in program.nodes else None
    where = f"node {node[1]}" + (f" of {site} ({site.source or 'source unknown'})" if site else "")
    reason = "has no ONNX counterpart" if "No ONNX function" in text else f"failed: {without_prefix(root)}"
    return ExportError(f"{node[2]}, {where}, {reason}", hint="another opset may have it; a .pt2 file keeps any operator")
