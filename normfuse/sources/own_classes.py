"""The classes of a Python file of the user's own, which a pickled model may name because the user says so."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from normfuse.errors import InputError
from normfuse.sources.allowlist import is_installed

Own = Mapping[str, ModuleType]
"""Name of a module as a model file has it -> the user's module that it means."""


def run_file(path: str | os.PathLike[str]) -> Own:
    """Run a Python file, and say under which names a model file may have its classes: its own, and a script's ``__main__``.

    Its folder is on the path from then on, for what it imports.

    Raises:
        InputError: there is no such file, another module has its name, or it fails.
    """
    file = Path(path).resolve()
    if file.suffix != ".py" or not file.stem.isidentifier() or not file.is_file():
        raise InputError(
            f"{path} is no Python file", hint="name the file that has the classes of the model, such as my_model.py"
        )
    known = sys.modules.get(file.stem)
    if known is None and not is_installed(file.stem) and file.stem not in sys.stdlib_module_names:
        known = _imported(file)
    if known is None or Path(getattr(known, "__file__", None) or "").resolve() != file:
        raise InputError(
            f"{path} is called like another module, '{file.stem}'", hint="give the file, and its classes, another name"
        )
    return {file.stem: known, "__main__": known}


def _imported(file: Path) -> ModuleType:
    folder = str(file.parent)
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that it shadows nothing that is installed
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's own code
        del sys.modules[file.stem]
        raise InputError(f"{file} fails: {type(error).__name__}: {error}", hint=f"the error is in {file}") from error
    return module
