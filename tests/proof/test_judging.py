"""How two outputs are judged: nothing hides behind a mask or an outlier, and honest noise is no alarm."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import normfuse
from normfuse.graph.interpreter import run
from normfuse.proof.judging import judged
from tests.batch_norms import FOLDS
from tests.models import noise
from tests.zoo.spread import spread

FLOOR = 2.0**-46
FILLS = st.one_of(
    st.floats(-1e30, 1e30, allow_subnormal=False),
    st.sampled_from(
        [0.0, 1.0, -5.0, -100.0, -1e4, -65504.0, -1e9, -1e12, -1e18, -1e20, -1e30, -3.4e38, 1e300, -torch.inf, torch.inf]
    ),
)


@st.composite
def layouts(draw: st.DrawFn) -> Tensor:
    """Masks of every share, but never of all entries: scattered, whole rows or columns, blocks, or triangles."""
    rows, columns = draw(st.integers(2, 24)), draw(st.integers(2, 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    how = draw(st.sampled_from(["scattered", "rows", "columns", "block", "triangle", "all but one", "one"]))
    share = draw(st.floats(0.0, 1.0))
    if how == "scattered":
        mask = torch.rand(rows, columns, generator=generator) < share
    elif how == "rows":
        mask[: int(share * rows)] = True
    elif how == "columns":
        mask[:, : int(share * columns)] = True
    elif how == "block":
        mask[: int(share * rows), : int(share * columns)] = True
    elif how == "triangle":
        mask = torch.ones(rows, columns, dtype=torch.bool).triu(1)
    else:
        mask[...] = how == "all but one"
        mask[0, 0] = how == "one"
    mask[-1, -1] = False
    return mask


def drawn(truth: Tensor, size: float, seeds: range, moves: Tensor) -> list[Tensor]:
    """Samples of noise of one absolute size where the entries move at all."""
    made = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        made.append(truth + torch.where(moves, size * torch.randn(truth.shape, generator=generator, dtype=torch.float64), 0.0))
    return made


@settings(max_examples=150, deadline=None)
@given(layouts(), FILLS, st.sampled_from([1e-13, 1e-7, 1e-4]), st.booleans(), st.integers(0, 2**31))
@example(torch.arange(35).reshape(5, 7) < 21, 1.0, 1e-13, True, 6)  # a lone entry of less than 1 among quieter ones
def test_no_mask_hides_another_difference(mask: Tensor, fill: float, size: float, added: bool, seed: int) -> None:
    values = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 3.0
    masked = (
        values + torch.where(mask, torch.tensor(fill, dtype=torch.float64), 0.0) if added else values.masked_fill(mask, fill)
    )
    samples = drawn(masked, size, range(2), ~mask)
    if added and abs(fill) < 1e300:  # arithmetic with a mask's number is rough
        samples = [
            each + torch.where(mask, torch.tensor(1e-15 * fill * (place + 1), dtype=torch.float64), 0.0)
            for place, each in enumerate(samples)
        ]
    (honest,) = drawn(masked, size, range(7, 8), ~mask)
    assert judged(masked, honest, samples, FLOOR).agrees
    wrong = masked.clone()
    wrong[-1, -1] += 500 * size
    assert not judged(masked, wrong, samples, FLOOR).agrees
    all_wrong = torch.where(mask, masked, masked + 100 * size * torch.sign(values))
    assert not judged(masked, all_wrong, samples, FLOOR).agrees


def test_a_difference_behind_a_mask_counts_as_well() -> None:
    truth = torch.tensor([[-1e9, 1.0, 2.0, -1e9]], dtype=torch.float64)
    wrong = torch.tensor([[-1e9, 1.0, 2.0, -1.1e9]], dtype=torch.float64)
    assert not judged(truth, wrong, drawn(truth, 1e-15, range(2), truth > 0), FLOOR).agrees


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.0, 6.0), st.integers(1, 400), st.integers(1, 64))
def test_honest_noise_of_any_size_by_channel_is_no_alarm(seed: int, decades: float, rows: int, channels: int) -> None:
    """Values of a small channel may carry the noise of a large one, through a layer that they share."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scale = 10.0 ** (decades * torch.rand(channels, generator=generator, dtype=torch.float64))
    truth = normal(rows, channels) * scale
    rough = scale * 10.0 ** (
        3 * torch.rand(channels, generator=generator, dtype=torch.float64)
    )  # of each channel, its own noise
    honest, *samples = (truth + 1e-15 * rough * normal(rows, channels) for _ in range(6))
    got = truth + (honest - truth) / 3
    # as in a proof: two samples, and three more where those do not explain it, because a lone loud entry's may be small by luck
    assert any(judged(truth, got, some, FLOOR).agrees for some in (samples[:2], samples[2:]))


