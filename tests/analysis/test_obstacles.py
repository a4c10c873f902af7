"""What stands in the way: its words are in one place, and each is said by somebody."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import normfuse
from normfuse.analysis.obstacles import Obstacle, Why, named, told
from normfuse.graph.program import Program

SOURCE = "\n".join(path.read_text() for path in Path(normfuse.__file__).parent.rglob("*.py") if path.stem != "obstacles")


@pytest.mark.parametrize("code", Why)
def test_every_code_is_used_and_its_words_are_written_once(code: Why) -> None:
    assert re.search(rf"\bWhy\.{code.name}\b", SOURCE)
    if not re.search(r"[{]", code.value):
        assert f'"{code.value}"' not in SOURCE


@pytest.mark.parametrize("code", Why)
def test_words_follow_the_name_of_a_node(code: Why) -> None:
    program = Program.trace(nn.Linear(2, 2), (torch.randn(2, 2),))
    weight, output = program.reader_of("weight"), next(iter(program.graph.find_nodes(op="output")))
    detail = (3.0,) * code.value.count("{")
    obstacle = Obstacle(code, weight, detail)
    assert told(program, obstacle) == f"'weight' {code.value.format(*detail)}"
    assert told(program, Obstacle(code, output, detail)) == "the caller reads its output"
    assert (obstacle.witness, Obstacle(code, weight, (output,)).witness) == (None, output)
    assert named(program, output) == "the caller"
