"""Random small models, rewritten by random passes and compared without the prover.

The judge is the model's own class: a copy in float64, another whose weights are nudged by a rounding. Nothing of
`normfuse.proof` has a part in it, and no proof stops what is wrong: rewrites run with ``verify="none"``.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import normfuse
from normfuse.errors import NormfuseError, TraceError
from normfuse.planning.registry import ALL, passes

MARGIN = 300.0
"""How many nudges a rewritten model may be off by: wrong ones are off by their own size."""


@dataclass(frozen=True)
class Outcome:
    """What became of one seed: ``rewritten``, ``unchanged``, ``refused``, ``untraced``, ``wrong`` or ``crash``, and why."""

    verdict: str
    told: str = ""


class RMS(nn.Module):
    """An RMSNorm written by hand, in one of the ways that people write it."""

    def __init__(self, size: int, style: int) -> None:
        super().__init__()
        self.weight, self.style = nn.Parameter(torch.ones(size)), style

    def forward(self, x: Tensor) -> Tensor:
        if self.style == 0:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight
        if self.style == 1:
            return self.weight * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6))
        return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * (1 + self.weight)


class Residual(nn.Module):
    def __init__(self, body: nn.Module, scale: bool, size: int) -> None:
        super().__init__()
        self.body, self.gamma = body, nn.Parameter(torch.ones(size)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + (y if self.gamma is None else y * self.gamma)


class Gate(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, dim=-1)
        y: Tensor = self.down(a * torch.sigmoid(b))
        return y


class Attention(nn.Module):
    def __init__(self, size: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.heads, self.causal = nn.Linear(size, 3 * size), nn.Linear(size, size), heads, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.reshape(*each.shape[:-1], self.heads, -1).transpose(-3, -2) for each in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(-3, -2)
        z: Tensor = self.out(y.reshape(x.shape))
        return z


class Joined(nn.Module):
    """Halves or wholes concatenated, and mapped back to the width."""

    def __init__(self, first: nn.Module, second: nn.Module, size: int) -> None:
        super().__init__()
        self.first, self.second, self.back = first, second, nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.back(torch.cat([self.first(x), self.second(x)], dim=-1))
        return y


class Through(nn.Module):
    """A body on a reshaped or transposed view."""

    def __init__(self, body: nn.Module, view: int) -> None:
        super().__init__()
        self.body, self.view = body, view

    def forward(self, x: Tensor) -> Tensor:
        if self.view == 0:
            y: Tensor = self.body(x.reshape(-1, x.shape[-1])).reshape(x.shape)
            return y
        if self.view == 1:
            return self.body(x.transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]
        return self.body(x.unsqueeze(1)).squeeze(1)  # type: ignore[no-any-return]


class Twice(nn.Module):
    """One module called twice: shared norms, tied weights."""

    def __init__(self, body: nn.Module, between: nn.Module) -> None:
        super().__init__()
        self.body, self.between = body, between

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(self.between(self.body(x)))
        return y


class Tokens(nn.Module):
    """Embeddings before a body, and the same table as its head."""

    def __init__(self, body: nn.Module, size: int, words: int, tied: bool) -> None:
        super().__init__()
        self.table, self.place, self.body = nn.Embedding(words, size), nn.Parameter(torch.randn(16, size)), body
        self.head = nn.Linear(size, words, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.place[: ids.shape[1]]
        y: Tensor = self.head(self.body(x))
        return y


class Flat(nn.Module):
    """Features of a picture as rows of tokens, or their mean, before a head."""

    def __init__(self, stem: nn.Module, body: nn.Module, pooled: bool) -> None:
        super().__init__()
        self.stem, self.body, self.pooled = stem, body, pooled

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = y.mean((2, 3)).unsqueeze(1) if self.pooled else y.flatten(2).transpose(1, 2)
        z: Tensor = self.body(y)
        return z


@dataclass
class Recipe:
    """Draws a model.

    Attributes:
        seed: the same one draws the same model.
        words: what was drawn, for a report.
    """

    seed: int
    words: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.size = self.random.choice((4, 6, 8, 12))

    def pick(self, choices: dict[str, Callable[[], nn.Module]]) -> nn.Module:
        name = self.random.choice(list(choices))
        self.words.append(name)
        return choices[name]()

    def chance(self, share: float = 0.5) -> bool:
        return self.random.random() < share

    def norm(self) -> nn.Module:
        size = self.size
        return self.pick(
            {
                "LayerNorm": lambda: nn.LayerNorm(size, self.random.choice((1e-5, 1e-3, 1e-12))),
                "LayerNorm without bias": lambda: nn.LayerNorm(size, bias=False),
                "LayerNorm without gain": lambda: nn.LayerNorm(size, elementwise_affine=False),
                "RMSNorm": lambda: nn.RMSNorm(size, self.random.choice((None, 1e-6))),
                "RMSNorm by hand": lambda: RMS(size, self.random.randrange(3)),
                "no norm": nn.Identity,
            }
        )

    def linear(self) -> nn.Module:
        size, bias = self.size, self.chance()
        return self.pick(
            {
                "linear": lambda: nn.Linear(size, size, bias=bias),
                "two linear": lambda: nn.Sequential(nn.Linear(size, 2 * size, bias=bias), nn.Linear(2 * size, size)),
                "mlp": lambda: nn.Sequential(
                    nn.Linear(size, 2 * size), self.activation(), nn.Linear(2 * size, size, bias=bias)
                ),
                "gate": lambda: Gate(size),
                "attention": lambda: Attention(size, 2, self.chance()),
            }
        )

    def activation(self) -> nn.Module:
        return self.random.choice((nn.GELU, nn.ReLU, nn.Tanh, nn.Hardswish, lambda: nn.LeakyReLU(0.1)))()

    def block(self, depth: int = 2) -> nn.Module:
        def inner() -> nn.Module:
            return self.block(depth - 1) if depth else self.linear()

        return self.pick(
            {
                "pre-norm": lambda: Residual(nn.Sequential(self.norm(), inner()), self.chance(0.3), self.size),
                "post-norm": lambda: nn.Sequential(Residual(inner(), self.chance(0.3), self.size), self.norm()),
                "plain": lambda: nn.Sequential(inner(), self.norm(), self.linear()),
                "joined": lambda: Joined(nn.Sequential(self.norm(), inner()), self.norm(), self.size),
                "viewed": lambda: Through(nn.Sequential(self.norm(), self.linear()), self.random.randrange(3)),
                "twice": lambda: Twice(self.norm(), inner()),
                "activation": lambda: nn.Sequential(inner(), self.activation(), self.norm()),
                "two norms": lambda: nn.Sequential(self.norm(), self.norm(), inner()),
            }
        )

    def channel_norm(self, channels: int) -> nn.Module:
        return self.pick(
            {
                "BatchNorm": lambda: nn.BatchNorm2d(channels, self.random.choice((1e-5, 1e-3))),
                "BatchNorm without affine": lambda: nn.BatchNorm2d(channels, affine=False),
                "GroupNorm": lambda: nn.GroupNorm(2, channels),
                "InstanceNorm": lambda: nn.InstanceNorm2d(channels, affine=self.chance(), track_running_stats=self.chance()),
                "no norm": nn.Identity,
            }
        )

    def conv(self, inside: int, channels: int, groups: int) -> nn.Module:
        padding, bias = self.random.choice((0, 1)), self.chance()
        return self.pick(
            {
                "conv": lambda: nn.Conv2d(inside, channels, 3, padding=padding, groups=groups, bias=bias),
                "transposed conv": lambda: nn.ConvTranspose2d(inside, channels, 2, bias=bias),
                "circular conv": lambda: nn.Conv2d(inside, channels, 3, padding=1, padding_mode="circular"),
                "pointwise conv": lambda: nn.Conv2d(inside, channels, 1),
            }
        )

    def stem(self, channels: int) -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(self.random.randint(1, 3)):
            conv = self.conv(channels if layers else 3, channels, self.random.choice((1, 1, 2)) if layers else 1)
            order = [conv, self.channel_norm(channels)]
            if layers and self.chance(0.3):
                order.reverse()
            layers += [*order, *([self.activation()] if self.chance() else [])]
        return nn.Sequential(*layers)

    def model(self) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(self.seed)
        body = nn.Sequential(*(self.block() for _ in range(self.random.randint(1, 3))), self.norm(), nn.Linear(self.size, 5))
        kind = self.random.choice(("features", "features", "tokens", "picture"))
        self.words.append(kind)
        if kind == "tokens":
            body[-1] = nn.Identity()
            return Tokens(body, self.size, 11, self.chance()), torch.randint(11, (2, 5))
        if kind == "picture":
            return Flat(self.stem(self.size), body, self.chance()), torch.randn(2, 3, 9, 9)
        return body, torch.randn(2, 5, self.size)


def spread(model: nn.Module) -> None:
    """Gains, shifts, biases and statistics that hide no mistake."""
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if not value.is_floating_point():
                continue
            if value.dim() < 2:
                value.copy_(
                    torch.empty_like(value).uniform_(0.4, 1.9) if "var" in name else value + 0.7 * torch.randn_like(value)
                )
            else:
                value.add_(0.2 * value.std() if value.numel() > 1 else 0.0)


def tried(seed: int) -> Outcome:
    """Draw, rewrite and judge the model of a seed."""
    recipe = Recipe(seed)
    model, x = recipe.model()
    spread(model.eval())
    dtype = recipe.random.choice((torch.float64, torch.float64, torch.float32, torch.bfloat16))
    model, x = model.to(dtype), x.to(dtype) if x.is_floating_point() else x
    names = recipe.random.choice((list(ALL), recipe.random.sample(sorted(passes()), recipe.random.randint(1, 3))))
    dynamic = ({0: Dim("batch")},) if recipe.chance(0.4) else None
    told = f"seed {seed}, {dtype}, {', '.join(names)}: {', '.join(recipe.words)}"
    warnings.simplefilter("ignore")
    try:
        result = normfuse.rewrite(model, names, inputs=(x,), dynamic_shapes=dynamic, verify="none")
        rewritten = result.module()
        batches = [x, torch.cat([x, x.flip(0), x[:1]])] if dynamic else [x]
        far = max((excess(model, rewritten, each) for each in batches), default=0.0)
    except TraceError as error:
        return Outcome("untraced", f"{told}: {error}")
    except NormfuseError as error:
        return Outcome("refused", f"{told}: {error}")
    except Exception as error:
        return Outcome("crash", f"{told}: {type(error).__name__}: {error}")
    if not far <= 1.0:
        return Outcome("wrong", f"{told}: {far:.1e} times what noise explains")
    return Outcome("rewritten" if any(result.report.plan.rewrites) else "unchanged", told)


def excess(model: nn.Module, rewritten: nn.Module, x: Tensor) -> float:
    """How many times farther than noise explains a rewritten model is from the original in float64."""
    epsilon = torch.finfo(next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)).eps
    exact, nudged = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    with torch.no_grad():
        for value in nudged.parameters():
            value.mul_(1 + epsilon * torch.randn_like(value))
        wide = x.double() if x.is_floating_point() else x
        truth, noisy, own, got = exact(wide), nudged(wide), model(x).double(), rewritten(x).double()
    if got.shape != truth.shape:
        return float("inf")
    scale = max(float(truth.abs().max()), 1e-30)
    noise = max(float((noisy - truth).abs().max()), float((own - truth).abs().max()), epsilon * scale)
    far = float((got - truth).abs().max())
    return far / (MARGIN * noise) if far == far else float("inf")
