"""Build what a picture of a pickle shows (`normfuse.sources.pickles`), calling nothing of the file's choice.

    containers, numbers, texts      as they are
    calls                           of `constructors.CONSTRUCTORS`, of enums (the member of that value) and of functools.partial
    instances                       an empty object of the class, by ``object.__new__``; its attributes are written into its
                                    ``__dict__``. No constructor, no ``__setstate__``, no ``__setattr__`` runs; the few that
                                    honest files need are in `REVIEWED`
    functions and classes           values, which nothing calls while the file is read

An instance's attributes may not stand where its class looks for something else: see `_shadows`. So a method is always the
method of the installed class, and a name that a class looks up is the name that its author wrote.
"""

from __future__ import annotations

import argparse
import enum
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.weight_norm import WeightNorm

from normfuse import limits
from normfuse.limits import OverLimit
from normfuse.sources.allowlist import Inert, NotAllowed, name_of
from normfuse.sources.constructors import CONSTRUCTORS, KINDS, LOOKUP, Rebuilds, Stored, is_data
from normfuse.sources.pickles import Made, Name, Outside, Unreadable, children

NAMESPACES: Mapping[str, type] = {"argparse.Namespace": argparse.Namespace, "types.SimpleNamespace": types.SimpleNamespace}
PARTIAL = "functools.partial"
_PRUNING = ("Identity", "RandomUnstructured", "L1Unstructured", "RandomStructured", "LnStructured", "CustomFromMask")

HOOKS: Mapping[str, tuple[type, str, tuple[str, ...]]] = {
    f"{WeightNorm.__module__}.WeightNorm": (WeightNorm, "name", ("_g", "_v")),
    **{
        f"{prune.__name__}.{name}": (getattr(prune, name), "_tensor_name", ("_orig", "_mask"))
        for name in (*_PRUNING, "PruningContainer")
    },
}
"""Hooks of torch that compute a weight before each call: their class, which of their attributes names that weight, and the
endings of what they compute it from. They are data; their ``__call__`` reads these tensors and sets that one."""

WRAPPERS: Mapping[str, str] = {
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
}
"""Modules around a model, and the name under which each holds it. The model is taken out; the wrapper is never made."""

_PACKED = "torch.ao.nn.quantized.modules.conv._ConvNd"

REVIEWED: Mapping[str, str] = {
    _PACKED: "the weights, packed for the kernels of this machine",
    "torch.nn.modules.activation.MultiheadAttention": "an attribute that files from before torch 1.2 lack",
    "torch.nn.modules.activation.Softmin": "an attribute that old files lack",
    "torch.nn.modules.activation.Softmax": "an attribute that old files lack",
    "torch.nn.modules.activation.LogSoftmax": "an attribute that old files lack",
    "torch.nn.modules.conv._ConvNd": "an attribute that old files lack",
    "torch.nn.modules.pooling.AvgPool3d": "attributes that old files lack",
    "torch.nn.modules.rnn.RNNBase": "weak references to its weights, which no pickle holds; very old files are refused first",
    "torch.nn.modules.transformer.TransformerEncoderLayer": "an attribute that old files lack",
    "torch.nn.modules.transformer.TransformerDecoderLayer": "an attribute that old files lack",
    "torch.nn.modules.upsampling.Upsample": "an attribute that old files lack",
}
"""Classes whose ``__setstate__`` is run on the checked attributes, and what it adds to them."""

_HOMES: Mapping[str, type] = {"_modules": nn.Module, "_parameters": Tensor, "_buffers": Tensor}
# Where a class finds the names of what it looks up: the same attack as an attribute in a method's place, once removed.
_LOOKUPS = frozenset({"attribute_map", "_compiled_call_impl"})


def unwrapped(value: Any) -> tuple[Any, list[str]]:
    """The model inside of wrappers (`WRAPPERS`), and the names of these, outermost first."""
    names: list[str] = []
    while isinstance(value, Made) and isinstance(value.by, Name) and value.by.text in WRAPPERS:
        inside = _wrapped(value, WRAPPERS[value.by.text])
        if inside is None or len(names) > limits.NESTING:
            break
        names.append(value.by.text.rpartition(".")[2])
        value = inside
    return value, names


