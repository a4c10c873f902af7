"""Every row of the table against numbers: what it says is carried is carried, what it says is hidden is hidden.

A case draws one call of an operator. The rows are asked about the call, and what they answer is tried in float64: any
linear map along an axis of the result must equal the same map applied to the operands that the row names. A new row
needs a case here; rows that are wrong on purpose show that the cases find them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph, Node

from normfuse import rules
from normfuse.interpret import call, widened
from normfuse.rules import METADATA, carries, hides, known_ops, rank
from normfuse.views import aten, shape

EXAMPLES = 40
quick = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    report_multiple_bugs=False,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
unshrunk = settings(quick, max_examples=100, phases=[Phase.generate])


# -- drawing calls -----------------------------------------------------------------------------------------------------


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


# -- the two properties ------------------------------------------------------------------------------------------------


def applied(matrix: Tensor, value: Any, axis: int) -> Any:
    """A matrix along an axis; where there are several tensors, of all those of its size."""
    if isinstance(value, (list, tuple)):
        return [applied(matrix, each, axis) if each.shape[axis] == len(matrix) else each for each in value]
    assert 0 <= axis < value.dim(), f"axis {axis} of a value of rank {value.dim()}"
    assert value.shape[axis] == len(matrix), f"a map of size {len(matrix)} along an axis of size {value.shape[axis]}"
    return torch.tensordot(matrix, value.double(), dims=([1], [axis])).movedim(0, axis)


def maps(size: int) -> Iterator[Tensor]:
    """Centring, a diagonal, and a linear map of no structure."""
    generator = torch.Generator().manual_seed(size)
    yield torch.eye(size, dtype=torch.float64) - 1 / size
    yield torch.diag(torch.randn(size, generator=generator, dtype=torch.float64))
    yield torch.randn(size, size, generator=generator, dtype=torch.float64)


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [each for each in value if each is not None]


def agree(a: Any, b: Any) -> bool:
    pairs = list(zip(flat(a), flat(b), strict=True))
    return all(
        one.shape == other.shape
        and torch.allclose(
            one.double(),
            other.double(),
            rtol=1e-10,
            atol=1e-10 * max(1.0, float(other.double().nan_to_num().abs().max()) if other.numel() else 1.0),
            equal_nan=True,
        )
        for one, other in pairs
    )


def check_carries(built: Built) -> int:
    """Try everything that the rows say of one call; how many axes they had something to say about."""
    node, said = built.node, 0
    result = call(node, built.values, wide=True)
    assert carries(node, rank(node)) is None
    for axis in range(rank(node)):
        carried = carries(node, axis)
        if carried is None:
            continue
        size = flat(result)[0].shape[axis]
        said += size > 1
        if not carried:
            means = [each.double().mean(axis) for each in flat(result)]
            assert agree(means, [torch.zeros_like(mean) for mean in means]), f"mean along {axis} is not zero"
        for matrix in maps(size) if carried else ():
            changed = {operand: applied(matrix, built.values[operand], own) for operand, own in dict(carried).items()}
            mapped = call(node, {**built.values, **changed}, wide=True)
            assert agree(mapped, applied(matrix, result, axis)), f"axis {axis} is not carried to {carried}"
    return said


def check_hides(built: Built) -> int:
    """Shift each operand along each axis that is said to be hidden; how many there were."""
    node, said = built.node, 0
    generator = torch.Generator().manual_seed(0)
    result = repeatable(node, built.values)
    for operand in dict.fromkeys(node.all_input_nodes):
        value = built.values[operand]
        for axis in hides(node, operand):
            sizes = [1 if own == axis else size for own, size in enumerate(value.shape)]
            shift = 3 * torch.randn(sizes, generator=generator, dtype=torch.float64)
            shifted = repeatable(node, {**built.values, operand: (value + shift).to(value.dtype)})
            said += value.dim() > 0 and value.shape[axis] > 1
            assert agree(read(node, shifted), read(node, result)), f"{operand} along {axis} is seen"
    return said


def repeatable(node: Node, values: dict[Node, Any]) -> Any:
    """The result with the same random numbers each time, and NaN for memory that nobody wrote."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    try:
        return call(node, values, wide=True)
    finally:
        torch.use_deterministic_algorithms(False)


def read(node: Node, result: Any) -> list[Tensor]:
    """The tensors of a result that somebody reads."""
    if not isinstance(result, (tuple, list)):
        return [result] if isinstance(result, Tensor) else []
    return [result[user.args[1]] for user in node.users]  # type: ignore[index]


def check(op: Any, table: dict[Any, Case], how: Callable[[Built], int], effort: settings) -> int:
    """Try many calls of an operator; how often the table had something to say."""
    said = 0

    @effort
    @given(st.data())
    def examples(data: st.DataObject) -> None:
        nonlocal said
        said += how(drawn(op, data, table))

    examples()
    return said


def by_name(ops: Any) -> list[Any]:
    return sorted(ops, key=str)


# -- cases: elementwise ------------------------------------------------------------------------------------------------


@case(aten.clone.default, aten.alias.default, aten.detach.default, aten.neg.default)
def _unary(d: Draw, op: Any) -> Any:
    return {"self": d.partner(d.shape(0, 4))}


@case(aten._to_copy.default)
def _to_copy(d: Draw, op: Any) -> Any:
    x = d.normal(*d.shape(0, 4))
    if d.of(range(4)) == 0:
        x = (4 * x).long()
    return {"self": x, "dtype": d.of((None, torch.float64, torch.float32, torch.float16, torch.int64, torch.bool))}


@case(aten.type_as.default, table=HIDING)
@case(aten.type_as.default)
def _type_as(d: Draw, op: Any) -> Any:
    x = d.normal(*d.shape())
    other = x if d.of(range(4)) == 0 else d.normal(2).to(d.of((torch.float64, torch.float32, torch.int64)))
    return {"self": x, "other": other}


@case(aten.copy.default, table=HIDING)
@case(aten.copy.default)
def _copy(d: Draw, op: Any) -> Any:
    shape = d.shape(0)
    x = d.normal(*shape).to(d.of((torch.float64, torch.float32, torch.int64)))
    return {"self": x, "src": x if d.of(range(4)) == 0 else d.partner(shape)}


@case(aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor)
def _add(d: Draw, op: Any) -> Any:
    shape = d.shape()
    x = d.normal(*shape)
    kind = d.of(("own mean", "own mean", "own mean", "partner", "partner", "number", "another mean", "itself"))
    other: Any = x
    if kind == "partner":
        other = d.partner(shape)
    if kind == "number":
        other = d.normal() if op is aten.rsub.Tensor else d.of((0, 0.0, 1.5))
    if kind.endswith("mean"):
        keepdim = len(set(shape)) > 1 or d.of(range(4)) > 0  # in a square, a mean without its axis still broadcasts
        dims = [d.dim(len(shape))] if d.of(range(4)) else d.shuffled(range(len(shape)))[:2]
        source = x if kind == "own mean" else d.normal(*shape)
        other = Call(aten.mean.dim, {"self": source, "dim": dims, "keepdim": keepdim})
    alpha = {"alpha": d.of((1, 2, -0.5))} if d.flag() else {}
    swap = kind != "number" and d.of(range(4)) == 0
    return {"self": other, "other": x, **alpha} if swap else {"self": x, "other": other, **alpha}


@case(aten.mul.Tensor, aten.div.Tensor, aten.true_divide.Tensor)
def _mul(d: Draw, op: Any) -> Any:
    shape = d.shape()
    x = d.normal(*shape)
    kind = d.of(("partner", "partner", "partner", "number", "itself", "mask"))
    other = {"number": 1.5, "itself": x, "mask": x > 0}.get(kind)
    if other is None or (kind == "mask" and op is not aten.mul.Tensor):
        other = d.partner(shape)
    return {"self": other, "other": x} if kind == "partner" and d.flag() else {"self": x, "other": other}


@case(aten.mul.Scalar, aten.div.Scalar, aten.true_divide.Scalar)
def _mul_scalar(d: Draw, op: Any) -> Any:
    return {"self": d.partner(d.shape()), "other": d.of((2, 0.5))}


