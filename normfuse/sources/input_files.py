"""Example inputs from files, and from a function of the user's own."""

from __future__ import annotations

import os
import runpy
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils import _pytree as pytree

from normfuse import limits
from normfuse.errors import InputError, LoadError, first_line
from normfuse.limits import OverLimit, check_inflation
from normfuse.sources.inputs import Inputs, call_of, from_loader
from normfuse.sources.loading import first_bytes, load_data

# ---- from files


def from_file(path: str | os.PathLike[str]) -> Inputs:
    """Inputs saved as .pt, .npy, .npz or .safetensors; nothing in the file is executed.

    A tensor or a sequence is positional. In a mapping ``arg0``, ``arg1``, … are positional and all others keywords, unless
    it has ``args`` and ``kwargs`` themselves.
    """
    path = Path(path)
    try:
        args, kwargs = call_of(_content(path))
        leaves = pytree.tree_leaves((args, kwargs))
    except LoadError as error:
        raise InputError(str(error), hint=error.hint) from error
    except OverLimit as over:
        raise InputError(f"{path} is not read: {over}", hint=over.hint) from None
    except Exception as error:  # each of the readers has its own ways to fail
        reason = first_line(error)[:200]
        raise InputError(f"cannot read inputs from {path}: {reason}", hint="save them with torch.save") from error
    strangers = [leaf for leaf in leaves if not isinstance(leaf, Tensor | bool | int | float | str | None)]
    if strangers or not any(isinstance(leaf, Tensor) for leaf in leaves):
        held = type(strangers[0]).__name__ if strangers else "no tensor"
        raise InputError(f"{path} holds {held}, not inputs", hint="save a tensor, or a tuple or dict of tensors")
    return Inputs(args, kwargs)


def from_script(path: str | os.PathLike[str], name: str = "inputs") -> Inputs:
    """The examples of a loader that a Python file makes: what its function ``name`` gives.

    The file is executed: name only your own.

    Raises:
        InputError: there is no such file or function, or the file or the loader fails.
    """
    made = run_script(path, name)
    try:
        return from_loader(made())
    except InputError:
        raise
    except Exception as error:  # the user's own code
        raise InputError(f"{path} fails: {type(error).__name__}: {error}", hint=f"the error is in {path}") from error


def run_script(path: str | os.PathLike[str], name: str) -> Callable[[], Any]:
    """The function of a name in a Python file, which is run.

    Raises:
        InputError: there is no such file or function, or the file fails.
    """
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}", hint="check the path")
    sys.path.insert(0, str(Path(path).parent))  # as `python FILE.py` does, for what the file imports
    try:
        named = runpy.run_path(os.fspath(path))
    except (Exception, SystemExit) as error:  # the user's own code
        raise InputError(f"{path} fails: {type(error).__name__}: {error}", hint=f"the error is in {path}") from error
    if not callable(named.get(name)):
        raise InputError(f"{path} has no function '{name}'", hint="write FILE.py:NAME with the name of a function in it")
    found: Callable[[], Any] = named[name]
    return found


def _content(path: Path) -> Any:
    head = first_bytes(path)
    if head.startswith(b"\x93NUMPY"):
        return torch.from_numpy(_array(path))
    if head.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            numpy = all(name.endswith(".npy") for name in archive.namelist())
            unpacked = sum(member.file_size for member in archive.infolist())
        if numpy:
            check_inflation(unpacked, path.stat().st_size)
            if unpacked > limits.INPUT_BYTES:
                raise OverLimit(f"its arrays would take {unpacked:,} bytes", "INPUT_BYTES")
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays}
    if head[8:9] == b"{":
        return load_file(path)
    return load_data(path)


def _array(path: Path) -> Any:
    mapped = np.load(path, allow_pickle=False, mmap_mode="c")  # so that its sizes are compared with the file's
    if mapped.nbytes > limits.INPUT_BYTES:
        raise OverLimit(f"its array would take {mapped.nbytes:,} bytes", "INPUT_BYTES")
    return np.array(mapped)
