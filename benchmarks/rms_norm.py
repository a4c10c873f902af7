"""How fast is an RMSNorm in eager mode, in the place of a LayerNorm? Prints Markdown tables.

All variants of a row take turns in one run, on one thread, timed by that thread's own clock on a CPU, so that other processes
cost cache but not time. A cell has the median in µs and, in brackets, the ratio of the
medians and of the minima to LayerNorm's or to the original model's: below one is faster.

    python -m benchmarks.rms_norm [--device cuda] [--dtype float16] [norms] [operators] [training] [models]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

import normfuse
from benchmarks.record import recorded
from normfuse.nn import CRMSNorm, RMSNorm
from normfuse.nn.rms_norm import inverse_rms

SHAPES = (
    (1, 197, 768), (8, 197, 192), (8, 197, 64), (1, 128, 768), (8, 128, 1024), (1, 64, 64), (1, 8, 768), (1, 1, 4096),
    (1, 1, 768),
)  # fmt: skip
MODELS = {  # width, heads, layers, and shape of the input
    "ViT-Ti, 1 image": (192, 3, 12, (1, 197)),
    "ViT-Ti, 8 images": (192, 3, 12, (8, 197)),
    "GPT-2 small, 128 tokens": (768, 12, 12, (1, 128)),
    "GPT-2 small, 1 token": (768, 12, 12, (1, 1)),
    "width 64, 64 tokens": (64, 4, 4, (1, 64)),
    "width 64, 1 token": (64, 4, 4, (1, 1)),
}
EPS = 1e-5

Variants = Mapping[str, Callable[[], object]]
Spelling = Callable[..., Tensor]


def timed(variants: Variants, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds per call of every variant in every round; a round of a variant takes at least half a millisecond."""
    clock = synchronized if device == "cuda" else time.thread_time

    def seconds(call: Callable[[], object], times: int) -> float:
        start = clock()
        for _ in range(times):
            call()
        return (clock() - start) / times

    for call in variants.values():
        seconds(call, 2)
    once = {name: seconds(call, 2) for name, call in variants.items()}
    times = {name: max(1, int(5e-4 / each)) for name, each in once.items()}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            # What the variant before left in the caches and the heap is not ours; it is nothing to a fifth of a second.
            for _ in range(3 if times[name] > 1 else 1 if once[name] < 0.2 else 0):
                call()
            samples[name].append(seconds(call, times[name]))
    return samples


def synchronized() -> float:
    """The time at which the GPU has done all that it was given."""
    torch.cuda.synchronize()  # type: ignore[no-untyped-call]
    return time.perf_counter()


def row(name: str, variants: Variants, rounds: int, device: str) -> None:
    """Print a line of a table: the first variant's median, and of the others ratios to it."""
    samples = timed(variants, rounds, device)
    base, *_ = samples.values()
    cells = [f"{statistics.median(base) * 1e6:.1f}"]
    for taken in list(samples.values())[1:]:
        ratios = statistics.median(taken) / statistics.median(base), min(taken) / min(base)
        cells.append(f"{statistics.median(taken) * 1e6:.1f} ({ratios[0]:.2f}, {ratios[1]:.2f})")
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def heading(title: str, columns: list[str]) -> None:
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")


def norms(device: str) -> None:
    """Modules without gradients."""
    columns = ["LayerNorm", "torch RMSNorm", "RMSNorm", "RMSNorm, no gain", "CRMSNorm"]
    heading("Forward, no gradients", ["shape", *columns])
    for shape in SHAPES:
        d = shape[-1]
        modules = [nn.LayerNorm(d), nn.RMSNorm(d, EPS), RMSNorm(d, EPS), RMSNorm(d, EPS, False), CRMSNorm(d - 1)]
        x = torch.randn(shape, device=device)
        given = [x, x, x, x, x[..., 1:].contiguous()]
        calls = {c: partial(m.to(device), each) for c, m, each in zip(columns, modules, given, strict=True)}
        with torch.no_grad():
            row("×".join(map(str, shape)), calls, 60, device)


