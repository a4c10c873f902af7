"""Models trained elsewhere: their norms go where they should, by the calculus alone, and nothing of them is left."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from torch import nn

import normfuse
import normfuse.nn
from normfuse.transforms.constant_norms import HALF, LEFT, READERS, WRITERS
from tests.float64 import error_in_float64
from tests.foreign_norms import (
    FOREIGN,
    PREPBN,
    EvoNorm2dB0,
    EvoNorm2dS0,
    LlamaRepBN,
    MaskPowerNorm,
    RepBN,
    UN1d,
)

LARGE = {"UN, translation", "PRepBN, LLaMA"}


def marks(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.xdist_group(name), *[pytest.mark.slow] * (name in LARGE)]


def every_case() -> pytest.MarkDecorator:
    """Every model with every pass that is to find its norms."""

    cases = ((name, each) for name, case in FOREIGN.items() for each in case.passes)
    return pytest.mark.parametrize(
        ("name", "passed"), [pytest.param(*case, marks=marks(case[0]), id=", ".join(case)) for case in cases]
    )


@cache
def rewritten(name: str, passed: str) -> normfuse.Result:
    case = FOREIGN[name]
    return normfuse.rewrite(case.module(), passed, inputs=case.inputs)


WAYS = (WRITERS, READERS, HALF, LEFT)
IDLE = {"clone", "_assert_tensor_metadata"}
ALIKE = {"transpose": "permute", "t": "permute", "_unsafe_view": "view", "unsqueeze": "view", "squeeze": "view"}


@every_case()
def test_every_norm_goes_where_it_should(name: str, passed: str) -> None:
    case, result = FOREIGN[name], rewritten(name, passed)
    report = result.report.to_dict()
    ways = Counter(way for each in report["rewrites"] for way in WAYS if each["because"].startswith(way))
    assert tuple(ways[way] for way in WAYS) == (case.writers, case.readers, case.halves, case.kept)
    assert tuple(refusal["code"] for refusal in report["refusals"]) == case.codes
    assert report["norms"]["after"] == {}
    assert result.report.evidence.ok
    assert error_in_float64(case.module(), case.inputs, passed) <= 1e-14
    torch.testing.assert_close(result.module()(*case.inputs), case.module()(*case.inputs), rtol=1e-4, atol=1e-4)


@every_case()
def test_nothing_of_it_is_left(name: str, passed: str) -> None:
    """The operators that remain are those of the model without norms, and of scales and shifts that had to stay."""
    case = FOREIGN[name]
    remain = Counter({"mul": case.kept, "add": case.kept + case.halves})
    assert operators(rewritten(name, passed).program) == operators(normfuse.Program.trace(case.bare(), case.inputs)) + remain


def operators(program: normfuse.Program) -> Counter[str]:
    """How often a program calls each operator, those apart that compute nothing."""
    called = (node.target._opname for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload))
    return Counter(ALIKE.get(name, name) for name in called if name not in IDLE)


def test_nothing_of_ours_is_in_them() -> None:
    """Not even imported: the modules could come from anybody's checkpoint."""
    code = "import sys, tests.foreign_norms; assert not [name for name in sys.modules if name.startswith('normfuse')]"
    subprocess.run([sys.executable, "-c", code], check=True)
    for case in FOREIGN.values():
        assert {type(module).__module__.partition(".")[0] for module in case.build().modules()} <= {"tests", "torch"}


OURS: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], nn.Module]]] = {
    "UN": (UN1d, normfuse.nn.UnifiedNorm),
    "RepBN": (RepBN, normfuse.nn.RepBN),
    "RepBN of LLaMA": (LlamaRepBN, lambda channels: normfuse.nn.RepBN(channels, eps=1e-6)),
    "PRepBN": (PREPBN, lambda channels: normfuse.nn.PRepBN(channels, total=4)),
    "PowerNorm": (partial(MaskPowerNorm, groups=2), lambda channels: normfuse.nn.PowerNorm(channels, num_groups=2)),
    "EvoNorm B0": (EvoNorm2dB0, normfuse.nn.EvoNormB0),
    "EvoNorm S0": (EvoNorm2dS0, lambda channels: normfuse.nn.EvoNormS0(channels, num_groups=2)),
}


@pytest.mark.parametrize("name", OURS)
def test_they_compute_what_ours_compute(name: str) -> None:
    """Two writings of one formula, apart from each other; one's checkpoint is the other's."""
    theirs, ours = (make(16) for make in OURS[name])
    with torch.no_grad():
        for key, value in (*theirs.named_parameters(), *theirs.named_buffers()):
            if value.is_floating_point() and not key.startswith("buffer"):
                value.uniform_(0.3, 2.0)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 16, 5, 4) if name.startswith("Evo") else torch.randn(3, 5, 16)
    torch.testing.assert_close(theirs.eval()(x), ours.eval()(x))
