"""A rotation of a stream needs no walk of its own: a policy of ten lines carries a random orthogonal basis with the two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node

from normfuse.analysis.facts import Facts
from normfuse.analysis.obstacles import Obstacle, Why
from normfuse.graph.edits import Edit, SetTensor, apply
from normfuse.graph.program import Program
from normfuse.graph.views import aten
from normfuse.transforms.draft import Draft, channel, is_transposed
from normfuse.transforms.forward import Forward, Pending
from normfuse.transforms.into_writers import fold
from normfuse.transforms.maps import Map
from tests.transforms.orthogonal import Orthogonal


class Rotate(Forward):
    """Weights take the basis up; what meets the stream is rotated in what writes it; RMS(Rt) = R RMS(t)."""

    COMPENSATES = True

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self.draft = Draft(facts)

    def layer(self, node: Node, a: dict[str, Any], pending: Pending) -> Obstacle | None:
        if pending.axis != channel(node, a["input"]) or a.get("groups", 1) != 1:
            return Obstacle(Why.MIXES_GROUPS, node)
        dim = 0 if is_transposed(node) else 1
        return self.draft.change(a["weight"], lambda own: pending.map.read(own, dim, 0))

    def composed(self, node: Node, a: dict[str, Any], value: Node, pending: Pending) -> Pending | None:
        return pending if node.target is aten.rms_norm.default and a["weight"] is None else None

    def compensate(self, operand: Node, axis: int, pending: Map) -> Obstacle | None:
        return fold(self.draft, operand, axis, pending.inverse)


def rotate(program: Program, value: str, axis: int) -> Obstacle | list[Edit]:
    """A value and its stream in the basis that the program stores as 'rotation'."""
    node, walk, basis = program.nodes[value], Rotate(Facts(program)), Map(basis=Orthogonal("rotation"))
    return fold(walk.draft, node, axis, basis) or walk.run(node, Pending((axis,), basis)) or walk.draft.edits


class Stream(nn.Module):
    """Layers that write d features and one that reads them, with a random orthogonal matrix beside them."""

    rotation: Tensor

    def __init__(self, d: int, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.of = forward
        self.register_buffer("rotation", torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self, x)


def traced(stream: Stream, *sizes: int) -> tuple[Program, Tensor]:
    x = torch.randn(*sizes, dtype=torch.float64)
    return Program.trace(stream.double().eval(), (x,)), x


def assert_the_same(program: Program, x: Tensor, edits: Obstacle | list[Edit], changed: set[str]) -> None:
    assert isinstance(edits, list), edits
    assert {edit.name for edit in edits if isinstance(edit, SetTensor)} == changed
    rotated = apply(program, edits)
    with torch.no_grad():
        before, after = program.module()(x), rotated.module()(x)
    assert (before - after).abs().max() <= 1e-12 * before.abs().max()


@settings(max_examples=12, deadline=None)
@given(st.integers(2, 5), st.integers(2, 5), st.integers(1, 5), st.booleans(), st.booleans())
def test_two_layers_that_are_added(d: int, inner: int, tokens: int, bias: bool, minus: bool) -> None:
    def forward(own: Any, x: Tensor) -> Tensor:
        one, other = own.a(x), own.b(x).mT.contiguous().mT
        return own.c(one - other if minus else other + one)  # type: ignore[no-any-return]

    a, b = nn.Linear(inner, d, bias), nn.Linear(inner, d, not bias)
    program, x = traced(Stream(d, forward, a=a, b=b, c=nn.Linear(d, inner)), 2, tokens, inner)
    (start,) = (reader.name for reader in program.reader_of("a.weight").users)
    changed = {"a.weight", "b.weight", "c.weight", "a.bias" if bias else "b.bias"}
    assert_the_same(program, x, rotate(program, start, 2), changed)


def test_a_stream_of_convolutions() -> None:
    a, b, c = nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
    program, x = traced(Stream(4, lambda own, x: own.c(own.a(x) + own.b(x)), a=a, b=b, c=c), 2, 3, 4, 4)
    (start,) = (reader.name for reader in program.reader_of("a.weight").users)
    assert_the_same(program, x, rotate(program, start, 1), {"a.weight", "a.bias", "b.weight", "b.bias", "c.weight"})


def test_a_residual_stream_behind_norms() -> None:
    def forward(own: Any, x: Tensor) -> Tensor:
        x = own.a(x)
        x = x + own.down(torch.relu(own.up(own.norm(x))))
        return own.head(own.norm(x))  # type: ignore[no-any-return]

    layers = {"a": nn.Linear(5, 4), "up": nn.Linear(4, 6), "down": nn.Linear(6, 4), "head": nn.Linear(4, 3, False)}
    norm = nn.RMSNorm(4, eps=1e-6, elementwise_affine=False)
    program, x = traced(Stream(4, forward, norm=norm, **layers), 2, 4, 5)
    (start,) = (reader.name for reader in program.reader_of("a.weight").users)
    changed = {"a.weight", "a.bias", "up.weight", "down.weight", "down.bias", "head.weight"}
    assert_the_same(program, x, rotate(program, start, 2), changed)


STOPPED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "an activation": (lambda own, x: own.c(torch.relu(own.a(x))), "is no linear layer"),
    "a gain": (lambda own, x: own.c(own.a(x) * own.gain.weight[0]), "is no linear layer"),
    "heads": (lambda own, x: own.c(own.a(x).unflatten(2, (2, 2)).flatten(2)), "is no linear layer"),
    "an input": (lambda own, x: own.c(own.a(x) + x), "does not let a scale of its channels through"),
    "a number": (lambda own, x: own.c(own.a(x) + 1.0), "adds what does not vary along the channels"),
    "parts": (lambda own, x: own.c(torch.cat([own.a(x)[..., :2], x[..., 2:]], 2)), "is no linear layer"),
    "itself": (lambda own, x: own.c((lambda y: y @ y)(own.a(x))), "reads the value in two ways"),
    "the caller": (lambda own, x: own.a(x), "is no linear layer"),
    "groups that write": (
        lambda own, x: own.c(own.a(x) + own.grouped(x.mT).mT), "writes its channels in groups",
    ),
}  # fmt: skip


@pytest.mark.parametrize("reader", STOPPED)
def test_what_is_not_linear_along_the_axis_stops_it(reader: str) -> None:
    forward, why = STOPPED[reader]
    layers = {"a": nn.Linear(4, 4), "c": nn.Linear(4, 4), "gain": nn.Linear(4, 4), "grouped": nn.Conv1d(4, 4, 1, groups=2)}
    program, _ = traced(Stream(4, forward, **layers), 2, 4, 4)
    start = next(reader.name for reader in program.reader_of("a.weight").users)
    stopped = rotate(program, start, 2)
    assert isinstance(stopped, Obstacle)
    assert str(stopped) == why
