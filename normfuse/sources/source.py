"""What somebody holds, opened: a model, and what is needed to give the same kind back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from normfuse.errors import InputError, LoadError, listed
from normfuse.sources.mapped import is_mapped, let_go
from normfuse.sources.tensor_files import Weights, is_at_home


@dataclass(frozen=True)
class Stored:
    """A model whose class and whose tensors are kept apart, as in a folder: how they came, and how they are given back.

    Attributes:
        path: the folder, or the file of tensors.
        weights: its tensors.
        keys: name of a tensor of the module -> names of the stored tensors that it is; none where the class made it anew.
        open: opens the same class with the tensors at another path.
        beside: files of the folder that are no tensors and go along.
    """

    path: Path
    weights: Weights
    keys: Mapping[str, tuple[str, ...]]
    open: Callable[[Path], Source]
    beside: tuple[Path, ...] = ()

    @property
    def as_they_are(self) -> frozenset[str]:
        """Names of the module's tensors that files hold in the form that the module has."""
        return frozenset(name for name, keys in self.keys.items() if keys)

    @property
    def is_folder(self) -> bool:
        """Whether several files belong together."""
        return self.path.is_dir() or self.weights.index is not None

    def check_name(self, target: Path) -> None:
        """Refuse a place whose name says that something else is there than what is written back.

        Raises:
            InputError: it does.
        """
        of_folder, kind = self.path if self.path.is_dir() else self.path.parent, self.path.suffix
        if self.is_folder and target.suffix in _WEIGHTS:
            said = f"what was brought is the folder {of_folder}, and {target} is named like a file"
            raise InputError(said, hint="name a folder, or OUT.pt2 for a program")
        if not self.is_folder and (kind == ".safetensors") != (target.suffix == ".safetensors"):
            said = f"what was brought is a {kind} file, and {target} is named otherwise"
            raise InputError(said, hint=f"name {target.with_suffix(kind).name}, or OUT.pt2 for a program")

    def opened(self, path: Path) -> Source:
        """What was written there, opened as this was."""
        return self.open(path if self.path.is_dir() or not self.is_folder else path / self.path.name)


@dataclass(frozen=True)
class Source:
    """A model as somebody brought it; what takes a model takes it.

    Attributes:
        name: how its owner named it.
        model: the model, in evaluation mode where its file does not say otherwise.
        files: what must not be written over.
        notes: what its owner should know of how it was opened, as sentences.
        stored: how the same kind is written; None where it is a program, or a pickled module.
    """

    name: str
    model: nn.Module | ExportedProgram
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    stored: Stored | None = None


