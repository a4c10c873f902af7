"""Read a model file, without executing it.

    load(path)         a pickled nn.Module, or an exported program (.pt2); decided by content, not by ending
    load_data(path)    tensors and plain containers, for example inputs

Loading does not execute what a file brings. A pickle is read as a picture of what it describes (`pickles`); what that names
is judged by `allowlist`'s rules, and refused by name; what is left is built by `building`, which calls a closed table of
constructors and nothing else. Whatever a few bytes could make large has a bound with a name (`limits`). SECURITY.md tells
what this protects from, and what not.

Everything that is not a model is recognised where that is cheap, and answered with what to do instead.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normfuse.errors import LoadError, NormfuseWarning
from normfuse.limits import OverLimit, check_inflation
from normfuse.sources import allowlist, archive
from normfuse.sources.building import Builder, check_modules, names_in
from normfuse.sources.constructors import Stored
from normfuse.sources.extents import check_numbers
from normfuse.sources.missing_packages import what_to_do
from normfuse.sources.own_classes import run_file
from normfuse.sources.pickles import Unreadable, picture
from normfuse.sources.storages import archived, in_a_row, unpacked_size

TRUST = "--trust-pickle (trust_pickle=True) lets the file run whatever it contains on this machine: your own decision"
RESAVE = "save the module with torch.save(model, path), or export it with torch.export and torch.export.save"
BUILD = "build the model in Python, load these weights into it, then pass the module or torch.save(model, path)"
NAME_IT = "say of which model: --model timm:NAME, torchvision:NAME, transformers:FOLDER or FILE.py:NAME (your own code)"

SCRIPT = "save the nn.Module that it was made of with torch.save(model, path), or export that one with torch.export"

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled
# What is not a model, by its first bytes: (pattern, what it is, what to do). The first that matches is the answer.
FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (rb"\x80[\x01-\x05]", "is a plain pickle, not a file of torch.save", RESAVE),
    (rb"\x93NUMPY", "is a NumPy array, not a model", "example inputs are passed with --input"),
    (rb"GGUF", "is a GGUF file, which holds weights for llama.cpp", BUILD),
    (rb"\x89HDF\r\n", "is an HDF5 file, such as Keras weights", BUILD),
    (rb"(?s).{4}TFL3", "is a TensorFlow Lite model", "normfuse reads PyTorch models"),
    (rb"(?s).{8}\{\s*\"", "is a safetensors file: weights without a model", NAME_IT),
    (rb"version https://git-lfs", "is a Git LFS pointer, not the file that it points to", "run: git lfs pull"),
    (rb"(?i)\s*<(!doctype|html|\?xml)", "is a web page", "the download answered with a page; fetch the file again"),
    (
        rb'\s*\{\s*"',
        "is a JSON text, not a model",
        "name the folder that it is in; for an index of weights that has no config.json beside it, say --model too",
    ),
    (rb"\x08[\x01-\x20][\x12\x1a\x22\x28\x32\x3a\x42]", "looks like an ONNX model", "pass the PyTorch model instead"),
    (rb"(?s)[^\x00-\x08\x0e-\x1a]+$", "is a text file, not a model", RESAVE),
)


def load(
    path: str | os.PathLike[str], *, code: str | os.PathLike[str] | None = None, trust_pickle: bool = False
) -> nn.Module | torch.export.ExportedProgram:
    """The model in a file, as saved: on the CPU, in the mode (train or eval) that it was saved in.

    Args:
        path: a file of `torch.save(module)` or `torch.export.save(program)`.
        code: a Python file of your own, which is run: the model may have the classes that are made in it.
        trust_pickle: unpickle without any check. The file can then run code of its own.

    Raises:
        LoadError: the file is not a model, or asks for more than `allowlist` allows.
        InputError: ``code`` is no Python file, or fails.
    """
    path = Path(path)
    resolve = allowlist.resolve if code is None else partial(allowlist.resolve, own=run_file(code))
    head = first_bytes(path)
    if head.startswith(LEGACY):
        return _as_module(path, _load_legacy(path, trust_pickle=trust_pickle, resolve=resolve))
    if not head.startswith(b"PK\x03\x04"):
        raise foreign(path, head)
    reader = archive_reader(path)
    records = set(reader.get_all_records())
    if "archive_format" in records:
        return _load_exported(path, reader, trust_pickle=trust_pickle)
    if "constants.pkl" in records:
        return _load_script(path, trust_pickle=trust_pickle)
    if "data.pkl" not in records:
        raise LoadError(f"{path} is a zip file, but not one of torch.save or torch.export.save", hint=RESAVE)
    return _as_module(path, _load_pickled(path, reader, trust_pickle=trust_pickle, resolve=resolve))


def load_data(path: str | os.PathLike[str]) -> Any:
    """What `torch.save` wrote, if it is made of tensors and plain containers only; nothing else is allowed by name.

    Raises:
        LoadError: it is not, or the file is no file of `torch.save`.
    """
    path = Path(path)
    head = first_bytes(path)
    if head.startswith(LEGACY):
        return _load_legacy(path, trust_pickle=False, resolve=_nothing)
    if not head.startswith(b"PK\x03\x04"):
        raise foreign(path, head)
    reader = archive_reader(path)
    if "data.pkl" not in reader.get_all_records():
        raise LoadError(f"{path} is a zip file, but not one of torch.save", hint="save the inputs with torch.save")
    return _load_pickled(path, reader, trust_pickle=False, resolve=_nothing)


Resolve = Callable[[set[str]], Mapping[str, Any]]


def _nothing(names: set[str]) -> Mapping[str, Any]:
    if names:
        raise allowlist.NotAllowed(*sorted(names))
    return {}


def first_bytes(path: Path) -> bytes:
    """What a file begins with.

    Raises:
        LoadError: it is empty, no regular file, or cannot be read.
    """
    try:
        if path.is_dir():
            raise _folder(path)
        if path.exists() and not path.is_file():
            raise LoadError(f"{path} is not a regular file", hint="copy the model to a file first")
        with path.open("rb") as file:
            head = file.read(512)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise LoadError(f"cannot read {path}: {reason}", hint="check the path and its permissions") from error
    if not head:
        raise LoadError(f"{path} is empty", hint="fetch or save the file again")
    return head


def _folder(path: Path) -> LoadError:
    if (path / "saved_model.pb").exists():
        return LoadError(f"{path} is a TensorFlow SavedModel", hint="normfuse reads PyTorch models")
    if (path / "config.json").exists():
        hint = "normfuse.open(path) opens it, and so does whatever takes a model"
        return LoadError(f"{path} is a folder of transformers' save_pretrained, not one file", hint=hint)
    if (path / ADAPTER).exists():
        return adapter(path)
    if (path / "model_index.json").exists():
        return LoadError(f"{path} is a pipeline of several models", hint="name the folder of one of them, which is inside")
    if (path / ".metadata").exists():
        return LoadError(f"{path} is a checkpoint of torch.distributed.checkpoint: weights without a model", hint=NAME_IT)
    if not any(path.iterdir()):
        return LoadError(f"{path} is a folder with nothing in it", hint="check the path")
    return LoadError(f"{path} is a folder, not a model file", hint=f"it has no config.json: name a file in it, or {NAME_IT}")


ADAPTER = "adapter_config.json"


def adapter(folder: Path) -> LoadError:
    """What to say of a folder that has an adapter, with which its weights are others than those in its files."""
    hint = "merge it into its model first: PeftModel.merge_and_unload(), then save_pretrained"
    return LoadError(f"{folder} has an adapter of PEFT ({ADAPTER}), which changes the weights of its model", hint=hint)


def foreign(path: Path, head: bytes) -> LoadError:
    """What a file is that is none of torch's, by its first bytes."""
    for pattern, what, hint in FOREIGN:
        if re.match(pattern, head):
            return LoadError(f"{path} {what}", hint=hint)
    return LoadError(f"{path} is not a file of torch.save or torch.export.save", hint=RESAVE)


