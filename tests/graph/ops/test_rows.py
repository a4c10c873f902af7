"""Every row of the table against numbers: what it says is carried is carried, what it says is hidden is hidden.

A case draws one call of an operator. The rows are asked about the call, and what they answer is tried in float64: any
linear map along an axis of the result must equal the same map applied to the operands that the row names. A new row
needs a case here; rows that are wrong on purpose show that the cases find them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import Graph

from normfuse.graph.ops.lookup import carries, hides
from normfuse.graph.ops.row import TABLE
from normfuse.graph.views import aten
from tests.graph.ops.calls import Built, Call
from tests.graph.ops.cases import CASES, HIDING
from tests.graph.ops.properties import by_name, check, check_carries, check_hides, quick


def test_every_row_has_a_case_and_every_case_a_row() -> None:
    assert {op for op, row in TABLE.items() if row.carries} <= set(CASES)
    assert {op for op, row in TABLE.items() if row.hides} == set(HIDING)
    assert set(CASES) | set(HIDING) == set(TABLE)


@pytest.mark.parametrize("op", by_name(op for op in CASES if TABLE[op].carries), ids=str)
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
