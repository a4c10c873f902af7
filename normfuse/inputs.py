"""Example inputs: from a spec on the command line, from a file, or found on the model.

A spec is `[name:]dtype[dim,…]`, one per input:

    float32[2,3,224,224]          a positional input
    float32[batch,3,224,224]      a name in place of a size is a dynamic dim; the same name is the same dim everywhere
    ids:int64[batch=4,seq=16]     a keyword input; the sizes that the example has (2 where none is given)
    int64[batch,seq=16:1-512]     and the range that the dim may have
    float32[]                     a scalar tensor

Floats are drawn from N(0, 1) and integers below a limit, with a generator of our own: nobody else's random state moves.
"""

from __future__ import annotations

import math
import os
import re
import runpy
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from normfuse import limits
from normfuse.errors import InputError, LoadError, first_line
from normfuse.limits import OverLimit, check_inflation
from normfuse.loading import first_bytes, load_data

EXAMPLES = 16  # of a loader: a proof on a whole data set would take days
DEFAULT_SIZE = 2
DRAWN_BYTES = 8  # of an entry while it is drawn, whatever it becomes
DEFAULT_LIMIT = 2  # integers are 0 or 1 where nothing is known of the table that they index
GRAMMAR = "write [name:]dtype[dim,...], such as float32[batch,3,224,224] or ids:int64[batch,seq=16:1-512]"

Key = int | str  # which input: its position, or its keyword


@dataclass(frozen=True)
class Inputs:
    """What a model is called with, as torch.export takes it.

    ``dynamic_shapes`` is a tuple (positional inputs), a dict (keyword inputs), or a `torch.export.ShapesCollection` on
    these very tensors (both kinds: the names of positional inputs are the model's, not ours). None: all sizes are fixed.
    ``more`` are further examples, of a loader: models are compared on them too. ``left_out`` tells what of a loader's batches
    is no input (`normfuse.batches`).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any | None = None
    more: tuple[Inputs, ...] = ()
    left_out: str | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be told of them."""
        return (self.left_out,) if self.left_out else ()


@dataclass(frozen=True)
class DynamicDim:
    """A dim whose size may change: its name, and what is said of its size in the example and of its range."""

    name: str
    size: int | None = None
    min: int | None = None
    max: int | None = None


@dataclass(frozen=True)
class Spec:
    """One input; positional where ``name`` is None."""

    name: str | None
    dtype: torch.dtype
    dims: tuple[int | DynamicDim, ...]


def as_inputs(inputs: Any, kwargs: Mapping[str, Any] | None = None) -> Inputs | None:
    """What a user passes as ``inputs`` and ``kwargs``; None where that is nothing.

    Args:
        inputs: a tensor, a tuple or list of positional inputs, a dict of keyword inputs, `Inputs`, or a loader of any of these.
        kwargs: further keyword inputs.

    Raises:
        InputError: it is none of these.
    """
    if inputs is None and not kwargs:
        return None
    if is_loader(inputs):
        inputs = from_loader(inputs)
    if not isinstance(inputs, Inputs | Tensor | tuple | list | Mapping | None):
        raise InputError(f"inputs must be a tuple of tensors, not a {type(inputs).__name__}", hint="inputs=(x,)")
    if isinstance(inputs, Inputs):
        given = inputs
    elif isinstance(inputs, Mapping):
        given = Inputs((), dict(inputs))
    else:
        given = Inputs((inputs,) if isinstance(inputs, Tensor) else tuple(inputs or ()), {})
    return replace(given, kwargs={**given.kwargs, **(kwargs or {})})


def is_loader(inputs: Any) -> bool:
    """Whether a user's inputs are a loader of batches, and not inputs themselves."""
    return isinstance(inputs, Iterable) and not isinstance(inputs, Tensor | np.ndarray | tuple | list | str | Mapping)


# ---- from specs

