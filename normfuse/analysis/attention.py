"""Means that are taken with weights of the input's: attention, whose rows of weights sum to one.

A shift of all values is a shift of every such mean, whatever the weights are. A row of ``softmax`` sums to one, or it is NaN
and stays so. ``scaled_dot_product_attention`` gives zeros for a query that its mask keeps from every key, so there the mask
must be shown to leave each query one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from normfuse.analysis.facts import Facts
from normfuse.analysis.obstacles import Why
from normfuse.graph.interpreter import computed
from normfuse.graph.ops.lookup import carries, computes, keeps, rank, weighed
from normfuse.graph.ops.row import SAME, Computes, Keeps
from normfuse.graph.program import Program
from normfuse.graph.views import arguments, aten, shape


def is_mean(facts: Facts, node: Node) -> bool:
    """Whether a node is a product of weights and values that depend on the input, and not one with a stored weight."""
    values = weighed(node)
    return values is not None and arguments(node)[values] not in facts.constant


def why_no_mean(facts: Facts, node: Node) -> Why | None:
    """Why the weights of what is `weighed` may not sum to one, or None where they are proven to."""
    a = arguments(node)
    if not statically_known_true(shape(a[weighed(node) or ""])[-2] > 0):
        return Why.NO_KEYS
    if node.target is not aten.scaled_dot_product_attention.default:
        weights = a["self"]
        return None if _sums_to_one(weights) else Why.SUMS_TO_OTHERS
    if a["dropout_p"] != 0:
        return Why.DROPS
    return None if _leaves_a_key(facts, a["attn_mask"]) else Why.MASKED


def _sums_to_one(weights: Node) -> bool:
    """Whether rows along the last axis are those of a softmax, cast, moved or repeated as they are."""
    node, axis = weights, rank(weights) - 1
    while keeps(node) in (*SAME, Keeps.EXPAND):
        carried = carries(node, axis)
        if not carried:
            return False
        ((node, axis),) = carried
    return computes(node) is Computes.SOFTMAX and bool(arguments(node)["dim"] % rank(node) == axis)


def _leaves_a_key(facts: Facts, mask: Node | None) -> bool:
    """Whether a mask is the same for all inputs and leaves every query a key; a causal attention leaves each the first one."""
    if mask is None:
        return True
    value = _constant(facts.program, mask) if mask in facts.constant else None
    if value is None:
        return False
    open_ = value if value.dtype == torch.bool else value > -torch.inf
    return bool(open_.any(-1).all())


def _constant(program: Program, wanted: Node) -> Tensor | None:
    """The value of what depends on stored tensors alone; None where their numbers are not known."""

    def known(node: Node) -> Tensor:
        name = program.stored.get(node.name, "")
        if not name or name in program.formulas or not _is_known(program.tensor(name)):
            raise LookupError(node.name)
        return program.tensor(name)

    try:
        value = computed(wanted, {}, known)
    except LookupError:
        return None
    return value if isinstance(value, Tensor) else None


def _is_known(tensor: Tensor) -> bool:
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)
