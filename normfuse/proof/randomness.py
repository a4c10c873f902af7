"""Models whose outputs are random are compared on the same random numbers, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Graph

from normfuse.graph.interpreter import run
from normfuse.graph.nodes import draws, graphs_of, operator_name
from normfuse.graph.program import Program
from normfuse.proof.coverage import Missing
from normfuse.proof.differences import identical

_HINT = "compare the models without what is random: call eval() on them, or set dropout to 0"


def is_random(program: Program, flat: Sequence[Any]) -> bool:
    """Whether two runs of a program differ."""
    if not drawn(program.graph):
        return False
    return not identical(*(run(program, flat, seed=seed) for seed in (0, 1)))


def uncompared(reference: Program, other: Program | None, flat: Sequence[Any]) -> Missing | None:
    """Why two models cannot be compared on the same random numbers; None where they can, or need not be.

    Args:
        reference: a program.
        other: the other one; None for a model that runs elsewhere.
        flat: inputs of the reference.
    """
    if not is_random(reference, flat):
        return None  # if the other is, it is another function
    if other is None:
        return Missing("nothing was compared: the outputs are random, and another runtime draws other numbers", _HINT)
    if drawn(reference.graph) != drawn(other.graph) and drawn(other.graph):
        return Missing("nothing was compared: the outputs are random, and the models draw in different orders", _HINT)
    return None


def drawn(graph: Graph) -> list[str]:
    """The calls that draw, in order."""
    found: list[str] = []
    for node in graph.nodes:
        inner = graphs_of(node)
        if draws(node) and not inner:
            found.append(operator_name(node))
        for _, body in inner:
            found += drawn(body.graph)
    return found
