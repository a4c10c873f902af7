"""What do Pre-RMSNorm, folded gains and Pre-CRMSNorm save? Beside the original, and beside no norms at all. Prints Markdown.

    python -m benchmarks.pre_norms [--models "ViT-Ti, 1 image" …] [--ways eager …] [--device cuda] [--dtype float16]
                                   [--rounds 15] [--quick]

All variants of a model are built, compared with the original and warmed up; then they take turns, on one thread, timed by that
thread's own clock on a CPU, so that other processes cost cache but not time. A cell has the ratio of the medians and, in
brackets, of the minima to the original's time: below one is faster. "No norms" is the original with its norms deleted, another
function and the limit of what any rewrite of norms can save. Weights are random, with gains, shifts and biases spread. The exit
code is 1 if a rewritten model computes something else.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import math
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normfuse
from benchmarks.crms_norm import MODELS, Build, _session
from benchmarks.record import recorded
from benchmarks.rms_norm import heading, timed
from normfuse.graph.program import Program
from tests.zoo.spread import spread

REWRITES = {
    "pre_rmsnorm": "pre_rmsnorm",
    "all": "all",
    "pre_crmsnorm": "pre_crmsnorm",
    "pre_crmsnorm_compressed": "pre_crmsnorm_compressed",
}
PAPER = "0.90–0.99"  # Jiang et al. 2023, abstract: 1 to 10 % less time, for training and inference
QUICK = ["d = 64, 1 sequence"]
LIMITS = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 3e-1}  # rounding is far below, a wrong rewrite far above
Call = Callable[[], object]


@dataclass(frozen=True)
class Variant:
    """A model as a program, which compilers get, and as the module that a user gets."""

    name: str
    program: Program
    module: Any


def variants(build: Build, device: str, dtype: torch.dtype) -> tuple[list[Variant], Tensor]:
    """The original, what each pass makes of it, and the limit; with the input."""
    torch.manual_seed(0)
    model, x = build()
    model, x = spread(model).eval().to(device, dtype), x.to(device)
    x = x.to(dtype) if x.is_floating_point() else x
    original, bare = (Program.trace(each, (x,)) for each in (model, without_norms(model)))
    made = [Variant("original", original, original.module())]
    for name, passes in REWRITES.items():
        result = normfuse.rewrite(model, passes, inputs=(x,), verify="structure")
        made.append(Variant(name, result.program, result.module()))
    return [*made, Variant("no norms", bare, bare.module())], x


def without_norms(model: nn.Module) -> nn.Module:
    """A copy without its LayerNorms, of small weights: otherwise the stream overflows, which takes another time."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.mul_(0.1)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.forward = nn.Identity().forward  # type: ignore[method-assign]
    return model


def eager(variant: Variant, x: Tensor) -> Call:
    """Operator by operator."""
    return partial(variant.module, x)


def compiled(variant: Variant, x: Tensor) -> Call:
    """Behind `torch.compile`."""
    return partial(torch.compile(variant.program.module()), x)  # type: ignore[arg-type]


def in_onnx_runtime(variant: Variant, x: Tensor) -> Call:
    """After ONNX Runtime's own optimizations."""
    with tempfile.TemporaryDirectory() as folder:
        return _session(Path(folder), x.device.type, variant.program, x)


WAYS: dict[str, Callable[[Variant, Tensor], Call]] = {
    "eager": eager,
    "torch.compile": compiled,
    "ONNX Runtime": in_onnx_runtime,
}


def measured(build: Build, ways: list[str], device: str, dtype: torch.dtype, rounds: int) -> Iterator[tuple[str, str]]:
    """Each way to run a model with the cells of its row: the original's milliseconds, then ratios to it."""
    made, x = variants(build, device, dtype)
    for way in ways:
        calls = {each.name: WAYS[way](each, x) for each in made}
        check(calls, LIMITS[dtype])
        samples = timed(calls, rounds, device)
        base = samples.pop("original")
        ratios = ((statistics.median(taken) / statistics.median(base), min(taken) / min(base)) for taken in samples.values())
        cells = [f"{statistics.median(base) * 1e3:.2f}", *(f"{medians:.2f} ({minima:.2f})" for medians, minima in ratios)]
        yield way, " | ".join(cells)
        torch._dynamo.reset()


def check(calls: dict[str, Call], limit: float) -> None:
    """Every rewritten model must compute what the original does; the one without norms anything that is finite."""
    outputs = {name: first(call()) for name, call in calls.items()}
    expected = outputs["original"]
    for name, got in outputs.items():
        error = 0.0 if name == "no norms" else float((got - expected).abs().max() / expected.abs().max())
        if not (error <= limit and math.isfinite(float(got.abs().max()))):
            sys.exit(f"{name}: off by {error:.1e} of the largest output, or not finite")


def first(output: object) -> Tensor:
    """The first tensor of an output, in float64."""
    while not isinstance(output, Tensor) and not hasattr(output, "dtype"):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]  # type: ignore[index]
    return torch.as_tensor(output).double().cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="one small model and five rounds, to see that it runs")
    options = parser.parse_args()
    models, rounds = (options.models or QUICK, 5) if options.quick else (options.models or list(MODELS), options.rounds)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"{datetime.date.today()}, {versions(options.ways)}, {place(options.device)}, {options.dtype}, {rounds} rounds")
    rows: dict[str, list[str]] = {way: [] for way in options.ways}
    for name in models:
        with torch.no_grad():
            for way, cells in measured(MODELS[name], options.ways, options.device, getattr(torch, options.dtype), rounds):
                rows[way].append(f"| {name} | {cells} | {PAPER} |")
                print(way, rows[way][-1], file=sys.stderr, flush=True)
    for way in options.ways:
        heading(way, ["model", "original, ms", *REWRITES, "no norms", "the paper's"])
        print("\n".join(rows[way]), flush=True)


def versions(ways: list[str]) -> str:
    """What was measured."""
    known = [f"torch {torch.__version__}", f"normfuse {normfuse.__version__}"]
    if "ONNX Runtime" in ways:
        import onnxruntime

        known.append(f"onnxruntime {onnxruntime.__version__}")
    return ", ".join(known)


def place(device: str) -> str:
    """Where it was measured."""
    return torch.cuda.get_device_name() if device == "cuda" else "CPU time of one thread"


if __name__ == "__main__":
    recorded(main)
