"""What a row says of a call, tried in float64: any linear map along an axis of the result is the same map of the operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Node

from normfuse.graph.interpreter import call
from normfuse.graph.ops.lookup import carries, hides, rank
from normfuse.graph.ops.row import TABLE, No, Operator
from tests.graph.ops.calls import Built, Case, drawn

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


def applied(matrix: Tensor, value: Any, axis: int) -> Any:
    """A matrix along an axis; where there are several tensors, of all those of its size."""
    if isinstance(value, (list, tuple)):
        floats = (each.is_floating_point() and each.shape[axis] == matrix.shape[1] for each in value)
        return [applied(matrix, each, axis) if is_float else each for each, is_float in zip(value, floats, strict=True)]
    assert 0 <= axis < value.dim(), f"axis {axis} of a value of rank {value.dim()}"
    assert value.shape[axis] == matrix.shape[1], f"a map of size {matrix.shape[1]} along an axis of size {value.shape[axis]}"
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


def answered(op: Any, **columns: Any) -> Operator:
    """The row of an operator with other answers in some columns; of an operator without one, with "no" in all others."""
    none: dict[str, Any] = dict.fromkeys((each.name for each in fields(Operator)), No("unknown"))
    return replace(TABLE.get(op, Operator(**none)), **columns)


def by_name(ops: Any) -> list[Any]:
    return sorted(ops, key=str)
