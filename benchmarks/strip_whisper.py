"""How many LayerNorms of the trained Whisper tiny.en can go without training? Prints Markdown tables.

The norms are calibrated and chosen on two clips of real speech, one of them half silence, and measured on a third one. The
targets are the tokens of the original model's own greedy transcript; the metric is the cross-entropy of predicting each of
them from those before it.

    python -m benchmarks.strip_whisper [--bounds 0.01 0.1 1.0]

A bound is a share of the original's own cross-entropy. Weights and recordings arrive through pip (tests/zoo/trained.py).
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import normfuse
from benchmarks.record import recorded
from normfuse.graph.program import Program
from normfuse.stripping.quality import loss, measure
from tests.zoo import trained

LENGTH = 128
CLIPS = {"two_cities": ("two_cities", 0, 22), "beckett": ("beckett", 0, 30), "two_cities, later": ("two_cities", 22, 52)}
"""Recording, and where a clip begins and ends in seconds; the last one is not chosen on."""


def batch(model: Any, clip: str) -> dict[str, torch.Tensor]:
    """A clip with the original model's transcript of it."""
    name, begin, end = CLIPS[clip]
    audio = trained.recording(name)[begin * trained.SAMPLE_RATE : end * trained.SAMPLE_RATE]
    features = trained.log_mel(audio)
    tokens = trained.greedy_tokens(model, features, length=LENGTH)
    print(f"- {clip}: {len(audio) / trained.SAMPLE_RATE:.0f} s, {len(tokens)} tokens, “{trained.text_of(tokens)}”")
    read = [trained.START, trained.NO_TIMESTAMPS, *tokens, trained.END]
    ids = torch.full((1, LENGTH), trained.END)
    ids[0, : len(read) - 1] = torch.tensor(read[:-1])
    targets = torch.full((1, LENGTH), -100)
    targets[0, 1 : len(read) - 1] = torch.tensor(read[2:])  # the prompt is given
    return {"input_features": features, "decoder_input_ids": ids, "targets": targets}


def main() -> None:
    parser = argparse.ArgumentParser(description="Partial removal of Whisper tiny.en's LayerNorms.")
    parser.add_argument("--bounds", type=float, nargs="*", default=[0.01, 0.1, 1.0], help="shares of the cross-entropy")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = trained.whisper_tiny_en()
    *here, there = (batch(model, clip) for clip in CLIPS)
    program = Program.trace(model, (), {key: value for key, value in there.items() if key != "targets"})
    calibration = normfuse.calibrate(program, here)
    print("\n| norm | σ | spread | first token | near-constant |\n|---|---|---|---|---|")
    for each in calibration.norms:
        near = "yes" if each.is_near_constant else ""
        print(f"| {each.site} | {each.mean:.4g} | {each.rest_spread:.1%} | × {each.first:.3g} | {near} |")
    own = loss(program, here)
    head = ["bound", "norms removed", "cross-entropy where chosen", "cross-entropy elsewhere", "same choice elsewhere"]
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for bound in options.bounds:
        found = normfuse.strip(program, here, calibration, max_loss_increase=bound * own, verify="structure")
        quality, other = found.report.quality, measure(program, found.program, [there])
        row = [
            f"{bound:.0%}", f"{len(found.report.removed)} of {len(found.report.candidates)}",
            f"{quality.loss_before:.4f} → {quality.loss_after:.4f}", f"{other.loss_before:.4f} → {other.loss_after:.4f}",
            f"{other.agreement:.1%}",
        ]  # fmt: skip
        print(f"| {' | '.join(row)} |", flush=True)
    costs = sorted(found.report.candidates, key=lambda each: each.cost or 0.0)
    print("\n| norm | its removal alone costs (nats) |\n|---|---|")
    for candidate in costs:
        print(f"| {candidate.site} | {candidate.cost:+.4f} |")


if __name__ == "__main__":
    recorded(main)
