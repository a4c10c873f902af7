"""Expressions: what is written of them does not change, and each reading of the one walk computes the same numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph, GraphModule

from normfuse.errors import InvalidPlan
from normfuse.graph import expressions
from normfuse.graph.arithmetic import operator_named
from normfuse.graph.expressions import (
    FLOAT32,
    Call,
    Expression,
    Number,
    Read,
    Ref,
    along_axis,
    calls_from_json,
    evaluate,
    formula_from_json,
    interpret,
    reads,
    size,
    substitute,
    text,
    to_json,
    uncentered,
)

WEIGHT, GAIN = Read("fc.weight"), Read("ls")
WRITTEN: tuple[tuple[Expression, str, str], ...] = (
    (WEIGHT, '{"read": "fc.weight"}', "fc.weight"),
    (Number(float("inf")), '{"number": "inf"}', "inf"),
    (WEIGHT.centered(-1), '{"center": {"read": "fc.weight"}, "dim": -1}', "center(fc.weight, dim=-1)"),
    (WEIGHT.scaled(GAIN, 0), '{"scale": {"read": "fc.weight"}, "by": {"read": "ls"}, "dim": 0}', "scale(fc.weight, ls, dim=0)"),
    (GAIN.shifted(Number(2), 0), '{"shift": {"read": "ls"}, "by": {"number": 2}, "dim": 0}', "shift(ls, 2, dim=0)"),
    (
        Call("sub.Tensor", (WEIGHT, GAIN), (("alpha", 0.5),)),
        '{"apply": "sub.Tensor", "args": [{"read": "fc.weight"}, {"read": "ls"}], "kwargs": {"alpha": 0.5}, "output": 0}',
        "sub(fc.weight, ls, alpha=0.5)",
    ),
    (
        Call("unbind.int", (Call("cat.default", ((GAIN, GAIN),)), 0), (), 1),
        '{"apply": "unbind.int", "args": [{"apply": "cat.default", "args": [[{"read": "ls"}, {"read": "ls"}]], "kwargs": {}, '
        '"output": 0}, 0], "kwargs": {}, "output": 1}',
        "unbind(cat((ls, ls)), 0)[1]",
    ),
    (
        Call("view.default", (GAIN, (4,))),
        '{"apply": "view.default", "args": [{"read": "ls"}, [4]], "kwargs": {}, "output": 0}',
        "view(ls, (4,))",
    ),
)
CALLED: tuple[tuple[Expression, str, str], ...] = (
    (Ref("x"), '{"ref": "x"}', "x"),
    (
        Call("sub.Tensor", (Ref("x"), Call("mean.dim", (Ref("x"), (1,), True), FLOAT32))),
        '{"call": "sub.Tensor", "args": [{"ref": "x"}, '
        '{"call": "mean.dim", "args": [{"ref": "x"}, [1], true], "dtype": "float32"}]}',
        "sub.Tensor(x, mean.dim(x, [1], True))",
    ),
    (
        Call("rms_norm.default", (Ref("x"), (8,), None, float("inf"))),
        '{"call": "rms_norm.default", "args": [{"ref": "x"}, [8], null, {"float": "inf"}]}',
        "rms_norm(x, [8], None, inf)",
    ),
)


@pytest.mark.parametrize(("formula", "written", "shown"), WRITTEN)
def test_formulas_are_written_as_ever(formula: Expression, written: str, shown: str) -> None:
    assert json.dumps(to_json(formula)) == written
    assert formula_from_json(json.loads(written)) == formula
    assert str(formula) == shown


@pytest.mark.parametrize(("call", "written", "shown"), CALLED)
def test_calls_are_written_as_ever(call: Expression, written: str, shown: str) -> None:
    assert json.dumps(to_json(call, in_graph=True)) == written
    assert calls_from_json(json.loads(written)) == call
    assert text(call, in_graph=True) == shown


def test_a_formula_is_no_call_and_a_call_no_formula() -> None:
    for _, written, _ in CALLED:
        with pytest.raises(ValueError, match="is not known"):
            formula_from_json(json.loads(written))
    for _, written, _ in WRITTEN:
        with pytest.raises(ValueError, match="is no whole number"):
            calls_from_json(json.loads(written))
    with pytest.raises(ValueError, match="only computes"):
        formula_from_json({"apply": "batch_norm.default", "args": []})  # which would write to what it is given
    with pytest.raises(InvalidPlan, match="no dtype"):
        calls_from_json({"call": "mean.dim", "args": [], "dtype": "int8"})
    with pytest.raises(ValueError, match="only computes"):
        formula_from_json({"apply": "center", "args": [{"read": "x"}]})


# -- the walk ----------------------------------------------------------------------------------------------------------

STORED: dict[str, tuple[int, ...]] = {"square": (4, 4), "half": (4, 1), "row": (1, 4), "entries": (4,), "one": (1,)}
_LEAVES = st.sampled_from([Read("square"), Read("half"), Read("row"), Number(-1.5)])
_ENTRIES = st.sampled_from([Read("entries"), Read("one"), Number(3.0)])


def _grown(inner: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
    binary = st.sampled_from(["mul.Tensor", "add.Tensor", "sub.Tensor"])
    return st.one_of(
        st.builds(lambda op, a, b: Call(op, (a, b)), binary, inner, inner),
        st.builds(lambda a: Call("neg.default", (a,)), inner),
        st.builds(lambda a, b: Call("sub.Tensor", (a, b), (("alpha", 0.5),)), inner, inner),
        st.builds(lambda a, by, dim: _whole(a).scaled(by, dim), inner, _ENTRIES, st.sampled_from([0, 1, -1])),
        st.builds(lambda a, by, dim: _whole(a).shifted(by, dim), inner, _ENTRIES, st.sampled_from([0, 1, -1])),
        st.builds(lambda a, dim: _whole(a).centered(dim), inner, st.sampled_from([0, 1, -2])),
        st.builds(lambda a, b: Call("cat.default", ((_whole(a), _whole(b)), 0), ()), inner, inner).map(
            lambda joined: Call("split.Tensor", (joined, 4, 0), (), 1)
        ),
    )


def _whole(a: Expression) -> Call:
    """With two axes of four entries each."""
    return Call("expand.default", (a, (4, 4)))


formulas = st.recursive(_LEAVES, _grown, max_leaves=6)


def _numbers() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(sizes, generator=generator) for name, sizes in STORED.items()}


def _by_matrices(call: Call, values: list[Any]) -> Any:
    """What calls mean, by sums of products; a second opinion on `along_axis`."""
    (of, *by), keywords = values, dict(call.kwargs)
    if call.op not in expressions.ALONG_AXIS:
        result = operator_named(call.op)(*values, **keywords)
        return result[call.output] if isinstance(result, (tuple, list)) else result
    along = of.movedim(keywords["dim"], 0)
    if call.op == "center":
        return torch.einsum("ij,jk->ik", torch.eye(4, dtype=of.dtype) - 0.25, along).movedim(0, keywords["dim"])
    entries = by[0].reshape(-1).expand(4)
    if call.op == "scale":
        found = torch.einsum("ij,jk->ik", torch.diag(entries), along)
    else:
        found = along + torch.outer(entries, torch.ones(4, dtype=entries.dtype))
    return found.movedim(0, keywords["dim"])


@settings(deadline=None, max_examples=40)
@given(formulas)
def test_every_reading_computes_the_same(formula: Expression) -> None:
    stored = _numbers()
    value = evaluate(formula, stored.__getitem__)
    assert value.dtype == torch.float64

    def leaf(of: Read | Number) -> Tensor:
        return stored[of.name].double() if isinstance(of, Read) else torch.tensor(of.value, dtype=torch.float64)

    torch.testing.assert_close(value, interpret(formula, leaf, _by_matrices), rtol=1e-12, atol=1e-12)

    graph = Graph()
    given_ = {name: graph.placeholder(name) for name in STORED}

    def made(call: Call, values: list[Any]) -> Any:
        if call.op in expressions.ALONG_AXIS:
            return along_axis(call, values, 2, lambda op, *args: graph.call_function(operator_named(op), args))
        result = graph.call_function(operator_named(call.op), tuple(values), dict(call.kwargs))
        return graph.call_function(lambda several: several[1], (result,)) if call.output else result

    def entered(of: Read | Number) -> Any:
        return given_[of.name] if isinstance(of, Read) else graph.call_function(torch.full, ((), of.value))

    graph.output(interpret(formula, entered, made))
    again = GraphModule({}, graph)(*(each.double() for each in stored.values()))
    torch.testing.assert_close(value, again.double(), rtol=0, atol=0)


@settings(deadline=None)
@given(formulas, formulas)
def test_what_is_substituted_is_what_is_read(formula: Expression, by: Expression) -> None:
    stored, by = _numbers(), _whole(by)
    read = {**{name: value.double() for name, value in stored.items()}, "square": evaluate(by, stored.__getitem__)}
    composed = substitute(formula, {"square": by})
    torch.testing.assert_close(evaluate(composed, stored.__getitem__), evaluate(formula, read.__getitem__), rtol=0, atol=0)
    times = list(reads(formula)).count("square")
    assert size(composed) == size(formula) + times * (size(by) - 1)
    assert len(list(reads(composed))) == len(list(reads(formula))) + times * (len(list(reads(by))) - 1)


@settings(deadline=None)
@given(formulas)
def test_json_brings_back_what_it_was_given(formula: Expression) -> None:
    assert formula_from_json(json.loads(json.dumps(to_json(formula)))) == formula


def test_what_is_centred_last() -> None:
    assert uncentered(WEIGHT.centered(0).centered(1)) == (WEIGHT, frozenset({0, 1}))
    assert uncentered(WEIGHT.centered(0).scaled(GAIN, 1)) == (WEIGHT.centered(0).scaled(GAIN, 1), frozenset())
