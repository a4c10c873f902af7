"""Large tensors in blocks: the same values as whole ones, under every change of weights that a proof makes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from normfuse.graph import parts, stored_values
from normfuse.graph.expressions import Call, Formula, Read
from normfuse.graph.interpreter import flat_inputs, run
from normfuse.graph.parts import Part, Weights, deviation, row_sizes
from normfuse.graph.program import Program
from normfuse.proof.noise import PERIOD, kick, nudged
from tests.zoo.spread import spread

_IDS = torch.tensor([[0, 3, 7, 40, 40, 3]])


class _Reader(nn.Module):
    """A table, a Linear, and products with plain matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(41, 12)
        self.up = nn.Linear(12, 20)
        self.plain = nn.Parameter(torch.randn(20, 10))
        self.down = nn.Parameter(torch.randn(10, 12))
        self.bias = nn.Parameter(torch.randn(12))

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.up(self.table(ids))) @ self.plain
        flat = torch.addmm(self.bias, x.reshape(-1, 10), self.down)
        return nn.functional.linear(flat, self.table.weight)


_FORMULAS: dict[str, dict[str, Formula]] = {
    "as they are": {},
    "writers centred": {"up.weight": Read("up.weight").centered(0), "down": Read("down").centered(1)},
    "rows scaled": {"table.weight": Read("table.weight").scaled(Read("bias"), 1)},
    "along both axes": {"plain": Read("plain").centered(1).centered(0)},
    "a small one of a large one": {"bias": Read("bias") + Call("mean.dim", (Read("down"), (0,)))},
}


def _shifted(name: str, value: Tensor, part: Part) -> Tensor:
    return value + deviation(part.whole)


_CHANGES: dict[str, Weights | None] = {
    "none": None,
    "nudged": nudged(1e-2),
    "shifted and nudged": nudged(1e-2, _shifted, 1),
}


@pytest.mark.parametrize("change", _CHANGES)
@pytest.mark.parametrize("formulas", _FORMULAS)
def test_blocks_give_what_the_whole_gives(formulas: str, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = Program.trace(spread(_Reader()).eval(), (_IDS,))
    program = Program(traced.exported, _FORMULAS[formulas])
    flat = flat_inputs(program, (_IDS,))
    (expected,) = run(program, flat, wide=True, weights=_CHANGES[change])
    widened = _counted(monkeypatch)
    monkeypatch.setattr(stored_values, "LEAST", 30)
    monkeypatch.setattr(stored_values, "BLOCK", 48)
    (got,) = run(program, flat, wide=True, weights=_CHANGES[change])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert max(widened) <= 48


@pytest.mark.parametrize("call", ["linear", "matmul", "addmm"])
def test_a_matrix_that_a_call_reads_twice_is_taken_as_a_whole(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(12, 12))

        def forward(self, x: Tensor) -> Tensor:
            w = self.w
            calls = {
                "linear": lambda: nn.functional.linear(w, w),
                "matmul": lambda: w @ w,
                "addmm": lambda: torch.addmm(w, x, w),
            }
            return x + calls[call]()

    x = torch.randn(12, 12)
    program = Program.trace(Twice(), (x,))
    (expected,) = run(program, [x], wide=True)
    monkeypatch.setattr(stored_values, "LEAST", 30)
    monkeypatch.setattr(stored_values, "BLOCK", 48)
    (got,) = run(program, [x], wide=True)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many entries are widened at a time from now on."""
    widened: list[int] = []
    wide = Part.wide

    def counting(part: Part) -> Tensor:
        value = wide(part)
        widened.append(value.numel())
        return value

    monkeypatch.setattr(Part, "wide", counting)
    return widened


def test_an_index_that_is_no_row_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    program = Program.trace(nn.Embedding(41, 12), (_IDS,))
    monkeypatch.setattr(stored_values, "LEAST", 30)
    for wrong in (41, -1):
        with pytest.raises(IndexError, match="out of range"):
            run(program, [torch.full_like(_IDS, wrong)], wide=True)


@pytest.mark.parametrize("shape", [(300, 7, 1000), (3, PERIOD + 5), (2_500_000,)])
def test_numbers_of_a_part_are_those_of_the_whole(shape: tuple[int, ...]) -> None:
    whole = torch.zeros(shape, dtype=torch.float16)
    numbers = kick("w", whole.double(), Part(whole))
    for axis, length in enumerate(shape):
        part = Part(whole, axis, length // 3, length - length // 3 - 1)
        assert torch.equal(kick("w", part.wide(), part), part.of(numbers))


def test_deviations_and_rows_are_measured_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (torch.randn(40, 30) * 3.0 + 100.0).bfloat16()
    wide = whole.double()
    monkeypatch.setattr(parts, "PIECE", 64)
    assert deviation(whole) == pytest.approx(float(wide.std()), rel=1e-13)
    torch.testing.assert_close(row_sizes(whole), wide.square().sum(1))
    assert parts.any_filled(whole)
    assert not parts.any_filled(torch.zeros(40, 30))
