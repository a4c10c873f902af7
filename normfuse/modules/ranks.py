"""Processes that hold one model together: they start from the same, decide alike, and fail together."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normfuse.errors import CannotApply, NormfuseError, first_line
from normfuse.graph.sharded import Parted, forget_parting, gathered_once, is_shard, is_sharded, meet, reshard, shards
from normfuse.planning.planner import Plan
from normfuse.sources.inputs import Inputs
from normfuse.sources.safetensors_file import bytes_of

T = TypeVar("T")


def mesh_of(model: nn.Module) -> Any:
    """The mesh of the processes that hold a sharded model.

    Raises:
        CannotApply: its tensors lie on several sets of processes.
    """
    reshard(model)
    meshes = {id(each.device_mesh): each.device_mesh for _, each in shards(model)}.values()
    largest = max(meshes, key=lambda each: each.mesh.numel())
    everyone = set(largest.mesh.flatten().tolist())
    if any(not everyone.issuperset(each.mesh.flatten().tolist()) for each in meshes):
        raise CannotApply(
            ["its parameters lie on several sets of processes"],
            hint="rewrite it before it is sharded, or rewrite the saved model",
        )
    return largest


def gathered(mesh: Any, place: str, value: T) -> list[T]:
    """What every process of a mesh has for a value, in the order of the mesh; all of them are at this place."""
    import torch.distributed as dist

    meet(mesh, place)
    values: list[Any] = [value]
    for group in reversed(mesh.get_all_groups()):
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, values, group=group)
        values = [each for part in parts for each in part]
    return values


@contextlib.contextmanager
def together(model: nn.Module) -> Iterator[None]:
    """Every process of a sharded model ends this as the others do: where one fails, all of them raise.

    Raises:
        NormfuseError: another process has failed.
    """
    if not is_sharded(model):
        yield
        return
    mesh, error = mesh_of(model), None
    forget_parting()
    try:
        _require_same(model, mesh)
        with gathered_once():
            yield
    except Exception as failure:
        error = failure
    try:
        failed = [] if forget_parting() else gathered(mesh, "the end", None if error is None else first_line(error))
    except Parted as parted:
        forget_parting()
        error = error or parted
    if error is not None:
        raise error
    for rank, why in enumerate(failed):
        if why is not None:
            raise NormfuseError(f"process {rank} of this model has failed: {why}", hint="no process has changed its part")


def of_first(model: nn.Module, given: Inputs) -> Inputs:
    """The inputs of the first process of a sharded model, on every one of them and on its device."""
    if not is_sharded(model):
        return given
    mesh = mesh_of(model)
    mine = [(each.args, each.kwargs) for each in (given, *given.more)]
    device = next((each.device for each in pytree.tree_leaves(mine) if isinstance(each, Tensor)), torch.device("cpu"))
    first = gathered(mesh, "the inputs", pytree.tree_map_only(Tensor, lambda each: each.detach().cpu(), mine))[0]
    if _alike(first, mine):
        return given  # these very tensors may be named in the dynamic shapes
    (args, kwargs), *more = pytree.tree_map_only(Tensor, lambda each: each.to(device), first)
    return replace(given, args=args, kwargs=kwargs, more=tuple(Inputs(*each) for each in more))


def _alike(one: Any, other: Any) -> bool:
    (ours, ours_in), (theirs, theirs_in) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return ours_in == theirs_in and all(
        torch.equal(a, b.cpu()) if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape else a == b
        for a, b in zip(ours, theirs, strict=True)
    )


def _require_same(model: nn.Module, mesh: Any) -> None:
    """What is not in shards must be the same on all processes, and so must the copies of a shard.

    Raises:
        NormfuseError: they differ; it names them.
    """
    mine = {
        (name, *_part(tensor)): _digest(tensor)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
    }
    differing: set[str] = set()
    known: dict[tuple[Any, ...], str] = {}
    for theirs in gathered(mesh, "the state", mine):
        if {name for name, *_ in theirs} != {name for name, *_ in mine}:
            raise NormfuseError("the processes hold models of different classes or settings", hint="build the same one on each")
        differing |= {key[0] for key, digest in theirs.items() if known.setdefault(key, digest) != digest}
    if differing:
        raise NormfuseError(
            f"the processes hold different values of '{min(differing)}'"
            + (f" and {len(differing) - 1} more" if differing - {min(differing)} else ""),
            hint="bring them together first: torch.distributed.broadcast(tensor, src=0) for each",
        )


def require_one_plan(model: nn.Module, plan: Plan) -> None:
    """Every process of a sharded model must have come to one plan, of graphs and numbers that are the same on each.

    Raises:
        NormfuseError: they have not.
    """
    if is_sharded(model) and len(set(gathered(mesh_of(model), "the plan", plan.to_json()))) > 1:
        hint = "call it with the same arguments on each of them"
        raise NormfuseError("the processes have come to different plans", hint=hint)


def _part(tensor: Any) -> tuple[Any, ...]:
    """Which part of a tensor lies here; the same for copies of it."""
    if not is_shard(tensor):
        return ()
    coordinate = tensor.device_mesh.get_coordinate()
    return tuple(at for at, placement in zip(coordinate, tensor.placements, strict=True) if not placement.is_replicate())


def _digest(tensor: Any) -> str:
    local = tensor._local_tensor if is_shard(tensor) else tensor
    form = f"{tuple(local.shape)} {local.dtype}"
    return hashlib.sha256(form.encode() + bytes(bytes_of(local))).hexdigest()
