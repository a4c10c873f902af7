"""Norms in the bodies of control flow are counted and refused, and what a body reads is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as mapped
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.export import ExportedProgram
from torch.nn.attention.flex_attention import flex_attention

import normfuse
from normfuse.analysis.facts import analyze
from normfuse.graph.interpreter import flat_inputs, run
from normfuse.graph.program import Program
from normfuse.planning.registry import codes
from tests.zoo.spread import spread

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
STEPS = torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(0))


class Branches(nn.Module):
    """A convolution and its BatchNorm in both branches, and the same again in front."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
        self.inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda t: self.inner(t), lambda t: self.inner(-t), (self.front(x),))


class Nested(nn.Module):
    """A cond inside a map, and in it a LayerNorm; an RMSNorm by hand outside of the cond."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gain = nn.LayerNorm(8), nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Any:
        def step(row: Tensor, shift: Tensor) -> Any:
            row = row * (row.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.gain
            return torch.cond(row.sum() > 0, lambda t: self.norm(t) + shift, lambda t: t - shift, (row,))

        return mapped(step, x, torch.ones(8))  # type: ignore[arg-type]


class Scanned(nn.Module):
    """A LayerNorm over each step of a scan."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Any:
        return scan(lambda carry, row: (carry + self.norm(row), carry * 1.0), torch.zeros(2, 8), x, dim=0)


class Looped(nn.Module):
    """A LayerNorm until three steps are made."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Any:
        return while_loop(lambda i, t: i < 3, lambda i, t: (i + 1, self.norm(t) + 1), (torch.tensor(0), x))


class Scored(nn.Module):
    """Flex attention whose scores are shifted by a table: its function is a body without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Parameter(torch.randn(2, 4)), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Any:
        x = self.norm(x)
        return flex_attention(x, x, x, lambda score, batch, head, query, key: score + self.table[head, key])


class Shared(nn.Module):
    """A body reads the weight that a BatchNorm would be folded into."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.layer(x))
        return torch.cond(x.sum() > 0, lambda t: t @ self.layer.weight, lambda t: t + 1, (y,))


class Watched(nn.Module):
    """A body sees the stream whose mean a LayerNorm would have taken out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        return self.norm(y) + torch.cond(x.sum() > 0, lambda t: t.relu(), lambda t: t - 1, (y,))


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, bool, dict[str, int]]] = {
    "cond": (Branches, IMAGES, True, {"batch_norm": 3}),
    "cond in map": (Nested, STEPS, True, {"rms_norm": 1, "layer_norm": 1}),
    "scan": (Scanned, STEPS, False, {"layer_norm": 1}),
    "while": (Looped, ROWS, False, {"layer_norm": 1}),
    "flex attention": (Scored, torch.randn(1, 2, 4, 8), False, {"layer_norm": 1}),
}


def exported(name: str) -> tuple[nn.Module, ExportedProgram, Tensor]:
    make, x, strict, _ = MODELS[name]
    model = spread(make()).eval()
    with torch.no_grad():  # flex attention has no gradient on a CPU
        return model, torch.export.export(model, (x,), strict=strict), x


@pytest.mark.parametrize("name", MODELS)
def test_a_body_runs_as_it_does_in_torch(name: str) -> None:
    model, program, x = exported(name)
    traced = Program.from_exported(program)
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(model(x))
    for wide, near in ((False, 0.0), (True, 1e-5)):
        outputs = run(traced, flat_inputs(traced, (x,)), wide=wide)
        assert all(torch.allclose(a.double(), b.double(), rtol=near, atol=near) for a, b in zip(expected, outputs, strict=True))
    floats = [each for each in run(traced, flat_inputs(traced, (x,)), wide=True) if each.is_floating_point()]
    assert {each.dtype for each in floats} == {torch.float64}, "a body was run in another dtype"


@pytest.mark.parametrize("name", MODELS)
def test_norms_in_bodies_are_counted(name: str) -> None:
    _, program, _ = exported(name)
    assert dict(normfuse.inspect(program).counts) == MODELS[name][3]


def test_norms_in_bodies_are_refused_and_those_outside_are_folded() -> None:
    model, program, x = exported("cond")
    result = normfuse.rewrite(program, "conv_bn", inputs=(x,))
    report = result.report.to_dict()
    assert report["norms"] == {"before": {"batch_norm": 3}, "after": {"batch_norm": 2}}
    refused = [each for each in report["refusals"] if each["code"] == "NF105"]
    assert [each["module"] for each in refused] == ["inner.1", "inner.1"]
    assert all("cond" in each["reason"] and each["hint"] for each in refused)
    for each in (x, -x, x + 1):
        assert torch.allclose(result.module()(each), model(each), atol=1e-5)


def test_a_module_with_a_norm_in_a_branch_is_traced() -> None:
    result = normfuse.rewrite(spread(Branches()).eval(), "conv_bn", inputs=(IMAGES,))
    assert result.report.to_dict()["norms"] == {"before": {"batch_norm": 3}, "after": {"batch_norm": 2}}


def test_a_pass_is_silent_of_norms_that_do_not_concern_it() -> None:
    _, program, x = exported("cond in map")
    refusals = normfuse.rewrite(program, "pre_rmsnorm", inputs=(x,)).report.to_dict()["refusals"]
    assert [(each["code"], each["node"].rpartition(".")[2]) for each in refusals] == [("NF105", "layer_norm")]
    assert normfuse.rewrite(program, "conv_bn", inputs=(x,)).report.to_dict()["refusals"] == []


def test_the_refusal_is_explained() -> None:
    assert "while_loop" in codes()["NF105"]


def test_a_function_of_flex_attention_is_proven_too() -> None:
    _, program, x = exported("flex attention")
    assert normfuse.rewrite(program, "all", inputs=(x,)).report.to_dict()["evidence"]["ok"]
    assert normfuse.verify(program, program, inputs=(x,)).ok


@pytest.mark.parametrize(("make", "name"), [(Shared, "conv_bn"), (Watched, "pre_rmsnorm")])
def test_what_a_body_reads_stays(make: Callable[[], nn.Module], name: str) -> None:
    model = spread(make()).eval()
    program = torch.export.export(model, (ROWS,), strict=True)
    result = normfuse.rewrite(program, name, inputs=(ROWS,))
    assert analyze(Program.from_exported(program)).norms, "the norm is outside of the body"
    for each in (ROWS, -ROWS):
        assert torch.allclose(result.module()(each), model(each), atol=1e-5)


def test_a_wrong_body_is_found() -> None:
    """Programs are compared through their bodies: the same branches but for one gain."""
    model, program, x = exported("cond")
    other = Branches().eval()
    other.load_state_dict(model.state_dict())
    other.get_parameter("inner.1.weight").data[1] *= 1.001
    again = torch.export.export(other, (x,), strict=True)
    assert not normfuse.verify(program, again, inputs=(x,)).ok
