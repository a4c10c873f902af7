"""Which tensors a program that leaves keeps, and whose memory they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.graph.edits import copied
from normfuse.graph.program import Program, identity


def only_read(program: Program) -> Program:
    """The program without tensors that nobody reads, those that were folded away among them.

    Other names of a tensor that is read stay, and so does what the program updates. Memory that is shared with tensors that are
    gone is not kept for them: what is left of it is copied.

    Args:
        program: its formulas evaluated.
    """
    read = [name for node, name in program.stored.items() if program.nodes[node].users or name in program.written]
    kept = {other for name in read for other in (name, *program.twins(name))}
    draft, copies = copied(program)
    for node, name in program.stored.items():
        if name not in kept:
            draft.graph.erase_node(copies[node])
    state, constants = (
        {name: value for name, value in home.items() if name in kept or not isinstance(value, Tensor)}
        for home in (program.exported.state_dict, program.exported.constants)
    )
    smaller = Program(program.rebuilt(draft, draft.graph, state, constants), notes=program.notes)
    return _with_copies(smaller, _loose(smaller).__contains__)


def own_state(program: Program) -> Program:
    """The program with its own copies of the tensors that it updates; all others are shared.

    Args:
        program: its formulas evaluated.
    """
    return _with_copies(program, program.written.__contains__)


def _loose(program: Program) -> set[str]:
    """Tensors in memory that is larger than all tensors of the program in it."""
    used: dict[int, dict[tuple[Any, ...], int]] = {}
    names: dict[int, list[str]] = {}
    for name in program.tensor_names():
        tensor = program.tensor(name)
        if tensor.layout is torch.strided and not tensor.is_meta:
            memory = tensor.untyped_storage()._cdata
            used.setdefault(memory, {})[identity(tensor)] = tensor.numel() * tensor.element_size()
            names.setdefault(memory, []).append(name)
    small = (each for each in names.values() if not program.written.intersection(each))
    return {
        name
        for each in small
        for name in each
        if program.tensor(name).untyped_storage().nbytes() > sum(used[program.tensor(name).untyped_storage()._cdata].values())
    }


def _with_copies(program: Program, wanted: Callable[[str], bool]) -> Program:
    """The program with copies of some of its tensors; names of one tensor go on naming one."""
    copies: dict[tuple[Any, ...], Tensor] = {}
    homes: list[dict[str, Any]] = [dict(program.exported.state_dict), dict(program.exported.constants)]
    for home in homes:
        for name, value in home.items():
            if isinstance(value, Tensor) and wanted(name):
                copy = copies.setdefault(identity(value), value.detach().clone())
                home[name] = nn.Parameter(copy, value.requires_grad) if isinstance(value, nn.Parameter) else copy
    if not copies:
        return program
    return Program(program.rebuilt(program.exported.graph_module, program.graph, *homes), notes=program.notes)
