"""Formulas as one straight line of torch's functions, and their gradients in reverse order (a Wengert list), as Python code.

Autograd would keep the scales and record every step; interpreting a formula at every call costs more than computing it. So a
layer's formulas are written down once, each part of them once however often it occurs: a = γ·rsqrt(σ² + ε) of W' = a⊙W and of
b' = β − a⊙μ is one line. The backward code forms again what the gradients read, and runs the layer's own gradients in between.

    value                operands' gradients, G = ∂L/∂value
    scale(W, a, dim)     a⊙G, written over G where it is nobody else's; Σ G⊙W over the other axes
    shift(W, c, dim)     G; Σ G over the other axes
    center(W, dim)       center(G, dim)
    x·y, x + y, x − y, −x, views
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from normfuse.graph.expressions import Call, Expression, Formula, Number, Read, parts

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "mul.Tensor": torch.mul,
    "add.Tensor": torch.add,
    "sub.Tensor": torch.sub,
    "div.Tensor": torch.div,
    "neg.default": torch.neg,
    "sqrt.default": torch.sqrt,
    "rsqrt.default": torch.rsqrt,
    "reciprocal.default": torch.reciprocal,
    "view.default": torch.reshape,
    "reshape.default": torch.reshape,
    "expand.default": torch.broadcast_to,
}
"""What a tape has a line for; a formula with another operator is left to autograd."""


class NoTapeError(Exception):
    """A formula has an operator that no line, or no gradient, is written down for."""


class Tape:
    """Formulas over the same tensors, written down for the shapes, dtypes and devices that these have.

    Args:
        formulas: those of a layer's weight and, where that is one too, of its bias.
        leaves: the tensors that they read, by name.
        dtypes: the dtype of each result.
        wide: the dtype to compute in.
        outside: whether the layer is given the weight's scale apart, to apply it to its output.

    Raises:
        NoTapeError: a formula has an operator that is not among `FUNCTIONS`.
    """

    def __init__(
        self,
        formulas: Sequence[Formula],
        leaves: Mapping[str, Tensor],
        dtypes: Sequence[torch.dtype],
        wide: torch.dtype,
        *,
        outside: bool = False,
    ) -> None:
        self._graph, self._leaves = Graph(), leaves
        self._place: _Place = (next(iter(leaves.values())).device, wide)
        self._root = torch.nn.Module()
        self._numbers: dict[float, Node] = {}
        self._lines: dict[Any, Node] = {}
        self._nodes: dict[Formula, Node] = {}
        self._formulas: dict[Node, Formula] = {}
        given = {name: self._typed(self._graph.placeholder(f"leaf_{at}"), leaves[name]) for at, name in enumerate(leaves)}
        self._layer = self._graph.placeholder("layer", default_value=None)
        self._read = {name: self._moved(given[name], _place_of(leaf), self._place) for name, leaf in leaves.items()}
        self._results = list(map(self._node, formulas))
        places = ((self._place[0], dtype) for dtype in dtypes)
        self._rounded = [self._moved(node, self._place, each) for node, each in zip(self._results, places, strict=True)]

        self._weight, self._scale = self._rounded[0], None
        match formulas[0]:
            case Call("scale", (of, by)) if outside:
                self._weight, self._scale = self._node(of), self._line(torch.reshape, self._node(by), (-1,))

    def forward(self) -> Callable[..., tuple[Tensor, ...]]:
        """Code that takes the leaves and returns the results, and last the scale where it is apart."""
        return self._code((self._weight, *self._rounded[1:], *([self._scale] if self._scale is not None else [])))

    def backward(self, into: bool, of_bias: bool, wanted: Sequence[bool]) -> Callable[..., tuple[Tensor | None, ...]]:
        """Code that takes the leaves and the layer's gradients: a function of its weight, the scale outside and a mask.

        Args:
            into: whether the layer's input wants a gradient, for which the layer must be given its weight.
            of_bias: whether a bias that is no formula wants one.
            wanted: whether each leaf wants one.

        Returns:
            Code that returns ∂L/∂input, ∂L/∂bias where that is no formula, and the leaves' gradients.

        Raises:
            NoTapeError: there is an operator on the way whose gradient is not written down.
        """
        asking = {self._read[name] for name, each in zip(self._leaves, wanted, strict=True) if each}
        self._reached = self._way_to(asking)
        formed, of_weight = len(self._results) == 2, self._results[0] in self._reached
        of_bias = self._results[1] in self._reached if formed else of_bias
        operands = (self._weight, self._scale) if into else (None, None)
        found = self._graph.call_function(_gradients, (self._layer, *operands, (into, of_weight, of_bias), self._place[1]))
        of_input, *given = (self._graph.call_function(operator.getitem, (found, at)) for at in range(3))
        pairs = [(node, self._typed(each, node.meta["val"])) for node, each in zip(self._results, given, strict=False)]
        arrived = self._pulled({node: gradient for node, gradient in pairs if node in self._reached})
        ends = {name: arrived[node] for name, node in self._read.items() if node in asking and node in arrived}
        back = {name: self._moved(each, self._place, _place_of(self._leaves[name])) for name, each in ends.items()}
        return self._code((of_input, None if formed else given[1], *map(back.get, self._leaves)))

    def _code(self, output: tuple[Any, ...]) -> Callable[..., Any]:
        self._graph.output(output)
        self._graph.eliminate_dead_code()
        run: Callable[..., Any] = GraphModule(self._root, self._graph).forward
        return run

    # -- lines -----------------------------------------------------------------------------------------------------------

    def _line(self, function: Callable[..., Tensor], *args: Any) -> Node:
        """A call in its shortest form; the one that is there already, and its operand where it changes nothing."""
        function, args = self._shorter(function, args)
        value = function(*map_arg(args, lambda each: each.meta["val"]))
        if function in (torch.reshape, torch.broadcast_to) and value.shape == args[0].meta["val"].shape:
            return args[0]  # type: ignore[no-any-return]
        if (function, args) not in self._lines:
            self._lines[function, args] = self._typed(self._graph.call_function(function, args), value)
        return self._lines[function, args]

    def _shorter(self, function: Callable[..., Tensor], args: tuple[Any, ...]) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        """−x·y is −(x·y), x + (−y) is x − y, and a product is added in one go."""
        if function not in (torch.mul, torch.add, torch.sub):
            return function, args
        x, y = args
        if function is not torch.sub and x.target is torch.neg:
            x, y = y, x
        if y.target is torch.neg:
            (y,) = y.args
            if function is torch.mul:
                return torch.neg, (self._line(torch.mul, x, y),)
            function = torch.add if function is torch.sub else torch.sub
        if function is torch.add and x.target is torch.mul:
            x, y = y, x
        arrays = y.target is torch.mul and all(map(_shape, y.args))
        if function is not torch.mul and arrays and _shape(x) == _shape(y):
            return _plus_product if function is torch.add else _minus_product, (x, *y.args)
        return function, (x, y)

    def _number(self, value: float) -> Node:
        """A literal as a tensor that is made once."""
        name = f"number_{len(self._numbers)}"
        if value not in self._numbers:
            setattr(self._root, name, torch.tensor(value, dtype=self._place[1]))
            self._numbers[value] = self._typed(self._graph.get_attr(name), getattr(self._root, name))
        return self._numbers[value]

    @staticmethod
    def _typed(node: Node, like: Tensor) -> Node:
        node.meta["val"] = torch.empty_like(like, device="meta")
        return node

    def _moved(self, node: Node, source: _Place, target: _Place) -> Node:
        """A value in another dtype or on another device."""
        if source == target:
            return node
        key = (_to, node, target)
        if key not in self._lines:
            moved = self._graph.call_function(_to, (node, *target))
            self._lines[key] = self._typed(moved, node.meta["val"].to(target[1]))
        return self._lines[key]

    def _node(self, formula: Formula) -> Node:
        if formula not in self._nodes:
            self._nodes[formula] = node = self._written(formula)
            self._formulas.setdefault(node, formula)
        return self._nodes[formula]

    def _written(self, formula: Formula) -> Node:
        match formula:
            case Read(name):
                return self._read[name]
            case Number(number):
                return self._number(number)
            case Call("center", (of,), (("dim", dim),)):
                return self._centered(self._node(of), dim)
            case Call("scale", (of, by), (("dim", dim),)):
                return self._line(torch.mul, self._node(of), self._along(by, self._node(of), dim))
            case Call("shift", (of, by), (("dim", dim),)):
                return self._line(torch.add, self._node(of), self._along(by, self._node(of), dim))
            case Call(op, args, (), 0) if op in FUNCTIONS:
                return self._line(FUNCTIONS[op], *map(self._argument, args))
            case _:
                raise NoTapeError(str(formula))

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Expression):
            return self._node(value)
        return self._number(value) if isinstance(value, (int, float)) else value

    def _along(self, by: Formula, value: Node, dim: int) -> Node:
        sizes = [1] * len(_shape(value))
        sizes[dim] = -1
        return self._line(torch.reshape, self._node(by), tuple(sizes))

    def _centered(self, value: Node, dim: int) -> Node:
        return self._line(torch.sub, value, self._line(torch.mean, value, (dim,), True))

    # -- gradients -------------------------------------------------------------------------------------------------------

    def _operands(self, node: Node) -> list[Node]:
        return [self._node(each) for each in parts(self._formulas.get(node))]

    def _way_to(self, asking: set[Node]) -> set[Node]:
        """The values through which a gradient reaches a leaf that asks for it."""
        reached = set(asking)
        for node in self._graph.nodes:
            if any(each in reached for each in self._operands(node)):
                reached.add(node)
        return reached

    def _pulled(self, given: Mapping[Node, Node]) -> dict[Node, Node]:
        """Value → its gradient, for those that are computed from nothing, given the results', which are nobody else's."""
        found = dict(given)
        for node in reversed([each for each in self._graph.nodes if each in self._reached and self._operands(each)]):
            if node in found:
                gradient = found.pop(node)
                for operand, more in self._through(node, gradient, overwrite=given.get(node) is gradient):
                    more = self._summed(more, operand)
                    found[operand] = self._line(torch.add, found[operand], more) if operand in found else more
        return found

    def _through(self, node: Node, gradient: Node, *, overwrite: bool) -> Iterator[tuple[Node, Node]]:
        """(Operand, what a value's gradient adds to the operand's own), for operands through which it reaches a leaf."""
        operands = self._operands(node)
        wanted = [each in self._reached for each in operands]
        match self._formulas[node]:
            case Call("center", _, (("dim", dim),)):
                yield operands[0], self._centered(gradient, dim)
            case Call("scale", (_, by), (("dim", dim),)):
                if wanted[1]:
                    yield operands[1], self._entries(self._line(torch.mul, gradient, operands[0]), dim, operands[1])
                if wanted[0]:  # last, because it may overwrite the gradient
                    times = torch.Tensor.mul_ if overwrite else torch.mul
                    yield operands[0], self._line(times, gradient, self._along(by, operands[0], dim))
            case Call("shift", _, (("dim", dim),)):
                if wanted[1]:
                    yield operands[1], self._entries(gradient, dim, operands[1])
                if wanted[0]:
                    yield operands[0], gradient
            case Call("mul.Tensor") if len(operands) == 2:
                for operand, other in zip(operands, reversed(operands), strict=True):
                    if operand in self._reached:
                        yield operand, self._line(torch.mul, gradient, other)
            case Call("sub.Tensor") if len(operands) == 2:
                if wanted[0]:
                    yield operands[0], gradient
                if wanted[1]:
                    yield operands[1], self._line(torch.neg, gradient)
            case Call("neg.default"):
                yield operands[0], self._line(torch.neg, gradient)
            case Call("add.Tensor"):
                yield from ((each, gradient) for each, asked in zip(operands, wanted, strict=True) if asked)
            case Call("view.default" | "reshape.default"):
                yield operands[0], self._line(torch.reshape, gradient, tuple(_shape(operands[0])))
            case Call("expand.default"):
                yield operands[0], gradient
            case formula:
                raise NoTapeError(str(formula))

    def _entries(self, gradient: Node, dim: int, like: Node) -> Node:
        """A gradient summed over all axes but one, as the entries that lay along that one."""
        rank, entries = len(_shape(gradient)), _shape(like)
        others = tuple(axis for axis in range(rank) if axis != dim % rank or entries.numel() == 1)
        summed = self._line(torch.sum, gradient, others) if others else gradient
        return self._line(torch.reshape, summed, tuple(entries))

    def _summed(self, gradient: Node, like: Node) -> Node:
        """A gradient summed over the axes along which the operand was repeated."""
        sizes = tuple(_shape(like))
        return gradient if _shape(gradient) == sizes else self._line(torch.Tensor.sum_to_size, gradient, sizes)


_Place: TypeAlias = tuple[torch.device, torch.dtype]


def _shape(node: Node) -> torch.Size:
    shape: torch.Size = node.meta["val"].shape
    return shape


def _plus_product(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return torch.addcmul(x, y, z)


def _minus_product(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return torch.addcmul(x, y, z, value=-1)


def _place_of(tensor: Tensor) -> _Place:
    return tensor.device, tensor.dtype


def _to(value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return value.to(device, dtype)


def _gradients(layer: Callable[..., Any], weight: Tensor | None, scale: Tensor | None, mask: Any, dtype: torch.dtype) -> Any:
    """A layer's gradients; under autocast those of weight and bias arrive in another dtype than the formulas'."""
    of_input, *others = layer(weight, scale, mask)
    return of_input, *(each if each is None or each.dtype == dtype else each.to(dtype) for each in others)
