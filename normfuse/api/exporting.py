"""`normfuse.export`: write a model for a runtime, run it there, and compare."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfuse.api.opening import Given, Model, files_of, to_program
from normfuse.errors import ExportError, InputError, one_of
from normfuse.escaping import is_text
from normfuse.exporters.lowering import evaluated
from normfuse.exporters.targets import Target, target_of
from normfuse.graph.program import Program
from normfuse.proof.cases import Case, cases_for
from normfuse.proof.equivalence import compare
from normfuse.proof.evidence import Evidence, checked
from normfuse.proof.measuring import Progress
from normfuse.proof.sides import artifact_side, ports_of, program_side
from normfuse.sources.atomic import proven_first, scratch

if TYPE_CHECKING:
    from normfuse.exporters.tensorrt import Support


def export(
    model: Model,
    path: str | Path,
    *,
    to: str | None = None,
    opset: int = 20,
    inputs: Given = None,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    trust_pickle: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Evidence:
    """Write a model for a runtime, run the file there as a user would, and compare; what differs is not written.

    Args:
        model: as for `rewrite`; a `Result` brings its own inputs.
        path: the file to write.
        to: ``onnx``, ``tensorrt``, ``openvino``, ``executorch``, ``aoti``, or what another package adds (`docs/plugins.md`);
            None to go by how the path ends.
        opset: the ONNX opset, also of the file that an engine is built from; RMSNorm is written in the form that ONNX
            Runtime fuses at that opset.
        inputs: as for `rewrite`.
        kwargs: as for `rewrite`.
        dynamic_shapes: as for `rewrite`.
        trust_pickle: as for `rewrite`.
        progress: called with (what, done, total).
        options: further arguments of the target's ``export``, such as ``capabilities`` for an engine.

    Returns:
        The evidence. An engine that cannot run on this machine is not compared; the ONNX file that it was built from is.

    Raises:
        InputError: the path is the model's own file, or its folder does not exist.
        MissingExtra: the packages for the target are not installed.
        ExportError: the target cannot say the program; names the node.
        VerificationFailed: the runtime computes something else; nothing is written.
    """
    target = target_of(to, path)
    _check_name(target, Path(path))
    _, program, given = to_program(model, inputs, kwargs, dynamic_shapes, trust_pickle)
    program = program.baked()
    tried = cases_for(program, given)
    write = target.module().export
    known = [name for name, each in inspect.signature(write).parameters.items() if each.kind is each.KEYWORD_ONLY]
    for name in options:
        one_of(name, known, f"option of {target.name}")
    wanted = {"opset": opset, **options} if "opset" in known else options
    written: list[Any] = []
    with proven_first(
        Path(path), lambda file: written.append(write(program, file, **wanted)), never_over=files_of(model)
    ) as file:
        evidence = compared(program, file, target.name, tried, opset=opset, progress=progress)
        checked(evidence)
    engine = (str(written[0]),) if target.name == "tensorrt" else ()
    return replace(evidence, notes=(*engine, *evidence.notes))


def compared(
    program: Program, file: Path, target: str, tried: Iterable[Case], *, opset: int, progress: Progress | None
) -> Evidence:
    """The evidence that a file computes what the program does whose weights it holds.

    Args:
        program: what was exported.
        file: what was written.
        target: its name.
        tried: the inputs.
        opset: for the ONNX file that stands in for an engine.
        progress: called with (what, done, total).
    """
    from normfuse.api.verification import opened

    try:
        artifact = opened(file, trust=True)  # what was just written here is our own
    except ExportError as error:
        if target != "tensorrt":
            raise
        from normfuse.exporters import onnx

        with scratch() as folder:
            stand_in = folder / f"{file.stem}.onnx"
            onnx.export(program, stand_in, opset=opset)
            evidence = compared(program, stand_in, "onnx", tried, opset=opset, progress=progress)
        return replace(evidence, notes=(f"{error}; the ONNX file that it was built from was compared", *evidence.notes))
    stored, tried = evaluated(program), list(tried)
    if stored is not program:  # weights that its graph computes were rounded, so they are not the very same any more
        evidence = compare(program_side("the program", program), program_side("as it is stored", stored), tried)
        if not evidence.ok:
            return evidence
    reference = program_side("the program", stored, state=False, short=True)
    return compare(reference, artifact_side(artifact, ports_of(program)), tried, same_weights=True, progress=progress)


def supported(
    model: Model,
    *,
    opset: int = 20,
    inputs: Given = None,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    trust_pickle: bool = False,
) -> list[Support]:
    """What TensorRT says of every operator of a model's ONNX file, before an engine is built.

    Args:
        model: as for `export`.
        opset: as for `export`.
        inputs: as for `export`.
        kwargs: as for `export`.
        dynamic_shapes: as for `export`.
        trust_pickle: as for `export`.

    Raises:
        MissingExtra: TensorRT for RTX is not installed.
        ExportError: ONNX cannot say the program.
    """
    from normfuse.exporters import tensorrt

    _, program, _ = to_program(model, inputs, kwargs, dynamic_shapes, trust_pickle)
    return tensorrt.dry_run(program.baked(), opset=opset)


def _check_name(target: Target, path: Path) -> None:
    """Refuse now what could not be opened to be compared."""
    if path.suffix not in target.suffixes:
        usual = target.suffixes[0]
        hint = f"write {path.stem}{usual}, or say with --to (to=...) what the file is for"
        raise InputError(f"what is written for {target.name} is a {usual} file, not {path.name}", hint=hint)
    if not is_text(path):
        raise InputError(f"{path} is not UTF-8, and no runtime opens such a name", hint="give another name")
