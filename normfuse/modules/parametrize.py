"""A module that reads formulas in place of its own tensors, or whose forward gives way: the same object, another class.

A rewritten module's class becomes a subclass of its own class with the same name. Per changed tensor it has a property, which
Python finds before `nn.Module.__getattr__`, so the module's own code reads the formula's value while its parameters, their
names, hooks, optimizers, ``.to()`` and `state_dict` go on as before. Everything a module needs is data in its `Rewritten`
record, so copying and pickling work, and taking the class away again restores the module.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.errors import CannotApply, NormfuseError
from normfuse.graph.expressions import Call, Ref
from normfuse.graph.program import identity
from normfuse.graph.sharded import (
    asks_for_shard,
    give_class,
    give_memory,
    inner_class,
    is_shard,
    is_sharded,
    memory_of,
    refresh,
    reshard,
)
from normfuse.modules.on_shards import as_read, evaluated, handed_on
from normfuse.modules.placement import VALUE
from normfuse.modules.recompute import Formed
from normfuse.modules.record import (
    GIVEN_UP,
    RECORD,
    FormerTensor,
    Forming,
    Recipe,
    Rewritten,
    home_of,
    is_idle,
    is_rewritten,
    own,
    own_class,
    plain,
    rewritten,
)
from normfuse.modules.state_dicts import load_of, note, unwatched, watched


def install(module: nn.Module, record: Rewritten) -> None:
    """Give a module the behaviour of a record; `own_class` takes it away again."""
    if is_rewritten(module):
        plain(module)
    module.__dict__[RECORD] = record
    attributes = tuple(sorted(record.tensors.keys() | record.borrowed))
    give_class(module, _class_for(inner_class(module), attributes, record.change is not None))


@contextlib.contextmanager
def own_classes(model: nn.Module) -> Iterator[None]:
    """A model as its own classes would have it, with the tensors that it has now."""
    classes = [(module, type(module)) for module, _ in rewritten(model)]
    try:
        for module, _ in classes:
            plain(module)
        yield
    finally:
        for module, each in classes:
            module.__class__ = each


@contextlib.contextmanager
def put_back(model: nn.Module, *, always: bool = False) -> Iterator[None]:
    """Whatever is done to a model's classes, records and tensors is undone where it fails, or always."""
    reshard(model)
    modules = [(each, type(each), _marks(each)) for each in model.modules()]
    homes: list[Any] = [home for each, *_ in modules for home in (each._parameters, each._buffers)]
    tensors = [(each, memory_of(each)) for home in homes for each in home.values() if each is not None]
    fields = [(each, dict(each)) for each in (*homes, *(record.__dict__ for _, record in rewritten(model)))]
    done = False
    try:
        yield
        done = not always
    finally:
        if not done:
            reshard(model)
            for module, own_type, marks in modules:
                module.__class__ = own_type
                for mark in _marks(module):
                    del module.__dict__[mark]
                module.__dict__.update(marks)
            for each, before in fields:
                each.clear()
                each.update(before)
            for tensor, data in tensors:
                give_memory(tensor, data)
            refresh(model)


def _marks(module: nn.Module) -> dict[str, Any]:
    return {key: module.__dict__[key] for key in (RECORD, GIVEN_UP) if key in module.__dict__}


@functools.cache
def _class_for(base: Any, attributes: tuple[str, ...], forward: bool) -> type[nn.Module]:
    """A subclass with the class's own name, a property per attribute, and the record's forward where there is one."""
    members: dict[str, Any] = {name: _property(name) for name in attributes}
    members |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}

    def reduce(self: Any, protocol: Any) -> Any:
        made, args, *state = tuple(base.__reduce_ex__(self, protocol))
        as_base = tuple(base if each is type(self) else each for each in args)
        return _made_again, (attributes, forward, made, as_base), *state

    members["_load_from_state_dict"] = load_of(base)
    if forward:
        members["forward"] = _forward_of(base)
    return type(base.__name__, (base,), members | {"__reduce_ex__": reduce})


