"""A checkpoint that two ranks save, each its part of every tensor: uneven parts, along the first axis or the last."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

RANKS = 2


def save(rank: int, weights: Path, folder: Path) -> None:
    import torch.distributed as dist
    import torch.distributed.checkpoint
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    dcp: Any = torch.distributed.checkpoint
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}.meeting", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    held = torch.load(weights, weights_only=True)
    along = {key: Shard(each.ndim - 1 if key.endswith("down.weight") else 0) for key, each in held.items()}
    sharded: dict[str, Any] = {key: distribute_tensor(each, mesh, [along[key]]) for key, each in held.items()}
    assert all(isinstance(each, DTensor) for each in sharded.values())
    moments = {key: distribute_tensor(each.square(), mesh, [along[key]]) for key, each in held.items()}
    content: dict[str, Any] = {"model": sharded, "optim": {"state": moments, "lr": 0.5}, "step": 7, "plain": torch.ones(3)}
    content["small"] = {  # with less than an entry for every rank, and whole on each
        "one": distribute_tensor(torch.tensor([3.0]), mesh, [Shard(0)]),
        "none": distribute_tensor(torch.empty(0, 2), mesh, [Shard(0)]),
        "whole": distribute_tensor(torch.arange(4.0), mesh, [Replicate()]),
    }
    dcp.save(content, checkpoint_id=folder)
    dist.destroy_process_group()


def save_by_ranks(weights: Path, folder: Path) -> None:
    """Save the weights in a file of `torch.save` by processes of their own."""
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                save(rank, weights, folder)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    ended = [os.waitpid(child, 0)[1] for child in children]
    assert not any(ended)
