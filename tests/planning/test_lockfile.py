"""A lock file notices what matters and nothing else."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from normfuse.graph.program import Program
from normfuse.planning.lockfile import drift
from normfuse.planning.planner import Plan, plan
from tests.zoo.spread import spread


class Net(nn.Module):
    def __init__(self, gate: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8, bias=bias), nn.LayerNorm(8), nn.Linear(8, 4)
        self.gate = gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        z = self.down(self.norm(y))
        return z * y.mean() if self.gate else z


def planned(model: nn.Module, name: str = "pre_rmsnorm") -> Plan:
    return plan(Program.trace(spread(model).eval(), (torch.randn(3, 6),)), [name])


def test_the_same_model_with_other_weights_is_the_same() -> None:
    assert drift(planned(Net()), planned(Net())) == []


def test_it_survives_the_file() -> None:
    chosen = planned(Net())
    assert drift(Plan.from_json(chosen.to_json()), chosen) == []


def test_names_of_nodes_and_lines_do_not_count() -> None:
    chosen = planned(Net())
    moved = tuple(
        tuple(replace(each, sites=tuple(replace(site, node="other", source="x.py:1") for site in each.sites)) for each in some)
        for some in chosen.rounds
    )
    assert drift(chosen, replace(chosen, rounds=moved)) == []


def test_a_norm_that_is_refused_now_is_named() -> None:
    (told,) = drift(planned(Net()), planned(Net(gate=True)))
    assert told.startswith("norm (pre_rmsnorm): refused (NF")
    assert "locked: layer_norm → rms_norm" in told


def test_a_tensor_less_is_named() -> None:
    assert drift(planned(Net()), planned(Net(bias=False))) == ["no longer changes up.bias"]


def test_other_passes_are_another_plan() -> None:
    (told,) = drift(planned(Net()), planned(Net(), "fold_affine"))
    assert "the locked plan is of pre_rmsnorm" in told
