"""Does planning scale? Time of torch.export, of analysis and plan, and of applying the plan, for GPT-2 XL at 12 to 96 layers.

The weights are on the meta device: planning never reads them. Prints a Markdown table.

    python -m benchmarks.planning_scale [--layers 12 24 48 96] [--repeats 3]
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from rich.progress import track

from benchmarks.record import recorded
from normfuse.graph.program import Program
from normfuse.planning.planner import plan
from tests.zoo import torchvision_shim


def gpt2_xl(layers: int, returned: bool) -> torch.nn.Module:
    """GPT-2 XL's shape at another depth, without memory; ``returned`` makes it return every hidden state."""
    torchvision_shim.install()
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        config = GPT2Config(n_embd=1600, n_layer=layers, n_head=25, use_cache=False, output_hidden_states=returned)
        model: torch.nn.Module = GPT2LMHeadModel(config)
    return model.eval()


def timed(work: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def measure(layers: int, repeats: int, returned: bool) -> tuple[int, int, float, float, float]:
    """Nodes, norms converted, and medians of the seconds of export, plan and apply."""
    model, ids = gpt2_xl(layers, returned), torch.zeros(1, 64, dtype=torch.long, device="meta")
    export_s, exported = timed(lambda: torch.export.export(model, (), {"input_ids": ids}, strict=False))
    program = Program.from_exported(exported)  # type: ignore[arg-type]
    rows = []
    for _ in range(repeats):
        fresh = Program(program.exported)
        plan_s, chosen = timed(lambda fresh=fresh: plan(fresh, ["pre_rmsnorm"]))  # type: ignore[misc]
        apply_s, _ = timed(lambda chosen=chosen: chosen.apply(program))  # type: ignore[misc, attr-defined]
        rows.append((plan_s, apply_s))
    norms = sum(len(each.sites) for each in plan(program, ["pre_rmsnorm"]).rewrites)
    plans, applies = zip(*rows, strict=True)
    return len(program.graph.nodes), norms, export_s, statistics.median(plans), statistics.median(applies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24, 48, 96])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--returned", action="store_true", help="return every hidden state: nearly all norms are refused")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    measure(2, 1, options.returned)  # first-use costs of torch.export
    rows = [(each, *measure(each, options.repeats, options.returned)) for each in track(options.layers, "measuring")]
    print(f"torch {torch.__version__}, one thread, median of {options.repeats}; seconds\n")
    print("| layers | graph nodes | norms converted | torch.export | analysis + plan | plan / export | µs per node | apply |")
    print("|---|---|---|---|---|---|---|---|")
    for layers, nodes, norms, export_s, plan_s, apply_s in rows:
        print(
            f"| {layers} | {nodes} | {norms} | {export_s:.2f} | {plan_s:.2f} | {plan_s / export_s:.2f} "
            f"| {1e6 * plan_s / nodes:.0f} | {apply_s:.2f} |"
        )


if __name__ == "__main__":
    recorded(main)
