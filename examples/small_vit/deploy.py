"""Fold the norms of the trained twins, and print what that changed: `python examples/small_vit/deploy.py`.

Reads the `<norm>.safetensors` that `train.py` wrote. Each twin is rewritten and proven, and named beside its original on the
whole test set; both are exported and timed in ONNX Runtime. Prints Markdown; keeps the deployed files with `--out`.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from pictures import Pictures, cifar10, made_up
from rich.progress import track
from safetensors import safe_open
from small_vit import TWINS, make_twin
from torch import Tensor, nn
from torch.export import Dim

import normfuse
from normfuse.exporters.onnxruntime import fused_ops

FOLDS = ["offline_norm"]
BATCHES = {1: 2000, 64: 150}  # images in a call: calls that are timed
NORM_OPS = ("norm", "sqrt", "var", "pow", "std")


@dataclass(frozen=True)
class Twin:
    """A trained twin, the same one folded, and what was said of both.

    Attributes:
        norm: one of `TWINS`.
        figures: of its training.
        model: as it was trained, in eval mode.
        result: the rewritten program with its report.
    """

    norm: str
    figures: Mapping[str, str]
    model: nn.Module
    result: normfuse.Result


def load(path: Path) -> tuple[nn.Module, dict[str, str]]:
    """Returns a trained twin in eval mode, and the figures of its training."""
    with safe_open(path, framework="pt") as file:
        figures = dict(file.metadata())
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a dict
    model = make_twin(figures["norm"], int(figures["steps"]))
    model.load_state_dict(state)
    return model.eval(), figures


def fold(path: Path, example: Tensor) -> Twin:
    """Returns a trained twin with its norms folded, for any number of images; raises if the proof fails."""
    model, figures = load(path)
    result = normfuse.rewrite(model, FOLDS, inputs=(example,), dynamic_shapes=({0: Dim("batch")},))
    return Twin(figures["norm"], figures, model, result)


@torch.no_grad()
def named(model: Callable[[Tensor], Tensor], pictures: Pictures) -> Tensor:
    """Returns the class that the model gives each picture."""
    return torch.cat([model(part).argmax(1) for part in torch.split(pictures.inputs(), 500)])


def norm_ops(ops: Mapping[str, int]) -> int:
    """Returns how many of the operators compute a norm, or anything that only a norm needs in this model."""
    return sum(count for op, count in ops.items() if any(part in op.lower() for part in NORM_OPS))


def graph_ops(program: normfuse.Program) -> Counter[str]:
    """Returns operator -> number of nodes of a program."""
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


def proof_table(twins: Sequence[Twin], test: Pictures) -> list[str]:
    """Returns a row per twin: accuracy before and after, what became of the norms, and the proof."""
    rows = [
        "| twin | accuracy | folded | same class | norms | folded | norm operators left | algebra: error / own noise "
        "| rounding |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for twin in twins:
        before, after = named(twin.model, test), named(twin.result.module(), test)
        right = [f"{(each == test.classes).float().mean().item():.2%}" for each in (before, after)]
        same = f"{int((before == after).sum()):,} of {len(test.classes):,}"
        report, evidence = twin.result.report, twin.result.report.evidence
        proof = ["–", "–"]  # what was not changed needs no proof
        if evidence.algebra:
            proof = [f"{evidence.error:.1e} / {evidence.noise:.1e}", f"{evidence.ratio:.2f}"]
        cells = (twin.norm, *right, same, _kinds(report.norms_before), _kinds(report.norms_after))
        rows.append(f"| {' | '.join(cells)} | {norm_ops(graph_ops(twin.result.program))} | {' | '.join(proof)} |")
    return rows


def _kinds(norms: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in norms.items() if count) or "none"


def export(twins: Sequence[Twin], folder: Path) -> dict[str, Path]:
    """Writes the twins as ONNX, trained and folded, each compared in ONNX Runtime; returns the files by name."""
    files = {}
    for twin in twins:
        files[twin.norm] = folder / f"{twin.norm}.onnx"
        given = twin.result.inputs
        normfuse.export(twin.model, files[twin.norm], inputs=given.args, dynamic_shapes=({0: Dim("batch")},))
        if any(twin.result.report.plan.rewrites):
            twin.result.save(folder / f"{twin.norm}.folded.pt2")
            files[f"{twin.norm}, folded"] = folder / f"{twin.norm}.folded.onnx"
            normfuse.export(twin.result, files[f"{twin.norm}, folded"])
    return files


def session(path: Path) -> Any:
    """Returns an ONNX Runtime session on one thread of the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def latencies(sessions: Mapping[str, Any], images: Tensor, calls: int) -> dict[str, list[float]]:
    """Returns seconds per call of every session; they take turns, so that what disturbs one disturbs all."""
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    feed = {next(iter(sessions.values())).get_inputs()[0].name: images.numpy()}
    for _ in range(calls):
        for name, each in sessions.items():
            start = time.perf_counter()
            each.run(None, feed)
            seconds[name].append(time.perf_counter() - start)
    return {name: times[calls // 10 :] for name, times in seconds.items()}  # the first ones warm up


def latency_table(twins: Sequence[Twin], files: Mapping[str, Path], images: Tensor, share: float) -> list[str]:
    """Returns a row per file: nodes of the graph and in ONNX Runtime, and the time beside the first file's."""
    sessions = {name: session(path) for name, path in files.items()}
    sizes = {size: latencies(sessions, images[:size], max(10, int(calls * share))) for size, calls in BATCHES.items()}
    programs = {twin.norm: normfuse.Program.trace(twin.model, (images[:2],), {}, None) for twin in twins}
    programs |= {f"{twin.norm}, folded": twin.result.program for twin in twins}
    heads = " | ".join(f"batch {size}: ms | ratio of medians | of minima" for size in sizes)
    rows = [f"| file | graph nodes | ONNX Runtime nodes | … of norms | {heads} |", "|---" * (4 + 3 * len(sizes)) + "|"]
    for name, path in files.items():
        ran = fused_ops(path)
        cells = [name, str(graph_ops(programs[name]).total()), str(sum(ran.values())), str(norm_ops(ran))]
        for seconds in sizes.values():
            own, first = seconds[name], next(iter(seconds.values()))
            ratios = (statistics.median(own) / statistics.median(first), min(own) / min(first))
            cells += [f"{1e3 * statistics.median(own):.2f}", *(f"{ratio:.2f}" for ratio in ratios)]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def training_table(twins: Sequence[Twin]) -> list[str]:
    """Returns a row per twin: what its training cost and reached."""
    rows = ["| twin | steps | CPU seconds | loss at the end | validation | after closing |", "|---|---|---|---|---|---|"]
    for twin in twins:
        f = twin.figures
        shown = [f"{float(f[key]):.2%}" for key in ("validation_before_closing", "validation")]
        rows.append(f"| {twin.norm} | {f['steps']} | {f['cpu_seconds']} | {f['final_loss']} | {' | '.join(shown)} |")
    return rows


def check(twins: Sequence[Twin]) -> None:
    """Leaves with a message if a norm that is constant at inference was not folded."""
    for twin in twins:
        left = norm_ops(graph_ops(twin.result.program)) or sum(twin.result.report.norms_after.values())
        if left and twin.norm != "layer_norm":
            sys.exit(f"{twin.norm}: {left} norms are left; normfuse inspect says why")


def main() -> None:
    """Folds, measures and prints."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Fold the norms of the trained small vision Transformers and compare.")
    parser.add_argument("--weights", type=Path, default=here, help="folder that train.py wrote to (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder to keep the .pt2 and .onnx files in (default: a temporary one)")
    parser.add_argument("--smoke", action="store_true", help="made-up pictures and few timed calls, to try the script")
    options = parser.parse_args()

    torch.set_num_threads(1)
    test = (made_up() if options.smoke else cifar10()).test
    images = test.inputs()[: max(BATCHES)]
    paths = [options.weights / f"{norm}.safetensors" for norm in TWINS]
    twins = [fold(path, images[:4]) for path in track(paths, "folding")]
    check(twins)
    print(f"\ntorch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}, one thread\n")
    print("\n".join([*training_table(twins), "", *proof_table(twins, test), ""]))
    with tempfile.TemporaryDirectory() as scratch:
        files = export(twins, options.out or Path(scratch))
        print("\n".join(latency_table(twins, files, images, share=0.01 if options.smoke else 1.0)))


if __name__ == "__main__":
    main()
