"""Operators that jump, and operators without a float64 kernel: one run takes them as another run did.

Rounding to a grid, a comparison or the place of a maximum jumps: two programs that are one function arrive at a tie from two
sides, and differ by a whole step. An operator that runs in its own dtype jumps likewise, by a rounding of that dtype. Measured
as noise, such steps would excuse anything; ignored, they would be false alarms. So the run that is the truth writes down what
these operators read and gave. A run that reads the same there, up to the noise that is measured in front of the operator, goes
on with what the truth gave; where it reads anything else, with its own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from normfuse.graph.nodes import operator_name
from normfuse.graph.ops.rounding import has_steps
from normfuse.graph.program import Program
from normfuse.graph.views import dtype
from normfuse.proof.evidence import MARGIN

STEP_FLOOR = 2.0**-50
"""Four roundings of a float64: a single operand of a step, where `normfuse.proof.agreement` has whole sums in mind."""
MASK = 1e6
"""What is so many times as large as the usual entry is a mask, and says nothing of the noise of the others."""

NthCall = tuple[str, int]


class Steps:
    """What the jumping operators of a program did on one set of inputs.

    Attributes:
        own: the operators that ran in their own dtype, by name.
    """

    def __init__(self) -> None:
        self.own: Counter[str] = Counter()
        self._read: dict[NthCall, list[Any]] = {}
        self._gave: dict[NthCall, Any] = {}
        self._noise: dict[NthCall, list[float]] = {}

    def written(self) -> _Run:
        """For the run that is the truth."""
        return _Run(self, self._write)

    def measured(self) -> _Run:
        """For the same program, nudged: what it reads tells the noise, and it goes on with what the truth gave."""
        return _Run(self, self._measure)

    def followed(self) -> _Run:
        """For another program."""
        return _Run(self, self._follow)

    def _write(self, key: NthCall, node: Node, read: list[Any], value: Any) -> Any:
        self._read[key], self._gave[key] = read, value
        return value

    def _measure(self, key: NthCall, node: Node, read: list[Any], value: Any) -> Any:
        if not self._comparable(key, read, value):
            return value
        noise = [_noise(a, b) for a, b in zip(self._read[key], read, strict=True)]
        self._noise[key] = [max(pair) for pair in zip(noise, self._noise.get(key, noise), strict=True)]
        return self._gave[key]

    def _follow(self, key: NthCall, node: Node, read: list[Any], value: Any) -> Any:
        if key not in self._noise or not self._comparable(key, read, value):
            return value
        near = [_near(a, b, noise) for a, b, noise in zip(self._read[key], read, self._noise[key], strict=True)]
        gave = self._gave[key]
        if all(bool(each.all()) for each in near):
            return gave
        if isinstance(value, Tensor) and not value.is_quantized and all(each.shape in (value.shape, ()) for each in near):
            return torch.where(torch.stack([each.expand(value.shape) for each in near]).all(0), gave, value)
        return value

    def _comparable(self, key: NthCall, read: list[Any], value: Any) -> bool:
        """Whether the truth made the same call, of values of the same form."""
        return key in self._read and _form(self._read[key]) == _form(read) and _form(self._gave[key]) == _form(value)


class _Run:
    """One run; see `normfuse.graph.interpreter.Beside`."""

    def __init__(self, steps: Steps, take: Any) -> None:
        self.steps, self.take = steps, take
        self.times: Counter[str] = Counter()

    def __call__(self, node: Node, operands: Sequence[Any], value: Any, own: bool) -> Any:
        if own:
            self.steps.own[operator_name(node)] += 1
        if not own and not jumps(node):
            return value
        self.times[node.name] += 1  # a body runs its calls more than once
        return self.take((node.name, self.times[node.name]), node, [x for x in operands if isinstance(x, Tensor)], value)


def notes_of_own_dtype(operators: Iterable[str]) -> list[str]:
    """What the reader of the evidence should know of operators that ran in their own dtype."""
    names = ", ".join(sorted(operators))
    return [f"without a float64 kernel, run in their own dtype, so compared to its rounding: {names}"] if names else []


def jumps(node: Node) -> bool:
    """Whether the result of a call is no continuous function of the floats that it reads."""
    reads_floats = any(gives_floats(each) for each in node.all_input_nodes)
    if not reads_floats or not isinstance(node.target, torch._ops.OpOverload):
        return False
    kept = dtype(node)
    if kept is not None and not kept.is_floating_point and not kept.is_complex:
        return True
    return has_steps(node)


def jumping(program: Program) -> bool:
    """Whether a program has such a call."""
    return any(jumps(node) for node in program.graph.nodes)


def gives_floats(node: Node) -> bool:
    """Whether a node yields a tensor of floats."""
    kind = dtype(node)
    return kind is not None and kind.is_floating_point


def _form(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_form(each) for each in value]
    return (value.shape, value.dtype) if isinstance(value, Tensor) else None


def _noise(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors of one form, and no less than rounding makes; entries as large as masks apart."""
    if not a.is_floating_point() or a.numel() == 0:
        return 0.0
    usual = a.abs().nanmedian().item()
    plain = torch.isfinite(a) & torch.isfinite(b) & (a.abs() <= MASK * usual)
    return max(((a - b)[plain].abs().max().item() if plain.any() else 0.0), STEP_FLOOR * usual if math.isfinite(usual) else 0.0)


def _near(a: Tensor, b: Tensor, noise: float) -> Tensor:
    """Where two tensors of one form are one, up to noise."""
    if not a.is_floating_point():
        return a == b
    return (a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= MARGIN * (noise + STEP_FLOOR * a.abs()))