_HEAD = re.compile(r"\s*(?:(?P<name>[A-Za-z_]\w*)\s*:\s*)?(?P<dtype>\w+)\s*\[\s*", re.ASCII)
_DIM = re.compile(
    r"(?P<fixed>\d{1,18})|(?P<name>[A-Za-z_]\w*)(?:=(?P<size>\d{1,18}))?(?::(?P<min>\d{1,18})-(?P<max>\d{1,18})?)?",
    re.ASCII,
)
_COMMA = re.compile(r"\s*,\s*")
_END = re.compile(r"\s*\]\s*$")
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


def parse_spec(text: str) -> Spec:
    """Read one spec.

    Raises:
        InputError: with the position of what cannot be read.
    """
    head = _HEAD.match(text)
    if head is None:
        start = re.compile(r"[\w\s:]*").match(text)
        raise _unreadable(text, start.end() if start else 0, "a dtype followed by '['")
    dims: list[int | DynamicDim] = []
    at = head.end()
    done = _END.match(text, at)
    while not done:
        dim = _DIM.match(text, at)
        if dim is None:
            raise _unreadable(text, at, "a size or a name")
        dims.append(_dim(dim))
        done = _END.match(text, dim.end())
        comma = _COMMA.match(text, dim.end())
        if not done and comma is None:
            raise _unreadable(text, dim.end(), "',' or a final ']'")
        at = comma.end() if comma else at
    return Spec(head["name"], _dtype(text, head), tuple(dims))


def from_specs(specs: Iterable[str | Spec], *, seed: int = 0, index_limits: Mapping[Key, int] | None = None) -> Inputs:
    """Draw one input per spec.

    Args:
        specs: texts as in the module's docstring, or parsed ones.
        seed: the same seed draws the same inputs.
        index_limits: for integer inputs, by position or keyword: draw from [0, limit), default [0, 2).
    """
    parsed = [spec if isinstance(spec, Spec) else parse_spec(spec) for spec in specs]
    args = [spec for spec in parsed if spec.name is None]
    keyed: dict[Key, Spec] = dict(enumerate(args))
    keyed |= {spec.name: spec for spec in parsed if spec.name is not None}
    if len(keyed) != len(parsed):
        raise InputError("two input specs have the same name", hint="each keyword input takes one spec")
    tables = dict(index_limits or {})
    if unknown := [key for key in tables if key not in keyed]:
        raise InputError(f"a limit is given for {unknown[0]!r}, which is no input", hint=f"inputs: {list(keyed)}")
    dims = _sized(dim for spec in parsed for dim in spec.dims if isinstance(dim, DynamicDim))
    _check_memory(sum(math.prod(_sizes(spec, dims)) * DRAWN_BYTES for spec in parsed))
    generator = torch.Generator().manual_seed(seed)
    try:
        drawn = {key: _draw(spec, dims, tables.get(key, DEFAULT_LIMIT), generator) for key, spec in keyed.items()}
    except (RuntimeError, MemoryError) as error:
        raise InputError("the inputs of these specs do not fit into memory", hint="give smaller sizes") from error
    return Inputs(
        tuple(drawn[position] for position in range(len(args))),
        {name: tensor for name, tensor in drawn.items() if isinstance(name, str)},
        _dynamic_shapes(keyed, drawn, dims),
    )


def _check_memory(size: int) -> None:
    if size > limits.INPUT_BYTES:
        over = OverLimit(f"these inputs would take {size:,} bytes", "INPUT_BYTES")
        raise InputError(str(over), hint=f"give smaller sizes, or raise the limit: {over.setting}")


def _unreadable(text: str, at: int, expected: str) -> InputError:
    found = repr(text[at]) if at < len(text) else "the end"
    return InputError(f"input spec '{text}': {expected} is expected at position {at + 1}, found {found}", hint=GRAMMAR)