def _wrapped(value: Made, attribute: str) -> Any:
    state = value.states[0] if value.states and isinstance(value.states[0], dict) else {}
    modules = state.get("_modules")
    held = dict(modules.pairs) if isinstance(modules, Made) else modules if isinstance(modules, dict) else {}
    # A compiled module is pickled as a call with the module as first argument.
    return held.get(attribute) or (value.arguments[0] if value.called and value.arguments else None)


def names_in(root: Any) -> set[str]:
    """All names of a picture that no constructor or constant stands for; measures it as well.

    Raises:
        OverLimit: it is nested too deeply, or shares its parts so often that walking over it would not end.
        Unreadable: a container holds itself.
    """
    walk = _Walk()
    walk.measure(root, 0)
    if "torch.nn.parameter.UninitializedParameter" in walk.names:
        raise Unreadable("its lazy layers have no weights yet: run the model once before you save it")
    known = (CONSTRUCTORS, KINDS, NAMESPACES, HOOKS, (PARTIAL,))
    return {name for name in walk.names if not any(name in table for table in known)}


class _Walk:
    """Counts a picture's values as often as they are reached; an instance that is reached again counts once."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.sizes: dict[int, tuple[int, int]] = {}
        self.path: dict[int, Any] = {}

    def measure(self, value: Any, depth: int) -> tuple[int, int]:
        """How many values there are, and how deep they lie."""
        value, _wrappers = unwrapped(value)
        if isinstance(value, Name):
            self.names.add(value.text)
        if not isinstance(value, list | tuple | dict | set | frozenset | Made):
            return 1, 0
        if id(value) in self.sizes:
            count, height = self.sizes[id(value)]
            return (1 if _is_instance(value) else count), height
        if id(value) in self.path:
            inside = list(self.path)[list(self.path).index(id(value)) :]
            if not any(_is_instance(self.path[each]) for each in inside):
                raise Unreadable("a container in it holds itself")
            return 1, 0
        return self._measured(value, depth)

    def _measured(self, value: Any, depth: int) -> tuple[int, int]:
        if depth > limits.NESTING:
            raise OverLimit("its values are nested too deeply", "NESTING")
        self.path[id(value)] = value
        count, height = 1, 0
        for child in children(value):
            below, deep = self.measure(child, depth + 1)
            count, height = count + below, max(height, deep + 1)
        del self.path[id(value)]
        if count > limits.OCCURRENCES:
            raise OverLimit("its values hold each other too often", "OCCURRENCES")
        if height > limits.NESTING:
            raise OverLimit("its values are nested too deeply", "NESTING")
        self.sizes[id(value)] = count, height
        return count, height


def _is_instance(value: Any) -> bool:
    return isinstance(value, Made) and not value.called


class Builder:
    """Builds the values of one picture; each once, so that what is shared in the file is shared."""

    def __init__(self, things: Mapping[str, Any], stored: Callable[[Any], Stored]) -> None:
        self.things = things
        self.stored = stored
        self.done: dict[int, Any] = {}
        self.modules: list[nn.Module] = []
        self.unwrapped: list[str] = []

    def build(self, value: Any) -> Any:
        """The object that `value` shows.

        Raises:
            NotAllowed: it calls what may not be called, or puts an attribute where a class looks for another.
            Unreadable: it is no object of these classes.
        """
        value, wrappers = unwrapped(value)
        self.unwrapped += wrappers
        if isinstance(value, Name):
            return self._named(value.text)
        make = _BUILDERS.get(type(value))
        if make is None:
            return value
        if id(value) not in self.done:
            self.done[id(value)] = make(self, value)
        return self.done[id(value)]

    def _named(self, name: str) -> Any:
        if name in KINDS:
            return KINDS[name]
        if name == LOOKUP:
            raise NotAllowed(name)  # it is called for functions of torch, and no value
        if name in CONSTRUCTORS:
            return Rebuilds(name)
        if name in NAMESPACES or name in HOOKS or name == PARTIAL:
            return Inert(name)
        thing = self.things[name]
        return thing if not isinstance(thing, type) or thing.__module__.startswith("torch.nn.modules.") else Inert(name)

    def _list(self, value: list[Any]) -> list[Any]:
        built: list[Any] = []
        self.done[id(value)] = built
        built.extend(map(self.build, value))
        return built

    def _tuple(self, value: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(map(self.build, value))

    def _dict(self, value: dict[Any, Any]) -> dict[Any, Any]:
        built: dict[Any, Any] = {}
        self.done[id(value)] = built
        self._put(built, value.items())
        return built

    def _put(self, built: dict[Any, Any], pairs: Any) -> None:
        for key, item in pairs:
            built[self._key(key)] = self.build(item)

    def _set(self, value: set[Any]) -> set[Any]:
        return set(map(self._key, value))

    def _frozenset(self, value: frozenset[Any]) -> frozenset[Any]:
        return frozenset(map(self._key, value))

    def _key(self, key: Any) -> Any:
        built = self.build(key)
        if isinstance(key, Made) and not (isinstance(built, enum.Enum) or is_data(built)):
            raise Unreadable(f"its pickle has a {type(built).__name__} for a key")
        return built

    def _outside(self, value: Outside) -> Any:
        return self.stored(value.reference)

    def _made(self, value: Made) -> Any:
        if not isinstance(value.by, Name):
            raise NotAllowed("a call of what another call gives")
        name = value.by.text
        if value.keywords:
            raise NotAllowed(f"{name} with keyword arguments")
        if name == PARTIAL:
            return self._partial(value)
        if name in NAMESPACES:
            return self._instance(NAMESPACES[name], value)
        if name in HOOKS:
            return self._instance(HOOKS[name][0], value)
        if value.called:
            return self._called(name, value)
        thing = self.things.get(name)
        if not isinstance(thing, type) or issubclass(thing, enum.Enum):
            raise NotAllowed(f"an empty {name}")
        return self._module(thing, value) if issubclass(thing, nn.Module) else self._instance(thing, value)

    def _called(self, name: str, value: Made) -> Any:
        thing = self.things.get(name)
        if isinstance(thing, type) and issubclass(thing, enum.Enum):
            return _member(thing, self.build(value.arguments))
        if name not in CONSTRUCTORS:
            raise NotAllowed(f"a call of {name}()")
        built = CONSTRUCTORS[name](*self.build(value.arguments))
        self.done[id(value)] = built
        self._fill_container(built, value)
        return built

    def _fill_container(self, built: Any, value: Made) -> None:
        states = self.build(value.states)
        for state in states:  # torch keeps the versions of a state dict's entries on it
            if not isinstance(state, dict) or set(state) - {"_metadata"} or not is_data(state):
                raise NotAllowed(f"attributes on a {type(built).__name__}")
            built.__dict__.update(state)
        if (value.pairs and not isinstance(built, dict)) or (value.entries and not hasattr(built, "extend")):
            raise Unreadable(f"its pickle fills a {type(built).__name__}")
        if value.pairs:
            self._put(built, value.pairs)
        if value.entries:
            built.extend(map(self.build, value.entries))

    def _partial(self, value: Made) -> Any:
        state = self.build(value.states[-1]) if value.states else (*self.build(value.arguments), (), {}, None)
        if not (isinstance(state, tuple) and len(state) == 4 and isinstance(state[1], tuple) and not state[3]):
            raise Unreadable("its pickle has an odd functools.partial")
        function, arguments, keywords = state[0], state[1], state[2] or {}
        if not isinstance(keywords, dict) or not all(isinstance(name, str) for name in keywords):
            raise Unreadable("its pickle has an odd functools.partial")
        makes_modules = isinstance(function, type | Inert)  # nothing of these is a method of what it is given
        for held in (*arguments, *keywords.values()):
            if not is_data(held) and not (makes_modules and isinstance(held, type | Inert | types.FunctionType)):
                raise NotAllowed(f"a functools.partial that holds a {name_of(type(held))}")
        if not callable(function) or isinstance(function, nn.Module):
            raise NotAllowed(f"a functools.partial of a {name_of(type(function))}")
        return functools.partial(function, *arguments, **keywords)

    # -- instances -----------------------------------------------------------------------------------------------------

    def _instance(self, cls: type, value: Made) -> Any:
        """A namespace, a dataclass or a config: an empty object with these attributes."""
        instance: Any = types.SimpleNamespace() if cls is types.SimpleNamespace else object.__new__(cls)
        self.done[id(value)] = instance
        state = self._state(cls, value)
        _check_attributes(cls, state.items())
        _attributes(instance).update(state)
        return instance

    def _module(self, cls: type[nn.Module], value: Made) -> nn.Module:
        instance: nn.Module = object.__new__(cls)
        self.done[id(value)] = instance
        self.modules.append(instance)
        owner = _setter(cls)
        if owner is not nn.Module and name_of(owner) not in REVIEWED:
            raise NotAllowed(f"{name_of(owner)}.__setstate__()")
        if name_of(owner) == _PACKED:
            return self._packed(instance, value)
        given = self._state(cls, value)
        state = {**vars(nn.Module()), **given}
        _check_homes(cls, state)
        inside = {name for name in vars(nn.Module()) if name not in vars(nn.Module)}
        attributes = [(name, item) for name, item in state.items() if name not in inside]
        _check_attributes(cls, [*attributes, *((name, item) for home in _HOMES for name, item in state[home].items())])
        _attributes(instance).update(state)
        _set_state(cls, instance, state)
        return instance

    def _packed(self, instance: nn.Module, value: Made) -> nn.Module:
        """A quantized convolution: its state is a tuple of numbers and tensors, which it packs for its kernels."""
        (state,) = self.build(value.states) or ((),)
        if value.arguments or not isinstance(state, tuple) or not is_data(state):
            raise NotAllowed(f"to make a {name_of(type(instance))} otherwise than from its attributes")
        _attributes(instance).update(vars(nn.Module()))
        _setter(type(instance)).__setstate__(instance, state)  # type: ignore[attr-defined]
        return instance

    def _state(self, cls: type, value: Made) -> dict[str, Any]:
        if self.build(value.arguments) != () or value.entries or value.pairs or len(value.states) > 1:
            raise NotAllowed(f"to make a {name_of(cls)} otherwise than from its attributes")
        state = self.build(value.states[0]) if value.states else {}
        if isinstance(state, tuple) and len(state) == 2 and not state[1]:
            state = state[0]
        if state is None:
            state = {}
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise NotAllowed(f"to make a {name_of(cls)} otherwise than from its attributes")
        return state


def _setter(cls: type) -> type:
    """The class whose ``__setstate__`` would fill an instance of `cls`."""
    return next(base for base in cls.__mro__ if "__setstate__" in vars(base))


def _attributes(instance: Any) -> dict[str, Any]:
    """An instance's own ``__dict__``; asked of `object`, because configs answer with code of their own."""
    found: dict[str, Any] = object.__getattribute__(instance, "__dict__")
    return found


