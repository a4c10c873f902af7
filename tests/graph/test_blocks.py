"""Formulas in blocks are the formulas: numbers of every form that passes give, along every axis, and what cannot be cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from normfuse.graph import blocks
from normfuse.graph.blocks import overwrite, rounded
from normfuse.graph.expressions import Call, Formula, Number, Read, evaluate

W, V, G, B = Read("w"), Read("v"), Read("g"), Read("b")
PRODUCT = Call("sum.dim_IntList", (W.scaled(B, 1), (1,)))
FORMULAS: dict[str, Formula] = {
    "columns centred": W.centered(1),
    "rows centred": W.centered(0),
    "both centred": W.centered(0).centered(1),
    "scaled along columns": W.scaled(G, 1),
    "scaled along rows": W.scaled(G, 0),
    "scaled by a gain plus one": W.scaled(Call("add.Tensor", (G, 1.0), (("alpha", 1),)), 1),
    "centred, then scaled": W.centered(0).scaled(G, 1),
    "a bias with a product": B.shifted(PRODUCT, 0),
    "a bias with a product of a product": B.shifted(Call("sum.dim_IntList", (V.scaled(B.shifted(PRODUCT, 0), 1), (1,))), 0),
    "a bias with a product along rows": B.shifted(Call("sum.dim_IntList", (W.scaled(B, 0), (0,), False)), 0),
    "a number": W * Number(3.0) - Number(0.25),
    "a quotient": W / Call("rsqrt.default", (Call("add.Scalar", (G * G, 1e-5)),)),
    "twice the same, another way round": W + Call("t.default", (W,)),
    "itself whole": W - Call("mean.default", (W,)),
    "a matrix product": Call("matmul.default", (W, V)),
    "a matrix product of itself": Call("matmul.default", (W, W)),
    "a linear layer": Call("linear.default", (V, W, B)),
    "filled": Call("full_like.default", (W, 0.5)),
    "one of several results": Call("split.Tensor", (W, 24, 0), output=1).centered(1),
    "cut out": Call("slice.Tensor", (W, 0, 3, 17)).centered(0),
    "joined": Call("cat.default", ((W, V), 0)).centered(1),
    "moved": Call("permute.default", (W, (1, 0))).scaled(G, 0),
    "in another form": Call("reshape.default", (W, (8, 6, 48))).centered(2),
}


def tensors(dtype: torch.dtype = torch.float32, size: int = 48) -> Callable[[str], Tensor]:
    draw = torch.Generator().manual_seed(0)
    sizes = {"w": (size, size), "v": (size, size), "g": (size,), "b": (size,)}
    held = {name: (0.3 + torch.randn(each, generator=draw)).to(dtype) for name, each in sizes.items()}
    return held.__getitem__


@pytest.mark.parametrize("block", [1, 37, 100, 1 << 12])
@pytest.mark.parametrize("name", FORMULAS)
def test_blocks_are_the_formula(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", block)
    read = tensors()
    torch.testing.assert_close(
        rounded(FORMULAS[name], read, torch.float64), evaluate(FORMULAS[name], read), rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", [name for name in FORMULAS if evaluate(FORMULAS[name], tensors()).shape == (48, 48)])
def test_a_tensor_is_overwritten_in_place(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    read = tensors(dtype)
    before, value = read("w"), read("w").clone()
    whole = evaluate(FORMULAS[name], read).to(dtype)
    monkeypatch.setattr(blocks, "BLOCK", 100)
    assert overwrite(FORMULAS[name], "w", value, read)
    assert torch.equal(before, tensors(dtype)("w"))  # what was read is as it was
    torch.testing.assert_close(value, whole, rtol=2 * torch.finfo(dtype).eps, atol=1e-6 if dtype is torch.float16 else 1e-12)


def test_what_becomes_the_same_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 100)
    value = torch.full((48, 48), 2.0)
    assert not overwrite(W * Number(1.0), "w", value, tensors())
    value[0, 0] = -0.0
    assert overwrite(W + Number(0.0), "w", value, tensors())  # a zero that loses its sign is another


@pytest.mark.parametrize("block", [100, 1 << 20])
def test_another_shape_is_refused(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", block)
    with pytest.raises(ValueError, match="where it is stored"):
        overwrite(Call("slice.Tensor", (W, 0, 0, 1)), "w", torch.zeros(48, 48), tensors())


@pytest.mark.parametrize(
    "name", ["columns centred", "rows centred", "scaled along columns", "a bias with a product of a product"]
)
def test_no_large_tensor_is_in_float64_as_a_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 4 * 48)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dtype == torch.float64 and result.device.type == "cpu":
                largest = max(largest, result.numel())
            return result

    with Watch():
        rounded(FORMULAS[name], tensors(), torch.float32)
    assert largest <= 4 * 48


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 9), block=st.integers(1, 90), dims=st.lists(st.integers(0, 1), max_size=3)
)
@settings(max_examples=60, deadline=None)
def test_any_sizes(rows: int, columns: int, block: int, dims: list[int]) -> None:
    held = {"w": torch.randn(rows, columns), "r": torch.randn(rows), "c": torch.randn(columns), "one": torch.randn(1)}
    formula: Formula = W
    for dim in dims:
        formula = formula.centered(dim).scaled(Read("rc"[dim]), dim).shifted(Read("one"), 1 - dim)
    before = blocks.BLOCK
    blocks.BLOCK = block
    try:
        torch.testing.assert_close(rounded(formula, held.__getitem__, torch.float64), evaluate(formula, held.__getitem__))
    finally:
        blocks.BLOCK = before
