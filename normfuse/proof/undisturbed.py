"""A module that is run without a trace of it: what a call changes is put back.

A forward may count its calls, keep caches, update statistics, or clip its weights, and a hook may write down what it sees. The
module belongs to the user, who did not ask for a call.
"""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normfuse.graph.program import identity
from normfuse.graph.seeds import torch_seeded
from normfuse.graph.sharded import is_shard, reshard
from normfuse.sources.mapped import undoing

Undo = Callable[[], None]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), tuple, frozenset, type, torch.dtype, torch.device)


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """The module's tensors and attributes, and what its hooks hold, are afterwards as they were.

    Its tensors are copied meanwhile, which takes as much memory as they do; those that lie in a mapped file are not, as the
    file still has what is written over.
    """
    reshard(module)
    undo = list(_kept(module))
    try:
        yield
    finally:
        reshard(module)
        for each in reversed(undo):
            each()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's, NumPy's and Python's random numbers start from a seed inside, and go on outside as if nothing had been drawn."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch_seeded(seed):
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _kept(module: nn.Module) -> Iterator[Undo]:
    seen: set[int] = set()
    for each in module.modules():
        for hook in (*each._forward_hooks.values(), *each._forward_pre_hooks.values(), vars(each).get("forward")):
            yield from _kept_by_call(hook, seen)
        yield from _kept_in(vars(each), seen)
        for value in list(vars(each).values()):
            yield from _kept_value(value, seen)


def _kept_value(value: Any, seen: set[int]) -> Iterator[Undo]:
    """What puts a value back as it is now: a tensor's numbers, a container's entries, an object's attributes."""
    if isinstance(value, (*_PLAIN, nn.Module)) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield from _kept_tensor(value)
    elif isinstance(value, (dict, list, set, deque)):
        yield _contents(value)
        for each in list(value.values() if isinstance(value, dict) else value)[:_MEMBERS]:
            yield from _kept_value(each, seen)
    elif isinstance(value, (FunctionType, MethodType, partial)):
        yield from _kept_by_call(value, seen)
    elif isinstance(getattr(value, "__dict__", None), dict) and not type(value).__module__.startswith("torch"):
        yield from _kept_in(vars(value), seen)


_MEMBERS = 10_000
"""Entries of a container that are looked into: a vocabulary that hangs on a model is no state."""


def _kept_tensor(tensor: Tensor) -> Iterator[Undo]:
    if is_shard(tensor):
        yield _kept_shard(tensor._local_tensor)  # type: ignore[attr-defined]
        return
    if undo := undoing(tensor):
        yield partial(_put_back_mapped, tensor, tensor.detach(), undo)
        return
    try:
        before = tensor.detach().clone()
    except Exception:  # a lazy parameter has no numbers yet
        return

    def put_back() -> None:
        if not tensor.is_meta and (tensor.shape != before.shape or not torch.equal(tensor, before)):
            tensor.data = before

    yield put_back


def _put_back_mapped(tensor: Tensor, before: Tensor, undo: Undo) -> None:
    undo()
    if not tensor.is_meta and identity(tensor) != identity(before):  # it was given other memory
        tensor.data = before


def _kept_shard(local: Tensor) -> Undo:
    """What puts the shard of a tensor back, where it lies: FSDP gathers it from this memory."""
    before = local.detach().clone()

    def put_back() -> None:
        if not torch.equal(local, before):
            local.detach().copy_(before)

    return put_back


def _contents(container: Any) -> Undo:
    before = container.copy()

    def put_back() -> None:
        if isinstance(container, dict) and _same_entries(container, before):
            return
        container.clear()
        container.extend(before) if isinstance(container, (list, deque)) else container.update(before)

    return put_back


def _same_entries(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    return list(one) == list(other) and all(one[key] is other[key] for key in one)


def _kept_in(attributes: dict[str, Any], seen: set[int]) -> Iterator[Undo]:
    """The attributes of an object, and one level of what they hold."""
    if id(attributes) not in seen:
        seen.add(id(attributes))
        yield _contents(attributes)
        for value in list(attributes.values()):
            if isinstance(value, (dict, list, set, deque, Tensor)):
                yield from _kept_value(value, seen)


def _kept_by_call(function: Any, seen: set[int]) -> Iterator[Undo]:
    """What a hook can change: variables around it, global ones that it names, and the object that it is a method of."""
    if isinstance(function, partial):
        yield from _kept_value(list(function.args), seen)
        for each in (function.func, *function.args, *function.keywords.values()):
            yield from _kept_value(each, seen)
        return
    if isinstance(function, MethodType):
        yield from _kept_value(function.__self__, seen)
        function = function.__func__
    elif function is not None and not isinstance(function, FunctionType):
        yield from _kept_value(function, seen)
    if not isinstance(function, FunctionType) or (function.__module__ or "").startswith("torch."):
        return
    for cell in function.__closure__ or ():
        yield from _kept_cell(cell, seen)
    names = [name for name in function.__code__.co_names if name in function.__globals__]
    for value in (function.__globals__[name] for name in names):
        if isinstance(value, (dict, list, set, deque)):
            yield from _kept_value(value, seen)
    yield _globals(function.__globals__, {name: function.__globals__[name] for name in names})


def _globals(namespace: dict[str, Any], before: Mapping[str, Any]) -> Undo:
    def put_back() -> None:
        for name, value in before.items():
            if namespace.get(name) is not value:
                namespace[name] = value

    return put_back


def _kept_cell(cell: CellType, seen: set[int]) -> Iterator[Undo]:
    try:
        before = cell.cell_contents
    except ValueError:  # not assigned yet
        return

    def put_back() -> None:
        if cell.cell_contents is not before:
            cell.cell_contents = before

    yield put_back
    yield from _kept_value(before, seen)