def _member(cls: type[enum.Enum], arguments: tuple[Any, ...]) -> enum.Enum:
    if len(arguments) == 1 and is_data(arguments[0]):
        for member in cls.__members__.values():
            if type(member._value_) is type(arguments[0]) and member._value_ == arguments[0]:
                return member
    raise Unreadable(f"{name_of(cls)} has no such member")


def _check_homes(cls: type, state: Mapping[str, Any]) -> None:
    """A module's own tables: of modules, of tensors, and of hooks, which have to be empty."""
    for home, kind in _HOMES.items():
        if not isinstance(state[home], dict):
            raise NotAllowed(f"another {home} in {name_of(cls)}")
        for name, item in state[home].items():
            if not isinstance(name, str) or not name or "." in name or not (item is None or isinstance(item, kind)):
                raise NotAllowed(f"the entry {name!r} in {home} of {name_of(cls)}")
    for name, empty in vars(nn.Module()).items():
        hooks = isinstance(empty, dict) and name not in _HOMES
        if hooks and (not isinstance(state[name], dict) or not _are_reviewed(name, cls, state)):
            raise NotAllowed(f"{name} in {name_of(cls)} (hooks: remove them before you save the model)")
    kinds = {"training": bool, "_non_persistent_buffers_set": set, "_is_full_backward_hook": bool | None}
    for name, plain in kinds.items():
        if not isinstance(state[name], plain):
            raise NotAllowed(f"another {name} in {name_of(cls)}")