def _dtype(text: str, head: re.Match[str]) -> torch.dtype:
    dtype = getattr(torch, head["dtype"], None)
    if isinstance(dtype, torch.dtype) and (
        dtype.is_floating_point or dtype.is_complex or dtype == torch.bool or dtype in _INTEGERS
    ):
        return dtype
    at = head.start("dtype") + 1
    raise InputError(f"input spec '{text}': unknown dtype '{head['dtype']}' at position {at}", hint=GRAMMAR)


def _dim(match: re.Match[str]) -> int | DynamicDim:
    if match["fixed"]:
        return int(match["fixed"])
    size, low, high = (int(match[part]) if match[part] else None for part in ("size", "min", "max"))
    return DynamicDim(match["name"], size, low, high)


def _sized(dims: Iterable[DynamicDim]) -> dict[str, DynamicDim]:
    """Each dim once, with all that is said of it anywhere, and a size."""
    said: dict[str, dict[str, int]] = {}
    for dim in dims:
        known = said.setdefault(dim.name, {})
        for part in ("size", "min", "max"):
            value = getattr(dim, part)
            if value is not None and known.setdefault(part, value) != value:
                raise InputError(f"dim '{dim.name}' has two values for its {part}: {known[part]} and {value}")
    for name, known in said.items():
        low, high = known.get("min", 0), known.get("max", float("inf"))
        size = known.setdefault("size", int(min(max(DEFAULT_SIZE, low), high)))
        if not low <= size <= high:
            raise InputError(f"dim '{name}' of size {size} is outside its range {low} to {high}", hint=GRAMMAR)
    return {name: DynamicDim(name, **known) for name, known in said.items()}


def _sizes(spec: Spec, dims: Mapping[str, DynamicDim]) -> list[int]:
    return [dims[dim.name].size or 0 if isinstance(dim, DynamicDim) else dim for dim in spec.dims]


def _draw(spec: Spec, dims: Mapping[str, DynamicDim], limit: int, generator: torch.Generator) -> Tensor:
    sizes = _sizes(spec, dims)
    if spec.dtype == torch.bool:
        return torch.randint(0, 2, sizes, generator=generator).bool()
    if spec.dtype in _INTEGERS:
        high = min(max(limit, 1), torch.iinfo(spec.dtype).max)
        return torch.randint(0, high, sizes, generator=generator).to(spec.dtype)
    # Low precisions and float32 inputs of one seed are the same values; float64 and complex ones have all their own bits.
    drawn = spec.dtype if spec.dtype == torch.float64 or spec.dtype.is_complex else torch.float32
    return torch.randn(sizes, generator=generator, dtype=drawn).to(spec.dtype)


def _dynamic_shapes(keyed: Mapping[Key, Spec], drawn: Mapping[Key, Tensor], dims: Mapping[str, DynamicDim]) -> Any:
    if not dims:
        return None
    made = {name: torch.export.Dim(name, min=dim.min, max=dim.max) for name, dim in dims.items()}
    shapes = {
        key: {axis: made[dim.name] for axis, dim in enumerate(spec.dims) if isinstance(dim, DynamicDim)} or None
        for key, spec in keyed.items()
    }
    if all(isinstance(key, int) for key in shapes):
        return tuple(shapes.values())
    if all(isinstance(key, str) for key in shapes):
        return shapes
    collection = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for key, shape in shapes.items():
        if shape:
            collection[drawn[key]] = shape
    return collection


# ---- limits of integer inputs


def integer_limits(model: nn.Module | torch.export.ExportedProgram, inputs: Inputs) -> dict[Key, int]:
    """For each integer input that indexes a table, the size of the smallest one, found by one run of the model.

    An input is followed through views, casts and copies, not through arithmetic. Inputs that index nothing are left out.

    Raises:
        InputError: the model does not run on these inputs.
    """
    module = model.module() if isinstance(model, torch.export.ExportedProgram) else model
    modes = [(part, part.training) for part in module.modules()]
    given: dict[Key, Any] = dict(enumerate(inputs.args)) | dict(inputs.kwargs.items())
    lookups = _Lookups(given)
    try:
        for part, _ in modes:
            part.training = False  # not eval(): exported modules refuse it, and nothing may notice this run
        with torch.no_grad(), torch.random.fork_rng(devices=()), lookups:
            module(*inputs.args, **inputs.kwargs)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"the model does not run on these inputs: {reason}", hint="give others with --input") from error
    finally:
        for part, mode in modes:
            part.training = mode
    return lookups.limits


