"""What Tune mode costs beside Eval, Deploy and two published Tunes: bytes kept for backward, peak memory, time. Markdown.

    python -m benchmarks.tune [--networks resnet50 …] [--batches 1 4 16] [--sizes 64 128 224] [--rounds 5] [--device cuda]
                              [--compiled] [--quick] [--json tune.json]

All ways start from one model in evaluation mode with random weights and measured running statistics, want gradients of all
parameters, and run one forward and one backward pass:

    Eval          the model as it is
    Tune          normfuse.tune
    Deploy        normfuse.deploy: the folded weights are the parameters, which is no way to train
    mmengine      its turn_on_efficient_conv_bn_eval
    inductor      its efficient_conv_bn_eval_fx_passes, run without its code generator, like all others
    … compiled    --compiled: Eval, inductor's pass and Tune through torch.compile as it is

Kept bytes are those of all tensors that autograd packs, each storage once, the model's own parameters and buffers left out:
the same on every machine. The peak is the largest sum of tensors allocated at a time during the pass, over what was there
before, gradients included; on a CPU from the profiler's allocator events. Times alternate between the ways; they are CPU
seconds of one thread, or the clock's around a synchronized pass on a GPU. A way that computes another output or other
gradients than Eval ends the run with exit code 1 (Deploy's gradients are of other parameters: of the input alone).
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import itertools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._inductor import config as inductor
from torch._inductor.fx_passes.pre_grad import pre_grad_passes
from torch.fx import Interpreter
from torch.profiler import ProfilerActivity, profile

import normfuse
from benchmarks.record import recorded
from normfuse.nn import recalibrate
from tests.zoo import torchvision_shim

LIMIT = 1e-8  # largest error over largest entry in float64, where ReLUs that flip by rounding are rare

# -- networks ----------------------------------------------------------------------------------------------------------


def torchvision_model(name: str) -> nn.Module:
    torchvision_shim.install()
    import torchvision

    model: nn.Module = torchvision.models.get_model(name, weights=None)
    return model


def resnet50_fpn() -> nn.Module:
    """ResNet-50 with a feature pyramid, as detectors have it; BatchNorms fixed by evaluation mode."""
    torchvision_shim.install()
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    model: nn.Module = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": lambda: torchvision_model("resnet50"),
    "resnet101": lambda: torchvision_model("resnet101"),
    "mobilenet_v2": lambda: torchvision_model("mobilenet_v2"),
    "resnet50_fpn": resnet50_fpn,
}


def network(name: str, device: str) -> nn.Module:
    """The network with running statistics of noise, so that BatchNorms do something and activations keep their size."""
    torch.manual_seed(0)
    model = recalibrate(NETWORKS[name](), [torch.randn(8, 3, 64, 64)])
    return model.eval().to(device)


# -- ways to train it --------------------------------------------------------------------------------------------------


def tune(model: nn.Module, x: Tensor) -> Any:
    return normfuse.tune(model, ["conv_bn"], inputs=(x,), verify="none")


def deploy(model: nn.Module, x: Tensor) -> Any:
    return normfuse.deploy(model, ["conv_bn"], inputs=(x,), verify="none")


def by_mmengine(model: nn.Module, x: Tensor) -> Any:
    peer = importlib.import_module("mmengine.model.efficient_conv_bn_eval")
    peer.turn_on_efficient_conv_bn_eval_for_single_model(model)
    return model


def by_inductors_pass(model: nn.Module, x: Tensor) -> Any:
    """The graph after inductor's pass, run operator by operator as the other ways are."""

    def backend(graph_module: Any, inputs: Any) -> Any:
        with inductor.patch(efficient_conv_bn_eval_fx_passes=True):
            return Interpreter(pre_grad_passes(graph_module, inputs)).run  # its code has no text that Python reads

    return torch.compile(model, backend=backend, dynamic=False)


def compiled(model: nn.Module, x: Tensor, **options: Any) -> Any:
    run = torch.compile(model, dynamic=False)
    with inductor.patch(options):
        torch.autograd.backward(total(run(x)))
    return run


WAYS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "Eval": lambda model, x: model,
    "Tune": tune,
    "Deploy": deploy,
    "mmengine": by_mmengine,
    "inductor": by_inductors_pass,
}
COMPILED: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "Eval, compiled": compiled,
    "inductor, compiled": lambda model, x: compiled(model, x, efficient_conv_bn_eval_fx_passes=True),
    "Tune, compiled": lambda model, x: compiled(tune(model, x), x),
}

# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One way of one network on one input: MB are 10⁶ bytes, seconds one entry per round."""

    way: str
    kept_mb: float
    peak_mb: float
    seconds: list[float] = field(default_factory=list)


@dataclass
class Row:
    """All ways of one network on one input."""

    network: str
    batch: int
    size: int
    runs: list[Run]


@dataclass
class Way:
    """A network prepared for one way; `run` is called, `model` has the parameters."""

    name: str
    model: nn.Module
    run: Any


def total(outputs: Any) -> Tensor:
    """A loss with gradients of one size everywhere."""
    outputs = list(outputs.values()) if isinstance(outputs, dict) else [outputs]
    return torch.stack([(each * torch.linspace(-1, 2, each.shape[-1], device=each.device)).mean() for each in outputs]).sum()


def kept_bytes(way: Way, x: Tensor) -> int:
    own = {each.untyped_storage().data_ptr() for each in (*way.model.parameters(), *way.model.buffers(), x)}
    kept: dict[int, Tensor] = {}

    def pack(each: Tensor) -> Tensor:
        kept[each.untyped_storage().data_ptr()] = each  # held, so that no address is used twice
        return each

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        outputs = way.run(x)
    del outputs
    return sum(each.untyped_storage().nbytes() for place, each in kept.items() if place not in own)


