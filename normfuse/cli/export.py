"""`normfuse export`: write a model for a runtime, run it there, compare."""

from __future__ import annotations

import re
import time
from typing import Any

import rich_click as click
from rich.text import Text

from normfuse.cli.console import NO, YES, rendered, tell, working
from normfuse.cli.files import check_writable, wrote
from normfuse.cli.options import Source, with_answer, with_source
from normfuse.errors import InputError
from normfuse.escaping import escaped

ONLY = {
    "dry_run": ("--dry-run", "tensorrt"),
    "capabilities": ("--capability", "tensorrt"),
    "sizes": ("--size", "tensorrt"),
    "input_names": ("--input-name", "onnx"),
    "output_names": ("--output-name", "onnx"),
}
"""Argument of an exporter -> the option that gives it, and the target that it is for."""


def _sizes(text: str) -> tuple[str, tuple[int, ...]]:
    match = re.fullmatch(r"(\w+)=(\d+),(\d+),(\d+)", text)
    if match is None:
        raise InputError(f"cannot read the sizes '{text}'", hint="write DIM=SMALLEST,USUAL,LARGEST, such as batch=1,8,64")
    name, *sizes = match.groups()
    return name, tuple(map(int, sizes))


# fmt: off
@click.command()
@click.argument("model")
@click.option("--to", metavar="TARGET",
              help="onnx, tensorrt, openvino, executorch or aoti. [default=by how OUT ends: .onnx, .engine, .xml, .pte]")
@click.option("-o", "--output", required=True, metavar="OUT", help="The file to write.")
@click.option("--opset", default=20, show_default=True, metavar="N", help="Version of ONNX's standard operators.")
@click.option("--capability", "capabilities", multiple=True, metavar="X.Y",
              help="With tensorrt: a GPU generation to build for ahead of time, such as 8.9; may be given again.")
@click.option("--size", "sizes", multiple=True, metavar="DIM=A,B,C",
              help="With tensorrt: smallest, usual and largest size of a dynamic dim, such as batch=1,8,64; for every dim.")
@click.option("--input-name", "input_names", multiple=True, metavar="NAME",
              help="With onnx: what the file calls its inputs, given once for each, in order.")
@click.option("--output-name", "output_names", multiple=True, metavar="NAME", help="With onnx: the same for its outputs.")
@click.option("--dry-run", is_flag=True, help="With tensorrt: say of every operator whether TensorRT takes it; write nothing.")
@with_source
@with_answer
def export(model: str, to: str | None, output: str, opset: int, dry_run: bool, source: Source, as_json: bool,
           sizes: tuple[str, ...], **options: tuple[str, ...]) -> int:
    # fmt: on
    """Write MODEL for a runtime, run it there, and compare; a file that computes something else is removed."""
    started = time.perf_counter()
    check_writable([None if dry_run else output], (model, source.path))
    with working("exporting"):
        from normfuse.api import exporting
        from normfuse.exporters.targets import target_of

        target = target_of(to, output).name  # before anything is opened
        held = source.opened(model)
        example = source.inputs(held)
        further: dict[str, Any] = {name: given for name, given in options.items() if given}
        further |= {"sizes": dict(map(_sizes, sizes))} if sizes else {}
        if strange := [ONLY[name][0] for name in (*further, *(["dry_run"] if dry_run else [])) if ONLY[name][1] != target]:
            raise InputError(f"{strange[0]} is not for --to {target}", hint="normfuse export --help says what it is for")
        if dry_run:
            nodes = exporting.supported(held, opset=opset, inputs=example)
            refused = [str(each) for each in nodes if not each.supported]
            ending = f"TensorRT takes {len(nodes) - len(refused)} of {len(nodes)} operators"
            data: dict[str, Any] = {"model": model, "to": target, "operators": len(nodes), "refused": refused}
            return tell(as_json, data, *escaped(refused), Text(ending, "bold")) or (NO if refused else YES)
        evidence = exporting.export(held, output, to=target, opset=opset, inputs=example, **further)
    data = {"model": model, "to": target, "opset": opset, "written": output, "evidence": evidence.to_dict()}
    return tell(as_json, data, *rendered(evidence), "", Text(wrote(output, started), "bold"))
