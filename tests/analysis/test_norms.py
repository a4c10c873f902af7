"""Norms written by hand: the usual spellings are found with the right kind, eps and axis; what only looks alike is not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Node

from normfuse.analysis.norms import norms_of
from normfuse.graph.ops.lookup import rank
from normfuse.graph.program import Program
from normfuse.graph.views import Norm, aten

D = 8
EPS = (1e-12, 1e-5, 1e-3, 0.0)
Spelling = Callable[[Any, Tensor, float], Any]


class Net(nn.Module):
    """Many forwards side by side, each on an input of its own: tracing them together costs as much as one."""

    def __init__(self, forwards: list[Callable[[Any, Tensor], Any]]) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D))
        self._forwards = forwards

    def forward(self, *xs: Tensor) -> Any:
        return [forward(self, x) for forward, x in zip(self._forwards, xs, strict=True)]


def found(forwards: list[Callable[[Any, Tensor], Any]], inputs: list[Tensor], dynamic: Any = None) -> list[list[Norm]]:
    """The norms that are found behind each input."""
    shapes = None if dynamic is None else (tuple(dynamic),)
    program = Program.trace(Net(forwards), tuple(inputs), dynamic_shapes=shapes)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder" and node.name not in program.stored]
    norms = norms_of(program)
    return [[norm for norm in norms if node in behind(norm.x)] for node in placeholders]


def behind(node: Node) -> set[Node]:
    known, frontier = {node}, [node]
    while frontier:
        fresh = [operand for operand in frontier.pop().all_input_nodes if operand not in known]
        known.update(fresh)
        frontier.extend(fresh)
    return known


def mean(x: Tensor, axis: int = -1) -> Tensor:
    return x.mean(axis, keepdim=True)


def centred(x: Tensor, axis: int = -1) -> Tensor:
    return x - mean(x, axis)


def variance(x: Tensor, axis: int = -1) -> Tensor:
    return mean(centred(x, axis).pow(2), axis)


# -- the usual spellings -----------------------------------------------------------------------------------------------


def _one_centred(m: Any, x: Tensor, eps: float) -> Tensor:
    c = x - x.mean(dim=-1, keepdim=True)
    return m.gain * (c * torch.rsqrt((c * c).mean(dim=-1, keepdim=True) + eps)) + m.shift


def _moments(m: Any, x: Tensor, eps: float) -> Tensor:
    first, second = mean(x), mean(x * x)
    return (x - first) / (second - first.square() + eps).sqrt()


def _var_mean(m: Any, x: Tensor, eps: float) -> Tensor:
    var, first = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    return (x - first) * torch.rsqrt(var + eps)


def _var_mean_unbiased(m: Any, x: Tensor, eps: float) -> Tensor:
    var, first = torch.var_mean(x, dim=-1, unbiased=False, keepdim=True)
    return (x - first) * torch.rsqrt(var + eps)


def _wide(m: Any, x: Tensor, eps: float) -> Tensor:
    wide = x.half().float()
    return (m.gain * (centred(wide) * torch.rsqrt(variance(wide) + eps)).half()).float()


def _convnext(m: Any, x: Tensor, eps: float) -> Tensor:
    x = x.unsqueeze(-1)
    u = x.mean(1, keepdim=True)
    s = (x - u).pow(2).mean(1, keepdim=True)
    x = (x - u) / torch.sqrt(s + eps)
    return m.gain[:, None, None] * x + m.shift[:, None, None]


LAYER_NORM: dict[str, Spelling] = {
    "var unbiased=False, sqrt": lambda m, x, eps: centred(x) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + eps),
    "var correction=0, rsqrt": lambda m, x, eps: centred(x) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + eps),
    "squares of the centred": lambda m, x, eps: centred(x) / (variance(x) + eps).sqrt(),
    "one centred value, affine": _one_centred,
    "difference of moments": _moments,
    "pow(-0.5)": lambda m, x, eps: centred(x) * (variance(x) + eps).pow(-0.5),
    "pow(0.5)": lambda m, x, eps: centred(x) / (variance(x) + eps) ** 0.5,
    "reciprocal": lambda m, x, eps: centred(x) * torch.sqrt(variance(x) + eps).reciprocal(),
    "one over the root": lambda m, x, eps: (1 / torch.sqrt(variance(x) + eps)) * centred(x),
    "sum by d": lambda m, x, eps: (
        centred(x) / torch.sqrt((x - x.sum(-1, keepdim=True) / D).square().sum(-1, keepdim=True) / D + eps)
    ),
    "sum times one by d": lambda m, x, eps: (
        (x - x.sum(-1, keepdim=True) * (1 / D)) * (centred(x).square().sum((-1,), keepdim=True) * (1 / D) + eps).rsqrt()
    ),
    "sum by the size": lambda m, x, eps: (
        (x - x.sum(-1, keepdim=True) / x.shape[-1]) * (centred(x).square().sum(-1, keepdim=True) / x.size(-1) + eps).rsqrt()
    ),
    "var_mean correction=0": _var_mean,
    "var_mean unbiased=False": _var_mean_unbiased,
    "positive axis": lambda m, x, eps: centred(x, 2) * torch.rsqrt(variance(x, 2) + eps),
    "eps first": lambda m, x, eps: centred(x) * torch.rsqrt(eps + variance(x)),
    "casts around": _wide,
    "gain plus one": lambda m, x, eps: (1 + m.gain) * (centred(x) * torch.rsqrt(variance(x) + eps)),
    "in a residual": lambda m, x, eps: x + m.gain * (centred(x) * torch.rsqrt(variance(x) + eps)),
    "channels first": _convnext,
    "gain before the root": lambda m, x, eps: m.gain * centred(x) / torch.sqrt(variance(x) + eps) + m.shift,
    "gain before the rsqrt": lambda m, x, eps: m.gain * centred(x) * torch.rsqrt(variance(x) + eps),
    "gain on the rsqrt": lambda m, x, eps: m.gain * torch.rsqrt(variance(x) + eps) * centred(x),
    "gain plus one before the root": lambda m, x, eps: (1 + m.gain) * centred(x) / torch.sqrt(variance(x) + eps),
    "two products": lambda m, x, eps: x * torch.rsqrt(variance(x) + eps) - mean(x) * torch.rsqrt(variance(x) + eps),
    "middle axis": lambda m, x, eps: centred(x, 1) / torch.sqrt(x.var(1, unbiased=False, keepdim=True) + eps),
    "first axis": lambda m, x, eps: centred(x, 0) / torch.sqrt(x.var(0, unbiased=False, keepdim=True) + eps),
}
RMS_NORM: dict[str, Spelling] = {
    "rsqrt": lambda m, x, eps: x * torch.rsqrt(mean(x.pow(2)) + eps),
    "rsqrt, affine": lambda m, x, eps: m.gain * (x * torch.rsqrt(mean(x * x) + eps)),
    "sqrt": lambda m, x, eps: x / torch.sqrt(mean(x.square()) + eps),
    "pow(-0.5)": lambda m, x, eps: x * (mean(x**2) + eps) ** -0.5,
    "one over the root": lambda m, x, eps: x * (1 / (mean(x**2) + eps).sqrt()),
    "sum by d": lambda m, x, eps: x * ((x * x).sum(-1, keepdim=True) / D + eps).rsqrt(),
    "gain plus one": lambda m, x, eps: x * torch.rsqrt(mean(x.pow(2)) + eps) * (1.0 + m.gain),
    "casts around": lambda m, x, eps: m.gain * (w := x.double(), w / (mean(w.pow(2)) + eps).sqrt())[1].float(),
    "cast back like its input": lambda m, x, eps: m.gain * (w := x.double(), w * (mean(w * w) + eps).rsqrt())[1].type_as(x),
    "channels first": lambda m, x, eps: x * torch.rsqrt(mean(x.pow(2), 1) + eps) * m.gain[:, None],
}
AXES = {"channels first": 1, "middle axis": 1, "first axis": 0}
KINDS = [("layer_norm", *each) for each in LAYER_NORM.items()] + [("rms_norm", *each) for each in RMS_NORM.items()]
# every spelling with two eps in static shapes, with a third in dynamic ones
STATIC = [(*each, EPS[(place + turn) % 4]) for place, each in enumerate(KINDS) for turn in (0, 1)]
DYNAMIC = [(*each, EPS[(place + 2) % 4]) for place, each in enumerate(KINDS)]


def sized(name: str) -> tuple[int, ...]:
    """Three sizes of which the normalized one is D."""
    sizes = [3, 5]
    sizes.insert(AXES.get(name, 2), D)
    return tuple(sizes)


def spelled(spelling: Spelling, eps: float) -> Callable[[Any, Tensor], Any]:
    return lambda m, x: spelling(m, x, eps)


@cache
def _all(dynamic: bool) -> list[list[Norm]]:
    chosen = DYNAMIC if dynamic else STATIC
    inputs = [torch.randn(sized(name)) for _, name, _, _ in chosen]
    free = [{axis: Dim.AUTO for axis in range(3) if axis != AXES.get(name, 2)} for _, name, _, _ in chosen]
    return found([spelled(spelling, eps) for _, _, spelling, eps in chosen], inputs, free if dynamic else None)


def _check(norms: list[Norm], kind: str, name: str, eps: float) -> None:
    (norm,) = norms
    assert (norm.kind, norm.axes, norm.eps) == (kind, (AXES.get(name, 2),), eps)
    assert norm.by_hand
    inside = name.startswith(("gain before", "gain on", "gain plus one before"))
    assert norm.shift is None  # it stays outside, and so does a gain behind the norm
    assert (norm.gain is not None) == inside
    assert {norm.out} == {node for node in norm.inner if any(user not in norm.inner for user in node.users)}
    assert norm.x not in norm.inner
    assert rank(norm.x) == rank(norm.out)


@pytest.mark.parametrize("place", range(len(STATIC)), ids=[f"{kind}, {name}, eps {eps}" for kind, name, _, eps in STATIC])
def test_a_usual_spelling_is_found(place: int) -> None:
    kind, name, _, eps = STATIC[place]
    _check(_all(False)[place], kind, name, eps)


@pytest.mark.parametrize("place", range(len(DYNAMIC)), ids=[f"{kind}, {name}, eps {eps}" for kind, name, _, eps in DYNAMIC])
def test_a_usual_spelling_is_found_in_dynamic_shapes(place: int) -> None:
    kind, name, _, eps = DYNAMIC[place]
    _check(_all(True)[place], kind, name, eps)


def test_the_norm_is_of_the_value_before_centring() -> None:
    ((norm,),) = found([lambda m, x: _one_centred(m, x.relu(), 1e-5)], [torch.randn(3, 5, D)])
    assert norm.x.target is aten.relu.default


def test_bounded_values_are_normalized_as_they_are() -> None:
    def rms(m: Any, x: Tensor) -> Tensor:
        x = x.clamp(-1e4, 1e4)
        return x * torch.rsqrt(mean(x * x) + 1e-5)

    for (norm,) in found([rms, lambda m, x: _moments(m, x.clamp(-1e4, 1e4), 1e-5)], [torch.randn(3, 5, D) for _ in range(2)]):
        assert norm.x.target is aten.clamp.default


def test_norms_come_in_order_and_none_twice() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = x + F.layer_norm(_moments(m, x, 1e-5), (D,))
        return F.rms_norm(_one_centred(m, x, 1e-3), (D,))

    (norms,) = found([forward], [torch.randn(3, 5, D)])
    assert [norm.kind for norm in norms] == ["layer_norm", "layer_norm", "layer_norm", "rms_norm"]
    assert [norm.by_hand for norm in norms] == [True, False, True, False]


def test_a_decomposed_norm_is_not_by_hand() -> None:
    program = Program.trace(Net([lambda m, x: torch.native_layer_norm(x, (D,), None, None, 1e-5)[0]]), (torch.randn(3, D),))
    (norm,) = norms_of(program)
    assert (norm.kind, norm.eps, norm.by_hand) == ("layer_norm", 1e-5, False)


# -- what only looks alike ---------------------------------------------------------------------------------------------


def _mean_told(m: Any, x: Tensor) -> Any:
    first = mean(x)
    return (x - first) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt(), first


def _instance(m: Any, x: Tensor) -> Tensor:
    x = x.unsqueeze(0)
    first = x.mean((2, 3), keepdim=True)
    return (x - first) / torch.sqrt(x.var((2, 3), unbiased=False, keepdim=True) + 1e-5)


UNLIKE: dict[str, Callable[[Any, Tensor], Any]] = {
    "unbiased variance": lambda m, x: centred(x) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5),
    "unbiased standard deviation": lambda m, x: centred(x) / x.std(-1, keepdim=True),
    "eps beside the standard deviation": lambda m, x: centred(x) / (x.std(-1, unbiased=False, keepdim=True) + 1e-5),
    "eps beside the root": lambda m, x: centred(x) / (variance(x).sqrt() + 1e-5),
    "tiny eps beside the root": lambda m, x: centred(x) / (variance(x).sqrt() + 1e-12),
    "eps beside the root mean square": lambda m, x: x / (mean(x * x).sqrt() + 1e-6),
    "two eps": lambda m, x: centred(x) / ((variance(x) + 1e-5).sqrt() + 1e-5),
    "Euclidean norm": lambda m, x: x / x.norm(dim=-1, keepdim=True),
    "Euclidean norm by hand": lambda m, x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6),
    "normalize": lambda m, x: F.normalize(x, dim=-1),
    "sum by another number": lambda m, x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) / (D - 1) + 1e-6),
    "mean over another axis": lambda m, x: (x - mean(x, 1)) / (variance(x) + 1e-5).sqrt(),
    "variance over another axis": lambda m, x: centred(x) / (variance(x, 1) + 1e-5).sqrt(),
    "twice the mean": lambda m, x: (x - 2 * mean(x)) / (variance(x) + 1e-5).sqrt(),
    "part of the mean": lambda m, x: (x - 0.999 * mean(x)) / (variance(x) + 1e-5).sqrt(),
    "the mean added": lambda m, x: (x + mean(x)) / (variance(x) + 1e-5).sqrt(),
    "not centred": lambda m, x: x / (variance(x) + 1e-5).sqrt(),
    "the root forgotten": lambda m, x: centred(x) / (variance(x) + 1e-5),
    "another power": lambda m, x: x * (mean(x * x) + 1e-5).pow(-0.4),
    "mean of absolute values": lambda m, x: x / mean(x.abs()),
    "a mean that is told": _mean_told,
    "a scale that is told": lambda m, x: (r := torch.rsqrt(mean(x * x) + 1e-5), x * r),
    "statistics of another value": lambda m, x: x * torch.rsqrt(mean(x.roll(1, 1) ** 2) + 1e-5),
    "statistics of a part": lambda m, x: x * torch.rsqrt(mean(x[..., 1:] ** 2) + 1e-5),
    "softmax": lambda m, x: x.softmax(-1),
    "softmax by hand": lambda m, x: (e := (x - mean(x)).exp()) / e.sum(-1, keepdim=True),
    "two axes": _instance,
    "two axes, root mean square": lambda m, x: x * torch.rsqrt((x * x).mean((1, 2), keepdim=True) + 1e-5),
    "variance bounded below": lambda m, x: centred(x) / variance(x).clamp_min(1e-5).sqrt(),
    "variance bounded above": lambda m, x: centred(x) / (variance(x).clamp(max=1e4) + 1e-5).sqrt(),
    "root bounded below": lambda m, x: x / mean(x * x).sqrt().clamp_min(1e-12),
    "largest of variance and eps": lambda m, x: centred(x) * torch.maximum(variance(x), variance(x) * 0 + 1e-5).rsqrt(),
}


@cache
def _unlike() -> list[list[Norm]]:
    return found(list(UNLIKE.values()), [torch.randn(3, 5, D) for _ in UNLIKE])


BY_DEVIATION = {
    "unbiased standard deviation",
    "eps beside the standard deviation",
    "eps beside the root",
    "tiny eps beside the root",
}
"""These divide by the deviation itself."""


@pytest.mark.parametrize("name", UNLIKE)
def test_what_only_looks_alike_is_not_found(name: str) -> None:
    found = _unlike()[list(UNLIKE).index(name)]
    assert [norm.kind for norm in found] == ["std_norm"] * (name in BY_DEVIATION)  # a kind of its own


def test_bounds_are_not_found_in_a_single_vector_either() -> None:
    bounded = ["variance bounded below", "root bounded below", "largest of variance and eps"]
    for size in (D, 64):
        assert found([UNLIKE[name] for name in bounded], [torch.randn(size) for _ in bounded]) == [[], [], []]
