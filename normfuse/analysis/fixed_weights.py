"""Which weights cannot be changed, and why: integers behind a codebook or a quantizer, and what is computed from no float."""

from __future__ import annotations

from torch.fx import Node

from normfuse.analysis.facts import Facts
from normfuse.analysis.obstacles import Obstacle, Why
from normfuse.graph.nodes import computed_from
from normfuse.graph.ops.lookup import keeps
from normfuse.graph.ops.rounding import rounds
from normfuse.graph.ops.row import Keeps
from normfuse.graph.views import dtype


def why_fixed(facts: Facts, weight: Node) -> Obstacle | None:
    """What makes a weight one whose channels cannot be scaled or centred, and why; None where it is nothing of the kind."""
    behind = computed_from(weight)
    grid = next((node for node in behind if node.op == "call_function" and rounds(node)), None)
    if grid is not None:
        tensor = next((node for node in computed_from(grid) if facts.editable(node)), None)
        name = str(grid.target).removeprefix("aten.").partition(".")[0]
        return Obstacle(Why.QUANTIZED, tensor or grid, (name,))
    picked = next((node for node in behind if keeps(node) is Keeps.LOOKUP), None)
    if picked is not None:
        return Obstacle(Why.CODEBOOK, next((node for node in computed_from(picked) if facts.editable(node)), picked))
    for node in behind:
        kind = dtype(node)
        if node.op == "placeholder" and kind is not None and not kind.is_floating_point:
            return Obstacle(Why.NO_FLOAT, node, (str(kind).removeprefix("torch."),))
    return None