def _are_reviewed(table: str, cls: type, state: Mapping[str, Any]) -> bool:
    """Whether all hooks of a module are of `HOOKS`, and what they compute is a weight of this module."""
    tensors = {name for home in ("_parameters", "_buffers") for name, held in state[home].items() if held is not None}
    for key, hook in state[table].items():
        _cls, named, endings = HOOKS.get(name_of(type(hook)), (None, "", ()))
        weight = vars(hook).get(named) if named else None
        computed = isinstance(weight, str) and type(state.get(weight)) in (Tensor, nn.Parameter)
        if table != "_forward_pre_hooks" or type(key) is not int or not computed or hasattr(cls, weight or ""):
            return False
        if not all(f"{weight}{ending}" in tensors for ending in endings):
            return False
    return True


def _check_attributes(cls: type, attributes: Any) -> None:
    if strange := [name for name, value in attributes if _shadows(cls, name, value)]:
        raise NotAllowed(*(f"to replace {name} of {name_of(cls)}" for name in strange))


def _shadows(cls: type, name: str, value: Any) -> bool:
    """Whether an attribute of this name stands in the way of one that the class has.

    A class's default that is data may be replaced by other data, a default of None also by a config or a member of an enum,
    and a cached property by the data that it has cached. Methods, other properties, whatever else a class has, and the names
    that Python itself looks up, stay the class's own.
    """
    if name.startswith("__") or name in _LOOKUPS:
        return True
    owner = next((base for base in cls.__mro__ if name in vars(base)), None)
    if owner is None:
        return False
    default = vars(owner)[name]
    if default is None and not callable(value) and not isinstance(value, nn.Module):
        return False
    return not (is_data(value) and (is_data(default) or isinstance(default, functools.cached_property)))