def archive_reader(path: Path) -> torch._C.PyTorchFileReader:
    """Torch's reader of an archive.

    Raises:
        LoadError: the file is no archive of torch's, or is damaged.
    """
    # The same reader as torch.load's and torch.export.load's: two zip readers can see two contents in one hostile file.
    try:
        reader = torch._C.PyTorchFileReader(os.fspath(path))
        reader.get_all_records()  # which can fail too
        return reader
    except RuntimeError as error:
        with contextlib.suppress(*archive.NO_ZIP), zipfile.ZipFile(path) as unpacked:
            names = unpacked.namelist()
            if "serialized_exported_program.json" in names:
                hint = "export it again with this torch, or load it with the old one and save it again"
                what = "an exported program in torch's format from before 2.8"
                raise LoadError(f"{path} is {what}", hint=hint) from error
            what = "a NumPy .npz file" if names[:1] and names[0].endswith(".npy") else "a zip file"
            raise LoadError(f"{path} is {what}, not a model", hint=RESAVE) from error
        raise LoadError(f"{path} is damaged or cut short", hint="fetch or save the file again") from error


def _load_exported(path: Path, reader: torch._C.PyTorchFileReader, *, trust_pickle: bool) -> torch.export.ExportedProgram:
    from torch.export.pt2_archive import _package as pt2

    with told_as_load_error(path):
        if trust_pickle:
            with path.open("rb") as file:
                programs = pt2.load_pt2(file).exported_programs
        else:
            # torch.export.load falls back to another zip reader and an old format; this reads what was checked.
            examples = _checked_archive(path, reader)
            archived = _without_examples(path)
            programs = pt2._load_exported_programs(archived, archived.get_file_names(), None)
            for name in programs:
                programs[name]._example_inputs = examples.get(f"data/sample_inputs/{name}.pt")
    if set(programs) != {"model"}:
        raise LoadError(f"{path} holds {len(programs)} programs, not one", hint="save one with torch.export.save")
    program: torch.export.ExportedProgram = programs["model"]
    if not trust_pickle:
        with told_as_load_error(path):
            check_numbers(program.graph_module)
    return program


