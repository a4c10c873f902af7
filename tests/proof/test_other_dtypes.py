"""Models of other dtypes are compared, in both directions: each side gets the inputs that it takes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import normfuse
from normfuse.cli import main
from tests.models import noise
from tests.zoo.spread import spread

KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PAIRS = [(one, other) for one in KINDS for other in KINDS if one != other]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.norm, self.down = nn.Embedding(9, 8), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        y: Tensor = self.down(self.norm(torch.relu(self.up(x)) + self.table(ids)))
        return y


@pytest.fixture
def model() -> Small:
    return spread(Small()).eval()


IDS = torch.tensor([[0, 3, 8], [1, 1, 2]])


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_model_in_two_dtypes_is_one_function(model: Small, one: torch.dtype, other: torch.dtype) -> None:
    x = noise(2, 3, 6)
    a, b = (copy.deepcopy(model).to(each) for each in (one, other))
    evidence = normfuse.verify(a, b, (x, IDS))
    assert evidence.ok, evidence.complaint()
    wrong = copy.deepcopy(b)
    with torch.no_grad():
        wrong.down.weight[0] *= 1.2
    assert normfuse.verify(a, wrong, (x, IDS)).verdict == "disproven"


@pytest.mark.parametrize("given", KINDS)
def test_inputs_of_any_floating_dtype_are_taken(model: Small, given: torch.dtype) -> None:
    assert normfuse.verify(model.half(), copy.deepcopy(model).float(), (noise(2, 3, 6).to(given), IDS.int())).ok


def test_one_row_that_is_off_shows(model: Small) -> None:
    """Against the rounding of that row, not of the whole model."""
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.up.weight[3] *= 1.0001
    assert not normfuse.verify(model, wrong, (noise(2, 3, 6), IDS)).ok


def test_programs_in_two_dtypes_on_the_command_line(model: Small, tmp_path: Path) -> None:
    for name, dtype in (("half.pt2", torch.float16), ("float.pt2", torch.float32)):
        traced = torch.export.export(copy.deepcopy(model).to(dtype), (noise(2, 3, 6).to(dtype), IDS))
        torch.export.save(traced, tmp_path / name)
    for pair in (("half.pt2", "float.pt2"), ("float.pt2", "half.pt2")):
        result = CliRunner().invoke(main, ["verify", *(str(tmp_path / each) for each in pair)])
        assert result.exit_code == 0, result.output
