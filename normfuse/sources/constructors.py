"""The constructors of data: all that is ever called while a file is read.

Each stands for one name that an honest pickle calls, is written here rather than taken from the file's word, checks its
arguments, and makes a tensor or a plain value of them. A name that is not in `CONSTRUCTORS` cannot be called.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normfuse import limits
from normfuse.limits import OverLimit
from normfuse.sources.allowlist import Inert, NotAllowed
from normfuse.sources.pickles import PLAIN_KEYS, Unreadable


@dataclass(frozen=True)
class Stored:
    """Bytes of a tensor in the file, and what they are."""

    bytes: torch.UntypedStorage
    dtype: torch.dtype


@dataclass(frozen=True)
class Rebuilds:
    """The name of a constructor of tensors, given to another one as an argument."""

    name: str


_QUALITIES = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, torch.qscheme)
_SCALARS = (type(None), bool, int, float, complex, str, bytes)


def is_data(value: Any) -> bool:
    """Whether a value is a tensor, a number, a text, or a plain container of these: nothing in it has code of its own."""
    if type(value) in (*_SCALARS, *_QUALITIES, slice, Tensor, nn.Parameter, bytearray):
        return True
    if type(value) in (list, tuple, set, frozenset, collections.deque):
        return all(map(is_data, value))
    return type(value) in (dict, collections.OrderedDict) and all(is_data(part) for pair in value.items() for part in pair)


def _need(fits: bool, what: str) -> None:
    if not fits:
        raise Unreadable(f"its pickle has {what}")


def _only_tensor_arguments(hooks: Any) -> None:
    _need(hooks is None or (isinstance(hooks, dict) and not hooks), "hooks on a tensor")


def _are_sizes(values: Any) -> bool:
    return isinstance(values, tuple) and len(values) <= 64 and all(type(size) is int and size >= 0 for size in values)


def check_extent(size: Any, stride: Any, offset: Any, *, itemsize: int, stored: int) -> None:
    """Refuse a tensor that reaches beyond its ``stored`` bytes, or shows them so often that writing it out fills memory.

    Raises:
        Unreadable: sizes, strides and offset are no sizes, or reach beyond what is stored.
        OverLimit: written out, it is larger than `limits.VIEW_BYTES`.
    """
    fits = _are_sizes(size) and _are_sizes(stride) and _are_sizes((offset,)) and len(size) == len(stride)
    _need(fits, "a tensor of impossible sizes")
    entries = math.prod(size)
    reach = offset + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True)) + 1 if entries else 0
    _need(reach * itemsize <= stored, "a tensor that reaches beyond its storage")
    if entries * itemsize > max(stored, limits.VIEW_BYTES):
        raise OverLimit(f"a tensor of {entries * itemsize:,} bytes shows {stored:,} stored ones", "VIEW_BYTES")


def _tensor(
    stored: Any,
    offset: Any,
    size: Any,
    stride: Any,
    grad: Any = False,
    hooks: Any = None,
    *,
    dtype: Any = None,
    bits: Any = None,
) -> Tensor:
    _need(isinstance(stored, Stored) and isinstance(grad, bool), "a tensor without a storage")
    dtype = dtype or stored.dtype
    _need(isinstance(dtype, torch.dtype), "a tensor without a dtype")
    _only_tensor_arguments(hooks)
    check_extent(size, stride, offset, itemsize=dtype.itemsize, stored=stored.bytes.nbytes())
    made = torch.empty((0,), dtype=dtype).set_(stored.bytes, offset, size, stride)
    if bits:
        _need(type(bits) is dict and set(bits) <= {"conj", "neg"} and is_data(bits), "odd bits")
        torch._C._set_tensor_metadata(made, bits)  # type: ignore[attr-defined]
    return made.requires_grad_(grad)


def _tensor_v2(stored: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, bits: Any = None) -> Tensor:
    return _tensor(stored, offset, size, stride, grad, hooks, bits=bits)


def _tensor_v3(stored: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, bits: Any = None) -> Tensor:
    return _tensor(stored, offset, size, stride, grad, hooks, dtype=dtype, bits=bits)


def _quantized(stored: Any, offset: Any, size: Any, stride: Any, quantizer: Any, grad: Any, hooks: Any) -> Tensor:
    _need(isinstance(stored, Stored) and type(quantizer) is tuple and is_data(quantizer), "an odd quantized tensor")
    _only_tensor_arguments(hooks)
    check_extent(size, stride, offset, itemsize=stored.dtype.itemsize, stored=stored.bytes.nbytes())
    made_by: Any = torch.storage.TypedStorage
    typed = made_by(wrap_storage=stored.bytes, dtype=stored.dtype, _internal=True)
    made: Tensor = torch._utils._rebuild_qtensor(typed, offset, size, stride, quantizer, bool(grad), None)  # type: ignore[no-untyped-call]
    return made


def _sparse(layout: Any, parts: Any) -> Tensor:
    _need(isinstance(layout, torch.layout) and isinstance(parts, tuple) and is_data(parts), "an odd sparse tensor")
    if layout != torch.sparse_coo:
        compressed, plain, values, size = parts
        return torch.sparse_compressed_tensor(compressed, plain, values, tuple(size), layout=layout, check_invariants=True)
    indices, values, size = parts[:3]
    return torch.sparse_coo_tensor(indices, values, tuple(size), check_invariants=True)


def _parameter(data: Any, grad: Any, hooks: Any) -> nn.Parameter:
    _need(type(data) is Tensor and isinstance(grad, bool), "a parameter of no tensor")
    _only_tensor_arguments(hooks)
    return nn.Parameter(data, grad)


def _parameter_with_state(data: Any, grad: Any, hooks: Any, state: Any) -> Tensor:
    return _with_attributes(_parameter(data, grad, hooks), state)


def _from_type(rebuilds: Any, kind: Any, arguments: Any, state: Any) -> Tensor:
    if not isinstance(rebuilds, Rebuilds):
        called = rebuilds.name if isinstance(rebuilds, Inert) else getattr(rebuilds, "__name__", type(rebuilds).__name__)
        raise NotAllowed(f"a call of {called}()")
    _need(isinstance(arguments, tuple), "a tensor of no arguments")
    made = CONSTRUCTORS[rebuilds.name](*arguments)
    if type(made) not in (Tensor, nn.Parameter) or type(made) is not kind:
        raise Unreadable("its pickle has a tensor of another class")
    return _with_attributes(made, state)


def _with_attributes(tensor: Tensor, state: Any) -> Tensor:
    attributes = state[0] if isinstance(state, tuple) and len(state) == 2 and not state[1] else state
    for name, value in (attributes or {}).items():
        taken = not isinstance(name, str) or name.startswith("__") or any(name in vars(base) for base in nn.Parameter.__mro__)
        _need(not taken and is_data(value), "a tensor with attributes that replace its own")
        tensor.__dict__[name] = value
    return tensor


def _without_values(*_arguments: Any) -> Tensor:
    raise Unreadable("its tensors have no values (device 'meta'): load the weights into the model before you save it")


def _not_initialized(*_arguments: Any) -> Tensor:
    raise Unreadable("its lazy layers have no weights yet: run the model once before you save it")


def _ordered(pairs: Any = ()) -> collections.OrderedDict[Any, Any]:
    _need(type(pairs) in (list, tuple) and all(type(pair) in (list, tuple) for pair in pairs), "odd pairs")
    _need(all(_is_key(key) for key, _value in pairs), "an odd key")
    return collections.OrderedDict(pairs)


def _is_key(key: Any) -> bool:
    return type(key) in PLAIN_KEYS or (type(key) is tuple and all(type(part) in PLAIN_KEYS for part in key))


def _keys(*given: Any) -> Sequence[Any]:
    (values,) = given or ((),)
    _need(isinstance(values, list | tuple | set | frozenset) and all(map(_is_key, values)), "an odd set")
    return list(values)


def _text_bytes(text: Any, encoding: Any = "latin1") -> bytes:
    _need(type(text) is str and encoding in ("latin1", "latin-1", "utf-8", "ascii"), "odd bytes")
    return text.encode(encoding)  # type: ignore[no-any-return]


def _numbers(kind: Callable[..., Any]) -> Callable[..., Any]:
    def make(*arguments: Any) -> Any:
        _need(all(type(value) in (int, float, bool, type(None)) for value in arguments), "odd numbers")
        return kind(*arguments)

    return make


def _size(sizes: Any = ()) -> torch.Size:
    _need(isinstance(sizes, list | tuple) and _are_sizes(tuple(sizes)), "odd sizes")
    return torch.Size(sizes)


def _device(kind: Any, index: Any = None) -> torch.device:
    _need(type(kind) is str and type(index) in (int, type(None)), "an odd device")
    return torch.device(kind) if index is None else torch.device(kind, index)


def _layout(name: Any) -> torch.layout:
    found = getattr(torch, name.removeprefix("torch."), None) if type(name) is str else None
    _need(isinstance(found, torch.layout), "an odd layout")
    return found  # type: ignore[return-value]


def _counter(counts: Any = ()) -> collections.Counter[Any]:
    _need(type(counts) in (dict, tuple) and is_data(counts), "an odd counter")
    return collections.Counter(dict(counts))


def _deque(values: Any = (), longest: Any = None) -> collections.deque[Any]:
    _need(type(values) in (list, tuple) and type(longest) in (int, type(None)), "an odd deque")
    return collections.deque(values, longest)


_FACTORIES = (None, bool, int, float, str, list, tuple, dict, set)


def _defaultdict(factory: Any = None) -> collections.defaultdict[Any, Any]:
    _need(any(factory is known for known in _FACTORIES), "a dictionary whose defaults are made by no builtin")
    return collections.defaultdict(factory)


@dataclass(frozen=True)
class Functions:
    """The class whose methods are the functions of `torch`, such as `torch.relu`; a pickle gets at them by `getattr`."""


_ACTIVATIONS = (torch.celu, torch.log_softmax, torch.prelu, torch.relu, torch.selu, torch.sigmoid, torch.softmax, torch.tanh)
_ENTRYWISE = (torch.abs, torch.cos, torch.erf, torch.exp, torch.log, torch.log1p, torch.neg, torch.rsqrt, torch.sin, torch.sqrt)
_FUNCTIONS = {function.__name__: function for function in (*_ACTIVATIONS, *_ENTRYWISE, torch.reciprocal, torch.square)}


LOOKUP = "builtins.getattr"


def _function(owner: Any, name: Any) -> Callable[..., Any]:
    if not isinstance(owner, Functions) or type(name) is not str or name not in _FUNCTIONS:
        raise NotAllowed(f"a call of getattr() for {f'torch.{name}' if isinstance(owner, Functions) else name!r}")
    return _FUNCTIONS[name]


CONSTRUCTORS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "collections.Counter": _counter,
    "collections.defaultdict": _defaultdict,
    "collections.deque": _deque,
    "builtins.set": lambda *given: set(_keys(*given)),
    "builtins.frozenset": lambda *given: frozenset(_keys(*given)),
    "builtins.bytearray": lambda *given: bytearray(_text_bytes(*given) if given and type(given[0]) is str else b"".join(given)),
    "builtins.complex": _numbers(complex),
    "builtins.slice": _numbers(slice),
    LOOKUP: _function,
    "_codecs.encode": _text_bytes,
    "torch.Size": _size,
    "torch.device": _device,
    "torch.serialization._get_layout": _layout,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_qtensor": _quantized,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter_with_state,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch._utils._rebuild_meta_tensor_no_storage": _without_values,
    "torch.nn.parameter.UninitializedParameter": _not_initialized,
    "torch.nn.parameter.UninitializedBuffer": _not_initialized,
}

_BUILTINS = (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, slice)
_CONSTANTS = (torch.dtype, torch.qscheme, torch.memory_format)

KINDS: Mapping[str, Any] = {
    **{f"builtins.{kind.__name__}": kind for kind in _BUILTINS},
    **{str(found): found for found in vars(torch).values() if isinstance(found, _CONSTANTS)},
    "torch._C._VariableFunctionsClass": Functions(),
    "torch.Tensor": Tensor,
    "torch.nn.parameter.Parameter": nn.Parameter,
    "collections.OrderedDict": collections.OrderedDict,
}
"""Names of constants, and of plain types, which are values and are not called."""