def _without_examples(path: Path) -> Any:
    """Torch's reader of a .pt2, to which the pickles of example inputs are empty: torch would unpickle them its own way."""
    from torch.export.pt2_archive._package import PT2ArchiveReader

    class WithoutExamples(PT2ArchiveReader):
        def read_bytes(self, name: str) -> bytes:
            return b"" if name.startswith("data/sample_inputs/") else super().read_bytes(name)

    return WithoutExamples(os.fspath(path))


def _checked_archive(path: Path, reader: torch._C.PyTorchFileReader) -> dict[str, Any]:
    """The example inputs of a .pt2, by their records; refuses the archive if anything in it would execute."""
    check_inflation(unpacked_size(reader), path.stat().st_size)
    archive.check_version(reader)
    if strangers := dict.fromkeys(archive.archive_strangers(reader)):
        raise allowlist.NotAllowed(*strangers)
    examples: dict[str, Any] = {}
    for record in reader.get_all_records():
        content = reader.get_record(record) if record.startswith("data/sample_inputs/") else b""
        if content:
            inside = torch._C.PyTorchFileReader(BytesIO(content))  # type: ignore[arg-type]
            root, storages = archived(inside, None, len(content))
            examples[record] = _built(picture(root), storages, allowlist.resolve)
    return examples


