"""Is a stream of d - 1 entries faster than one of d? Prints Markdown tables.

All variants of a row take turns in one run, on one thread, timed by that thread's own clock on a CPU, so that other processes
cost cache but not time. A cell has the median in µs and, in brackets, the ratio of the medians and of the minima to the first
column's: below one is faster.

    python -m benchmarks.crms_norm [--device cuda] [--dtype float16] [--models "ViT-Ti"] [products] [eager] [compile] [ort]
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normfuse
from benchmarks.record import recorded
from benchmarks.rms_norm import heading, row
from normfuse.graph.program import Program

PRODUCTS = {  # tokens, d
    "d = 64, 64 tokens": (64, 64),
    "ViT-Ti, 1 image": (197, 192),
    "ViT-Ti, 8 images": (8 * 197, 192),
    "ViT-S, 1 image": (197, 384),
    "ViT-B, 1 image": (197, 768),
    "GPT-2 small, 128 tokens": (128, 768),
    "GPT-2 small, 1 token": (1, 768),
}
PASSES = ("pre_rmsnorm", "pre_crmsnorm", "pre_crmsnorm_compressed")
Build = Callable[[], tuple[nn.Module, Tensor]]


class Small(nn.Module):
    """Four pre-LN layers of width 64 behind an embedding, before a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(256, 64), nn.Linear(64, 256)
        block = nn.TransformerEncoderLayer(64, 4, 256, activation="gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 4, nn.LayerNorm(64), enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.blocks(self.table(ids)))
        return logits


def vit(name: str, batch: int) -> tuple[nn.Module, Tensor]:
    from tests.zoo import torchvision_shim

    torchvision_shim.install()  # before timm
    import timm

    return timm.create_model(f"vit_{name}_patch16_224"), torch.randn(batch, 3, 224, 224)


def gpt2(batch: int, tokens: int) -> tuple[nn.Module, Tensor]:
    from tests.zoo import torchvision_shim

    torchvision_shim.install()  # before transformers
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(use_cache=False)), torch.randint(0, 50257, (batch, tokens))


def small(batch: int) -> tuple[nn.Module, Tensor]:
    return Small(), torch.randint(0, 256, (batch, 64))


MODELS: dict[str, Build] = {
    "d = 64, 1 sequence": partial(small, 1),
    "d = 64, 8 sequences": partial(small, 8),
    "ViT-Ti, 1 image": partial(vit, "tiny", 1),
    "ViT-Ti, 8 images": partial(vit, "tiny", 8),
    "ViT-S, 1 image": partial(vit, "small", 1),
    "ViT-S, 8 images": partial(vit, "small", 8),
    "ViT-B, 1 image": partial(vit, "base", 1),
    "ViT-B, 8 images": partial(vit, "base", 8),
    "GPT-2 small, 1 × 64 tokens": partial(gpt2, 1, 64),
    "GPT-2 small, 8 × 64 tokens": partial(gpt2, 8, 64),
}


def products(device: str, _: str) -> None:
    """The matrix products that read and write a stream."""
    columns = ["reads d", "reads d - 1", "writes d", "writes d - 1"]
    heading("Products of a stream with a four times wider layer", ["shape", *columns])
    for name, (tokens, d) in PRODUCTS.items():
        sizes = ((d, 4 * d), (d - 1, 4 * d), (4 * d, d), (4 * d, d - 1))
        calls = {column: _product(tokens, *each, device) for column, each in zip(columns, sizes, strict=True)}
        row(name, calls, 15, device)


def _product(tokens: int, given: int, made: int, device: str) -> Callable[[], object]:
    x, weight, bias = (torch.randn(*sizes, device=device) for sizes in ((tokens, given), (made, given), (made,)))
    return partial(nn.functional.linear, x, weight, bias)


def programs(build: Build, device: str) -> Iterator[tuple[str, Program, Tensor]]:
    """The model, and what each pass makes of it."""
    torch.manual_seed(0)
    model, x = build()
    model, x = model.eval().to(device), x.to(device)
    x = x.to(torch.get_default_dtype()) if x.is_floating_point() else x
    yield "original", Program.trace(model, (x,)), x
    for name in PASSES:
        yield name, normfuse.rewrite(model, name, inputs=(x,), verify="structure").program, x


def table(title: str, device: str, chosen: str, runner: Callable[[Program, Tensor], Callable[[], object]], rounds: int) -> None:
    """One row per model, one column per pass."""
    heading(title, ["model", "original", *PASSES])
    for name, build in MODELS.items():
        if chosen in name:
            calls = {each: runner(program, x) for each, program, x in programs(build, device)}
            row(name, calls, rounds, device)
            torch._dynamo.reset()


def eager(device: str, chosen: str) -> None:
    """Exported programs, run operator by operator."""
    table("Eager", device, chosen, lambda program, x: partial(program.module(), x), 9)


def compiled(device: str, chosen: str) -> None:
    """Exported programs behind torch.compile."""
    table("torch.compile", device, chosen, lambda program, x: partial(torch.compile(program.module()), x), 9)  # type: ignore[arg-type]


def ort(device: str, chosen: str) -> None:
    """ONNX files in ONNX Runtime."""
    with tempfile.TemporaryDirectory() as folder:
        table("ONNX Runtime", device, chosen, partial(_session, Path(folder), device), 9)


def _session(folder: Path, device: str, program: Program, x: Tensor) -> Callable[[], object]:
    import onnxruntime

    from normfuse.exporters.onnx import export

    info = export(program.baked().exported, folder / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
    session: Any = onnxruntime.InferenceSession(str(info.path), options, providers=[provider])
    return partial(session.run, None, {session.get_inputs()[0].name: x.cpu().numpy()})


def main() -> None:
    tables = {"products": products, "eager": eager, "compile": compiled, "ort": ort}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", default=[], help=", ".join(tables))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--models", default="", help="a part of the models' names")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_default_dtype(getattr(torch, options.dtype))
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, {options.device}, {options.dtype}; µs (ratio of medians, of minima)")
    with torch.no_grad():
        for name in options.tables or tables:
            tables[name](options.device, options.models)


if __name__ == "__main__":
    recorded(main)
