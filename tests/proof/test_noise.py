"""The numbers that a proof changes weights with: the same ones for one name, none small, whatever mode torch is in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from normfuse.graph.parts import Part
from normfuse.proof import noise
from normfuse.proof.noise import PERIOD, kick, normal, nudged


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5), (PERIOD + 3,), (2, PERIOD)])
def test_one_name_has_one_draw_of_any_size(shape: tuple[int, ...]) -> None:
    like = torch.zeros(shape, dtype=torch.float64)
    drawn = kick("a", like)
    assert drawn.shape == like.shape
    assert torch.equal(drawn, kick("a", like))
    assert bool(((drawn.abs() >= 0.5) & (drawn.abs() <= 1.5)).all())
    if like.numel() > 2:
        assert not torch.equal(drawn, kick("b", like))
        assert not torch.equal(drawn.flatten()[:-1], drawn.flatten()[1:])


def test_rows_of_a_large_weight_are_changed_each_in_its_own_way() -> None:
    like = torch.zeros(2048, 1024, dtype=torch.float64)
    for draw in (kick, normal):
        rows = draw("a", like)
        assert len(torch.unique(rows[:, :3], dim=0)) == 2048
        assert abs(float(rows.mean())) < 0.01


def test_they_do_not_depend_on_the_mode_in_which_they_are_first_drawn() -> None:
    usual = kick("a", torch.zeros(5))
    for first in (torch.inference_mode(), torch.device("meta")):
        noise._kicks.cache_clear()
        with first:
            value: Tensor = torch.zeros(5, device="cpu")
            kick("a", value)
        assert torch.equal(kick("a", torch.zeros(5)), usual)
        assert not kick("a", torch.zeros(5)).is_inference()


def test_a_nudge_is_relative_and_of_its_size() -> None:
    value = torch.randn(PERIOD // 2, 3, dtype=torch.float64)
    moved = (nudged(1e-6)("w", value, Part(value)) - value) / value
    assert float(moved.abs().min()) > 0.49e-6
    assert float(moved.abs().max()) < 1.51e-6