class _Lookups(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches which inputs reach a table as indices; ``limits`` has the smallest table of each."""

    def __init__(self, inputs: Mapping[Key, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limits: dict[Key, int] = {}
        self._source: dict[int, Key] = {}
        self._kept: list[Tensor] = []  # or the address of a freed tensor would be taken for it
        for key, value in inputs.items():
            if isinstance(value, Tensor):
                self._follow(value, key)

    def _follow(self, tensor: Tensor, key: Key | None) -> None:
        if key is not None and tensor.dtype in _INTEGERS and tensor.numel():
            self._source[_address(tensor)] = key
            self._kept.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and note what it looks up."""
        result = func(*args, **(kwargs or {}))
        for index, limit in _looked_up(func, args):
            key = self._source.get(_address(index))
            if key is not None:
                self.limits[key] = min(limit, self.limits.get(key, limit))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
            self._follow(result, self._source.get(_address(args[0])))
        return result


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()  # shared by all views


def _looked_up(func: Any, args: Sequence[Any]) -> Iterator[tuple[Tensor, int]]:
    """The index tensors of one operator, each with the number of rows that it may choose from."""
    aten = torch.ops.aten
    if func in (aten.embedding.default, aten._embedding_bag.default, aten._embedding_bag_forward_only.default):
        yield args[1], args[0].shape[0]
    elif func is aten.index_select.default:
        yield args[2], args[0].shape[args[1]]
    elif func is aten.index.Tensor and args[1][0] is not None:  # table[ids]; indices of later dims are rare
        yield args[1][0], args[0].shape[0]


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


def from_loader(loader: Iterable[Any]) -> Inputs:
    """The first examples that a loader gives, such as a `torch.utils.data.DataLoader`; no more than `EXAMPLES`.

    Each is a tensor, a tuple or list of positional inputs, or a dict of keyword inputs, as in `from_file`, or `Inputs`. What of
    a tuple is taken `normfuse.batches` says.

    Raises:
        InputError: it gives nothing, or something else; what it raises itself goes through.
    """
    examples = []
    for content in islice(loader, EXAMPLES):
        if not isinstance(content, Inputs | Tensor | tuple | list | Mapping):
            raise InputError(f"the loader gives a {type(content).__name__}", hint="give tensors, or tuples or dicts of tensors")
        examples.append(content if isinstance(content, Inputs) else Inputs(*call_of(content)))
    if not examples:
        raise InputError("the loader gives nothing", hint="give at least one example")
    return replace(examples[0], more=tuple(examples[1:]))


def from_script(path: str | os.PathLike[str], name: str = "inputs") -> Inputs:
    """The examples of a loader that a Python file makes: what its function ``name`` gives.

    The file is executed: name only your own.

    Raises:
        InputError: there is no such file or function, or the file or the loader fails.
    """
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}")
    sys.path.insert(0, str(Path(path).parent))  # as `python FILE.py` does, for what the file imports
    try:
        named = runpy.run_path(os.fspath(path))
        if not callable(named.get(name)):
            raise InputError(f"{path} has no function '{name}'", hint="write FILE.py:NAME; NAME() gives the examples")
        return from_loader(named[name]())
    except InputError:
        raise
    except Exception as error:  # the user's own code
        raise InputError(f"{path} fails: {type(error).__name__}: {error}") from error


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


