"""Modules whose parameters lie in shards on several processes (DTensor, FSDP2): how a program reads them, and who asks.

A trace wants the module as its class has it: parameters of their full shapes, and no hooks that gather them. `whole` is that
module for a while, without its memory: its parameters are `Gathered`, which are gathered when an operator reads them, and only
for it. So a program of a sharded module is planned, proven and evaluated like any other, one full tensor at a time. All
processes read the same tensors in the same order; where they do not, all of them raise (`meet`).

Nothing here is imported or asked where torch.distributed is not in use.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import zlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normfuse.errors import NormfuseError


def is_shard(tensor: Any) -> bool:
    """Whether a tensor is a DTensor: one whose entries lie on several processes."""
    if type(tensor) is Tensor or type(tensor) is nn.Parameter:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(model: Any) -> bool:
    """Whether a module holds parameters or buffers in shards, gathered at the moment or not."""
    return isinstance(model, nn.Module) and (bool(groups(model)) or next(shards(model), None) is not None)


def shards(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The tensors of a module that lie in shards, by name; those that FSDP has gathered at the moment are none."""
    if "torch.distributed.tensor" in sys.modules:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if is_shard(tensor):
                yield name, tensor


# -- FSDP --------------------------------------------------------------------------------------------------------------


def _wrapper() -> Any:
    """The class that `fully_shard` puts in front of a module's own; None where nobody has imported it."""
    module = sys.modules.get("torch.distributed.fsdp")
    return getattr(module, "FSDPModule", None)


def groups(model: nn.Module) -> list[Any]:
    """FSDP's groups of parameters in a module, each of which is gathered at once."""
    wrapper = _wrapper()
    found: dict[int, Any] = {}
    for each in model.modules() if wrapper is not None else ():
        if isinstance(each, wrapper):
            for group in groups_of(each._get_fsdp_state()):
                found[id(group)] = group
    return list(found.values())


def groups_of(state: Any) -> list[Any]:
    """The groups of a state of FSDP."""
    one = getattr(state, "_fsdp_param_groups", None)
    if one is not None:
        return list(one)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


def reshard(model: nn.Module) -> None:
    """Let go of what FSDP has gathered: a module's parameters are its shards again."""
    for group in groups(model):
        group.reshard()


_TOPS: dict[tuple[type, type], type] = {}
"""(Wrapper, class) → the class that has one in front of the other."""


def inner_class(module: nn.Module) -> type:
    """The class of a module without the one that FSDP puts in front of it."""
    top, wrapper = type(module), _wrapper()
    if wrapper is None or not issubclass(top, wrapper):
        return top
    inner = top.__mro__[getattr(top, "_orig_cls_mro_index", 2)]
    _TOPS[top.__bases__[0], inner] = top
    return inner


def give_class(module: nn.Module, inner: type) -> None:
    """Give a module another class; what FSDP puts in front stays there."""
    top, before = type(module), inner_class(module)
    if top is before:
        module.__class__ = inner  # type: ignore[assignment]
        return
    key = top.__bases__[0], inner
    if key not in _TOPS:
        _TOPS[key] = type(f"FSDP{inner.__name__}", key, {"__deepcopy__": top.__dict__["__deepcopy__"]})
    module.__class__ = _TOPS[key]  # type: ignore[assignment]


def asks_for_shard(depth: int = 2) -> bool:
    """Whether the caller's caller is FSDP, which finds a parameter that was moved or loaded by its attribute."""
    code = sys._getframe(depth).f_code
    return code.co_name == "reset_sharded_param" and "fsdp" in code.co_filename


# -- memory ------------------------------------------------------------------------------------------------------------


def memory_of(tensor: Tensor) -> Tensor:
    """The memory of a tensor, or of its shard here, with a handle of its own: what `give_memory` takes."""
    local: Tensor = tensor._local_tensor if is_shard(tensor) else tensor  # type: ignore[attr-defined]
    return local.detach()


def give_memory(tensor: Tensor, memory: Tensor) -> None:
    """Let a tensor be other entries, its object kept; FSDP is told by `refresh`."""
    if is_shard(tensor):
        tensor._local_tensor = memory  # type: ignore[attr-defined]
    else:
        tensor.data = memory


def refresh(model: nn.Module) -> None:
    """Tell FSDP of shards that were given other memory, which it gathers from then on."""
    with torch.no_grad():
        for group in groups(model):
            for each in group.fsdp_params:
                each.reset_sharded_param()


# -- all processes alike -----------------------------------------------------------------------------------------------


class Parted(NormfuseError):
    """The processes of a model have come to different places, so nothing can be gathered any more."""


_PARTED: list[Parted] = []
"""What `meet` has raised and `forget_parting` has not forgotten: nobody waits for the others until then."""


def meet(mesh: Any, place: str) -> None:
    """Wait until every process of a mesh has come to the same place.

    Raises:
        Parted: one of them is somewhere else, or has failed; every one is told.
    """
    import torch.distributed as dist

    if _PARTED:
        raise _PARTED[0]
    label = zlib.crc32(place.encode())
    here = torch.tensor([label, -label], dtype=torch.int64, device=mesh.device_type)
    for group in mesh.get_all_groups():
        dist.all_reduce(here, dist.ReduceOp.MAX, group=group)
    if here[0] != label or here[1] != -label:
        what = f"this process is at '{place}', and another one is somewhere else or has failed"
        _PARTED.append(Parted(what, hint="call it on all processes in the same way; the first error on any of them tells why"))
        raise _PARTED[0]


