"""Can a model that fits no machine be planned? Seconds and memory of trace, plan and apply for 70 to 405 billion weights.

The weights are on the meta device: nothing is allocated for them. Then the same of folders in the published layout, whose
files are sparse: their small tensors are there, their large ones are holes that nobody may read if it is to be done in seconds.
Each has a process of its own, whose peak is what is told. Prints Markdown tables.

    python -m benchmarks.planning_large [--shapes neox-70b llama-70b bloom-176b llama-405b] [--tokens 16]
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import resource
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from benchmarks.large_folders import write
from benchmarks.record import recorded
from normfuse.graph.program import Program
from normfuse.planning.planner import plan
from tests.zoo import torchvision_shim

NEOX = {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "intermediate_size": 32768,
    "vocab_size": 50432,
}
BLOOM = {"hidden_size": 14336, "n_layer": 70, "n_head": 112, "vocab_size": 250880}
LLAMA = {
    "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "intermediate_size": 28672, "vocab_size": 32000,
}  # fmt: skip
LARGEST = LLAMA | {
    "hidden_size": 16384, "num_hidden_layers": 126, "num_attention_heads": 128, "intermediate_size": 53248,
    "vocab_size": 128256,
}  # fmt: skip
SHAPES: Mapping[str, tuple[str, Mapping[str, int], str]] = {
    "neox-70b": ("GPTNeoXForCausalLM", NEOX, "pre_rmsnorm"),
    "llama-70b": ("LlamaForCausalLM", LLAMA, "fold_affine"),
    "bloom-176b": ("BloomForCausalLM", BLOOM, "pre_rmsnorm"),
    "llama-405b": ("LlamaForCausalLM", LARGEST, "fold_affine"),
}


def measure(shape: str, tokens: int) -> list[Any]:
    """Weights, nodes, norms, seconds of build, trace, plan and apply, and the peak in bytes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torchvision_shim.install()
    import transformers

    name, sizes, pass_name = SHAPES[shape]
    cls = getattr(transformers, name)
    laps = [time.perf_counter()]
    with torch.device("meta"):
        model = cls(cls.config_class(**sizes, use_cache=False)).to(torch.bfloat16).eval()
        ids = torch.zeros(1, tokens, dtype=torch.long)
    laps.append(time.perf_counter())
    program = Program.trace(model, (), {"input_ids": ids})
    laps.append(time.perf_counter())
    chosen = plan(program, [pass_name])
    laps.append(time.perf_counter())
    chosen.apply(program)
    laps.append(time.perf_counter())
    norms = sum(len(each.sites) for each in chosen.rewrites)
    weights = sum(each.numel() for each in model.parameters())
    seconds = [after - before for before, after in itertools.pairwise(laps)]
    return [weights, len(program.graph.nodes), norms, *seconds, _peak()]


def measure_folder(shape: str, tokens: int, home: str) -> list[Any]:
    """Files, bytes, seconds to open, trace, plan and check the form of a folder, and the peak in bytes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torchvision_shim.install()
    import normfuse

    folder, (_, _, pass_name) = Path(home), SHAPES[shape]
    started = time.perf_counter()
    held = normfuse.open(folder)
    opened = time.perf_counter() - started
    given = {"input_ids": torch.arange(tokens)[None]}
    report = normfuse.rewrite(held, pass_name, kwargs=given, verify="structure").report
    norms = sum(len(each.sites) for each in report.plan.rewrites)
    whole = time.perf_counter() - started
    files = list(folder.glob("*.safetensors"))
    seconds = (opened, report.seconds["trace"], report.seconds["plan"], report.seconds["verify"], whole)
    return [len(files), sum(each.stat().st_size for each in files), norms, *seconds, _peak()]


def hollow(shape: str, folder: Path) -> None:
    """A folder of a shape, without its large tensors."""
    torchvision_shim.install()
    import transformers

    name, sizes, _ = SHAPES[shape]
    cls = getattr(transformers, name)
    with torch.device("meta"):
        settings = cls.config_class(**sizes, use_cache=False, architectures=[name], dtype="bfloat16")
        model = cls(settings)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if settings.tie_word_embeddings else set()
    tensors = [(key, tuple(value.shape)) for key, value in model.state_dict().items() if key not in tied]
    write(folder, settings.to_dict(), tensors, 5 * 10**9, hollow=True)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=16)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows, folders = [], []
    for shape in track(options.shapes, "measuring"):
        with context.Pool(1) as alone:
            rows.append((shape, *alone.apply(measure, (shape, options.tokens))))
        with tempfile.TemporaryDirectory() as home:
            with context.Pool(1) as alone:
                alone.apply(hollow, (shape, Path(home) / shape))
            with context.Pool(1) as alone:
                folders.append((shape, *alone.apply(measure_folder, (shape, options.tokens, f"{home}/{shape}"))))
    print(f"torch {torch.__version__}, one thread, bfloat16 on the meta device; seconds\n")
    print("| shape | weights | pass | graph nodes | norms | build | trace | plan | apply | in all | peak |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for shape, weights, nodes, norms, build, trace, planning, apply, peak in rows:
        times = " | ".join(f"{each:.1f}" for each in (build, trace, planning, apply, build + trace + planning + apply))
        print(
            f"| {shape} | {weights / 1e9:.0f} B | {SHAPES[shape][2]} | {nodes} | {norms} | {times} | {peak / 2**30:.2f} GiB |"
        )
    print("\nthe same as folders, planned and checked for form; seconds; the limits are 60 s and 2 GiB for 70 B\n")
    print("| folder | size | files | pass | norms | open | trace | plan | check | in all | peak |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for shape, files, size, norms, *seconds, peak in folders:
        times = " | ".join(f"{each:.1f}" for each in seconds)
        print(f"| {shape} | {size / 1e9:.0f} GB | {files} | {SHAPES[shape][2]} | {norms} | {times} | {peak / 2**30:.2f} GiB |")


if __name__ == "__main__":
    recorded(main)