@case(aten.rsub.Scalar)
def _rsub_scalar(d: Draw, op: Any) -> Any:
    return {"self": d.partner(d.shape()), "other": d.of((0, 0.0, 1.5)), "alpha": d.of((1, -0.5))}


@case(aten.addcmul.default)
def _addcmul(d: Draw, op: Any) -> Any:
    shape = d.shape()
    x, left, right = d.shuffled((d.normal(*shape), d.partner(shape), d.partner(shape)))
    return {"self": x, "tensor1": left, "tensor2": right, "value": d.of((1, -0.5))}


@case(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
def _where(d: Draw, op: Any) -> Any:
    shape = d.shape()
    condition = d.partner(shape, d.mask)
    left, right = d.normal(*shape), d.partner(shape)
    if op is aten.where.self and d.flag():
        left, right = right, left
    number = d.of((0, 0.0, 1.5))
    if op is aten.where.ScalarOther:
        left, right = (left if d.flag() else right), number
    if op is aten.where.ScalarSelf:
        left, right = number, (left if d.flag() else right)
    return {"condition": condition, "self": left, "other": right}


@case(aten.masked_fill.Scalar)
def _masked_fill(d: Draw, op: Any) -> Any:
    shape = d.shape()
    x, mask = (d.normal(*shape), d.partner(shape, d.mask)) if d.flag() else (d.partner(shape), d.mask(*shape))
    return {"self": x, "mask": mask, "value": d.of((0, 0.0, 1.5))}


@case(aten.lerp.Scalar, aten.lerp.Tensor)
def _lerp(d: Draw, op: Any) -> Any:
    shape = d.shape()
    x, end = d.shuffled((d.normal(*shape), d.partner(shape)))
    return {"self": x, "end": end, "weight": 0.3 if op is aten.lerp.Scalar else d.partner(shape)}


@case(aten.zeros.default, aten.full.default)
def _zeros(d: Draw, op: Any) -> Any:
    value = {"fill_value": d.of((0, 0.0, 1, 1.5))} if op is aten.full.default else {}
    return {"size": list(d.shape(0, 3)), **value}


@case(aten.zeros_like.default, aten.new_zeros.default, aten.full_like.default, aten.new_full.default)
def _zeros_like(d: Draw, op: Any) -> Any:
    size = {"size": list(d.shape(0, 3))} if ".new_" in str(op) else {}
    value = {"fill_value": d.of((0, 0.0, 1, 1.5))} if "full" in str(op) else {}
    return {"self": d.normal(*d.shape(0, 3)), **size, **value}


# -- cases: moving axes ------------------------------------------------------------------------------------------------


def grouped(d: Draw, factors: list[int]) -> list[int]:
    """Sizes that are products of neighbouring factors, with some axes of size 1 between them."""
    sizes, current = [], 1
    for factor in factors:
        current *= factor
        if d.flag():
            sizes.append(current)
            current = 1
        if d.of(range(8)) == 0:
            sizes.append(1)
    return sizes if current == 1 else [*sizes, current]


@case(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _reshape(d: Draw, op: Any) -> Any:
    factors = [2] * d.of(range(1, 5)) if d.flag() else [d.of((1, 2, 3)) for _ in range(d.of(range(5)))]
    own, size = grouped(d, factors), grouped(d, factors)
    if size and d.flag():
        size[d.of(range(len(size)))] = -1
    return {"self": d.normal(*own), "shape" if op is aten.reshape.default else "size": size}


@case(aten.permute.default)
def _permute(d: Draw, op: Any) -> Any:
    shape = d.shape(0)
    return {"self": d.normal(*shape), "dims": [dim - len(shape) * d.flag() for dim in d.shuffled(range(len(shape)))]}


@case(aten.transpose.int)
def _transpose(d: Draw, op: Any) -> Any:
    shape = d.shape()
    return {"self": d.normal(*shape), "dim0": d.dim(len(shape)), "dim1": d.dim(len(shape))}


@case(aten.t.default)
def _t(d: Draw, op: Any) -> Any:
    return {"self": d.normal(*d.shape(0, 2))}


@case(aten.unsqueeze.default)
def _unsqueeze(d: Draw, op: Any) -> Any:
    shape = d.shape(0, 3)
    return {"self": d.normal(*shape), "dim": d.dim(len(shape) + 1)}


@case(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def _squeeze(d: Draw, op: Any) -> Any:
    shape = tuple(1 if d.of(range(3)) == 0 else size for size in d.shape())
    dim: dict[str, Any] = {} if op is aten.squeeze.default else {"dim": d.dim(len(shape))}
    return {"self": d.normal(*shape), **({"dim": d.dims(shape)} if op is aten.squeeze.dims else dim)}


@case(aten.expand.default)
def _expand(d: Draw, op: Any) -> Any:
    shape = d.shape()
    own = tuple(1 if d.of(range(3)) == 0 else size for size in shape[d.of((0, 0, 1)) :])
    kept = [-1 if d.flag() and size == mine else size for mine, size in zip(own[::-1], shape[::-1], strict=False)]
    return {"self": d.normal(*own), "size": [*shape[: len(shape) - len(own)], *kept[::-1]]}


@case(aten.repeat.default)
def _repeat(d: Draw, op: Any) -> Any:
    shape = d.shape(0, 3)
    return {"self": d.normal(*shape), "repeats": [d.of((1, 1, 2)) for _ in range(len(shape) + d.of((0, 0, 1)))]}


@case(aten.tile.default)
def _tile(d: Draw, op: Any) -> Any:
    shape = d.shape(0, 3)
    return {"self": d.normal(*shape), "dims": [d.of((1, 1, 2)) for _ in range(d.of(range(len(shape) + 2)))]}


@case(aten.repeat_interleave.self_int)
def _repeat_interleave(d: Draw, op: Any) -> Any:
    shape = d.shape()
    return {"self": d.normal(*shape), "repeats": d.of((1, 2)), "dim": d.of((None, d.dim(len(shape)), d.dim(len(shape))))}


# -- cases: picking and joining ----------------------------------------------------------------------------------------


@case(aten.cat.default)
def _cat(d: Draw, op: Any) -> Any:
    shape = d.shape()
    dim = d.of(range(len(shape)))
    tensors = [d.normal(*shape[:dim], d.of((1, 2, shape[dim])), *shape[dim + 1 :]) for _ in range(d.of((1, 2, 3)))]
    legacy = [d.normal(0)] if d.of(range(4)) == 0 else []
    return {"tensors": [*legacy, *tensors], "dim": dim - len(shape) if d.flag() and len(shape) > 1 else dim}


@case(aten.stack.default)
def _stack(d: Draw, op: Any) -> Any:
    shape = d.shape(0, 3)
    return {"tensors": [d.normal(*shape) for _ in range(d.of((1, 2, 3)))], "dim": d.dim(len(shape) + 1)}


@case(aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.select.int)
def _split(d: Draw, op: Any) -> Any:
    shape = d.shape()
    dim = d.dim(len(shape))
    more: dict[str, Any] = {}
    if op is aten.split.Tensor:
        more = {"split_size": d.of((1, 2))}
    if op is aten.split_with_sizes.default:
        first = d.of(range(1, shape[dim] + 1))
        more = {"split_sizes": [first, shape[dim] - first]}
    if op is aten.select.int:
        more = {"index": d.of((0, -1))}
    return {"self": d.normal(*shape), "dim": dim, **more}


@case(operator.getitem)
def _getitem(d: Draw, op: Any) -> Any:
    source = d.of((aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.native_layer_norm.default))
    if source is aten.native_layer_norm.default:
        return {"source": Call(source, _norm(d, source)), "index": d.of((0, 1, 2))}
    return {"source": Call(source, _split(d, source)), "index": 0}


@case(aten.slice.Tensor)
def _slice(d: Draw, op: Any) -> Any:
    shape = d.shape()
    end = d.of((None, 1, 2, -1, 2**63 - 1))
    return {
        "self": d.normal(*shape),
        "dim": d.dim(len(shape)),
        "start": d.of((None, 0, 1, -3)),
        "end": end,
        "step": d.of((1, 2)),
    }


@case(aten.index_select.default)
def _index_select(d: Draw, op: Any) -> Any:
    shape = d.shape()
    dim = d.dim(len(shape))
    index = torch.arange(shape[dim]) if d.flag() else d.below(shape[dim], d.of((1, 2, 3)))
    return {"self": d.normal(*shape), "dim": dim, "index": index}


@case(aten.gather.default)
def _gather(d: Draw, op: Any) -> Any:
    shape = d.shape()
    dim = d.of(range(len(shape)))
    full = tuple(size if own == dim or d.of(range(4)) else d.of(range(1, size + 1)) for own, size in enumerate(shape))
    index: Any = d.below(shape[dim], *(1 if d.flag() else size for size in full))
    if d.flag():
        index = Call(aten.expand.default, {"self": index, "size": list(full)})
    return {"self": d.normal(*shape), "dim": dim - len(shape) * d.flag(), "index": index}


@case(aten.index.Tensor, aten._unsafe_index.Tensor)
def _index(d: Draw, op: Any) -> Any:
    shape = d.shape(2, 4)
    joint = tuple(d.of((1, 2, 3)) for _ in range(d.of(range(3))))
    indices: list[Any] = []
    kind = d.of(("integers", "integers", "integers", "mask", "bytes", "square mask"))
    if kind == "integers" or op is aten._unsafe_index.Tensor:
        for own in range(d.of(range(1, len(shape) + 1))):
            if d.flag():
                sizes = joint[d.of(range(len(joint) + 1)) :]
                indices.append(d.below(shape[own], *sizes).to(d.of((torch.int64, torch.int32))))
            else:
                indices.append(None)
        if not any(isinstance(each, Tensor) for each in indices):
            indices[-1] = d.below(shape[len(indices) - 1], *joint)
    else:
        first = d.of(range(len(shape) - 1))
        sizes = shape[first : first + (2 if kind == "square mask" else 1 + d.of((0, 1)))]
        mask = d.mask(*sizes)
        indices = [*[None] * first, mask.to(torch.uint8) if kind == "bytes" and op is aten.index.Tensor else mask]
    return {"self": d.normal(*shape), "indices": indices}


@case(aten.index_put.default)
def _index_put(d: Draw, op: Any) -> Any:
    named = _index(d, op)
    picked = tuple(named["self"][tuple(slice(None) if each is None else each for each in named["indices"])].shape)
    values = d.partner(picked)
    return {**named, "values": values, "accumulate": d.flag()}


@case(aten.slice_scatter.default)
def _slice_scatter(d: Draw, op: Any) -> Any:
    named = _slice(d, op)
    part = aten.slice.Tensor(*named.values())
    return {**named, "src": d.normal(*part.shape)}


@case(aten.select_scatter.default)
def _select_scatter(d: Draw, op: Any) -> Any:
    shape = d.shape()
    dim = d.of(range(len(shape)))
    part = d.normal(*shape[:dim], *shape[dim + 1 :])
    return {"self": d.normal(*shape), "src": part, "dim": dim - len(shape) * d.flag(), "index": d.of((0, -1))}


@case(aten.index_add.default, aten.index_copy.default)
def _index_add(d: Draw, op: Any) -> Any:
    shape = d.shape()
    dim = d.of(range(len(shape)))
    index = torch.tensor(d.shuffled(range(shape[dim]))[: d.of((1, 2, 3, 4))])
    if op is aten.index_add.default and d.flag():
        index = d.below(shape[dim], d.of((1, 2, 3)))
    source = d.normal(*shape[:dim], len(index), *shape[dim + 1 :])
    scale = {"alpha": d.of((1, 2, -0.5))} if op is aten.index_add.default else {}
    return {"self": d.normal(*shape), "dim": dim - len(shape) * d.flag(), "index": index, "source": source, **scale}


@case(aten.pad.default, aten.constant_pad_nd.default)
def _pad(d: Draw, op: Any) -> Any:
    shape = d.shape()
    constant = {"value": d.of((0, 0.0, 1.5))} if d.flag() else {}
    if op is aten.pad.default and len(shape) in (2, 3) and d.of(range(4)) == 0:
        return {"self": d.normal(*shape), "pad": [d.of((0, 1)) for _ in range(2)], "mode": d.of(("replicate", "circular"))}
    pads = [d.of((0, 0, 1, 2)) for _ in range(2 * d.of(range(1, len(shape) + 1)))]
    for place in range(0, len(pads), 2):
        if shape[-1 - place // 2] > 2 and d.of(range(4)) == 0:
            pads[place] = -1
    return {"self": d.normal(*shape), "pad": pads, **constant}


@case(aten.roll.default)
def _roll(d: Draw, op: Any) -> Any:
    shape = d.shape()
    dims = d.dims(shape)
    return {"self": d.normal(*shape), "shifts": [d.of((1, -1, 2)) for _ in dims or (0,)], "dims": dims}


@case(aten.flip.default)
def _flip(d: Draw, op: Any) -> Any:
    shape = d.shape()
    return {"self": d.normal(*shape), "dims": d.dims(shape)}


# -- cases: sums over axes ---------------------------------------------------------------------------------------------


@case(aten.mean.dim, aten.sum.dim_IntList)
def _reduce(d: Draw, op: Any) -> Any:
    shape = d.shape(0)
    dims = None if d.of(range(8)) == 0 else d.dims(shape)
    more = {"dtype": d.of((None, torch.float64, torch.float32))} if d.flag() else {}
    return {"self": d.normal(*shape), "dim": dims, "keepdim": d.flag(), **more}


@case(aten.cumsum.default)
def _cumsum(d: Draw, op: Any) -> Any:
    shape = d.shape()
    return {"self": d.normal(*shape), "dim": d.dim(len(shape))}


def _picture(d: Draw, dims: int) -> Tensor:
    """Batched or not, with as many channels as pixels now and then."""
    square = d.flag()
    lead = [4 if square else d.of((1, 2, 3)) for _ in range(d.of((1, 2)))]
    return d.normal(*lead, *(4 if square else d.of((2, 3, 4)) for _ in range(dims)))


@case(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def _avg_pool(d: Draw, op: Any) -> Any:
    dims = int(str(op)[len("aten.avg_pool")])
    return {
        "self": _picture(d, dims),
        "kernel_size": [d.of((1, 2)) for _ in range(dims)],
        "stride": [d.of((1, 2))] * dims if d.flag() else [],
        "padding": [0] * dims,
        "ceil_mode": d.flag(),
    }


@case(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default,
      aten.adaptive_avg_pool3d.default)  # fmt: skip
def _adaptive(d: Draw, op: Any) -> Any:
    dims = int(str(op).split("pool")[1][0])
    return {"self": _picture(d, dims), "output_size": [d.of((1, 2, 3, 4)) for _ in range(dims)]}


@case(aten.upsample_nearest1d.vec, aten._upsample_nearest_exact1d.vec, aten.upsample_linear1d.vec,
      aten.upsample_nearest2d.vec, aten._upsample_nearest_exact2d.vec, aten.upsample_bilinear2d.vec,
      aten.upsample_bicubic2d.vec, aten._upsample_bilinear2d_aa.vec, aten._upsample_bicubic2d_aa.vec,
      aten.upsample_nearest3d.vec, aten._upsample_nearest_exact3d.vec, aten.upsample_trilinear3d.vec)  # fmt: skip
def _upsample(d: Draw, op: Any) -> Any:
    dims = int(str(op).split("d")[0][-1])
    align = {} if "nearest" in str(op) else {"align_corners": d.flag()}
    size = {"output_size": [d.of((2, 4, 5)) for _ in range(dims)], "scale_factors": None}
    scale = {"output_size": None, "scale_factors": [d.of((2.0, 1.5)) for _ in range(dims)]}
    return {"input": d.normal(d.of((1, 2, 4)), d.of((1, 2, 4)), *[4] * dims), **align, **(size if d.flag() else scale)}


# -- cases: products with weights --------------------------------------------------------------------------------------


@case(aten.linear.default)
def _linear(d: Draw, op: Any) -> Any:
    inner, outer = (4, 4) if d.flag() else (d.of((1, 2, 3)), d.of((1, 2, 4)))
    x = d.normal(*(4 if d.flag() else 2 for _ in range(d.of(range(4)))), inner)
    weight = d.normal(inner) if d.of(range(8)) == 0 else d.normal(outer, inner)
    if weight.dim() == 1:
        return {"input": x, "weight": weight}
    bias = d.of(("none", "plain", "plain", "one", "scalar", "table", "thin table"))
    rows = x.shape[0] if x.dim() == 2 else 1
    shapes = {"plain": (outer,), "one": (1,), "scalar": (), "table": (rows, outer), "thin table": (rows, 1)}
    if bias in ("table", "thin table") and x.dim() != 2:
        bias = "plain"
    named = {"input": x, "weight": weight}
    return named if bias == "none" else {**named, "bias": d.normal(*shapes[bias])}


@case(aten.addmm.default)
def _addmm(d: Draw, op: Any) -> Any:
    n, m, p = (3, 3, 3) if d.flag() else (d.of((1, 2)), d.of((1, 4)), d.of((1, 3)))
    scale = {"alpha": 2.0, "beta": -0.5} if d.flag() else {}
    return {"self": d.partner((n, p)), "mat1": d.normal(n, m), "mat2": d.normal(m, p), **scale}


@case(aten.baddbmm.default)
def _baddbmm(d: Draw, op: Any) -> Any:
    b, n, m, p = (3, 3, 3, 3) if d.flag() else (d.of((1, 2)), d.of((1, 2)), d.of((1, 4)), d.of((1, 3)))
    scale = {"alpha": 2.0, "beta": -0.5} if d.flag() else {}
    return {"self": d.partner((b, n, p)), "batch1": d.normal(b, n, m), "batch2": d.normal(b, m, p), **scale}


@case(aten.einsum.default)
def _einsum(d: Draw, op: Any) -> Any:
    """Factors of few letters, so that they share some; upper case sorts before lower case."""
    sizes = dict.fromkeys("aBcd", 3) if d.flag() else {letter: d.of((1, 2, 3)) for letter in "aBcd"}
    broadcast = [sizes["a"] if d.flag() else 2, 2]
    dotted = d.of(range(3)) == 0
    terms, tensors = [], []
    for _ in range(d.of((1, 2, 2, 3))):
        letters = [d.of("aBcd") for _ in range(d.of(range(1, 4)))]
        dots, place = dotted and d.flag(), d.of(range(len(letters) + 1))
        own = broadcast[d.of(range(3)) :] if dots else []
        terms.append("".join([*letters[:place], *["..."] * dots, *letters[place:]]))
        tensors.append(d.normal(*(sizes[each] for each in letters[:place]), *own, *(sizes[each] for each in letters[place:])))
    out = d.shuffled(d.some(sorted({each for term in terms for each in term if each != "."})))
    if "..." in "".join(terms) and d.of(range(4)):
        out.insert(d.of(range(len(out) + 1)), "...")
    arrow = d.of(("", " -> ", "->", "->"))
    return {"equation": d.of((",", ", ")).join(terms) + (arrow and arrow + "".join(out)), "tensors": tensors}


@case(aten.scaled_dot_product_attention.default)
def _attention(d: Draw, op: Any) -> Any:
    square = d.flag()
    queries, keys, inner, outer = (3, 3, 3, 3) if square else (d.of((1, 2)), d.of((1, 4)), d.of((1, 3)), d.of((2, 3)))
    heads = d.of(((), (1,), (2, 2), (3, 3)))
    grouped = len(heads) == 2 and d.flag()
    batch = (*heads[:-1], 1) if grouped else heads
    mask = {"attn_mask": d.normal(queries, keys)} if d.flag() else {"is_causal": d.flag()}
    key, value = d.normal(*batch, keys, inner), d.normal(*batch, keys, outer)
    return {"query": d.normal(*heads, queries, inner), "key": key, "value": value, "enable_gqa": grouped, **mask}


@case(aten.mm.default, aten.bmm.default, aten.matmul.default)
def _matmul(d: Draw, op: Any) -> Any:
    n, m, p = (3, 3, 3) if d.flag() else (d.of((1, 2)), d.of((1, 4)), d.of((1, 3)))
    if op is aten.mm.default:
        return {"self": d.normal(n, m), "mat2": d.normal(m, p)}
    batch = d.of((1, 3))
    if op is aten.bmm.default:
        return {"self": d.normal(batch, n, m), "mat2": d.normal(batch, m, p)}
    left, right = (d.of(((), (1,), (3,), (3, 3), (1, 3))) for _ in range(2))
    a = d.normal(m) if d.of(range(6)) == 0 else d.normal(*left, n, m)
    b = d.normal(m) if d.of(range(6)) == 0 else d.normal(*right, m, p)
    return {"self": a, "other": b}


def _conv_named(d: Draw, dims: int, transposed: bool, batched: bool | None = None) -> dict[str, Any]:
    groups = d.of((1, 1, 2))
    inner, outer = (4, 4) if d.flag() else (groups * d.of((1, 2)), groups * d.of((1, 2)))
    batch = [] if (d.of(range(4)) == 0 if batched is None else not batched) else [d.of((1, 2, 4))]
    x = d.normal(*batch, inner, *(4 for _ in range(dims)))
    kernel = [d.of((1, 2)) for _ in range(dims)]
    weight = d.normal(inner, outer // groups, *kernel) if transposed else d.normal(outer, inner // groups, *kernel)
    named: dict[str, Any] = {"weight": weight, "groups": groups}
    if d.flag():
        named["bias"] = d.normal(outer)
    return {"input": x, **named}


@case(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
      aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)  # fmt: skip
def _conv(d: Draw, op: Any) -> Any:
    named = _conv_named(d, int(str(op)[len("aten.conv")]), transposed=False)
    if op._overloadname == "padding":
        return {**named, "padding": d.of(("same", "valid"))}
    return {**named, "padding": [d.of((0, 1))]} if d.flag() else named


@case(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def _conv_transpose(d: Draw, op: Any) -> Any:
    return _conv_named(d, int(str(op)[len("aten.conv_transpose")]), transposed=True)


@case(aten.convolution.default)
def _convolution(d: Draw, op: Any) -> Any:
    dims, transposed = d.of((1, 2)), d.flag()
    named = _conv_named(d, dims, transposed, batched=True)
    same = {"stride": [1] * dims, "padding": [0] * dims, "dilation": [1] * dims, "output_padding": [0] * dims}
    return {"bias": None, **named, **same, "transposed": transposed}


@case(aten.embedding.default)
def _embedding(d: Draw, op: Any) -> Any:
    rows, width = (3, 3) if d.flag() else (d.of((1, 4)), d.of((1, 2)))
    return {"weight": d.normal(rows, width), "indices": d.below(rows, *d.shape(0, 2))}


@case(aten.layer_norm.default, aten.native_layer_norm.default, table=HIDING)
@case(aten.layer_norm.default)
def _norm(d: Draw, op: Any) -> Any:
    shape = (*d.shape(0, 2), d.of((2, 3, 4)))
    sizes = shape[-d.of(range(1, len(shape) + 1)) :] if d.of(range(3)) == 0 else shape[-1:]
    x = d.normal(*shape)
    affine = d.of(("none", "none", "gain", "shift", "both", "itself"))
    weight = d.normal(*sizes) if affine in ("gain", "both") else None
    bias = d.normal(*sizes) if affine in ("shift", "both") else None
    if affine == "itself" and sizes == shape:
        weight, bias = (x, None) if d.flag() else (None, x)
    return {"input": x, "normalized_shape": list(sizes), "weight": weight, "bias": bias, "eps": d.of((1e-5, 0.1))}


# -- cases: readers that cannot see a shift ----------------------------------------------------------------------------


@case(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default, table=HIDING)
def _softmax(d: Draw, op: Any) -> Any:
    shape = d.shape(0)
    more = {"half_to_float": False} if str(op).startswith("aten._") else {}
    return {"self": d.normal(*shape), "dim": d.dim(max(len(shape), 1)), **more}


@case(aten.var.correction, aten.std.correction, aten.var.dim, aten.std.dim, table=HIDING)
def _spread(d: Draw, op: Any) -> Any:
    shape = d.shape()
    dims = d.of(([d.dim(len(shape))], [d.dim(len(shape))], d.dims(shape), None))
    correction = {"correction": d.of((0, 1, None))} if op._overloadname == "correction" else {"unbiased": d.flag()}
    return {"self": d.normal(*shape), "dim": dims, "keepdim": d.flag(), **correction}


@case(aten.sym_size.int, table=HIDING)
def _sym_size(d: Draw, op: Any) -> Any:
    shape = d.shape()
    return {"self": d.normal(*shape), "dim": d.dim(len(shape))}


@case(aten._assert_tensor_metadata.default, table=HIDING)
def _assert_metadata(d: Draw, op: Any) -> Any:
    return {"a": d.normal(*d.shape(0)), "dtype": torch.float64}


case(
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default,
    aten.rand_like.default, aten.randn_like.default,
    aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default, table=HIDING,
)(_zeros_like)  # fmt: skip


# -- the rows as they are ----------------------------------------------------------------------------------------------


def test_every_row_has_a_case_and_every_case_a_row() -> None:
    assert set(CASES) == known_ops()
    assert set(HIDING) == METADATA | set(rules._HIDES)


@pytest.mark.parametrize("op", by_name(CASES), ids=str)
def test_what_is_carried_is_carried(op: Any) -> None:
    assert check(op, CASES, check_carries, quick), "no example passed anything: the row, or its case, is of no use"


@pytest.mark.parametrize("op", by_name(HIDING), ids=str)
def test_what_is_hidden_is_hidden(op: Any) -> None:
    assert check(op, HIDING, check_hides, quick), "no example hid anything: the row, or its case, is of no use"


def test_integers_carry_nothing() -> None:
    x = torch.randn(3, 3)
    for outer in (
        Call(aten._to_copy.default, {"self": x, "dtype": torch.int64}),
        Call(aten._to_copy.default, {"self": x.long(), "dtype": torch.float32}),
        Call(aten.add.Tensor, {"self": x.long(), "other": x.long()}),
    ):
        assert carries(Built(outer).node, 1) is None


def test_other_nodes_carry_nothing() -> None:
    graph = Graph()
    node = graph.placeholder("x")
    node.meta["val"] = torch.randn(2, 2)
    unknown = graph.call_function(aten.gelu.default, (node,))
    unknown.meta["val"] = torch.randn(2, 2)
    assert carries(node, 0) is None
    assert carries(unknown, 0) is None
    assert carries(graph.output(unknown), 0) is None
    assert hides(unknown, node) == frozenset()


# -- rows must not be timid either -------------------------------------------------------------------------------------


def noise(*sizes: int) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64)


X, SQUARE, PICTURE, IDS = noise(2, 5, 4), noise(4, 4, 4), noise(2, 4, 6, 6), torch.tensor([[0, 1, 1], [2, 0, 1]])
W, B, KERNEL, TABLE, GATE = noise(8, 4), noise(8), noise(8, 4, 3, 3), noise(7, 4), noise(2, 5, 1)
KEEP, TOP = torch.ones(2, 5, 1, dtype=torch.bool), torch.zeros(2, 3, 1, dtype=torch.int64)
SPLIT = Call(aten.split.Tensor, {"self": X, "split_size": 2, "dim": 1})

MUST: dict[str, tuple[Any, dict[str, Any], int, tuple[tuple[Any, int], ...]]] = {
    "linear, features": (aten.linear.default, {"input": X, "weight": W, "bias": B}, 2, ((W, 0), (B, 0))),
    "linear without bias, features": (aten.linear.default, {"input": X, "weight": W}, 2, ((W, 0),)),
    "linear without bias, tokens": (aten.linear.default, {"input": X, "weight": W}, 1, ((X, 1),)),
    "addmm, features": (aten.addmm.default, {"self": B, "mat1": noise(5, 3), "mat2": (M := noise(3, 8))}, 1, ((M, 1), (B, 0))),
    "matmul, features": (aten.matmul.default, {"self": X, "other": (M := noise(4, 8))}, 2, ((M, 1),)),
    "matmul of two activations": (aten.matmul.default, {"self": SQUARE, "other": (Y := noise(4, 4, 4))}, 2, ((Y, 2),)),
    "matmul, rows": (aten.matmul.default, {"self": SQUARE, "other": noise(4, 4, 4)}, 1, ((SQUARE, 1),)),
    "mm, features": (aten.mm.default, {"self": noise(3, 4), "mat2": (M := noise(4, 8))}, 1, ((M, 1),)),
    "conv, channels": (aten.conv2d.default, {"input": PICTURE, "weight": KERNEL, "bias": B}, 1, ((KERNEL, 0), (B, 0))),
    "conv, channels, unbatched": (aten.conv2d.default, {"input": PICTURE[0], "weight": KERNEL}, 0, ((KERNEL, 0),)),
    "transposed conv, channels": (
        aten.conv_transpose2d.input, {"input": noise(2, 8, 3, 3), "weight": KERNEL}, 1, ((KERNEL, 1),),
    ),
    "embedding, features": (aten.embedding.default, {"weight": TABLE, "indices": IDS}, 2, ((TABLE, 1),)),
    "index into a table, features": (aten.index.Tensor, {"self": TABLE, "indices": [IDS]}, 2, ((TABLE, 1),)),
    "index of a batch and a token": (aten.index.Tensor, {"self": X, "indices": [IDS[0], IDS[1]]}, 1, ((X, 2),)),
    "index of tokens": (aten.index.Tensor, {"self": X, "indices": [None, IDS[0]]}, 2, ((X, 2),)),
    "gather of whole tokens": (
        aten.gather.default,
        {"self": X, "dim": 1, "index": Call(aten.expand.default, {"self": TOP, "size": [-1, -1, 4]})}, 2, ((X, 2),),
    ),
    "residual": (aten.add.Tensor, {"self": X, "other": (Y := noise(2, 5, 4))}, 2, ((X, 2), (Y, 2))),
    "positions": (aten.add.Tensor, {"self": X, "other": (Y := noise(5, 4))}, 2, ((X, 2), (Y, 1))),
    "a stored vector": (aten.add.Tensor, {"self": X, "other": (Y := noise(4))}, 2, ((X, 2), (Y, 0))),
    "zero": (aten.add.Tensor, {"self": X, "other": 0}, 2, ((X, 2),)),
    "difference": (aten.sub.Tensor, {"self": X, "other": (Y := noise(2, 5, 4))}, 2, ((X, 2), (Y, 2))),
    "explicit centring": (
        aten.sub.Tensor, {"self": X, "other": Call(aten.mean.dim, {"self": X, "dim": [-1], "keepdim": True})}, 2, (),
    ),
    "number": (aten.mul.Tensor, {"self": X, "other": 2.0}, 2, ((X, 2),)),
    "gate per token": (aten.mul.Tensor, {"self": X, "other": GATE}, 2, ((X, 2),)),
    "gate per token, on the left": (aten.mul.Tensor, {"self": GATE, "other": X}, 2, ((X, 2),)),
    "expanded gate": (
        aten.mul.Tensor, {"self": X, "other": Call(aten.expand.default, {"self": GATE, "size": [2, 5, 4]})}, 2, ((X, 2),),
    ),
    "division per token": (aten.div.Tensor, {"self": X, "other": GATE}, 2, ((X, 2),)),
    "masked tokens": (aten.masked_fill.Scalar, {"self": X, "mask": KEEP, "value": 0}, 2, ((X, 2),)),
    "chosen tokens": (aten.where.self, {"condition": KEEP, "self": X, "other": (Y := noise(4))}, 2, ((X, 2), (Y, 0))),
    "chosen or zero": (aten.where.ScalarOther, {"condition": KEEP, "self": X, "other": 0.0}, 2, ((X, 2),)),
    "cast": (aten._to_copy.default, {"self": X, "dtype": torch.float32}, 2, ((X, 2),)),
    "copy": (aten.clone.default, {"self": X}, 2, ((X, 2),)),
    "minus": (aten.neg.default, {"self": X}, 2, ((X, 2),)),
    "merged batch": (aten.view.default, {"self": X, "size": [10, 4]}, 1, ((X, 2),)),
    "split batch": (aten.view.default, {"self": (Y := noise(10, 4)), "size": [2, 5, 4]}, 2, ((Y, 1),)),
    "flattened picture": (aten.view.default, {"self": PICTURE, "size": [2, 4, 36]}, 1, ((PICTURE, 1),)),
    "merged batch of a cube": (aten.view.default, {"self": SQUARE, "size": [16, 4]}, 1, ((SQUARE, 2),)),
    "windows": (aten.view.default, {"self": (Y := noise(2, 4, 4, 4)), "size": [2, 2, 2, 2, 2, 4]}, 5, ((Y, 3),)),
    "permute": (aten.permute.default, {"self": PICTURE, "dims": [0, 2, 3, 1]}, 3, ((PICTURE, 1),)),
    "transpose": (aten.transpose.int, {"self": X, "dim0": 1, "dim1": 2}, 1, ((X, 2),)),
    "transpose of others": (aten.transpose.int, {"self": X, "dim0": 0, "dim1": 1}, 2, ((X, 2),)),
    "transposed matrix": (aten.t.default, {"self": W}, 0, ((W, 1),)),
    "unsqueeze": (aten.unsqueeze.default, {"self": X, "dim": 1}, 3, ((X, 2),)),
    "squeeze": (aten.squeeze.dim, {"self": (Y := noise(2, 1, 4)), "dim": 1}, 1, ((Y, 2),)),
    "expand": (aten.expand.default, {"self": (Y := noise(1, 1, 4)), "size": [2, -1, -1]}, 2, ((Y, 2),)),
    "repeat": (aten.repeat.default, {"self": X, "repeats": [1, 2, 1]}, 2, ((X, 2),)),
    "class token": (aten.cat.default, {"tensors": [(Y := noise(2, 1, 4)), X], "dim": 1}, 2, ((Y, 2), (X, 2))),
    "stack": (aten.stack.default, {"tensors": [X, X], "dim": 1}, 3, ((X, 2), (X, 2))),
    "split": (aten.split.Tensor, {"self": X, "split_size": 2, "dim": 1}, 2, ((X, 2),)),
    "first part": (operator.getitem, {"source": SPLIT, "index": 0}, 2, ((SPLIT, 2),)),
    "unbind": (aten.unbind.int, {"self": X, "dim": 0}, 1, ((X, 2),)),
    "first token": (aten.select.int, {"self": X, "dim": 1, "index": 0}, 1, ((X, 2),)),
    "some tokens": (aten.slice.Tensor, {"self": X, "dim": 1, "start": 1}, 2, ((X, 2),)),
    "all of a slice": (aten.slice.Tensor, {"self": X, "dim": 2, "end": 2**63 - 1}, 2, ((X, 2),)),
    "selected tokens": (aten.index_select.default, {"self": X, "dim": 1, "index": IDS[0]}, 2, ((X, 2),)),
    "padded tokens": (aten.pad.default, {"self": X, "pad": [0, 0, 0, 3]}, 2, ((X, 2),)),
    "padded pictures": (aten.constant_pad_nd.default, {"self": PICTURE, "pad": [1, 1, 1, 1]}, 1, ((PICTURE, 1),)),
    "shifted windows": (aten.roll.default, {"self": PICTURE, "shifts": [-1, -1], "dims": [2, 3]}, 1, ((PICTURE, 1),)),
    "flip": (aten.flip.default, {"self": X, "dims": [1]}, 2, ((X, 2),)),
    "mean over tokens": (aten.mean.dim, {"self": X, "dim": [1]}, 1, ((X, 2),)),
    "mean over pixels": (aten.mean.dim, {"self": PICTURE, "dim": [-1, -2], "keepdim": True}, 1, ((PICTURE, 1),)),
    "cumsum over tokens": (aten.cumsum.default, {"self": X, "dim": 1}, 2, ((X, 2),)),
    "pool": (aten.avg_pool2d.default, {"self": PICTURE, "kernel_size": [2, 2]}, 1, ((PICTURE, 1),)),
    "global pool": (aten.adaptive_avg_pool2d.default, {"self": PICTURE, "output_size": [1, 1]}, 1, ((PICTURE, 1),)),
    "resized positions": (
        aten.upsample_bicubic2d.vec,
        {"input": PICTURE, "output_size": [9, 9], "align_corners": False, "scale_factors": None}, 1, ((PICTURE, 1),),
    ),
    "norm without gain and shift": (aten.layer_norm.default, {"input": X, "normalized_shape": [4]}, 2, ()),
    "copy into a buffer": (aten.copy.default, {"self": noise(2, 5, 4), "src": (Y := noise(5, 4))}, 2, ((Y, 1),)),
    "zero minus": (aten.rsub.Scalar, {"self": X, "other": 0}, 2, ((X, 2),)),
    "gated residual": (
        aten.addcmul.default, {"self": X, "tensor1": GATE, "tensor2": (Y := noise(2, 5, 4))}, 2, ((X, 2), (Y, 2)),
    ),
    "blend": (aten.lerp.Scalar, {"self": X, "end": (Y := noise(4)), "weight": 0.3}, 2, ((X, 2), (Y, 0))),
    "blend per token": (
        aten.lerp.Tensor, {"self": X, "end": (Y := noise(2, 5, 4)), "weight": GATE}, 2, ((X, 2), (Y, 2)),
    ),
    "true division per token": (aten.true_divide.Tensor, {"self": X, "other": GATE}, 2, ((X, 2),)),
    "true division": (aten.true_divide.Scalar, {"self": X, "other": 2}, 2, ((X, 2),)),
    "tile": (aten.tile.default, {"self": X, "dims": [2, 1]}, 2, ((X, 2),)),
    "tile, batch": (aten.tile.default, {"self": X, "dims": [2, 1]}, 0, ((X, 0),)),
    "repeated heads": (aten.repeat_interleave.self_int, {"self": X, "repeats": 2, "dim": 1}, 2, ((X, 2),)),
    "picked pixels": (aten._unsafe_index.Tensor, {"self": PICTURE, "indices": [None, None, IDS, IDS[0]]}, 1, ((PICTURE, 1),)),
    "written tokens": (
        aten.slice_scatter.default, {"self": X, "src": (Y := noise(2, 2, 4)), "dim": 1, "start": -2}, 2, ((X, 2), (Y, 2)),
    ),
    "a written token": (
        aten.select_scatter.default, {"self": X, "src": (Y := noise(2, 4)), "dim": 1, "index": 0}, 2, ((X, 2), (Y, 1)),
    ),
    "tokens put in place": (
        aten.index_put.default, {"self": X, "indices": [None, IDS[0]], "values": (Y := noise(3, 4))}, 2, ((X, 2), (Y, 1)),
    ),
    "tokens added in place": (
        aten.index_put.default, {"self": TABLE, "indices": [IDS], "values": (Y := noise(2, 3, 4)), "accumulate": True}, 1,
        ((TABLE, 1), (Y, 2)),
    ),
    "experts' tokens": (
        aten.index_add.default, {"self": TABLE, "dim": 0, "index": IDS[0], "source": (Y := noise(3, 4))}, 1,
        ((TABLE, 1), (Y, 1)),
    ),
    "cached tokens": (
        aten.index_copy.default, {"self": X, "dim": 1, "index": IDS[1], "source": (Y := noise(2, 3, 4))}, 2, ((X, 2), (Y, 2)),
    ),
    "einsum, features": (aten.einsum.default, {"equation": "bti,oi->bto", "tensors": [X, W]}, 2, ((W, 0),)),
    "einsum, tokens": (aten.einsum.default, {"equation": "bti,oi->bto", "tensors": [X, W]}, 1, ((X, 1),)),
    "einsum of any rank": (aten.einsum.default, {"equation": "...i, oi -> ...o", "tensors": [X, W]}, 2, ((W, 0),)),
    "einsum of any rank, tokens": (aten.einsum.default, {"equation": "...i, oi -> ...o", "tensors": [X, W]}, 1, ((X, 1),)),
    "einsum with an implicit result": (aten.einsum.default, {"equation": "bti,oi", "tensors": [X, W]}, 1, ((W, 0),)),
    "attention": (
        aten.scaled_dot_product_attention.default, {"query": SQUARE, "key": SQUARE, "value": (Y := noise(4, 4, 4))}, 2,
        ((Y, 2),),
    ),
    "baddbmm, features": (
        aten.baddbmm.default, {"self": B, "batch1": X, "batch2": (M := noise(2, 4, 8))}, 2, ((M, 2), (B, 0)),
    ),
    "baddbmm, rows": (
        aten.baddbmm.default, {"self": (Y := noise(5, 1)), "batch1": X, "batch2": noise(2, 4, 8)}, 1, ((X, 1), (Y, 0)),
    ),
    "resized signal": (
        aten.upsample_linear1d.vec,
        {"input": X, "output_size": [9], "align_corners": False, "scale_factors": None}, 1, ((X, 1),),
    ),
    "resized signal, nearest": (
        aten.upsample_nearest1d.vec, {"input": X, "output_size": [9], "scale_factors": None}, 1, ((X, 1),),
    ),
    "resized picture, nearest": (
        aten._upsample_nearest_exact2d.vec, {"input": PICTURE, "output_size": [9, 9], "scale_factors": None}, 1,
        ((PICTURE, 1),),
    ),
    "resized volume": (
        aten.upsample_trilinear3d.vec,
        {"input": (Y := noise(1, 4, 2, 2, 2)), "output_size": [3, 3, 3], "align_corners": False, "scale_factors": None}, 1,
        ((Y, 1),),
    ),
    "zeros of that shape": (aten.full_like.default, {"self": X, "fill_value": 0}, 2, ()),
    "zeros of that dtype": (aten.new_full.default, {"self": X, "size": [2, 1, 4], "fill_value": 0.0}, 2, ()),
    "zeros": (aten.new_zeros.default, {"self": X, "size": [2, 1, 4]}, 2, ()),
}  # fmt: skip


@pytest.mark.parametrize("name", MUST)
def test_what_must_be_carried(name: str) -> None:
    op, named, axis, expected = MUST[name]
    built = Built(Call(op, named))
    assert carries(built.node, axis) == tuple((built.of(operand), own) for operand, own in expected)
    check_carries(built)


# -- rows that are wrong on purpose ------------------------------------------------------------------------------------

Wrong = Callable[[Node, dict[str, Any], int], Any]


def _named(name: str, move: Callable[[Node, dict[str, Any], int], int] = lambda node, a, axis: axis) -> Wrong:
    """Always that operand, along the axis that ``move`` says."""
    return lambda node, a, axis: ((a[name], own),) if 0 <= (own := move(node, a, axis)) < rank(a[name]) else None


def _also(op: Any, more: Wrong) -> Wrong:
    """The row as it is, and more where it says nothing."""
    right = rules._ROWS[op]
    return lambda node, a, axis: more(node, a, axis) if (said := right(node, a, axis)) is None else said


def _spanning(*names: str) -> Wrong:
    """All of these operands that have the axis, whatever the others do."""

    def row(node: Node, a: dict[str, Any], axis: int) -> Any:
        terms = [a[name] for name in names]
        return tuple((term, axis - rank(node) + rank(term)) for term in terms if rules.spans(term, node, axis)) or None

    return row


def _always(node: Node, a: dict[str, Any], axis: int) -> Any:
    return ()


def _of_equal_size(node: Node, a: dict[str, Any], axis: int) -> Any:
    sizes = list(shape(a["self"]))
    return ((a["self"], sizes.index(size)),) if (size := shape(node)[axis]) in sizes else None


def _weight_and_bias(dim: int, channel: Callable[[Node, dict[str, Any]], int]) -> Wrong:
    def row(node: Node, a: dict[str, Any], axis: int) -> Any:
        return rules._with_bias((a["weight"], dim), a["bias"]) if axis == channel(node, a) else None

    return row


def _channel(node: Node, a: dict[str, Any]) -> int:
    return rank(node) - rank(a["weight"]) + 1


def _first_with_letter(node: Node, a: dict[str, Any], axis: int) -> Any:
    left, _, right = a["equation"].replace(" ", "").partition("->")
    if not right or "." in a["equation"]:
        return None
    places = ((x, term.find(right[axis])) for x, term in zip(a["tensors"], left.split(","), strict=True))
    return (next((x, own) for x, own in places if own >= 0),)


WRONG: dict[str, tuple[Any, Wrong]] = {
    "add: a term that is constant along the axis": (aten.add.Tensor, _spanning("self", "other")),
    "add: one of two terms": (aten.add.Tensor, _named("self")),
    "sub: less a multiple of the mean": (
        aten.sub.Tensor, lambda node, a, axis: () if rules.is_mean_of(a["other"], a["self"], axis) else None,
    ),
    "sub: less the mean along any axis": (
        aten.sub.Tensor,
        lambda node, a, axis: () if any(rules.is_mean_of(a["other"], a["self"], own) for own in range(rank(node))) else None,
    ),
    "mul: the first of two spanning factors": (aten.mul.Tensor, _named("self")),
    "mul: both factors": (aten.mul.Tensor, _spanning("self", "other")),
    "div: the divisor": (aten.div.Tensor, _spanning("other")),
    "where: a condition that differs along the axis": (aten.where.self, _spanning("self", "other")),
    "masked_fill: a mask that differs along the axis": (aten.masked_fill.Scalar, _named("self")),
    "full: any number": (aten.full.default, _always),
    "view: the first axis of that size": (aten.view.default, _of_equal_size),
    "permute: the inverse": (
        aten.permute.default,
        _named("self", lambda node, a, axis: [dim % rank(node) for dim in a["dims"]].index(axis)),
    ),
    "transpose: not at all": (aten.transpose.int, _named("self")),
    "t: not at all": (aten.t.default, _named("self")),
    "unsqueeze: the axes stay": (aten.unsqueeze.default, _named("self")),
    "squeeze: the axes stay": (aten.squeeze.dim, _named("self")),
    "expand: axes counted from the front": (aten.expand.default, _named("self")),
    "repeat: a repeated axis": (aten.repeat.default, _named("self", lambda node, a, axis: axis - rank(node) + rank(a["self"]))),
    "cat: its own axis": (aten.cat.default, lambda node, a, axis: tuple((x, axis) for x in a["tensors"] if rank(x) > axis)),
    "stack: the axes stay": (
        aten.stack.default, lambda node, a, axis: tuple((x, axis) for x in a["tensors"] if rank(x) > axis),
    ),
    "split: its own axis": (aten.split.Tensor, _named("self")),
    "select: the axes stay": (aten.select.int, _named("self")),
    "slice: its own axis": (aten.slice.Tensor, _named("self")),
    "index_select: its own axis": (aten.index_select.default, _named("self")),
    "gather: an index that differs along the axis": (
        aten.gather.default,
        lambda node, a, axis: ((a["self"], axis),) if axis != a["dim"] % rank(node) else None,
    ),
    "index: the axes stay": (aten.index.Tensor, _named("self")),
    "index: as many axes as before": (aten.index.Tensor, _also(aten.index.Tensor, _named("self"))),
    "pad: along the padded axis": (aten.constant_pad_nd.default, _named("self")),
    "pad: with a number": (
        aten.pad.default,
        lambda node, a, axis: ((a["self"], axis),) if shape(node)[axis] == shape(a["self"])[axis] else None,
    ),
    "roll: its own axis": (aten.roll.default, _named("self")),
    "flip: its own axis": (aten.flip.default, _named("self")),
    "mean: the axes stay": (aten.mean.dim, _named("self")),
    "sum: its own axis": (aten.sum.dim_IntList, _also(aten.sum.dim_IntList, _named("self"))),
    "cumsum: its own axis": (aten.cumsum.default, _named("self")),
    "pool: pixels": (aten.avg_pool2d.default, _named("self")),
    "resize: pixels": (aten.upsample_bilinear2d.vec, _named("input")),
    "linear: tokens, beside a bias": (aten.linear.default, _also(aten.linear.default, _named("input"))),
    "linear: the input's features": (aten.linear.default, _weight_and_bias(1, lambda node, a: rank(node) - 1)),
    "linear: a bias of one entry": (aten.linear.default, _weight_and_bias(0, lambda node, a: rank(node) - 1)),
    "linear: without its bias": (
        aten.linear.default, lambda node, a, axis: ((a["weight"], 0),) if axis == rank(node) - 1 else None,
    ),
    "addmm: without its bias": (aten.addmm.default, lambda node, a, axis: ((a["mat2"], 1),) if axis == 1 else None),
    "addmm: a bias of one entry": (
        aten.addmm.default, lambda node, a, axis: ((a["mat2"], 1), (a["self"], rank(a["self"]) - 1)) if axis == 1 else None,
    ),
    "matmul: the inner axis": (aten.matmul.default, _named("other", lambda node, a, axis: rank(a["other"]) - 2)),
    "matmul: the batch": (aten.matmul.default, _also(aten.matmul.default, _named("self"))),
    "conv: with groups": (aten.conv2d.default, _weight_and_bias(0, _channel)),
    "conv: always batched": (aten.conv1d.default, _weight_and_bias(0, lambda node, a: 1 if a["groups"] == 1 else -1)),
    "conv: channels that come in": (aten.conv1d.default, _weight_and_bias(1, _channel)),
    "conv_transpose: with groups": (aten.conv_transpose2d.input, _weight_and_bias(1, _channel)),
    "conv_transpose: like conv": (aten.conv_transpose2d.input, _weight_and_bias(0, _channel)),
    "convolution: never transposed": (aten.convolution.default, rules._conv),
    "embedding: its rows": (aten.embedding.default, _named("weight", lambda node, a, axis: 0)),
    "copy: into what is overwritten": (aten.copy.default, _named("self")),
    "copy: a source that is constant along the axis": (
        aten.copy.default, _named("src", lambda node, a, axis: axis - rank(node) + rank(a["src"])),
    ),
    "rsub: from a number": (aten.rsub.Scalar, _named("self")),
    "addcmul: without its product": (aten.addcmul.default, _named("self")),
    "addcmul: both factors": (aten.addcmul.default, _spanning("self", "tensor1", "tensor2")),
    "lerp: one end": (aten.lerp.Scalar, _named("self")),
    "lerp: a weight that differs along the axis": (aten.lerp.Tensor, _spanning("self", "end")),
    "tile: axes counted from the front": (
        aten.tile.default,
        lambda node, a, axis: ((a["self"], axis),) if axis >= len(a["dims"]) or a["dims"][axis] == 1 else None,
    ),
    "repeat_interleave: its own axis": (aten.repeat_interleave.self_int, _named("self")),
    "repeat_interleave: no axis": (
        aten.repeat_interleave.self_int, lambda node, a, axis: ((a["self"], 0),) if a["dim"] is None else None,
    ),
    "slice_scatter: its own axis": (aten.slice_scatter.default, _spanning("self", "src")),
    "slice_scatter: without its source": (aten.slice_scatter.default, _also(aten.slice_scatter.default, _named("self"))),
    "select_scatter: the axes stay": (
        aten.select_scatter.default,
        lambda node, a, axis: ((a["self"], axis), (a["src"], axis)) if axis < rank(a["src"]) else None,
    ),
    "index_put: values that are constant along the axis": (
        aten.index_put.default,
        lambda node, a, axis: ((a["self"], axis),) if axis >= len(a["indices"]) else None,
    ),
    "index_put: an indexed axis": (aten.index_put.default, _spanning("self", "values")),
    "index_put: a mask is one axis": (
        aten.index_put.default,
        lambda node, a, axis: _spanning("self", "values")(node, a, axis) if axis >= len(a["indices"]) else None,
    ),
    "index_add: its own axis": (aten.index_add.default, _spanning("self", "source")),
    "einsum: a letter of several factors": (aten.einsum.default, _first_with_letter),
    "attention: of the queries": (aten.scaled_dot_product_attention.default, _named("query")),
    "attention: positions": (aten.scaled_dot_product_attention.default, _named("value")),
    "baddbmm: the batch": (aten.baddbmm.default, _also(aten.baddbmm.default, _named("batch1"))),
    "baddbmm: without its first term": (aten.baddbmm.default, lambda node, a, axis: ((a["batch2"], 2),) if axis == 2 else None),
    "layer_norm: with a gain": (aten.layer_norm.default, _always),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_row_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, wrong = WRONG[name]
    monkeypatch.setitem(rules._ROWS, op, wrong)
    with pytest.raises(AssertionError):
        check(op, CASES, check_carries, unshrunk)


ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}
WITHOUT_OPERANDS = ZEROS | {aten.full.default, aten.full_like.default, aten.new_full.default, aten.layer_norm.default}


@pytest.mark.parametrize("op", by_name(set(CASES) - ZEROS), ids=str)
def test_zero_mean_for_no_reason_is_found(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rules._ROWS, op, _always)
    with pytest.raises(AssertionError):
        check(op, CASES, check_carries, unshrunk)


@pytest.mark.parametrize("op", by_name(set(CASES) - WITHOUT_OPERANDS), ids=str)
def test_an_axis_off_by_one_is_found(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = rules._ROWS[op]

    def off(node: Node, a: dict[str, Any], axis: int) -> Any:
        return tuple((x, (own + 1) % rank(x)) for x, own in carried) if (carried := right(node, a, axis)) else None

    monkeypatch.setitem(rules._ROWS, op, off)
    with pytest.raises(AssertionError):
        check(op, CASES, check_carries, unshrunk)


HIDDEN_WRONG: dict[str, tuple[Any, Any]] = {
    "type_as: what is cast": (aten.type_as.default, lambda node, a, x: frozenset(range(rank(x)))),
    "copy: the source": (aten.copy.default, lambda node, a, x: frozenset(range(rank(x)))),
    "norm over several axes": (aten.layer_norm.default, lambda node, a, x: frozenset({rank(x) - 1})),
    "norm whose gain is its input": (
        aten.layer_norm.default,
        lambda node, a, x: frozenset({rank(x) - 1}) if a["input"] is x and len(a["normalized_shape"]) == 1 else frozenset(),
    ),
    "norm that tells the mean": (aten.native_layer_norm.default, rules._HIDES[aten.layer_norm.default]),
    "softmax along another axis": (aten.softmax.int, lambda node, a, x: frozenset({0} if rank(x) else ())),
    "spread over several axes": (aten.var.correction, lambda node, a, x: frozenset(d % rank(x) for d in a["dim"] or ())),
}


@pytest.mark.parametrize("name", HIDDEN_WRONG)
def test_a_reader_that_sees_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, wrong = HIDDEN_WRONG[name]
    if name == "norm that tells the mean":
        right = wrong
        wrong = lambda node, a, x: right(_unread(node), a, x)  # noqa: E731
    monkeypatch.setitem(rules._HIDES, op, wrong)
    with pytest.raises(AssertionError):
        check(op, HIDING, check_hides, unshrunk)


def _unread(node: Node) -> Node:
    """The same call, before anybody reads it."""
    twin = node.graph.call_function(aten.layer_norm.default, node.args, node.kwargs)
    twin.meta.update(node.meta)
    return twin