def call_of(content: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs of a tensor, a sequence, or a mapping as in `from_file`."""
    if isinstance(content, Tensor):
        return (content,), {}
    if not isinstance(content, Mapping):
        return tuple(content), {}
    if content and set(content) <= {"args", "kwargs"}:
        return tuple(content.get("args", ())), dict(content.get("kwargs", {}))
    numbered = [name for name in content if re.fullmatch(r"arg\d+", str(name))]
    names = [f"arg{position}" for position in range(len(numbered))]
    if set(names) != set(numbered):
        raise ValueError(f"positional inputs are {', '.join(names)} in that case, not {', '.join(numbered)}")
    if strange := [name for name in content if not isinstance(name, str)]:
        raise ValueError(f"{strange[0]!r} is no name of an input")
    return tuple(content[name] for name in names), {name: content[name] for name in content if name not in names}


# ---- found on the model


def found_on(model: Any) -> Inputs | None:
    """Inputs that the model itself tells of, with fixed sizes; None where it tells of none, or of what can be none.

    An exported program has its example inputs, a timm model ``pretrained_cfg``, a transformers model ``dummy_inputs`` or
    an image size in its config.

    Raises:
        InputError: they would take more than `limits.INPUT_BYTES`.
    """
    if isinstance(model, torch.export.ExportedProgram):
        return Inputs(tuple(model.example_inputs[0]), dict(model.example_inputs[1])) if model.example_inputs else None
    if not isinstance(model, nn.Module):
        return None
    sizes = _timm_sizes(model) or _image_sizes(model)
    if sizes is None:
        return _text_inputs(model)
    if not all(type(size) is int and size > 0 for size in sizes):
        return None
    _check_memory(2 * 4 * math.prod(sizes))
    pixels = torch.randn(2, *sizes, generator=torch.Generator().manual_seed(0))
    name = getattr(model, "main_input_name", None)
    return Inputs((), {name: _for(model, pixels)}) if isinstance(name, str) else Inputs((_for(model, pixels),), {})


def _for(model: nn.Module, tensor: Tensor) -> Tensor:
    """`tensor` on the model's device, and in its dtype where both are floating."""
    weight = next((weight for weight in model.parameters() if weight.is_floating_point()), torch.empty(0))
    return tensor.to(weight.device, weight.dtype if tensor.is_floating_point() else tensor.dtype)


def _timm_sizes(model: nn.Module) -> Sequence[int] | None:
    described = getattr(model, "pretrained_cfg", None) or {}
    sizes = described.get("input_size") if isinstance(described, Mapping) else None
    return sizes if isinstance(sizes, tuple | list) else None


def _image_sizes(model: nn.Module) -> Sequence[int] | None:
    config = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    if not isinstance(size, int | tuple | list) or getattr(model, "main_input_name", None) != "pixel_values":
        return None
    return getattr(config, "num_channels", 3), *((size, size) if isinstance(size, int) else size)


def _text_inputs(model: Any) -> Inputs | None:
    """The dummy inputs of transformers, with token ids drawn from the whole table."""
    try:  # code of the model's class, on settings that can be anything
        dummies = dict(model.dummy_inputs) if hasattr(model, "config") else {}
        rows = getattr(model.get_input_embeddings(), "num_embeddings", None) if dummies else None
    except Exception:
        return None
    known = model.main_input_name in dummies if isinstance(getattr(model, "main_input_name", None), str) else False
    plain = (Tensor, bool, int, float, type(None))
    if not known or not all(isinstance(name, str) and isinstance(value, plain) for name, value in dummies.items()):
        return None
    rows = rows if type(rows) is int and rows > 0 else DEFAULT_LIMIT
    generator = torch.Generator().manual_seed(0)
    kwargs: dict[str, Any] = {}
    for name, value in dummies.items():
        ids = name.endswith("input_ids") and isinstance(value, Tensor)
        drawn = torch.randint(0, rows, value.shape, generator=generator) if ids else value
        kwargs[name] = _for(model, drawn) if isinstance(drawn, Tensor) else drawn
    return Inputs((), kwargs)
