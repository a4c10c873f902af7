"""Formulas over tensors in shards: evaluated where these lie (deploy), and read while FSDP has let go of them (tune)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.errors import NormfuseError
from normfuse.graph.blocks import rounded as rounded_here
from normfuse.graph.expressions import Formula, evaluate, reads
from normfuse.graph.sharded import groups_of, is_shard

# -- evaluated (deploy) --------------------------------------------------------------------------------------------------


def evaluated(formula: Formula, read: Callable[[str], Any], dtype: torch.dtype, place: Tensor | None) -> Tensor:
    """What a tensor becomes: a formula in float64, rounded once; of a tensor in shards, the shard of it that lies here.

    Args:
        formula: what to compute.
        read: gives the stored tensor of a name, which may lie in shards.
        dtype: the dtype that the value is rounded to.
        place: the tensor that takes the value; None where there is none yet.
    """
    if not is_shard(place) and not any(is_shard(read(name)) for name in reads(formula)):
        return rounded_here(formula, read, dtype)
    value = _on_shards(formula, read)
    if not is_shard(place):
        return _full(value).to(dtype).contiguous()
    return _laid_out(value, place).to(dtype).contiguous()


def _on_shards(formula: Formula, read: Callable[[str], Any]) -> Any:
    """The value in float64: of operations on DTensors, or, where torch has no rule for one of them, of gathered tensors."""
    leaves = {name: read(name).detach() for name in reads(formula)}
    meshes = [each.device_mesh for each in leaves.values() if is_shard(each)]
    if not meshes:
        return evaluate(formula, leaves.__getitem__)

    with torch.no_grad():
        try:
            return evaluate(formula, lambda name: _everywhere(leaves[name], meshes[0]))
        except (NotImplementedError, RuntimeError, AssertionError):  # the same on every process: it is about kinds and sizes
            return evaluate(formula, lambda name: _full(leaves[name]))


def _full(tensor: Any) -> Tensor:
    full: Tensor = tensor.full_tensor() if is_shard(tensor) else tensor
    return full


def _laid_out(value: Any, place: Any) -> Tensor:
    """The part of a value that lies here once it is laid out as another tensor is."""
    mesh = place.device_mesh
    value = value if is_shard(value) and value.device_mesh == mesh else _everywhere(_full(value), mesh)
    local: Tensor = value.redistribute(mesh, place.placements).to_local()
    return local


# -- read (tune) ---------------------------------------------------------------------------------------------------------


def as_read(tensor: Tensor, holder: nn.Module, attribute: str) -> Tensor:
    """What a live formula or another module's code reads, whole: as FSDP has gathered it, or gathered for this reader alone.

    What FSDP holds gathered outside of its holder's forward is not read either: its gradients may have been reduced by the time
    that those of a reader come. What is gathered here hands its gradient to the shards by itself, averaged as FSDP's are.

    Where modules run on shards (tensor parallelism) it is one, and the reader runs on shards too.

    Raises:
        NormfuseError: FSDP has let go of a tensor that is one in two ways.
    """
    if not is_shard(tensor) and not holder.__dict__.get("_is_fsdp_managed_module", False):
        return tensor
    group, managed = (reference() for reference in _managed(holder).get(attribute, (_nothing, _nothing)))
    by_fsdp = group is not None and tensor is managed.__dict__.get("_unsharded_param")
    if group is None or (by_fsdp and _at_work(group)) or not (by_fsdp or is_shard(tensor)):
        return tensor
    if managed.is_dtensor:
        what = f"'{attribute}' of {type(holder).__name__} is tensor parallel, and is not gathered where another module reads it"
        raise NormfuseError(what, hint="call fully_shard on the two modules together")
    entries: Tensor = _Whole.apply(managed.sharded_param, group)  # type: ignore[no-untyped-call]
    return entries.to(group.mp_policy.param_dtype or entries.dtype)


def alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors for one formula: where some lie in shards, the others are the same everywhere."""
    mesh = next((each.device_mesh for each in tensors if is_shard(each)), None)  # type: ignore[attr-defined]
    return [each if mesh is None else _everywhere(each, mesh) for each in tensors]


def _everywhere(tensor: Tensor, mesh: Any) -> Any:
    from torch.distributed.tensor import DTensor, Replicate

    return tensor if is_shard(tensor) else DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def laid_out_as(value: Any, like: Any) -> Tensor:
    """A formula's value where the tensor lies in whose place it is read; gradients flow."""
    if torch.compiler.is_compiling() or not (is_shard(value) and is_shard(like)):
        return value  # type: ignore[no-any-return]
    laid: Tensor = value.redistribute(like.device_mesh, like.placements)
    return laid


def _at_work(group: Any) -> bool:
    """Whether a group's modules are in their forward, or in a backward that has not handed gradients on yet."""
    return group._training_state.name in ("FORWARD", "PRE_BACKWARD")


_MANAGED: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[Any, Any]]] = weakref.WeakKeyDictionary()


def _nothing() -> None:
    """In the place of a reference to something."""


def _managed(holder: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Attribute of a module → FSDP's group and its entry there."""
    if holder not in _MANAGED:
        from torch.distributed._composable_state import _module_state_mapping

        states = {id(state): state for each in list(_module_state_mapping.values()) if (state := each()) is not None}
        for group in (group for state in states.values() if hasattr(state, "_mp_policy") for group in groups_of(state)):
            for each in group.fsdp_params:
                info = each._module_info
                modules, names = (info.module, *info.shared_modules), (info.param_name, *info.shared_param_names)
                for module, name in zip(modules, names, strict=True):
                    _MANAGED.setdefault(module, {})[name] = weakref.ref(group), weakref.ref(each)  # they hold the module
    return _MANAGED.setdefault(holder, {})


def handed_on(value: Any) -> Any:
    """What a module hands on as it was given it: a copy of what FSDP has put its hook on, which nobody may write into."""
    if torch.compiler.is_compiling():
        return value
    hooked = isinstance(value, Tensor) and type(value.grad_fn).__name__.startswith("RegisterPostBackward")
    return value.clone() if hooked else value


class _Whole(torch.autograd.Function):
    """A shard gathered, whose gradient is averaged over the processes and handed back to the shards."""

    @staticmethod
    def forward(ctx: Any, shard: Any, group: Any) -> Tensor:
        ctx.mesh, ctx.placements = shard.device_mesh, shard.placements
        ctx.share = group.gradient_divide_factor or shard.device_mesh.size()
        full: Tensor = shard.full_tensor()
        return full

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, None]:
        from torch.distributed.tensor import DTensor, Partial

        parts = DTensor.from_local(grad.contiguous() / ctx.share, ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return parts.redistribute(ctx.mesh, ctx.placements), None
