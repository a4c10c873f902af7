"""Whether two outputs agree: each entry's difference is judged by the noise of entries like it, not by the largest one.

What a difference may be is told by samples: the outputs of the same model after changes of the size of its roundings. One
sample of one entry can be small by luck, so samples are pooled over a neighbourhood: entries of about one magnitude. A mask's
fill of any size is a neighbourhood of its own, however many entries it takes and wherever they are, and so is a box beside a
score. How often the noise a difference may be follows from how many samples there are (Student's t: a lone entry is judged
leniently) and of how many entries the largest is looked at; beside the largest entry the root of the mean square is judged,
which luck moves little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

SPREAD = 3.0
"""An honest difference may be so many times the noise: centring changes a weight by a few roundings, not by one."""

CHANCE = 1e-4
"""Of a false alarm in one output, if differences were as the samples are."""

OCTAVES = 3
"""Entries within a factor of 2 to this power are one neighbourhood."""

SPARSE = 64
"""A neighbourhood of fewer samples takes in the next smaller and the next larger one."""

LARGEST = 10.0
"""Of very few samples, Student's t would explain anything."""


HUGE = 1e100
"""The square of much more is none in float64, so that larger outputs are judged in a unit of their own."""


@dataclass(frozen=True)
class Judged:
    """One output.

    Attributes:
        error: the difference that is worst for what is allowed there, relative to the size of the entries around it.
        allowed: what noise explains there, likewise.
        noise: the noise itself.
    """

    error: float
    allowed: float
    noise: float = 0.0

    @property
    def agrees(self) -> bool:
        """Whether noise explains all differences."""
        return self.error <= self.allowed

    @property
    def excess(self) -> float:
        """How many times what is allowed the worst difference is."""
        return self.error / self.allowed if self.allowed else (math.inf if self.error else 0.0)


VANISHING = 1e-150
"""The square of what is smaller is nothing in float64, so nothing can be measured of it: the tail of a sharp softmax."""


def judged(truth: Tensor, other: Tensor, samples: Sequence[Tensor], floor: float) -> Judged:
    """Judge one output.

    Args:
        truth: of any shape and dtype; integers must be equal, NaN and infinity in the same places.
        other: what is judged.
        samples: outputs of the first model under noise.
        floor: the least relative difference that is explained whatever the samples say.
    """
    if truth.shape != other.shape:
        return Judged(math.inf, floor)
    if not truth.is_floating_point() and not truth.is_complex():
        return Judged(0.0 if torch.equal(truth, other.to(truth.dtype)) else math.inf, floor)
    true, got = _parts(truth), _parts(other)
    finite = torch.isfinite(true)
    if not torch.equal(finite, torch.isfinite(got)) or not torch.equal(_signs(true, finite), _signs(got, finite)):
        return Judged(math.inf, floor)
    size, error = true[finite].abs(), (got - true)[finite].abs()
    if not size.numel():
        return Judged(0.0, floor)
    unit = 2.0 ** float(size.max().log2().floor()) if float(size.max()) > HUGE else 1.0
    off = [(_parts(each)[finite] - true[finite]).nan_to_num(0.0, 0.0, 0.0) for each in samples if each.shape == truth.shape]
    squares = sum(((each / unit).square() for each in off), torch.zeros_like(size)) / max(len(off), 1)
    return _worst(size / unit, error / unit, squares, max(len(off), 1), floor)


def _parts(value: Tensor) -> Tensor:
    """Its entries in float64; those of a complex tensor as pairs."""
    return torch.view_as_real(value.to(torch.complex128)) if value.is_complex() else value.to(torch.float64)


def _signs(value: Tensor, finite: Tensor) -> Tensor:
    return torch.where(finite, 0.0, value).nan_to_num(nan=2.0, posinf=1.0, neginf=-1.0)


def _worst(size: Tensor, error: Tensor, squares: Tensor, draws: int, floor: float) -> Judged:
    """The worst of the largest difference and of the root of the mean square in each neighbourhood."""
    place, octave = _neighbourhoods(size)
    moves = (squares > 0.0).to(size)
    samples = draws * _summed(moves, place, octave)
    near = (octave[:, None] - octave[None, :]).abs()
    around = ((near == 0.0) | ((near <= 1.0) & (samples < SPARSE)[:, None])).to(size)
    taken = around @ samples
    noise = (draws * (around @ _summed(squares, place, octave)) / taken.clamp_min(1.0)).sqrt()
    count = _summed(torch.ones_like(size), place, octave)
    scale = (_summed(size.square(), place, octave) / count).sqrt()
    least = floor * scale
    own = torch.maximum(squares.sqrt(), noise[place])
    multiples = torch.tensor([_multiple(int(each), size.numel()) for each in taken.tolist()], dtype=size.dtype).to(size)
    steady = torch.tensor([_multiple(int(each), 1) / _multiple(10**6, 1) for each in taken.tolist()], dtype=size.dtype)
    moving = (samples / draws).clamp_min(1.0)
    luck = 1.0 - NormalDist().inv_cdf(CHANCE) / (2.0 * moving).sqrt()  # how far the root of so few squares may be off
    root = (_summed(error.square() * moves, place, octave) * draws / samples.clamp_min(1.0)).sqrt()
    return max(
        _at_worst(error, SPREAD * multiples[place] * own + least[place], own, scale[place]),
        _at_worst(root, SPREAD * luck * steady.to(size) * noise + least, noise, scale),
        key=lambda each: each.excess,
    )


def _at_worst(error: Tensor, allowed: Tensor, noise: Tensor, scale: Tensor) -> Judged:
    allowed = allowed + VANISHING
    at = int(torch.where(error > 0.0, error / allowed, 0.0).argmax())
    size = float(scale[at]) or 1.0
    return Judged(float(error[at]) / size, float(allowed[at]) / size, float(noise[at]) / size)


def _neighbourhoods(size: Tensor) -> tuple[Tensor, Tensor]:
    """For each entry the number of its neighbourhood, and the order of magnitude of each."""
    octave = torch.where(size > 0.0, torch.floor(torch.log2(size) / OCTAVES), torch.inf)
    smallest = octave[octave.isfinite()].min() if bool(octave.isfinite().any()) else octave.new_zeros(())
    known, place = torch.unique(torch.where(octave.isfinite(), octave, smallest), return_inverse=True)
    return place, known


def _summed(value: Tensor, place: Tensor, octave: Tensor) -> Tensor:
    return torch.zeros(len(octave), dtype=value.dtype, device=value.device).index_add(0, place, value)


@cache
def _multiple(samples: int, entries: int) -> float:
    """How many times the measured noise the largest of so many entries is, but for once in 1 / `CHANCE`.

    The quantile of Student's t, after Wallace (1959): exact within a few per cent.
    """
    normal = -NormalDist().inv_cdf(CHANCE / (2 * entries))
    freedom = max(samples, 1)
    exponent = (normal * (8 * freedom + 3) / (8 * freedom + 1)) ** 2 / freedom
    return min(LARGEST, math.sqrt(freedom * math.expm1(min(exponent, 100.0))))
