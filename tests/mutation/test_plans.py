"""The proof itself on trial: it must tell every wrong rewrite from the right one, and must not cry wolf.

Mutation score: of all the mutants that can be applied at all, the share that the proof refuses. It must be all of them, in
float32 as in half precision, since level 2 works on the formulas and so before any rounding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from normfuse.errors import NormfuseError
from normfuse.graph.interpreter import flat_inputs
from normfuse.graph.program import Program
from normfuse.planning import registry
from normfuse.planning.planner import plan
from normfuse.proof.cases import cases
from normfuse.proof.proving import prove
from tests.mutation.models import CANNOT_RUN, MODELS
from tests.mutation.plans import Mutant, mutants

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
QUICK = {
    ("plain", torch.float32), ("missing biases", torch.float16), ("square, transposed and reshaped", torch.bfloat16),
    ("before a padded conv", torch.float32), ("masked LM", torch.float32),
}  # fmt: skip
SAME_FUNCTION = {"two writers": "swapped"}
"""Mutants that are no mistakes: it does not matter which of two layers whose results are added has which weight."""


def survives(mutant: Mutant, program: Program, flat: list[object]) -> bool | None:
    """Whether the proof takes a mutant for a right rewrite; None for one that cannot even be applied or run."""
    try:
        wrong = mutant.plan.apply(program)
        tried = list(cases(program, flat))
        return all(prove(program, wrong, mutant.plan, each).ok for each in (tried[:1], tried))  # most fail on the first
    except (NormfuseError, RuntimeError, ValueError, KeyError, AssertionError):
        return None


def chosen_cases() -> list[Any]:
    return [
        pytest.param(name, dtype, marks=() if (name, dtype) in QUICK else pytest.mark.slow, id=f"{name}, {dtype}")
        for name in MODELS
        for dtype in DTYPES
        if (name, dtype) not in CANNOT_RUN
    ]


@pytest.mark.parametrize(("model", "dtype"), chosen_cases())
def test_every_mutant_is_told_from_the_right_rewrite(model: str, dtype: torch.dtype, record_property: Any) -> None:
    trap = MODELS[model]
    module = trap.module().to(dtype)
    inputs = tuple(
        each.to(dtype) if isinstance(each, torch.Tensor) and each.is_floating_point() else each for each in trap.inputs
    )
    program = Program.trace(module, inputs)
    flat = flat_inputs(program, inputs)
    tried, survivors = 0, []
    for name in registry.passes():
        chosen = plan(program, [name])
        if not any(chosen.rewrites):
            continue
        right = prove(program, chosen.apply(program), chosen, cases(program, flat))
        assert right.ok, f"false alarm on {name}: {right.complaint()}"
        verdicts = [(mutant, survives(mutant, program, flat)) for mutant in mutants(chosen, program)]
        tried += sum(verdict is not None for _, verdict in verdicts)
        survivors += [
            f"{name}: {mutant}" for mutant, verdict in verdicts if verdict and mutant.mistake != SAME_FUNCTION.get(model)
        ]
    record_property("mutants", tried)
    assert not survivors, f"{len(survivors)} of {tried} mutants survive"
