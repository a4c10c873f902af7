"""A rewritten program takes every input that its original takes, and none that it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import normfuse
from normfuse.errors import VerificationFailed
from normfuse.graph.program import Program
from normfuse.planning.planner import plan
from normfuse.planning.registry import ALL
from normfuse.proof.input_conditions import narrower
from tests.every_model import MODELS
from tests.models import noise
from tests.zoo.spread import spread


@contextmanager
def asked() -> Iterator[list[str]]:
    """What is asked of the example's sizes meanwhile, where the answer would become a guard."""
    answers: list[str] = []
    check = ShapeEnv._check_frozen

    def spy(self: ShapeEnv, expr: object, value: object) -> None:
        if not self._suppress_guards_tls():
            answers.append(f"{expr} is {value}")
        check(self, expr, value)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShapeEnv, "_check_frozen", spy)
        yield answers


def dynamic(inputs: object) -> object:
    """Every size of every tensor may vary, as far as the model lets it."""
    return pytree.tree_map(
        lambda value: dict.fromkeys(range(value.dim()), Dim.AUTO) if isinstance(value, Tensor) else None, inputs
    )


SOME = [pytest.param(name, marks=[pytest.mark.slow] if at % 5 else []) for at, name in enumerate(sorted(MODELS))]


@pytest.mark.parametrize("name", SOME)
def test_nothing_depends_on_the_example_sizes(name: str) -> None:
    trap = MODELS[name]
    program = Program.trace(trap.module(), trap.inputs, dynamic_shapes=dynamic(tuple(trap.inputs)))
    with asked() as answers:
        for each in ALL:
            assert not list(narrower(program, plan(program, [each]).apply(program)))
    assert not answers


def conv_net() -> nn.Module:
    convs = (nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False))
    return spread(nn.Sequential(*convs, nn.BatchNorm2d(4))).eval()


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)))


BATCH, SIDE = Dim("batch", min=1, max=512), Dim("side", min=2, max=40)
SIZES = (1, 2, 15, 16, 64)
DYNAMIC = {
    "batch of images": (conv_net, "conv_bn", {0: BATCH}, lambda n: (n, 3, 6, 6)),
    "height and width": (conv_net, "conv_bn", {2: 2 * SIDE, 3: SIDE}, lambda n: (2, 3, 2 * min(n + 1, 40), min(n + 1, 40))),
    "batch of tokens": (Tokens, "pre_rmsnorm", {0: BATCH}, lambda n: (n, 5, 6)),
    "batch and sequence": (Tokens, "pre_crmsnorm", {0: BATCH, 1: Dim("length", min=1, max=99)}, lambda n: (n, n + 3, 6)),
}  # fmt: skip


@pytest.mark.parametrize("example", [2, 15, 32])
@pytest.mark.parametrize("kind", sorted(DYNAMIC))
def test_takes_every_size_that_the_original_takes(kind: str, example: int, tmp_path: Path) -> None:
    build, name, dims, sizes = DYNAMIC[kind]
    model = spread(build()).eval()
    inputs = (noise(*sizes(example)),)
    original = torch.export.export(model, inputs, dynamic_shapes=(dims,), strict=False)
    result = normfuse.rewrite(model, name, inputs=inputs, dynamic_shapes=(dims,), verify="structure")
    assert list(result.report.plan.rewrites)
    loaded = torch.export.load(result.save(tmp_path / "a.pt2"))
    assert loaded._guards_code == original._guards_code
    assert repr(loaded.range_constraints) == repr(original.range_constraints)
    for size in SIZES:
        x = noise(*sizes(size))
        for written in (loaded.module(), result.module()):
            torch.testing.assert_close(written(x), model(x), rtol=1e-4, atol=1e-4)


class Longer(Tokens):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) if x.shape[0] > y.shape[0] else super().forward(-x)


def test_a_condition_of_the_original_stays_in_what_is_written(tmp_path: Path) -> None:
    inputs = (noise(8, 6), noise(3, 6))
    program = torch.export.export(spread(Longer()).eval(), inputs, dynamic_shapes=({0: Dim.AUTO}, {0: Dim.AUTO}), strict=False)
    (guard,) = program._guards_code
    torch.export.save(program, tmp_path / "a.pt2")
    result = normfuse.rewrite(tmp_path / "a.pt2", "pre_rmsnorm")
    loaded = torch.export.load(result.save(tmp_path / "b.pt2"))
    assert loaded._guards_code == [guard]
    with pytest.raises(AssertionError, match="Guard failed"):
        loaded.module()(noise(3, 6), noise(8, 6))


def test_the_proof_sees_a_guard_that_was_added(monkeypatch: pytest.MonkeyPatch) -> None:
    rebuilt = Program.rebuilt

    def faulty(self: Program, *args: object, **kwargs: object) -> object:
        exported = rebuilt(self, *args, **kwargs)  # type: ignore[arg-type]
        exported._guards_code = ["L['input'].size()[0] < 16"]
        return exported

    monkeypatch.setattr(Program, "rebuilt", faulty)
    with pytest.raises(VerificationFailed, match="a condition on the inputs was added"):
        normfuse.rewrite(conv_net(), "conv_bn", inputs=(noise(2, 3, 6, 6),), dynamic_shapes=({0: BATCH},))
