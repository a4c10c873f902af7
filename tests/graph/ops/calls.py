"""Random calls of operators, half of them with square shapes, so that no row gets away with guessing an axis from its size."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph, Node

from normfuse.graph.interpreter import call, widened
from normfuse.graph.views import aten


@dataclass(frozen=True, eq=False)
class Call:
    """One operator call by the names of its schema; operands are tensors (placeholders) or calls themselves."""

    op: Any
    named: dict[str, Any]


class Draw:
    """Random arguments. Half of all shapes are square, so that no row gets away with guessing an axis from its size."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data
        self._generator = torch.Generator().manual_seed(self.of(range(100)))

    def of(self, options: Any) -> Any:
        return self._data.draw(st.sampled_from(list(options)))

    def flag(self) -> bool:
        return bool(self.of((False, True)))

    def shuffled(self, options: Any) -> list[Any]:
        return self._data.draw(st.permutations(list(options)))

    def some(self, options: Any) -> list[Any]:
        return [each for each in options if self.flag()]

    def shape(self, low: int = 1, high: int = 4) -> tuple[int, ...]:
        axes = self.of(range(low, high + 1))
        square = self.of((2, 3)) if self.flag() else None
        return tuple(square or self.of((1, 2, 3, 4)) for _ in range(axes))

    def dim(self, axes: int) -> int:
        dim: int = self.of(range(axes))
        return dim - axes if self.flag() else dim

    def dims(self, axes: Any) -> list[int]:
        return [dim - len(axes) if self.flag() else dim for dim in self.some(range(len(axes)))]

    def normal(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, generator=self._generator, dtype=torch.float64)

    def mask(self, *sizes: int) -> Tensor:
        return self.normal(*sizes) > 0

    def below(self, limit: int, *sizes: int) -> Tensor:
        return torch.randint(limit, sizes, generator=self._generator)

    def partner(self, shape: tuple[int, ...], make: Callable[..., Tensor] | None = None) -> Any:
        """An operand that broadcasts to a shape: of lower rank, with axes of size 1, expanded, or neither."""
        make = make or self.normal
        own = shape[self.of(range(len(shape) + 1)) :] if self.flag() else shape
        kind = self.of(("full", "thin", "expanded", "expanded", "copied"))
        if kind == "full":
            return make(*own)
        thin = make(*(1 if self.flag() else size for size in own))
        if kind == "thin":
            return thin
        full = own if self.flag() else shape
        expanded = Call(aten.expand.default, {"self": thin, "size": list(full)})
        return expanded if kind == "expanded" else Call(aten.clone.default, {"self": expanded})


Case = Callable[[Draw, Any], Any]
CASES: dict[Any, Case] = {}
HIDING: dict[Any, Case] = {}


def case(*ops: Any, table: dict[Any, Case] = CASES) -> Callable[[Case], Case]:
    def add(builder: Case) -> Case:
        table.update(dict.fromkeys(ops, builder))
        return builder

    return add


class Built:
    """The graph of one call, with real tensors where the tracer would put fake ones."""

    def __init__(self, outer: Call, draw: Draw | None = None) -> None:
        self._graph, self._draw = Graph(), draw
        self.values: dict[Node, Any] = {}
        self._made: dict[int, Node] = {}
        self.node = self._make(outer, outermost=True)

    def of(self, operand: Any) -> Node:
        """The node of a tensor or call."""
        return self._made[id(operand)]

    def _make(self, each: Any, outermost: bool = False) -> Any:
        if isinstance(each, (list, tuple)):
            return type(each)(self._make(inner) for inner in each)
        if not isinstance(each, (Tensor, Call)):
            return each
        if id(each) not in self._made:
            if isinstance(each, Tensor):
                node, value = self._graph.placeholder(f"x{len(self._made)}"), widened(each)
                node.meta["val"] = each
            else:
                node = self._graph.call_function(each.op, *self._written(each, outermost))
                # the graph knows the dtypes that the model has; numbers are compared in float64
                node.meta["val"] = call(node, self.values, wide=False)
                value = call(node, self.values, wide=True)
            self._made[id(each)], self.values[node] = node, value
        return self._made[id(each)]

    def _written(self, each: Call, outermost: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments, defaults left out or spelled out."""
        named = {name: self._make(value) for name, value in each.named.items()}
        if each.op is operator.getitem:
            return tuple(named.values()), {}
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        free = self._draw is not None and outermost
        keywords = free and self._draw.flag()  # type: ignore[union-attr]
        for argument in each.op._schema.arguments:
            if argument.name not in named:
                if not (free and argument.has_default_value() and self._draw.flag()):  # type: ignore[union-attr]
                    keywords = True
                    continue
                named[argument.name] = argument.default_value
            keywords = keywords or (free and self._draw.of(range(4)) == 0)  # type: ignore[union-attr]
            if keywords or argument.kwarg_only:
                kwargs[argument.name] = named.pop(argument.name)
            else:
                args.append(named.pop(argument.name))
        assert not named, f"{each.op} has no arguments {list(named)}"
        return tuple(args), kwargs


def drawn(op: Any, data: st.DataObject, table: dict[Any, Case]) -> Built:
    draw = Draw(data)
    built = Built(Call(op, table[op](draw, op)), draw)
    value = built.values[built.node]
    if table is HIDING and isinstance(value, tuple):
        for index in draw.some(range(len(value))):
            built.node.graph.call_function(operator.getitem, (built.node, index))
    return built