def _made_again(attributes: tuple[str, ...], forward: bool, made: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """An unpickled or copied module, before its state is filled in."""
    module = made(*args)
    module.__class__ = _class_for(type(module), attributes, forward)  # type: ignore[arg-type]
    return module


# -- tensors -----------------------------------------------------------------------------------------------------------


def _property(name: str) -> property:
    def read(self: nn.Module) -> Any:
        if not torch.compiler.is_compiling() and is_shard(self._parameters.get(name)) and asks_for_shard():
            return self._parameters[name]
        try:
            return _value(self, name)
        except AttributeError as error:  # torch would hand out the module's own tensor instead
            raise NormfuseError(f"'{name}' of a rewritten {type(self).__name__} cannot be computed: {error}") from error

    def write(self: nn.Module, value: Any) -> None:
        self.__dict__[name] = value  # what DataParallel does with a replica's parameters

    return property(read, write)


def _value(module: nn.Module, name: str) -> Any:
    record: Rewritten = module.__dict__[RECORD]
    if is_idle(module, record):
        return own(module, name)
    if name in record.borrowed and name not in record.tensors:
        return _read(*record.borrowed[name])
    if not torch.compiler.is_compiling():
        return Formed.of(record, module, name)
    forming = Forming(record, (name,))  # a compiler decides by itself what to keep for backward
    return forming.by_autograd(*forming.leaves(module))[0]


def _read(holder: nn.Module, attribute: str) -> Any:
    """What a module reads of another one, or of itself in an expression."""
    found = getattr(holder, attribute)
    as_is = torch.compiler.is_compiling() or isinstance(found, Formed) or found is None
    return found if as_is else as_read(found, holder, attribute)


# -- forward -----------------------------------------------------------------------------------------------------------


def _forward_of(base: type[nn.Module]) -> Callable[..., Any]:
    original: Callable[..., Any] = base.forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        record: Rewritten = self.__dict__[RECORD]
        if record.change is None or is_idle(self, record):
            return original(self, *args, **kwargs)
        by = record.change.by
        if record.change.place == "after":
            return _computed(by, original(self, *args, **kwargs), self, record)
        value = args[0] if args else next(iter(kwargs.values()))
        value = _computed(by, value, self, record)
        if record.change.place == "instead":
            return value
        if args:
            return original(self, value, *args[1:], **kwargs)
        return original(self, **{**kwargs, next(iter(kwargs)): value})

    return forward


def _computed(by: Any, value: Any, module: nn.Module, record: Rewritten) -> Any:
    """The value of a change's expression; what occurs in it twice is computed once."""
    return handed_on(value) if by == VALUE else _part(by, value, module, record, {})


def _part(by: Any, value: Any, module: nn.Module, record: Rewritten, done: dict[Any, Any]) -> Any:
    # no closure: one that calls itself is a cycle, and would hold an activation until the garbage collector comes
    match by:
        case Ref():
            holder, attribute = (None, None) if by == VALUE else record.home[by.name]
            return value if attribute is None else _read(holder or module, attribute)
        case Call():
            if by not in done:
                args = (_part(each, value, module, record, done) for each in by.args)
                done[by] = by.target()(*args, **by.keywords())
            return done[by]
        case tuple():
            return list(by)
        case _:
            return by


# -- deploy and the way back -------------------------------------------------------------------------------------------


def bake(model: nn.Module) -> None:
    """Put the formulas' values in the place of a model's tensors; the originals are kept in the records.

    Every formula is evaluated in float64 and rounded once, and all of them are evaluated before any tensor changes. Tensors
    that nobody reads any more become neutral, or leave the state dict: beside the changed ones they would tell the model's own
    class to apply its norms twice.
    """
    reshard(model)
    records = dict(rewritten(model))
    _require_same_keys(model, records)
    values = [each for module, record in records.items() for each in _values(module, record)]
    before = [(_former(module, name), value) for module, name, value in values]
    tied: dict[tuple[Any, ...], Tensor] = {}
    for kept, value in before:
        records[kept.module].keep(kept)
        if kept.tensor is None or kept.data is None:
            kept.module.register_parameter(kept.name, nn.Parameter(value))
        else:
            give_memory(kept.tensor, tied.setdefault(identity(kept.data), value))
    gone: list[tuple[nn.Module, str]] = []
    for module, record in records.items():
        for holder, home, name in record.spare:
            gone.append((holder, name))
            record.keep(FormerTensor(holder, home, name, getattr(holder, home)[name], None))
            getattr(holder, home)[name] = None
        record.evaluated()
        install(module, record)
    changed = [own(kept.module, kept.name) for kept, _ in before]
    refresh(model)
    note(model, changed, gone, came=any(kept.tensor is None for kept, _ in before))


def _require_same_keys(model: nn.Module, records: Mapping[nn.Module, Rewritten]) -> None:
    """Raise where a model that was tuned and then sharded would lose a key, or get one: FSDP holds those that it has."""
    gone = [name for each in records.values() for holder, home, name in each.spare if is_shard(getattr(holder, home)[name])]
    formed = [(module, name) for module, each in records.items() for name in each.tensors.keys() - each.lent.keys()]
    come = [name for module, name in formed if own(module, name) is None] if is_sharded(model) else []
    if gone or come:
        what = f"a '{gone[0]}' would leave its module" if gone else f"a '{come[0]}' would be new in its module"
        hint = "normfuse.deploy(model) before fully_shard"
        raise CannotApply([f"{what}, whose parameters fully_shard has counted"], hint=hint)


def _values(module: nn.Module, record: Rewritten) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """(Module, attribute, value) of what a record's formulas become."""
    for name, recipe in {**record.tensors, **record.neutral}.items():
        if name not in record.lent:
            yield module, name, _baked(module, name, record, recipe)


def commit(model: nn.Module, *, keep: bool) -> None:
    """Give up the originals that `bake` has kept, or not; what is loaded from now on is looked at."""
    for module, record in () if keep else list(rewritten(model)):
        record.kept = None
        stands = record.deployment is None or record.deployment.stands
        if stands and record.change is None and not record.borrowed:
            own_class(module)
            module.__dict__[GIVEN_UP] = True
    watched(model)


def undo(model: nn.Module) -> bool:
    """Give a model its own classes and tensors back; False, and nothing done, where its own tensors were not kept."""
    reshard(model)
    records = dict(rewritten(model))
    if any(record.kept is None for record in records.values()) or any(GIVEN_UP in each.__dict__ for each in model.modules()):
        return False
    for module, record in records.items():
        for kept in reversed(record.kept or ()):
            kept.put_back()
        own_class(module)
    refresh(model)
    unwatched(model)
    return True


def _former(module: nn.Module, name: str) -> FormerTensor:
    tensor = own(module, name)
    return FormerTensor(module, home_of(module, name), name, tensor, None if tensor is None else memory_of(tensor))


def _baked(module: nn.Module, name: str, record: Rewritten, recipe: Recipe) -> Tensor:
    def read(name: str) -> Tensor:
        holder, place = record.home[name]
        tensor: Tensor = own(module if holder is None else holder, place)
        return tensor

    mine = own(module, name)
    return evaluated(recipe.formula, read, own(module, recipe.like).dtype, mine)
