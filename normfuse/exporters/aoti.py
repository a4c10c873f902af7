"""Write an AOTInductor package: the program compiled to native code, which PyTorch runs from Python or C++ without tracing.

The package is for the kind of machine that made it, and tells that machine's paths. It shares the suffix ``.pt2`` with files
of torch.export.save, which run anywhere; `is_aoti` tells them apart. Opening a package runs native code from the file, so that
wants an explicit ``trust``.
"""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normfuse.errors import ExportError, InputError, first_line
from normfuse.exporters.lowering import evaluated
from normfuse.graph.program import Program, quiet
from normfuse.proof.artifacts import Artifact
from normfuse.sources.archive import NO_ZIP
from normfuse.sources.atomic import write_atomically

INSIDE = "/data/aotinductor/"
CHECK = "AOTI_RUNTIME_CHECK_INPUTS"


@dataclass(frozen=True)
class PackageInfo:
    """What was written.

    Attributes:
        path: the file.
        target: what it runs on, as inductor says it: platform, machine, instruction set.
        bytes: size of the file.
    """

    path: Path
    target: Mapping[str, str]
    bytes: int


def export(program: Program, path: str | Path, *, options: Mapping[str, Any] | None = None) -> PackageInfo:
    """Compile a program and write the package.

    Args:
        program: the program; it is compiled for the device that its tensors are on.
        path: the ``.pt2`` file to write.
        options: inductor's own settings, such as ``{"max_autotune": True}``.

    Raises:
        ExportError: inductor cannot compile the program, or there is no C++ compiler.
        InputError: the file's name does not end in ``.pt2``, or it cannot be written.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise InputError(f"an AOTInductor package is a .pt2 file, not {path.name}", hint=f"write {path.stem}.pt2")
    exported, settings = evaluated(program).exported, dict(options or {})

    def write(file: Path) -> None:
        try:
            with quiet(), torch.no_grad():
                torch._inductor.aoti_compile_and_package(exported, package_path=str(file), inductor_configs=settings)
        except OSError:
            raise
        except Exception as error:  # inductor raises whatever its lowerings and the compiler raise
            hint = "it needs a C++ compiler such as g++; TORCH_LOGS=inductor tells more"
            raise ExportError(f"inductor cannot compile the program: {first_line(error)}", hint=hint) from error

    write_atomically(path, write)
    return PackageInfo(path, _target(path), path.stat().st_size)


def is_aoti(path: str | Path) -> bool:
    """Whether a file is an AOTInductor package, by the names in it: nothing in it is executed or unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(INSIDE in f"/{name}" for name in archive.namelist())
    except NO_ZIP:
        return False


def open_artifact(path: str | Path, *, trust: bool = False) -> Artifact:
    """A package, run by PyTorch. Its inputs are the tensors that the program takes, in order.

    Args:
        path: the file.
        trust: run the native code in the file, which can do anything on this machine: your own decision.

    Raises:
        ExportError: the file is not trusted, is no package, or is not for this machine.
    """
    path = Path(path)
    if not is_aoti(path):
        raise ExportError(f"{path.name} is no AOTInductor package", hint="normfuse export --to aoti writes one")
    if not trust:
        hint = "--trust-pickle (trust_pickle=True) lets the file run whatever it contains on this machine: your own decision"
        raise ExportError(f"{path.name} is native code, which runs when it is opened; refused", hint=hint)
    try:
        loaded: Any = torch._inductor.aoti_load_package(str(path))
    except Exception as error:  # the loader's C++ exceptions
        hint = "build it on a machine like this one: normfuse export --to aoti"
        raise ExportError(f"{path.name} cannot be loaded: {first_line(error)}", hint=hint) from error
    target = loaded.loader.get_metadata()

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        try:
            with torch.no_grad(), _checking_inputs():
                outputs = loaded.loader.run([each.detach() for each in inputs])
        except RuntimeError as error:
            raise InputError(f"{path.name} does not run on these inputs: {first_line(error)}") from error
        return [each for each in outputs if isinstance(each, Tensor)]

    device = target.get("AOTI_DEVICE_KEY", "cpu")
    where = target.get("AOTI_CPU_ISA", "").split(" ")[0] if device == "cpu" else device
    return Artifact(path.name, f"AOTInductor {torch.__version__} ({where or device})", None, {"": run})


@contextlib.contextmanager
def _checking_inputs() -> Iterator[None]:
    """Compiled code checks sizes and dtypes of its inputs only when told so; otherwise it reads what is not there."""
    before = os.environ.get(CHECK)
    os.environ[CHECK] = "1"
    try:
        yield
    finally:
        os.environ.pop(CHECK)
        if before is not None:
            os.environ[CHECK] = before


def _target(path: Path) -> dict[str, str]:
    """What the package says of the machine that it is for, read without running it."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if INSIDE in f"/{name}" and name.endswith("_metadata.json"))
        settings: dict[str, str] = json.loads(archive.read(names[0])) if names else {}
    return {key.removeprefix("AOTI_").lower(): value for key, value in settings.items() if value}