def _set_state(cls: type[nn.Module], instance: nn.Module, state: dict[str, Any]) -> None:
    """Do what the class does when it is unpickled, where that has been reviewed."""
    owner = _setter(cls)
    if owner is nn.Module:
        return
    if issubclass(cls, nn.RNNBase):
        listed = [state.get(name) for name in ("_flat_weights_names", "_flat_weights", "_all_weights")]
        weights = listed[1] if isinstance(listed[1], list) else [0]
        if not is_data(listed) or not all(isinstance(weight, Tensor | None) for weight in weights):
            raise Unreadable("it has a recurrent layer of a very old torch")
    owner.__setstate__(instance, state)  # type: ignore[attr-defined]


def check_modules(modules: Sequence[nn.Module]) -> None:
    """Refuse what can only be seen on modules that are whole.

    Raises:
        NotAllowed: a `ParameterDict` lists a key that is none of its entries, and would answer with a method.
        Unreadable: a module is inside itself.
        OverLimit: a model has too many modules, each counted as often as it is reached: tracing it would not end.
    """
    counts: dict[int, int] = {}
    inside: set[int] = set()
    most = limits.MODULES + 4 * len(modules)

    def count(module: nn.Module) -> int:
        if id(module) in inside:
            raise Unreadable("a module in it is inside itself")
        if id(module) not in counts:
            inside.add(id(module))
            counts[id(module)] = 1 + sum(count(child) for child in module._modules.values() if child is not None)
            inside.remove(id(module))
            if counts[id(module)] > most:
                raise OverLimit("its modules hold each other too often", "MODULES")
        return counts[id(module)]

    for module in modules:
        count(module)
        if isinstance(module, nn.ParameterDict):
            entries = {**module._parameters, **vars(module)}
            if strange := [key for key in vars(module).get("_keys", ()) if key not in entries]:
                raise NotAllowed(*(f"the key {key!r} of a ParameterDict" for key in strange))


_BUILDERS: dict[type, Callable[[Builder, Any], Any]] = {
    list: Builder._list,
    tuple: Builder._tuple,
    dict: Builder._dict,
    set: Builder._set,
    frozenset: Builder._frozenset,
    Outside: Builder._outside,
    Made: Builder._made,
}
