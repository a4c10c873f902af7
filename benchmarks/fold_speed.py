"""Is a folded model faster? Beside the original, and beside a twin without norms, which is the limit. Prints a Markdown table.

    python -m benchmarks.fold_speed [--models resnet50 …] [--ways eager …] [--device cuda] [--rounds 30]

All variants of a model are built and warmed up first, then single calls of all of them alternate, each round beginning with
another one. Times are of one 224² image unless ``--batch`` says otherwise. On the CPU they are CPU seconds of the one thread
that works: the same as by the clock on the wall where nobody else is on the machine, and not far from it where somebody is.
The weights are random, the running statistics measured. The exit code is 1 if a folded model computes something else.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch._inductor import config as inductor

import normfuse
from benchmarks.record import recorded
from normfuse.exporters import onnx, onnxruntime
from normfuse.graph.program import Program
from normfuse.nn import RepBN, convert, recalibrate
from tests.zoo import torchvision_shim

NORMS = (nn.modules.batchnorm._BatchNorm, RepBN)
LIMIT = 1e-3  # largest error over largest output: rounding through fifty layers is far below, a wrong fold far above
Call = Callable[[], Any]

# -- models ------------------------------------------------------------------------------------------------------------


def torchvision_model(name: str) -> nn.Module:
    torchvision_shim.install()
    import torchvision

    model: nn.Module = torchvision.models.get_model(name, weights=None)
    return model


def rep_vit() -> nn.Module:
    """ViT-Ti/16 with RepBN in place of every LayerNorm."""
    torchvision_shim.install()
    import timm

    model = timm.create_model("vit_tiny_patch16_224")
    return convert(model, tuple({type(each) for each in model.modules() if isinstance(each, nn.LayerNorm)}), to=RepBN)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": lambda: torchvision_model("resnet50"),
    "mobilenet_v2": lambda: torchvision_model("mobilenet_v2"),
    "efficientnet_b0": lambda: torchvision_model("efficientnet_b0"),
    "vit_tiny, RepBN": rep_vit,
}


def without_norms(model: nn.Module) -> nn.Module:
    """A copy whose norms do nothing."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NORMS):
                setattr(module, name, nn.Identity())
    return model


@dataclass(frozen=True)
class Variant:
    """A model as its user has it, and traced."""

    module: nn.Module
    program: Program


def variants(name: str, x: Tensor) -> dict[str, Variant]:
    """The original, the folded one and the limit."""
    torch.manual_seed(0)
    model = recalibrate(MODELS[name](), [torch.randn(8, *x.shape[1:])]).eval().to(x.device)
    bare = without_norms(model)
    result = normfuse.rewrite(model, passes=["offline_norm"], inputs=(x,), verify="structure")
    return {
        "original": Variant(model, Program.trace(model, (x,))),
        "folded": Variant(result.module(), result.program),
        "deleted": Variant(bare, Program.trace(bare, (x,))),
    }


# -- ways to run one ---------------------------------------------------------------------------------------------------


def eager(variant: Variant, x: Tensor) -> Call:
    """The module as it is; a folded one is a graph of aten calls."""
    return lambda: variant.module(x)


def traced(variant: Variant, x: Tensor) -> Call:
    """A graph of aten calls, for all of them alike."""
    module = variant.program.module()
    return lambda: module(x)


def compiled(variant: Variant, x: Tensor, *, freezing: bool = False) -> Call:
    """`torch.compile` as it is."""
    module = torch.compile(variant.program.module())
    with inductor.patch(freezing=True) if freezing else nullcontext():
        module(x)
    return lambda: module(x)


def frozen(variant: Variant, x: Tensor) -> Call:
    """`torch.compile` with frozen weights, which folds by itself what it can."""
    return compiled(variant, x, freezing=True)


def in_onnx_runtime(variant: Variant, x: Tensor) -> Call:
    """ONNX Runtime after its own optimizations, which fold by themselves what they can."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.export(variant.program.exported, path)
        session = onnxruntime._session(path, True)
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


WAYS: dict[str, Callable[[Variant, Tensor], Call]] = {
    "eager": eager,
    "eager, traced": traced,
    "torch.compile": compiled,
    "torch.compile, frozen": frozen,
    "ONNX Runtime": in_onnx_runtime,
}

# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """Time of a variant over the original's: of the medians, of the minima, and the quartiles of the ratios round by round."""

    medians: float
    minima: float
    quartiles: tuple[float, float]

    def __str__(self) -> str:
        return f"{self.medians:.2f} ({self.quartiles[0]:.2f}–{self.quartiles[1]:.2f}) | {self.minima:.2f}"


@dataclass(frozen=True)
class Row:
    """A model, run one way; milliseconds of the original's median call."""

    model: str
    way: str
    milliseconds: float
    folded: Ratio
    deleted: Ratio


def measure(model: str, ways: list[str], x: Tensor, rounds: int) -> Iterator[Row]:
    """Build everything, warm up, then take turns."""
    made = variants(model, x)
    calls = {(way, name): WAYS[way](variant, x) for way in ways for name, variant in made.items()}
    outputs = {key: call().double() for key, call in calls.items() for _ in range(3)}
    for way in ways:
        agree(outputs[way, "original"], outputs[way, "folded"], f"{model}, {way}")
        assert outputs[way, "deleted"].isfinite().all(), f"{model} without norms overflows, which may take another time"
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    keys = list(calls)
    for turn in track(range(rounds), model, console=Console(stderr=True)):
        for key in keys[turn % len(keys) :] + keys[: turn % len(keys)]:
            times[key].append(seconds(calls[key], x.device))
    for way in ways:
        original, folded, deleted = (times[way, name] for name in made)
        yield Row(model, way, 1e3 * statistics.median(original), ratio(folded, original), ratio(deleted, original))


def seconds(call: Call, device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def ratio(times: list[float], base: list[float]) -> Ratio:
    by_round = statistics.quantiles([one / other for one, other in zip(times, base, strict=True)], n=4)
    medians = statistics.median(times) / statistics.median(base)
    return Ratio(medians, min(times) / min(base), (by_round[0], by_round[2]))


def agree(expected: Tensor, got: Tensor, what: str) -> None:
    error = float((got - expected).abs().max() / expected.abs().max())
    if not error <= LIMIT:
        sys.exit(f"{what}: the folded model is off by {error:.1e} of the largest output")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, help="all of them; on another device than the CPU without ONNX Runtime"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    x = torch.randn(options.batch, 3, 224, 224, generator=torch.Generator().manual_seed(1)).to(options.device)
    ways = options.ways or [way for way in WAYS if x.device.type == "cpu" or WAYS[way] is not in_onnx_runtime]
    where = torch.cuda.get_device_name(x.device) if x.device.type == "cuda" else "CPU time of one thread"
    with torch.no_grad():
        rows = [row for name in options.models for row in measure(name, ways, x, options.rounds)]
    print(
        f"torch {torch.__version__}, {where}, batch {options.batch}, {options.rounds} rounds; in brackets quartiles of them\n"
    )
    print(
        "| model | run by | original, ms | folded / original, medians | minima | without norms / original, medians | minima |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {row.model} | {row.way} | {row.milliseconds:.1f} | {row.folded} | {row.deleted} |")


if __name__ == "__main__":
    recorded(main)
