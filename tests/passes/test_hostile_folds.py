"""Folds that once went wrong, compared in float64 without the prover: it must not be the only defence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from normfuse.analysis.affine import Affine
from normfuse.analysis.facts import Facts
from normfuse.analysis.obstacles import Obstacle
from normfuse.graph.program import Program
from normfuse.planning.planner import Plan, plan
from normfuse.transforms.draft import Absorbed
from normfuse.transforms.into_readers import into_readers
from tests.models import noise
from tests.zoo.spread import spread

D = 8
PASSES = ("conv_bn", "unified_norm", "prepbn", "offline_norm", "fold_affine", "pre_rmsnorm")


class Parts(nn.Module):
    """Layers to choose from, and a forward pass that is told."""

    def __init__(self, run: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.run = run
        self.norm, self.layer_norm, self.rms_norm = nn.BatchNorm1d(D), nn.LayerNorm(D), nn.RMSNorm(D)
        self.linear, self.head, self.bare = nn.Linear(D, D), nn.Linear(D, 3), nn.Linear(D, 3, bias=False)
        self.gain, self.shift, self.single = (nn.Parameter(torch.randn(size)) for size in (D, D, 1))
        self.query, self.key = nn.Parameter(torch.randn(D, D)), nn.Parameter(torch.randn(D, D))
        self.conv = nn.Conv2d(D, D, 3, padding=1)
        self.transposed = nn.ConvTranspose1d(D, D, 3, groups=2)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def _attend(value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(value, value, value)


def _clone_left_out(m: Parts, x: Tensor) -> tuple[Tensor, Tensor]:
    turned = x.transpose(1, 2)
    return torch.tanh(m.norm(turned.reshape(-1, D))), turned.relu()


def _two_weights_of_one_module(m: Parts, x: Tensor) -> tuple[Tensor, Tensor]:
    value = m.norm(torch.tanh(x))
    return torch.tanh(F.linear(value, m.query)), F.linear(value, m.key)


def _bmm(m: Parts, x: Tensor) -> Tensor:
    value = m.rms_norm(x)
    return m.bare(torch.bmm(value, value))


def _baddbmm(m: Parts, x: Tensor) -> Tensor:
    value = m.rms_norm(x)
    return m.bare(torch.baddbmm(value, value, value))


def _einsum(m: Parts, x: Tensor) -> Tensor:
    value = torch.tanh(x) * m.gain * 2
    return m.bare(torch.einsum("bij,bjk->bik", value, value))


CASES: dict[str, tuple[Callable[[Any, Tensor], Any], tuple[int, ...]]] = {
    "attention of a norm to itself": (lambda m, x: m.head(_attend(m.layer_norm(x))), (2, 5, D)),
    "attention of a gain to itself": (lambda m, x: m.bare(_attend(torch.tanh(x) * m.gain * 2)), (2, 5, D)),
    "bmm with itself": (_bmm, (2, D, D)),
    "einsum with itself": (_einsum, (2, D, D)),
    "baddbmm of itself": (_baddbmm, (2, D, D)),
    "random scale": (lambda m, x: torch.tanh(m.linear(x) * torch.rand_like(m.gain) + m.shift), (4, D)),
    "random weight": (lambda m, x: torch.tanh(F.linear(x, m.query * torch.bernoulli(torch.sigmoid(m.key)))), (4, D)),
    "a copy before a view": (_clone_left_out, (3, D, 5)),
    "a number scales a grouped transposed convolution": (
        lambda m, x: torch.tanh(m.transposed(x) * 0.5 + m.gain[:, None]),
        (2, D, 5),
    ),
    "a bias of one entry": (lambda m, x: torch.tanh(F.linear(m.norm(torch.tanh(x)), m.query, m.single)), (4, D)),
    "no batch before a padding convolution": (
        lambda m, x: m.conv(torch.tanh(x) * m.gain[:, None, None] + m.shift[:, None, None] + 1),
        (D, 4, 4),
    ),
    "two weights of one module": (_two_weights_of_one_module, (4, D)),
    "an expanded gain": (
        lambda m, x: torch.tanh(m.transposed(x) * m.gain[:, None].expand(D, 7) + m.shift[None, :, None].expand(1, D, 7)),
        (2, D, 5),
    ),
    "t of a vector": (lambda m, x: torch.tanh(m.gain * x.t()), (D,)),
    "transpose of a scalar": (lambda m, x: m.norm(x) * x.mean().transpose(0, -1), (4, D)),
    "weights of one joined weight": (
        lambda m, x: m.bare(F.linear(torch.cat([m.layer_norm(x), x], -1), torch.cat([m.query, m.key], 1))),
        (4, D),
    ),
}


def _outputs(program: Program, x: Tensor) -> list[Tensor]:
    module = program.module()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        out = module(x)
    return list(out) if isinstance(out, tuple) else [out]


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_fold_computes_the_same(case: str) -> None:
    run, sizes = CASES[case]
    torch.manual_seed(0)
    model = spread(Parts(run)).double().eval()
    x = noise(*sizes).double()
    program = Program.trace(model, (x,))
    chosen = plan(program, PASSES)
    rewritten = chosen.apply(program)
    for expected, given in zip(_outputs(program, x), _outputs(rewritten, x), strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-10)
    baked = rewritten.baked()
    assert all(baked.tensor(name).shape == program.tensor(name).shape for name in program.tensor_names())
    assert Plan.from_json(chosen.to_json()) == chosen
    assert plan(rewritten, PASSES).rounds == ()


def test_a_view_to_a_dynamic_size_is_kept() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(D)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.norm(torch.tanh(x).reshape(x.shape[0] * x.shape[1], D, 1)))

    sizes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    torch.manual_seed(0)
    program = Program.trace(spread(Model()).double().eval(), (noise(3, 5, D).double(),), dynamic_shapes=sizes)
    chosen = plan(program, ["conv_bn"])
    assert chosen.rounds
    again = Plan.from_json(chosen.to_json())
    assert again == chosen
    other = noise(2, 7, D).double()
    torch.testing.assert_close(again.apply(program).module()(other), program.module()(other), rtol=1e-10, atol=1e-10)


class Autocast(nn.Module):
    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run
        self.conv, self.norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
        self.bare, self.head, self.layer_norm = nn.Linear(6, 6, bias=False), nn.Linear(6, 3), nn.LayerNorm(6)
        self.masked, self.mask = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.rand(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.run(self, x)


AUTOCAST: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "into the writer": lambda m, x: torch.relu(m.norm(m.conv(x))),
    "left behind a relu": lambda m, x: torch.relu(m.norm(torch.relu(m.conv(x)))),
    "into a reader with a bias": lambda m, x: m.head(m.norm(torch.relu(m.conv(x))).mean((2, 3))),
    "into a reader without one": lambda m, x: m.bare(m.norm(torch.relu(m.conv(x))).mean((2, 3))),
    "gain and shift of a layer norm": lambda m, x: m.bare(m.layer_norm(torch.relu(m.conv(x)).mean((2, 3)))),
    "a computed weight": lambda m, x: F.linear(torch.relu(m.conv(x)).mean((2, 3)), m.masked * m.mask),
}


@pytest.mark.parametrize("case", AUTOCAST)
def test_autocast_keeps_its_dtypes(case: str) -> None:
    torch.manual_seed(0)
    x = noise(2, 4, 6, 6)
    program = Program.trace(spread(Autocast(AUTOCAST[case])).eval(), (x,))
    chosen = plan(program, PASSES)
    assert chosen.rounds
    with torch.no_grad():
        before, after = program.module()(x), chosen.apply(program).module()(x)
    assert after.dtype == before.dtype
    # casts to bfloat16 stay in the graph, so the two round differently: 2⁻⁸ per step, a handful of steps
    torch.testing.assert_close(after, before, rtol=0, atol=2**-5 * float(before.abs().max()))


def test_an_input_may_be_called_bias() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.weight = nn.BatchNorm1d(D), nn.Parameter(torch.randn(D, D))

        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            return torch.tanh(F.linear(self.norm(torch.tanh(x)), self.weight) + bias)

    torch.manual_seed(0)
    program = Program.trace(spread(Model()).double().eval(), (noise(4, D).double(), noise(4, D).double()))
    chosen = plan(program, ["conv_bn"])
    given = (noise(3 + 1, D).double(), 2 * noise(4, D).double())
    torch.testing.assert_close(chosen.apply(program).module()(*given), program.module()(*given), rtol=1e-10, atol=1e-10)


def test_statistics_that_the_program_updates_are_told_apart() -> None:
    class Model(nn.Module):
        mean: Tensor
        variance: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, D)
            self.register_buffer("mean", torch.zeros(D))
            self.register_buffer("variance", torch.ones(D))

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            z = F.batch_norm(y, self.mean, self.variance)
            self.mean.mul_(0.9).add_(0.1 * y.mean(0))
            return torch.tanh(z)

    (refusal,) = plan(Program.trace(Model().eval(), (noise(4, D),)), ["conv_bn"]).refusals
    assert refusal.reason == "the program updates its statistics"


def test_a_long_stream_is_walked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every norm of a post-norm stream would walk the rest of it again, for rewrites that all wait for the first."""
    walks: list[Any] = []

    def counted(facts: Facts, form: Affine, value: Node, others: dict[Node, Affine]) -> Absorbed | Obstacle:
        walks.append(value)
        return into_readers(facts, form, value, others)

    monkeypatch.setattr("normfuse.transforms.constant_norms.into_readers", counted)

    class Unified(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.up, self.down = nn.Parameter(1 + 0.1 * torch.randn(D)), nn.Linear(D, D), nn.Linear(D, D)
            self.register_buffer("moment", torch.rand(D) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.down(torch.relu(self.up(x)))) * torch.rsqrt(self.get_buffer("moment") + 1e-5) * self.gain

    torch.manual_seed(0)
    model = nn.Sequential(*(Unified() for _ in range(6)), nn.Linear(D, 3)).double().eval()
    chosen = plan(Program.trace(model, (noise(2, D).double(),)), ["unified_norm"])
    assert [len(each) for each in chosen.rounds] == [1]
    assert len(walks) <= 2
