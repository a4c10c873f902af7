"""Is a GPT without LayerNorm faster? Prints Markdown tables.

Each row has four programs of one size: the model with its LayerNorms, the same with stored deviations before and after folding
(`strip_layernorm`), and a twin that never had a norm. All take turns in one run, on one thread, timed by that thread's own
clock on a CPU. A cell has the median in µs and, in brackets, the ratio of the medians and of the minima to the first column's:
below one is faster.

    python -m benchmarks.strip [--models "GPT-2"] [eager] [compile] [ort]
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from benchmarks.crms_norm import _session
from benchmarks.record import recorded
from benchmarks.rms_norm import heading, row
from normfuse.graph.program import Program
from normfuse.stripping import attach, places

COLUMNS = ("with LayerNorm", "stored σ", "folded", "never a norm")
MODELS = {  # width, layers, heads, classes, batch, tokens
    "1 M, 1 × 128": (128, 4, 4, 256, 1, 128),
    "1 M, 8 × 128": (128, 4, 4, 256, 8, 128),
    "5 M, 1 × 128": (256, 6, 8, 256, 1, 128),
    "5 M, 8 × 128": (256, 6, 8, 256, 8, 128),
    "GPT-2 small, 1 × 64": (768, 12, 12, 50257, 1, 64),
    "GPT-2 small, 1 × 1": (768, 12, 12, 50257, 1, 1),
}
Runner = Callable[[Program, Tensor], Callable[[], object]]


class Block(nn.Module):
    """Causal attention and an MLP."""

    def __init__(self, width: int, heads: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, norm(width), norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The stream after the block."""
        made = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in made)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


def gpt(width: int, layers: int, heads: int, classes: int, norm: Callable[[int], nn.Module]) -> nn.Module:
    blocks = (Block(width, heads, norm) for _ in range(layers))
    return nn.Sequential(nn.Embedding(classes, width), *blocks, norm(width), nn.Linear(width, classes))


def programs(width: int, layers: int, heads: int, classes: int, batch: int, tokens: int) -> tuple[dict[str, Program], Tensor]:
    """The four programs of a row, and their input."""
    torch.manual_seed(0)
    x = torch.randint(0, classes, (batch, tokens))
    model, bare = (gpt(width, layers, heads, classes, norm) for norm in (nn.LayerNorm, lambda _: nn.Identity()))
    normal = Program.trace(model, (x,))
    made = attach(model, places(model, (x,)))
    model.train()(x)
    for norm in made.values():
        norm.remove()
    removed = Program.trace(model, (x,))
    folded = normfuse.rewrite(removed, "strip_layernorm", inputs=(x,), verify="structure")
    assert not folded.report.plan.refusals
    never = Program.trace(bare, (x,))
    assert _operators(folded.program) == _operators(never), "the folded model is not the one that never had a norm"
    every = (normal, removed, folded.program, never)
    return dict(zip(COLUMNS, every, strict=True)), x


def _operators(program: Program) -> Counter[str]:
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


def table(title: str, chosen: str, runner: Runner) -> None:
    """One row per model."""
    heading(title, ["model", *COLUMNS])
    for name, sizes in MODELS.items():
        if chosen in name:
            made, x = programs(*sizes)
            row(name, {column: runner(program, x) for column, program in made.items()}, 9, "cpu")
            torch._dynamo.reset()


def ort(title: str, chosen: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        table(title, chosen, partial(_session, Path(folder), "cpu"))


def main() -> None:
    tables: dict[str, Callable[[str], None]] = {
        "eager": lambda chosen: table("Eager", chosen, lambda program, x: partial(program.module(), x)),
        "compile": lambda chosen: table(
            "torch.compile",
            chosen,
            lambda program, x: partial(torch.compile(program.module()), x),  # type: ignore[arg-type]
        ),
        "ort": partial(ort, "ONNX Runtime"),
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", default=[], help=", ".join(tables))
    parser.add_argument("--models", default="", help="a part of the models' names")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, CPU, float32; µs (ratio of medians, of minima)")
    with torch.no_grad():
        for name in options.tables or tables:
            tables[name](options.models)


if __name__ == "__main__":
    recorded(main)
