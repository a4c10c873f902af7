"""Passes one after the other, in every order: the function stays, however they are chained."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

import normfuse
from tests.models import TRAPS

PASSES = ("pre_rmsnorm", "pre_crmsnorm", "fold_affine", "offline_norm")
QUICK = ("plain", "tied head", "layer scale", "zero padding")
MODELS = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in TRAPS if name not in QUICK)]

KEPT = {"plain": 0, "tied head": 0, "layer scale": 0, "mix-ln": 1, "by hand": 0, "returned hidden state": 3}
"""LayerNorms that are left whatever the order, because no pass can have them"""


def outputs(run: Any, inputs: tuple[Any, ...]) -> list[Tensor]:
    """What two calls give: some models keep state."""
    found = [run(*inputs) for _ in range(2)]
    return [each for several in found for each in (several if isinstance(several, tuple) else (several,))]


def chains(start: Any, inputs: tuple[Any, ...], saved: bool, left: tuple[str, ...] = PASSES) -> Iterator[normfuse.Result]:
    """The last result of every order; orders that begin alike share what they have in common."""
    for name in left:
        result = normfuse.rewrite(start, name, inputs=inputs, verify="none")
        others = tuple(each for each in left if each != name)
        yield from chains(result.program if saved else result, inputs, saved, others) if others else (result,)


@pytest.mark.parametrize("saved", [False, True], ids=["results", "saved"])
@pytest.mark.parametrize("name", MODELS)
def test_every_order_is_exact(name: str, saved: bool) -> None:
    """In float64, the module that is written: from results, which know their formulas, and from what was written before."""
    model, fresh = TRAPS[name].module().double(), TRAPS[name].module().double()
    inputs = tuple(each.double() if each.is_floating_point() else each for each in TRAPS[name].inputs)
    expected = outputs(fresh, inputs)
    ended = list(chains(model, inputs, saved))
    assert len(ended) == len(list(permutations(PASSES)))
    for result in ended:
        for ours, theirs in zip(outputs(copy.deepcopy(result.module()), inputs), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
        if name in KEPT:
            assert result.report.norms_after.get("layer_norm", 0) == KEPT[name]
        if name == "plain" and not saved:
            assert result.program.exported.state_dict["head.weight"].shape == (11, 7)  # also where pre_rmsnorm came first


@pytest.mark.parametrize("name", MODELS)
def test_one_plan_of_all_is_exact_in_any_order(name: str) -> None:
    model = TRAPS[name].module()
    for passes in ("all", PASSES, PASSES[::-1]):
        evidence = normfuse.rewrite(model, passes, inputs=TRAPS[name].inputs).report.evidence
        assert evidence.ok
        assert evidence.relative <= 1e-11