def same_memory(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Which of the given tensors each tensor of a module is.

    Those that lie in its memory, whatever they are called; and of a tensor that has several names, those of its names, where
    files hold it several times.
    """
    there: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in tensors.items():
        there.setdefault(_place(tensor), []).append(name)
    state = model.state_dict()
    names: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(_place(tensor), []).append(name)

    def keys(tensor: Tensor) -> Iterator[str]:
        found = there.get(_place(tensor), [])
        yield from found
        others = (each for each in names[_place(tensor)] if found and each not in found)
        yield from (each for each in others if each in tensors and _is_the_same(tensors[each], tensor))

    return {name: tuple(keys(tensor)) for name, tensor in state.items()}


def made_anew(model: nn.Module, tensors: Mapping[str, Tensor], keys: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """A sentence about stored tensors of which a class made others, if it did: those are no longer where the files are.

    Args:
        model: the model.
        tensors: what was stored.
        keys: what `same_memory` said of them.
    """
    read = {name for names in keys.values() for name in names}
    turned = sorted(tensors.keys() - read)
    state = model.state_dict()
    if not turned or all(names or is_mapped(state[name]) for name, names in keys.items()):
        return ()
    they = f"{len(turned)} stored tensors are" if len(turned) > 1 else "a stored tensor is"
    return (f"{they} joined, split, cast or copied where the model is made, and in memory as a whole: {listed(turned, 3)}",)


def _is_the_same(a: Tensor, b: Tensor) -> bool:
    same = a.dtype == b.dtype and torch.equal(a, b)
    for each in (a, b):
        let_go(each)
    return same


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


_WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".npz", ".tflite", ".pkl",
}  # fmt: skip


def files_beside(folder: Path, weights: Weights) -> tuple[Path, ...]:
    """What of a folder goes along with its tensors: tokenizers, processors, settings, texts.

    Weights in another form stay behind: they are the original's. So does a link that leads out of the folder, unless into the
    store of the hub's cache, of which snapshots are made.
    """
    kept = {each.name for each in weights.files}
    return tuple(
        each
        for each in sorted(folder.iterdir())
        if each.is_file()
        and each.name not in kept
        and each.suffix not in _WEIGHTS
        and not each.name.endswith(".index.json")
        and is_at_home(each)
    )


def left_behind(folder: Path) -> tuple[str, ...]:
    """A sentence about folders in a folder, if it has any: nobody reads them here, and nobody copies them."""
    inner = sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    return (f"folders in {folder.name} are neither read nor copied: {listed(inner)}",) if inner else ()


def require_fit(
    name: str, missing: Collection[str], unexpected: Collection[str], misshaped: Collection[tuple[str, Any, Any]]
) -> None:
    """Refuse weights that are not those of the model.

    Args:
        name: whose weights they are.
        missing: tensors that the model has and the weights have not.
        unexpected: the other way round.
        misshaped: (name, shape in the weights, shape in the model).

    Raises:
        LoadError: something is missing, unexpected or of another shape; all of it is listed.
    """
    sizes = [f"{key} ({_sizes(theirs)}, where the model has {_sizes(ours)})" for key, theirs, ours in sorted(misshaped)]
    if methods := [method for key in sorted(unexpected) for ending, method in _ROUNDED.items() if key.endswith(ending)]:
        raise rounded(name, methods[0])
    told = [
        f"{what} {listed(names, 8)}"
        for what, names in (("missing", sorted(missing)), ("unexpected", sorted(unexpected)), ("of another shape", sizes))
        if names
    ]
    if told:
        hint = "are the weights and the configuration of one model? name the architecture that the weights were saved from"
        raise LoadError(f"the weights of {name} do not fit its architecture: {'; '.join(told)}", hint=hint)


_ROUNDED = {
    ".qweight": "as gptq and awq do it", ".weight_packed": "as compressed-tensors does it",
    ".weight_scale": "to 8 bits, with scales beside", ".weight_scale_inv": "to 8 bits, with scales beside",
    ".SCB": "as bitsandbytes does it", ".absmax": "as bitsandbytes does it", "._packed_params": "as torch does it",
    "._packed_params._packed_params": "as torch does it", ".weight_zero_point": "to integers, with scales beside",
}  # fmt: skip
"""How names of tensors end that lie beside rounded weights -> who rounds so."""


def rounded(name: str, method: str) -> LoadError:
    """The refusal of weights that were quantized."""
    hint = "rewrite the checkpoint that it was made from, and quantize the result"
    return LoadError(f"{name} is quantized ({method}), and its norms cannot be folded into rounded weights", hint=hint)


def require_floats(name: str, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights of a few bits or of integers, where the model has weights to compute with.

    Raises:
        LoadError: there are such.
    """
    trained = {key for key, each in model.named_parameters(remove_duplicate=False) if each.is_floating_point()}
    for key, each in weights.items():
        few_bits = each.is_floating_point() and each.dtype.itemsize < 2
        if few_bits or (key in trained and not each.is_floating_point() and not each.is_complex()):
            raise rounded(name, f"'{key}' is stored as {str(each.dtype).removeprefix('torch.')}")


def _sizes(shape: Any) -> str:
    return "×".join(map(str, shape)) or "a number"
