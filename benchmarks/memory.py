"""How much memory does a rewrite need? Peak resident memory by stage, in multiples of the model's weights.

Each stage runs in a process of its own on a pre-LN Transformer of about 400 MB (float32). Prints a Markdown table.

    python -m benchmarks.memory [--width 1024] [--layers 8]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

from benchmarks.record import recorded

STAGES = ("load", "structure", "structure + save", "full", "full + save")


def encoder(width: int, layers: int) -> nn.Module:
    """A pre-LN encoder with spread weights."""
    layer = nn.TransformerEncoderLayer(width, 16, 4 * width, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False).eval()


def one_stage(stage: str, path: Path) -> dict[str, float]:
    """Run one stage and say the peak of this process, above what importing took."""
    import normfuse

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    warm = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    normfuse.rewrite(warm, "pre_rmsnorm", inputs=(torch.randn(2, 8),))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    base = status("VmRSS")
    model = normfuse.load(path)
    assert isinstance(model, nn.Module)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1024
    if stage == "load":
        sum(p.sum() for p in model.parameters())
    else:
        x = torch.randn(1, 8, next(model.parameters()).shape[-1])
        result = normfuse.rewrite(model, "pre_rmsnorm", inputs=(x,), verify=stage.split(" ")[0])
        if stage.endswith("save"):
            result.save(path.with_suffix(".out.pt2"))
    return {"weights": weights / 1024, "peak": (status("VmHWM") - base) / 1024}


def status(field: str) -> float:
    """A figure of this process in KiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(field)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--path", type=Path)
    options = parser.parse_args()
    if options.stage:
        print(json.dumps(one_stage(options.stage, options.path)))
        return
    print(f"torch {torch.__version__}, one thread; peak resident memory above a warm process\n")
    print("| stage | weights (MiB) | peak (MiB) | peak / weights |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoder.pt"
        torch.save(encoder(options.width, options.layers), path)
        for stage in STAGES:
            command = [sys.executable, "-m", "benchmarks.memory", "--stage", stage, "--path", str(path)]
            figures = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
            ratio = figures["peak"] / figures["weights"]
            print(f"| {stage} | {figures['weights']:.0f} | {figures['peak']:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    recorded(main)
