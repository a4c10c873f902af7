"""Torch's other names of operators, written as the operators that they are, once, where a program is read.

`torch.concat` is `torch.cat`, `torch.take_along_dim` is a gather: torch's own registry of composites says of what an operator
is composed. A composite that `normfuse.graph.ops` does not know is taken apart where that makes it known: where it is one
call of another operator with the same arguments, or consists of nothing but operators that the table knows. All others stay
whole, because exporters and recognition know them by their names. Nobody has to keep a list of names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from normfuse.graph.ops.lookup import knows
from normfuse.graph.shapes import unguarded
from normfuse.graph.views import aten
from normfuse.sources.extents import all_graphs

Composites: TypeAlias = dict[torch._ops.OperatorBase, Callable[..., Any]]


def composites(exported: ExportedProgram) -> Composites:
    """What to give to ``run_decompositions``: the composites of a program that are to be taken apart, and of what they are."""
    calls: dict[Any, list[Node]] = {}
    for graph in all_graphs(exported.graph_module):
        for node in graph.nodes:
            if node.target in _NUMBERS or (is_composite(node.target) and not knows(node.target) and _yields_tensors(node)):
                calls.setdefault(node.target, []).append(node)
    found = [op for op, nodes in calls.items() if op not in _NUMBERS and all(map(_becomes_known, nodes))]
    return {op: partial(op._op_dk, _IMPLICIT) for op in found} | {op: _NUMBERS[op] for op in calls if op in _NUMBERS}


_NUMBERS: Composites = {
    aten.add.Scalar: aten.add.Tensor, aten.sub.Scalar: aten.sub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor, aten.div.Scalar: aten.div.Tensor,
}  # fmt: skip
"""Arithmetic with a number as torch's own composites call it, and as torch.export writes it."""

_IMPLICIT = torch._C.DispatchKey.CompositeImplicitAutograd


def is_composite(op: Any) -> bool:
    """Whether torch says of what an operator is composed, whatever the device."""
    name = op.name() if isinstance(op, torch._ops.OpOverload) else ""  # type: ignore[no-untyped-call]
    return bool(name) and torch._C._dispatch_has_kernel_for_dispatch_key(name, _IMPLICIT)


def _yields_tensors(node: Node) -> bool:
    value = node.meta.get("val")
    return all(isinstance(each, Tensor) for each in (value if isinstance(value, (list, tuple)) and value else [value]))


def _becomes_known(node: Node) -> bool:
    """Whether a composite is another operator's name, or made of operators that are known."""
    with contextlib.suppress(Exception):  # what cannot be taken apart without numbers stays whole
        args, kwargs = map_arg((node.args, node.kwargs), lambda each: each.meta["val"])
        modes = (getattr(each.meta.get("val"), "fake_mode", None) for each in node.all_input_nodes)
        with unguarded(next(filter(None, modes), None)), torch.no_grad(), _Calls() as recorded:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        calls = [each for each in recorded.calls if _computes(*each[1:])]
        if len(calls) == 1 and calls[0][0] is not node.target and _alike(calls[0][1], (args, kwargs)):
            return _same(calls[0][2], result)  # not where it yields further results, as max_pool2d_with_indices does
        return all(knows(op) for op, *_ in calls)
    return False


def _computes(given: Any, result: Any) -> bool:
    """Whether a call computes with values: not with indices alone, and not to ask for a device."""
    tensors = [each for each in pytree.tree_leaves((given, result)) if isinstance(each, Tensor)]
    gives = any(isinstance(each, Tensor) for each in pytree.tree_leaves(result))
    return gives and any(each.is_floating_point() or each.is_complex() for each in tensors)


def _alike(one: Any, other: Any) -> bool:
    """Whether two calls have the very same arguments."""
    (args, kwargs), (others, named) = one, other
    pairs = zip(args, others, strict=True) if len(args) == len(others) else [(0, 1)]
    return kwargs == named and all(_same(*pair) for pair in pairs)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or (type(one) is type(other) and not isinstance(one, Tensor) and bool(one == other))


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down the operators that a composite calls."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and note it with its arguments and its result."""
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, (args, kwargs or {}), result))
        return result