class Detector(nn.Module):
    """Boxes in pixels beside scores, in one output; masked scores, and log-probabilities."""

    def __init__(self, fill: float = -1e12) -> None:
        super().__init__()
        self.up, self.norm, self.boxes, self.scores = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 4), nn.Linear(16, 5)
        self.fill = fill

    def forward(self, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.norm(self.up(x)))
        scores = self.scores(y).masked_fill(~keep.unsqueeze(-1), self.fill)
        return torch.cat([640 * self.boxes(y), torch.sigmoid(self.scores(y))], -1), torch.log_softmax(scores, -1) + scores


@pytest.mark.parametrize("fill", [-1e4, -1e9, -1e12, -1e20, -1e30, torch.finfo(torch.float32).min, -65504.0])
@pytest.mark.parametrize("part", ["scores.bias", "scores.weight", "boxes.weight", "up.weight"])
def test_a_detector_is_judged_in_every_part(fill: float, part: str) -> None:
    right: nn.Module = spread(Detector(fill)).eval()
    x, keep = noise(3, 8, 6), torch.arange(8).remainder(4).lt(3).expand(3, 8)
    assert normfuse.verify(right, copy.deepcopy(right), (x, keep)).ok
    wrong = copy.deepcopy(right)
    with torch.no_grad():
        wrong.get_parameter(part)[0] *= 1.01
    assert not normfuse.verify(right, wrong, (x, keep)).ok


def test_an_outlier_logit_hides_nothing() -> None:
    right = nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), nn.Linear(32, 50)).eval()
    with torch.no_grad():
        right[2].bias[7] = 1e6  # type: ignore[index, operator]
    wrong = copy.deepcopy(right)
    with torch.no_grad():
        wrong[2].weight[3] *= 1.002  # type: ignore[index, operator]
    assert normfuse.verify(right, copy.deepcopy(right), (noise(4, 6),)).ok
    assert not normfuse.verify(right, wrong, (noise(4, 6),)).ok


def test_a_mask_that_is_computed_with_is_not_moved() -> None:
    """Whole numbers of an input are no noise: a mask of ones is compared with one."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(6, 5)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return torch.where(mask == 1.0, self.line(x), 0.0)

    right, mask = Gated().eval(), torch.ones(4, 5)
    wrong = copy.deepcopy(right)
    with torch.no_grad():
        wrong.line.weight[0] *= 1.001
    program = normfuse.Program.trace(right, (noise(4, 6), mask))
    assert run(program, [noise(4, 6), mask])[0].abs().min() > 0
    assert not normfuse.verify(right, wrong, (noise(4, 6), mask)).ok


def test_a_way_of_more_steps_is_no_other_function() -> None:
    """A norm in front of a convolution rounds more often than the convolution with the norm folded in."""
    fold = FOLDS["before a conv"]
    folded = normfuse.rewrite(fold.module(), "all", inputs=fold.inputs).module()
    for a, b in ((fold.module(), folded), (folded, fold.module())):
        assert normfuse.verify(a, b, fold.inputs).ok


class Squares(nn.Module):
    """Overflows in float16 where an input is large."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).pow(4)


def test_what_overflows_in_the_reference_is_no_difference_and_what_overflows_in_the_other_alone_is() -> None:
    half, x = spread(Squares()).eval().half(), noise(2, 4).half()
    assert normfuse.verify(half, copy.deepcopy(half), (x,)).ok
    wider = normfuse.verify(copy.deepcopy(half).float(), half, (x.float() + 100.0,))
    assert wider.verdict == "disproven"
    other = copy.deepcopy(half)
    with torch.no_grad():
        other.layer.weight.mul_(1.5)
    assert normfuse.verify(half, other, (x,)).verdict == "disproven"
    assert normfuse.verify(half, copy.deepcopy(half), (x + 100.0,)).verdict == "not compared"
