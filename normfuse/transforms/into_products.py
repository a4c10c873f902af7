"""Who reads the output of a norm, and whether all of them can read it in another basis, with its gain and shift folded.

From the norm on, every value v is stored as t with v = scale ⊙ Lt + shift, where L gives back the entries that are meant
(`normfuse.transforms.basis`). Views and picks carry that map on, further constants along the axis join scale and shift, and
products with stored weights take it up: W ← (W diag(scale))L and b ← b + W shift. Anything else stands in the way.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx import Node

from normfuse.analysis.affine import constant
from normfuse.analysis.facts import Facts
from normfuse.analysis.obstacles import Obstacle, Why
from normfuse.graph.expressions import Call, Formula, Number
from normfuse.graph.ops.lookup import computes, layer, neutral, rank, same, same_sizes, unpadded, varies_along
from normfuse.graph.ops.row import Computes
from normfuse.graph.views import Norm, aten, dtype, is_tensor, shape
from normfuse.transforms.backward import Key, way_back
from normfuse.transforms.basis import Basis
from normfuse.transforms.draft import channel, is_transposed
from normfuse.transforms.forward import Forward, Pending
from normfuse.transforms.maps import Map


@dataclass(frozen=True)
class Reading:
    """A product with a stored weight that takes a map up.

    Attributes:
        node: the product.
        weight: name of the stored weight.
        dim: the axis of the weight that meets the axis of the map.
        way: views and casts between the stored weight and the product, each with its axis.
        map: what is pending on the value that it reads.
        bias: name of the stored bias, or None.
        takes_bias: whether the call has a place for a bias; otherwise what the shift adds is one more addition.
    """

    node: Node
    weight: str
    dim: int
    way: tuple[Key, ...]
    map: Map
    bias: str | None
    takes_bias: bool


@dataclass
class Products:
    """The readers of a norm's output, all of which can take its map up.

    Attributes:
        layers: where it ends.
        values: the values on the way, each with the axis of the map; the norm's own output first.
        dropped: constant multiplications and additions on the way that give way to their operands.
    """

    layers: list[Reading] = field(default_factory=list)
    values: list[Key] = field(default_factory=list)
    dropped: list[tuple[Node, Node]] = field(default_factory=list)


def products(facts: Facts, norm: Norm, basis: Basis) -> Products | Obstacle:
    """Who reads a norm's output, or the first reader that cannot read it in another basis."""
    scale, shift = (None if node is None else constant(facts, node) for node in (norm.gain, norm.shift))
    for node, found in ((norm.gain, scale), (norm.shift, shift)):
        if node is not None and found is None:
            return Obstacle(Why.NO_STORED_AFFINE, node)
    if dtype(norm.out) != dtype(norm.x):
        return Obstacle(Why.OTHER_DTYPE, norm.out)
    walk = _Find(facts)
    stopped = walk.run(norm.out, Pending((norm.axes[0],), Map(scale, shift, basis)))
    return stopped or (walk.found if walk.found.layers else Obstacle(Why.READ_BY_NO_LAYER, norm.out))


class _Find(Forward):
    """Products with stored weights take the map up; nothing is compensated. What they become is left to who asks."""

    RETURNED = Why.READS_IT

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self.found = Products()

    def carried(self, value: Node, pending: Pending) -> None:
        self.found.values.append((value, pending.axis))

    def composed(self, node: Node, a: dict[str, Any], value: Node, pending: Pending) -> Pending | Obstacle | None:
        """Multiplied by, or added to, what varies along the axis alone."""
        if neutral(node) is None or a.get("alpha", 1) != 1:
            return None
        is_first = a["self"] is value
        other = a["other"] if is_first else a["self"]
        fits = same_sizes(value, node) and dtype(value) == dtype(node)
        if not fits or not (other in self.facts.constant or isinstance(other, (int, float))):
            return None
        entries: Formula | None = Number(float(other)) if not isinstance(other, Node) else constant(self.facts, other)
        axes = varies_along(other, node) if isinstance(other, Node) else []
        commutes = computes(node) in (Computes.SUM, Computes.PRODUCT)
        if entries is None or axes not in ([], [pending.axis]) or not (is_first or commutes):
            return Obstacle(Why.DIFFERS, node)
        if not commutes:
            entries = Call("reciprocal.default" if computes(node) is Computes.QUOTIENT else "neg.default", (entries,))
        self.found.dropped.append((node, value))
        return replace(pending, map=pending.map.then(None, entries) if neutral(node) == 0 else pending.map.then(entries, None))

    # -- taking it up --------------------------------------------------------------------------------------------------

    def layer(self, node: Node, a: dict[str, Any], pending: Pending) -> Obstacle | None:
        weight, bias, transposed = a["weight"], a["bias"], is_transposed(node)
        if rank(weight) < 2 or pending.axis != channel(node, a["input"]) or a.get("groups", 1) != 1:
            return Obstacle(Why.MIXES_GROUPS, node)
        padded = not (node.target is aten.linear.default or unpadded(a["padding"]))
        if pending.map.shift is not None and (transposed or padded):
            return Obstacle(Why.PADS, node)
        return self._take(node, weight, 0 if transposed else 1, pending.map, bias, bias is None)

    def product(self, node: Node, a: dict[str, Any], value: Node, weight: Node, pending: Pending) -> Obstacle | None:
        if rank(value) < 2 or rank(weight) < 2 or pending.axis != rank(value) - 1:
            return Obstacle(Why.MIXES_OTHERS, node)
        if pending.map.shift is not None and a.get("alpha", 1) != 1:
            return Obstacle(Why.SCALES_PRODUCT, node)
        bias = a["self"] if node.target is aten.addmm.default and a["beta"] == 1 else None
        return self._take(node, weight, rank(weight) - 2, pending.map, bias, False)

    def _take(self, node: Node, weight: Node, dim: int, pending: Map, bias: Any, takes_bias: bool) -> Obstacle | None:
        *way, (tensor, along) = way_back(self.facts, weight, dim, pending.linear, shared=True) or [(node, 0)]
        alone = not any(value.op == "placeholder" for value, _ in way)
        if tensor is node or not alone or (way and rank(tensor) != 2):
            return Obstacle(Why.NO_STORED_FACTOR, node)
        stored = self.facts.program.stored
        out = shape(node)[channel(node, node) if layer(node) else -1]
        owned = is_tensor(bias) and self.facts.editable(bias) and rank(bias) == 1 and same(shape(bias)[0], out)
        if pending.shift is not None and bias is not None and not owned and rank(tensor) > 2:
            return Obstacle(Why.NO_BIAS_OF_ITS_OWN, bias)
        name = stored[bias.name] if owned else None
        self.found.layers.append(Reading(node, stored[tensor.name], along, tuple(way), pending, name, takes_bias))
        return None
