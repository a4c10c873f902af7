"""The smallest change that a proof says it would have seen: three times as much is seen, and less than it is not invented."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.graph.edits import SetTensor
from normfuse.graph.expressions import Call, Number
from normfuse.graph.interpreter import flat_inputs
from normfuse.graph.program import Program
from normfuse.planning.planner import Plan, plan
from normfuse.proof.cases import cases
from normfuse.proof.evidence import MARGIN, Evidence, Sensitivity
from normfuse.proof.proving import prove
from normfuse.report.evidence_text import evidence_lines
from normfuse.report.html import html
from tests.batch_norms import FOLDS
from tests.models import TRAPS

ROUNDINGS = MARGIN * torch.finfo(torch.float32).eps
"""Between two models, weights that differ may be roundings of one another: less than so many is not told from one."""

MODELS: dict[str, Any] = {name: TRAPS[name] for name in ("plain", "tied head", "eps 1e-3")}
MODELS |= {name: FOLDS[name] for name in ("before a padded conv", "square, transposed and reshaped") if name in FOLDS}


def middle_row(value: Tensor) -> int:
    size = value.double().reshape(len(value), -1).norm(dim=1)
    filled = size.argsort()[int((size == 0.0).sum()) :]
    return int(filled[len(filled) // 2])


def one_row_off(chosen: Plan, program: Program, edit: SetTensor, change: float) -> Plan:
    """The plan with one row of a tensor scaled."""
    value = program.tensor(edit.name)
    row = middle_row(value)
    bounds = ((0, row), (row, row + 1), (row + 1, len(value)))
    parts = [Call("slice.Tensor", (edit.formula, 0, *ends)) for ends in bounds if ends[0] < ends[1]]
    at = 1 if row else 0
    parts[at] = Call("mul.Tensor", (parts[at], Number(1.0 + change)))
    wrong = replace(edit, formula=Call("cat.default", (tuple(parts), 0)))
    rounds = tuple(
        tuple(replace(each, edits=tuple(wrong if e == edit else e for e in each.edits)) for each in rewrites)
        for rewrites in chosen.rounds
    )
    return replace(chosen, rounds=rounds)


@pytest.mark.parametrize("name", MODELS)
def test_three_times_the_stated_change_is_caught(name: str) -> None:
    trap = MODELS[name]
    program = Program.trace(trap.module(), trap.inputs)
    chosen = plan(program, ["pre_rmsnorm", "conv_bn"])
    tried = list(cases(program, flat_inputs(program, trap.inputs)))[:1]
    right = prove(program, chosen.apply(program), chosen, tried)
    assert right.ok
    assert right.sensitivity is not None
    assert 0 < right.sensitivity.shown <= right.sensitivity.sampled <= 3
    assert right.sensitivity.change < 1e-9
    edits = [edit for rewrite in chosen.rewrites for edit in rewrite.edits if isinstance(edit, SetTensor)]
    weights = [edit for edit in edits if program.tensor(edit.name).dim() > 1 and "embed" not in edit.name]
    assert weights
    for edit in weights:
        wrong = one_row_off(chosen, program, edit, 3.0 * right.sensitivity.change)
        assert not prove(program, wrong.apply(program), wrong, tried).ok, f"a row of {edit.name} off, and nobody noticed"


@pytest.mark.parametrize("name", ["plain", "before a padded conv"])
def test_three_times_the_stated_change_of_a_model_is_caught(name: str) -> None:
    trap = MODELS[name]
    model, wrong = trap.module(), trap.module()
    seen = normfuse.verify(model, copy.deepcopy(model), trap.inputs).sensitivity
    assert seen is not None
    assert 0.0 < seen.change < 1e-3
    for key, value in wrong.named_parameters():
        if value.dim() > 1 and "embed" not in key and "position" not in key:
            off = copy.deepcopy(model)
            with torch.no_grad():
                off.get_parameter(key)[middle_row(value)] *= 1.0 + max(3.0 * seen.change, ROUNDINGS)
            assert not normfuse.verify(model, off, trap.inputs).ok, key


class OneOfMany(nn.Module):
    """Of a table, inputs read some rows; nothing else is stored."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).tanh()


def test_where_no_row_can_be_sampled_nothing_is_said() -> None:
    model = OneOfMany().eval()
    evidence = normfuse.verify(model, model, (torch.tensor([[1, 2]]),))
    assert evidence.ok
    assert evidence.sensitivity is None
    assert evidence.to_dict()["sensitivity"] is None
    assert "would show" not in html(evidence_lines(evidence), "")


def test_what_does_not_reach_the_outputs_is_not_called_seen() -> None:
    """A bias of the keys adds the same to every score: softmax does not see it."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key = nn.Parameter(torch.randn(4))
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            scores = x @ (x + self.key).transpose(1, 2)
            return self.head(scores.softmax(-1) @ x)

    torch.manual_seed(0)
    model = Attention().eval()
    seen = normfuse.verify(model, model, (torch.randn(2, 5, 4),)).sensitivity
    assert seen is not None
    assert (seen.shown, seen.sampled) == (2, 3)
    assert "of 2 of 3 sampled tensors" in str(seen)


def test_how_it_is_told() -> None:
    assert str(Sensitivity(2e-3, 3, 3)) == "a row off by 0.2 % would show"
    assert str(Sensitivity(2e-13, 3, 3)) == "a row off by 2e-13 would show"
    assert str(Sensitivity(0.1, 0, 3)) == "a row off by 10 % would not show"
    model = TRAPS["plain"].module()
    report = normfuse.rewrite(model, "pre_rmsnorm", inputs=TRAPS["plain"].inputs).report
    seen = report.evidence.sensitivity
    assert seen is not None
    assert report.to_dict()["evidence"]["sensitivity"] == {"change": seen.change, "shown": 3, "sampled": 3}
    assert str(seen) in html(report.render(), "")


def test_a_failure_states_none() -> None:
    model, other = TRAPS["plain"].module(), TRAPS["plain"].module()
    with torch.no_grad():
        other.head.weight.mul_(1.01)
    evidence: Evidence = normfuse.verify(model, other, TRAPS["plain"].inputs)
    assert not evidence.ok
    assert evidence.sensitivity is None