def peak_bytes(way: Way, x: Tensor) -> int:
    if x.device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        one_pass(way, x)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
        one_pass(way, x)
    events = sorted((each for each in told.profiler.kineto_results.events() if each.name() == "[memory]"), key=start)
    return max(itertools.accumulate(each.nbytes() for each in events), default=0)


def start(event: Any) -> int:
    nanoseconds: int = event.start_ns()
    return nanoseconds


def one_pass(way: Way, x: Tensor) -> float:
    clock = time.process_time if x.device.type == "cpu" else time.perf_counter
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    begin = clock()
    torch.autograd.backward(total(way.run(x)))
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    taken = clock() - begin
    way.model.zero_grad()
    return taken


def prepared(name: str, ways: dict[str, Callable[[nn.Module, Tensor], Any]], x: Tensor) -> Iterator[Way]:
    original = network(name, str(x.device)).to(x.dtype)
    for way, prepare in ways.items():
        if way == "mmengine" and importlib.util.find_spec("mmengine") is None:
            continue
        model = copy.deepcopy(original)
        yield Way(way, model, prepare(model, x))


def agree(name: str, ways: dict[str, Callable[[nn.Module, Tensor], Any]], device: str) -> None:
    """Outputs, gradients of all parameters but Deploy's, and gradients of the input are Eval's, in float64."""
    expected: dict[str, Tensor] = {}
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    for way in prepared(name, ways, x):
        given = x.clone().requires_grad_()
        way.model.zero_grad()
        loss = total(way.run(given))
        torch.autograd.backward(loss)
        assert given.grad is not None
        found = {"output": loss.detach(), "input": given.grad}
        if way.name != "Deploy":
            found |= {name: each.grad for name, each in way.model.named_parameters() if each.grad is not None}
            assert not expected or found.keys() == expected.keys(), f"{way.name}: other parameters have gradients"
        expected = expected or found
        for name, value in found.items():
            error = float((value - expected[name]).abs().max() / expected[name].abs().max())
            if not error <= LIMIT:
                sys.exit(f"{way.name}: the gradient of {name} is off by {error:.1e} of its largest entry")


def measure(name: str, batches: Sequence[int], sizes: Sequence[int], options: argparse.Namespace) -> Iterator[Row]:
    if not options.unchecked:
        agree(name, WAYS, options.device)
    x = torch.randn(batches[0], 3, sizes[0], sizes[0]).to(options.device)
    ways = list(prepared(name, {**WAYS, **(COMPILED if options.compiled else {})}, x))
    for size, batch in itertools.product(sizes, batches):
        x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to(options.device)
        runs = [Run(way.name, kept_bytes(way, x) / 1e6, peak_bytes(way, x) / 1e6) for way in ways]
        for turn in range(options.rounds):
            for at in range(len(ways)):
                which = (turn + at) % len(ways)
                runs[which].seconds.append(one_pass(ways[which], x))
        yield Row(name, batch, size, runs)


# -- the tables --------------------------------------------------------------------------------------------------------


def kept(run: Run, base: Run) -> str:
    return f"{run.kept_mb:.1f}"


def peak(run: Run, base: Run) -> str:
    return f"{run.peak_mb:.1f}"


def times(run: Run, base: Run) -> str:
    if not run.seconds:
        return "–"
    if run is base:
        return f"{1e3 * statistics.median(run.seconds):.0f} ms"
    return f"{statistics.median(run.seconds) / statistics.median(base.seconds):.2f}, {min(run.seconds) / min(base.seconds):.2f}"


TABLES = {
    "Kept for backward, MB": kept,
    "Peak memory, MB": peak,
    "Time of a forward and backward pass: Eval's median, and of Eval's the medians and minima": times,
}


def tables(rows: Sequence[Row]) -> Iterator[str]:
    ways = list(dict.fromkeys(run.way for row in rows for run in row.runs))
    for title, cell in TABLES.items():
        yield f"\n{title}\n\n| network | input | {' | '.join(ways)} |\n|---|---|{'---|' * len(ways)}"
        for row in rows:
            cells = (cell(run, row.runs[0]) for run in row.runs)
            yield f"| {row.network} | {row.batch} × {row.size}² | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 128, 224])
    parser.add_argument("--rounds", type=int, default=5, help="0 for bytes and memory alone")
    parser.add_argument("--quick", action="store_true", help="one image of 64² and one round, to see that everything runs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compiled", action="store_true", help="through inductor's code generator too: minutes per network")
    parser.add_argument("--unchecked", action="store_true", help="do not compare outputs and gradients first")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.batches, options.sizes, options.rounds = [1], [64], 1
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dynamo.recompile_limit = 64  # a graph for every input; behind the limit it would silently run the model as it is
    peer = f"mmengine {version('mmengine')}" if importlib.util.find_spec("mmengine") else "mmengine not installed"
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU time of one thread"
    print(f"torch {torch.__version__}, {peer}, {where}, {options.rounds} rounds")
    rows = []
    for name in options.networks:
        for row in measure(name, options.batches, options.sizes, options):
            rows.append(row)
            print(f"{name}, {row.batch} × {row.size}²: done", file=sys.stderr)
            if options.json:  # what is there, in case that the rest is not waited for
                options.json.write_text(json.dumps([asdict(each) for each in rows], indent=1))
    print("\n".join(tables(rows)))


if __name__ == "__main__":
    recorded(main)