def operators(device: str) -> None:
    """What a program can call, with and without gain and shift ("bare"): minima in µs."""
    columns = [
        "layer_norm, gain and shift", "layer_norm, gain", "layer_norm, bare",
        "rms_norm, gain", "rms_norm, bare", "vector_norm, gain", "vector_norm, bare",
    ]  # fmt: skip
    heading("Operators, no gradients: µs, minima", ["shape", *columns])
    for shape in (*SHAPES, (8, 128, 768), (8, 197, 768)):
        d = [shape[-1]]
        x, gain, shift = (torch.randn(size, device=device) for size in (shape, d, d))
        layer_norm: Spelling = nn.functional.layer_norm
        others: tuple[Spelling, ...] = (nn.functional.rms_norm, by_vector_norm)
        made: list[Callable[[], object]] = [
            partial(layer_norm, x, d, *affine, EPS) for affine in ((gain, shift), (gain, None), (None, None))
        ]
        made += [partial(spelling, x, d, each, EPS) for spelling in others for each in (gain, None)]
        with torch.no_grad():
            samples = timed(dict(zip(columns, made, strict=True)), 60, device)
        cells = (f"{min(samples[column]) * 1e6:.1f}" for column in columns)
        print(f"| {'×'.join(map(str, shape))} | {' | '.join(cells)} |", flush=True)


def training(device: str) -> None:
    """Modules, forward and backward."""
    columns = ["LayerNorm", "torch RMSNorm", "RMSNorm"]
    heading("Forward and backward", ["shape", *columns])
    for shape in SHAPES:
        modules = [nn.LayerNorm(shape[-1]), nn.RMSNorm(shape[-1], EPS), RMSNorm(shape[-1], EPS)]
        x, grad = torch.randn(shape, device=device, requires_grad=True), torch.randn(shape, device=device)
        calls = {c: partial(gradients, m.to(device), x, grad) for c, m in zip(columns, modules, strict=True)}
        row("×".join(map(str, shape)), calls, 40, device)


def gradients(module: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Of the input and all parameters."""
    return torch.autograd.grad(module(x), (x, *module.parameters()), grad)


def by_vector_norm(x: Tensor, _: object, weight: Tensor | None, eps: float) -> Tensor:
    """What `normfuse.nn.RMSNorm` computes, spelled as a program can hold it: nothing in place."""
    y = x * inverse_rms(x, eps)
    return y if weight is None else y * weight


def in_place(x: Tensor, _: object, weight: Tensor | None, eps: float) -> Tensor:
    """What `normfuse.nn.RMSNorm` does."""
    y = x * inverse_rms(x, eps)
    return y if weight is None else y.mul_(weight)


def respelled(program: nn.Module, spelling: Spelling) -> nn.Module:
    """A rewritten program with another spelling of its rms_norm operators."""
    assert isinstance(program, torch.fx.GraphModule)
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.rms_norm.default:
            node.target = spelling
    program.recompile()
    return program


def transformer(width: int, heads: int, layers: int, affine: bool) -> nn.Module:
    """A pre-LN encoder behind a projection; without gains and shifts it is what folding them into their readers leaves."""
    block = nn.TransformerEncoderLayer(width, heads, 4 * width, activation="gelu", batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
    for each in model.modules():
        if isinstance(each, nn.LayerNorm) and not affine:
            each.elementwise_affine, each.weight, each.bias = False, None, None  # type: ignore[assignment]
    return nn.Sequential(nn.Linear(width, width), model).eval()


def models(device: str) -> None:
    """Pre-LN Transformers as programs: the original, and rewritten ones with their norms in several spellings."""
    spellings: dict[str, Spelling] = {
        "rms_norm": torch.ops.aten.rms_norm.default,
        "vector_norm": by_vector_norm,
        "in place": in_place,
    }
    folded: dict[str, Spelling] = {"folded, rms_norm": spellings["rms_norm"], "folded, vector_norm": by_vector_norm}
    heading("Pre-LN programs in eager mode, no gradients", ["model", "original", *spellings, *folded])
    for name, (width, heads, layers, size) in MODELS.items():
        x = torch.randn(*size, width, device=device)
        calls: dict[str, Callable[[], object]] = {}
        for affine, wanted in ((True, spellings), (False, folded)):
            model = transformer(width, heads, layers, affine).to(device)
            if affine:
                calls["original"] = partial(torch.export.export(model, (x,)).run_decompositions({}).module(), x)
            result = normfuse.rewrite(model, "pre_rmsnorm", inputs=(x,), verify="structure")
            assert result.report.to_dict()["norms"]["after"] == {"rms_norm": 2 * layers + 1}
            calls |= {column: partial(respelled(result.module(), each), x) for column, each in wanted.items()}
        with torch.no_grad():
            row(name, calls, 15 if width * math.prod(size) < 50_000 else 5, device)


def main() -> None:
    tables = {"norms": norms, "operators": operators, "training": training, "models": models}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", default=[], help=", ".join(tables))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, options.dtype))
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, {options.device}, {options.dtype}; µs (ratio of medians, of minima)")
    for name in options.tables or tables:
        tables[name](options.device)


if __name__ == "__main__":
    recorded(main)
