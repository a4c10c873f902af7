"""Every column of every row: answered, and true of numbers; wrong answers are found."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normfuse.graph.ops.row import NOT_CARRIED, TABLE, Computes, Keeps, Layer, Mean, No, Normalization, Operator, Product, Sized
from normfuse.graph.views import aten
from tests.graph.ops.calls import drawn
from tests.graph.ops.cases import CASES, HIDING
from tests.graph.ops.columns import COLUMNS
from tests.graph.ops.properties import answered, by_name, quick

ANSWERS: dict[str, Any] = {
    "carries": callable,
    "hides": callable,
    "shift": lambda answer: answer is True or callable(answer),
    "keeps": lambda answer: isinstance(answer, Keeps),
    "computes": lambda answer: isinstance(answer, Computes),
    "role": lambda answer: isinstance(answer, (Layer, Product, Mean, Normalization)),
    "width": lambda answer: answer is True or isinstance(answer, Sized) or callable(answer),
}


def test_no_column_has_a_default() -> None:
    assert [each.name for each in fields(Operator)] == list(ANSWERS)
    assert all(each.default is each.default_factory is MISSING for each in fields(Operator))


@pytest.mark.parametrize("op", by_name(TABLE), ids=str)
def test_every_column_is_answered(op: Any) -> None:
    row = TABLE[op]
    for name, is_answer in ANSWERS.items():
        answer = getattr(row, name)
        assert answer.why.strip() if isinstance(answer, No) else is_answer(answer), name
    if not row.carries:
        assert not row.shift
        assert row.width is NOT_CARRIED or isinstance(row.width, (No, Sized))


def tried(op: Any, names: list[str], examples: int = 12) -> dict[str, int]:
    """Try columns on random calls of an operator; how often each had something to say."""
    said = dict.fromkeys(names, 0)

    @settings(quick, max_examples=examples)
    @given(st.data())
    def calls(data: st.DataObject) -> None:
        built = drawn(op, data, CASES if op in CASES else HIDING)
        for name in names:
            said[name] += COLUMNS[name](built)

    calls()
    return said


@pytest.mark.parametrize("op", by_name(TABLE), ids=str)
def test_what_a_column_says_is_true(op: Any) -> None:
    names = [name for name in COLUMNS if getattr(TABLE[op], name)]
    if names:
        silent = [name for name, times in tried(op, names).items() if not times and (op, name) not in NEVER]
        said = tried(op, silent, 200) if silent else {}
        assert all(said.values()), f"no example tried one of {said}"


NEVER = {
    (aten.ones.default, "width"), (aten.new_ones.default, "width"),
}  # fmt: skip
"""Sizes that are said, of results with a mean of their own."""

WITHOUT_OPERANDS = {op for op, row in TABLE.items() if row.computes is Computes.FILL} | {aten.layer_norm.default}
CARRYING = [op for op, row in TABLE.items() if row.carries]
WRONG: list[tuple[Any, str, Any]] = [
    *((op, "shift", True) for op in CARRYING if not TABLE[op].shift and op not in WITHOUT_OPERANDS),
    *((op, "width", True) for op in CARRYING if not TABLE[op].width and op not in WITHOUT_OPERANDS),
    (aten.avg_pool2d.default, "shift", True),
    (aten.grid_sampler.default, "shift", True),
    (aten.index_put.default, "shift", True),
    (aten.pad.default, "shift", True),
    (aten.squeeze.dim, "width", True),
    (aten.view.default, "width", True),
    (aten.expand.default, "width", True),
    (aten.view.default, "keeps", Keeps.COPY),
    (aten.permute.default, "keeps", Keeps.RESHAPE),
    (aten.expand.default, "keeps", Keeps.RESHAPE),
    (aten.repeat.default, "keeps", Keeps.EXPAND),
    (aten.slice.Tensor, "keeps", Keeps.REPEAT),
    (aten.neg.default, "keeps", Keeps.COPY),
    (aten.cat.default, "keeps", Keeps.PICK),
    (aten.pad.default, "keeps", Keeps.PICK),
    (aten.mean.dim, "keeps", Keeps.PICK),
    (aten.add.Tensor, "computes", Computes.DIFFERENCE),
    (aten.sub.Tensor, "computes", Computes.SUM),
    (aten.rsub.Tensor, "computes", Computes.DIFFERENCE),
    (aten.mul.Tensor, "computes", Computes.QUOTIENT),
    (aten.lerp.Tensor, "computes", Computes.CHOICE),
    (aten.transpose.int, "computes", Computes.ALGEBRAIC),
    (aten.square.default, "computes", Computes.ROOT),
    (aten.var.correction, "computes", Computes.DEVIATION),
    (aten.linalg_vector_norm.default, "computes", Computes.SOFTMAX),
    (aten.log_softmax.int, "computes", Computes.SOFTMAX),
    (aten.zeros_like.default, "computes", Computes.SUM),
    (aten.rand_like.default, "computes", Computes.FILL),
    (aten.layer_norm.default, "role", TABLE[aten.rms_norm.default].role),
    (aten.rms_norm.default, "role", TABLE[aten.layer_norm.default].role),
    (aten.group_norm.default, "role", TABLE[aten.instance_norm.default].role),
    (aten.instance_norm.default, "role", TABLE[aten.batch_norm.default].role),
    (aten.linear.default, "role", Layer(transposed=True)),
    (aten.conv2d.default, "role", Layer(transposed=True)),
    (aten.conv_transpose2d.input, "role", Layer(transposed=False)),
    (aten.convolution.default, "role", Layer(transposed=False)),
    (aten.addmm.default, "role", Product("mat2", "mat1", "self")),
    (aten.mm.default, "role", Product("mat2", "self")),
    (aten.matmul.default, "role", Mean("self")),
    (aten.scaled_dot_product_attention.default, "role", Mean("key")),
]
OF_OTHERS = {aten.round.default: Computes.ALGEBRAIC, aten.sigmoid.default: Computes.ROOT, aten.cumsum.default: Computes.FILL}


@pytest.mark.parametrize("op", by_name(OF_OTHERS), ids=str)
def test_what_an_operator_does_not_compute_is_found(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, op, CASES.get(op, CASES[aten.square.default]))
    test_a_wrong_answer_is_found(op, "computes", OF_OTHERS[op], monkeypatch)


@pytest.mark.parametrize(("op", "name", "answer"), WRONG, ids=lambda each: re.sub(r"<function (\w+) at .*?>", r"\1", str(each)))
def test_a_wrong_answer_is_found(op: Any, name: str, answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLE, op, answered(op, **{name: answer}))
    with pytest.raises((AssertionError, RuntimeError, IndexError, KeyError)):
        tried(op, [name], 100)