def forget_parting() -> Parted | None:
    """What `meet` has raised, so that the processes may meet again."""
    return _PARTED.pop() if _PARTED else None


KEPT_BYTES = 1 << 28
"""How much of what was gathered is kept while a rewrite is planned and proven."""

_KEPT: ContextVar[dict[tuple[Any, ...], tuple[Tensor, Tensor]] | None] = ContextVar("what was gathered", default=None)


@contextlib.contextmanager
def gathered_once() -> Iterator[None]:
    """What is gathered inside is kept, up to a limit: for as long as nobody writes to shards."""
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


class Gathered(Tensor):
    """A sharded tensor as programs read it: of the full shape and without memory; an operator that reads it is given all of it.

    Attributes:
        shard: what is gathered.
        known_as: its name in its model.
    """

    shard: Any
    known_as: str

    @staticmethod
    def __new__(cls, shard: Any, name: str) -> Gathered:
        """What stands for a DTensor; its memory stays its own, also where the DTensor is given other memory."""
        form = {"strides": shard.stride(), "dtype": shard.dtype, "device": shard.device}
        self = torch.Tensor._make_wrapper_subclass(cls, shard.shape, requires_grad=shard.requires_grad, **form)  # type: ignore[attr-defined]
        self.shard, self.known_as = shard, name
        return self  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Gathered({self.known_as}, {tuple(self.shape)})"

    @property
    def full(self) -> Tensor:
        """All entries, on every process."""
        kept = _KEPT.get()
        local = self.shard._local_tensor
        key = local.untyped_storage()._cdata, local.storage_offset(), tuple(self.shape)
        if kept is not None and key in kept:
            return kept[key][1]
        with torch.no_grad():
            meet(self.shard.device_mesh, self.known_as)
            entries: Tensor = self.shard.full_tensor()
        if kept is not None and entries.nbytes + sum(each.nbytes for _, each in kept.values()) <= KEPT_BYTES:
            kept[key] = local, entries
        return entries

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        entries = self.full.clone()
        return nn.Parameter(entries, requires_grad=self.requires_grad) if isinstance(self, nn.Parameter) else entries

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return cls(args[0].shard.detach(), args[0].known_as)
        args, kwargs = pytree.tree_map_only(cls, lambda each: each.full, (args, kwargs or {}))
        return func(*args, **kwargs)


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """A module as its class has it: its parameters `Gathered`, without the hooks and classes of torch.distributed."""
    if not is_sharded(model):
        yield
        return
    reshard(model)
    names = {id(tensor): name for name, tensor in shards(model)}
    made: dict[int, Tensor] = {}
    undo = [(table, dict(table)) for each in model.modules() for table in _tables(each)]
    classes = [(each, type(each)) for each in model.modules()]
    try:
        for module, _ in classes:
            module.__class__ = inner_class(module)  # type: ignore[assignment]
            homes: tuple[dict[str, Any], ...] = module._parameters, module._buffers
            for home in homes:
                for attribute, tensor in home.items():
                    if tensor is not None and id(tensor) in names:
                        home[attribute] = made.setdefault(id(tensor), _standing_for(tensor, names[id(tensor)]))
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if _is_of_torch(hook)]:
                    del hooks[key]
        yield
    finally:
        for module, top in classes:
            module.__class__ = top
        for table, before in undo:
            table.clear()
            table.update(before)


def copied(module: nn.Module) -> nn.Module:
    """A copy of a module that is `whole`, with all entries of its tensors; what torch.distributed notes on it is not copied."""
    notes = {
        id(value): value for each in module.modules() for key, value in vars(each).items() if key.startswith("__composable")
    }
    return copy.deepcopy(module, notes)


def _tables(module: nn.Module) -> tuple[Any, ...]:
    return module._parameters, module._buffers, module._forward_pre_hooks, module._forward_hooks


def _standing_for(tensor: Any, name: str) -> Tensor:
    gathered = Gathered(tensor.detach(), name)
    return nn.Parameter(gathered, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else gathered


def _is_of_torch(hook: Any) -> bool:
    """Whether a hook gathers or spreads tensors; those of users stay."""
    function = getattr(hook, "func", hook)
    return str(getattr(function, "__module__", "")).startswith("torch.distributed")


@contextlib.contextmanager
def in_stored_dtype(model: nn.Module) -> Iterator[None]:
    """A module for a call that is compared: where FSDP would call it in mixed precision, it is called `whole`.

    Everywhere else FSDP itself gathers what the call reads. All processes begin it together.
    """
    if not is_sharded(model):
        yield
        return
    for mesh in {id(each.device_mesh): each.device_mesh for _, each in shards(model)}.values():
        meet(mesh, f"a call of {type(model).__name__}")
    mixed = any(group.mp_policy.param_dtype or group.mp_policy.output_dtype for group in groups(model))
    with whole(model) if mixed else contextlib.nullcontext():
        yield