def _load_script(path: Path, *, trust_pickle: bool) -> nn.Module:
    if not trust_pickle:  # its code can run while it is loaded, and write files
        said = f"{path} is a TorchScript archive: code, which is not run unasked"
        raise LoadError(said, hint=f"{SCRIPT}. {TRUST}, and torch's converter then makes a program of it")
    with told_as_load_error(path), warnings.catch_warnings(action="ignore"):
        script: nn.Module = torch.jit.load(os.fspath(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
        return script


def _load_legacy(path: Path, *, trust_pickle: bool, resolve: Resolve = allowlist.resolve) -> Any:
    with told_as_load_error(path):
        if trust_pickle:
            return torch.load(path, map_location="cpu", weights_only=False)
        (_magic, _version, _machine, root, keys), storages = in_a_row(path.read_bytes())
        content = _built(picture(root), storages, resolve)
        storages.fill(picture(keys))
        return content


def _load_pickled(
    path: Path, reader: torch._C.PyTorchFileReader, *, trust_pickle: bool, resolve: Resolve = allowlist.resolve
) -> Any:
    with told_as_load_error(path):
        if trust_pickle:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
        root, storages = archived(reader, path, path.stat().st_size)
        return _built(picture(root), storages, resolve)


def _built(root: Any, stored: Callable[[Any], Stored], resolve: Resolve) -> Any:
    builder = Builder(resolve(names_in(root)), stored)
    content = builder.build(root)
    if builder.unwrapped:
        around = " and ".join(dict.fromkeys(builder.unwrapped))
        warnings.warn(f"the file holds a model inside of {around}; the model itself was taken", NormfuseWarning, stacklevel=2)
    check_modules(builder.modules)
    return content


@contextlib.contextmanager
def told_as_load_error(path: Path) -> Iterator[None]:
    """A damaged or hostile file can fail anywhere in torch's readers, with anything: to the user it is one line."""
    try:
        yield
    except LoadError:
        raise
    except allowlist.NotAllowed as refused:
        raise LoadError(f"{path} wants {refused}; refused", hint=_hint(refused.names, path.parent)) from None
    except allowlist.Broken as broken:
        hint = "repair that installation; the file itself may be fine"
        raise LoadError(f"{path} needs {broken}", hint=hint) from broken
    except OverLimit as over:
        raise LoadError(f"{path} is not read: {over}", hint=over.hint) from None
    except RecursionError as error:
        raise LoadError(f"{path} cannot be read: it is nested too deeply", hint=RESAVE) from error
    except Unreadable as error:
        raise LoadError(f"{path} cannot be read: {error}", hint=RESAVE) from error
    except Exception as error:
        raise LoadError(f"{path} cannot be read: {_reason(error)}", hint="fetch or save the file again") from error


def _hint(names: Sequence[str], beside: Path) -> str:
    tops = {name.partition(".")[0] for name in names if allowlist.is_identifier_path(name)}
    if "__main__" in tops:
        return (
            f"export the model with torch.export, or name the script of your own that has its classes: --model FILE.py. {TRUST}"
        )
    if any(name.startswith(("torch.nn.utils.", "torch.nn.modules.module._Wrapped")) for name in names):
        return f"remove its hooks before you save it, for example with torch.nn.utils.remove_spectral_norm. {TRUST}"
    missing = sorted(top for top in tops - sys.stdlib_module_names if not allowlist.is_installed(top))
    return ". ".join(each for each in (what_to_do(missing, beside), TRUST) if each)


def _reason(error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line[:200]


def _as_module(path: Path, content: Any) -> nn.Module:
    """`content` if it is a module; otherwise the error that says what it is and how to get from there to a module."""
    if isinstance(content, nn.Module):
        return content
    if not isinstance(content, Mapping):
        raise LoadError(f"{path} holds a {type(content).__name__}, not a model", hint=RESAVE)
    modules = [str(key) for key, value in content.items() if isinstance(value, nn.Module)]
    if modules:
        entry = f"torch.load(path, weights_only=False)[{modules[0]!r}]"
        message = f"{path} is a dictionary; its entry {' and '.join(map(repr, modules))} holds a model"
        raise LoadError(message, hint=f"save that entry alone: torch.save({entry}, 'model.pt')")
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        raise LoadError(f"{path} is a state dict: weights without a model", hint=NAME_IT)
    held = ", ".join(map(str, list(content)[:6])) or "nothing"
    raise LoadError(f"{path} is a checkpoint dictionary ({held}), without a model", hint=NAME_IT)
