"""What a change of a model costs on real inputs: cross-entropy, accuracy, divergence, and the tokens that suffer most."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import RenderableType
from rich.text import Text
from torch import Tensor

from normfuse.errors import InputError
from normfuse.graph.interpreter import flat_inputs, run
from normfuse.graph.program import Program
from normfuse.proof.measuring import Progress
from normfuse.report.text import plain_table
from normfuse.sources.batches import taken
from normfuse.stripping.calibration import TARGETS, Batch, inputs_of, targets_of

IGNORED = -100
WORST = 8
VISIBLE = 1e-3  # nats: below it nobody suffers


@dataclass(frozen=True)
class Worst:
    """A token that suffers.

    Attributes:
        batch: number of its batch.
        row: its place in the batch.
        position: its place in the sequence; 0 where there is none.
        target: what was to be predicted.
        kl: divergence of the changed prediction from the original one, in nats.
        before: cross-entropy of the original, in nats.
        after: cross-entropy of the changed model.
    """

    batch: int
    row: int
    position: int
    target: int
    kl: float
    before: float
    after: float


@dataclass(frozen=True)
class Quality:
    """A model and its changed version on the same data; means over predictions, in nats.

    Attributes:
        predictions: how many were compared.
        loss_before: cross-entropy of the original.
        loss_after: cross-entropy of the changed model.
        accuracy_before: share of predictions whose likeliest class is the target.
        accuracy_after: likewise.
        kl: mean divergence KL(original ‖ changed).
        agreement: share of predictions with the same likeliest class in both.
        worst: the predictions that diverge most, the worst one first.
    """

    predictions: int
    loss_before: float
    loss_after: float
    accuracy_before: float
    accuracy_after: float
    kl: float
    agreement: float
    worst: tuple[Worst, ...]

    @property
    def increase(self) -> float:
        """How much the loss rose."""
        return self.loss_after - self.loss_before

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON types."""
        return {**asdict(self), "increase": self.increase, "worst": [asdict(each) for each in self.worst]}

    def render(self) -> Iterator[RenderableType]:
        """The figures for a terminal."""
        table = plain_table("measured", "before", "after", "change")
        rows = (
            ("cross-entropy (nats)", self.loss_before, self.loss_after, f"{self.increase:+.4f}"),
            ("accuracy", self.accuracy_before, self.accuracy_after, f"{self.accuracy_after - self.accuracy_before:+.4f}"),
        )
        for name, before, after, change in rows:
            table.add_row(Text(name), Text(f"{before:.4f}"), Text(f"{after:.4f}"), Text(change))
        yield table
        said = f"on {self.predictions} predictions: KL {self.kl:.2e} nats, the same choice in {self.agreement:.2%}"
        yield Text(said)
        for each in (token for token in self.worst[:3] if token.kl > VISIBLE):
            where = f"batch {each.batch}, row {each.row}, position {each.position}"
            yield Text(f"worst: {where}: KL {each.kl:.3f}, cross-entropy {each.before:.3f} → {each.after:.3f}", "dim")


def loss(program: Program, batches: Sequence[Batch]) -> float:
    """Cross-entropy of a program on some batches, in nats per prediction.

    Raises:
        InputError: a batch has no targets and its inputs are not tokens that tell them.
    """
    total, count = 0.0, 0
    for batch in batches:
        logits, targets = predicted(program, batch)
        total += F.cross_entropy(logits, targets, reduction="sum").item()
        count += len(targets)
    return total / count


def measure(a: Program, b: Program, batches: Sequence[Batch], progress: Progress | None = None) -> Quality:
    """What a program becomes when it is replaced by another one.

    Args:
        a: the original.
        b: what replaces it.
        batches: inputs, with targets or tokens whose successors are the targets.
        progress: told (what, done, total).
    """
    sums, count, worst = torch.zeros(6, dtype=torch.float64), 0, []
    for number, batch in enumerate(batches):
        if progress:
            progress("measuring", number, len(batches))
        (logits, targets), (changed, _) = predicted(a, batch), predicted(b, batch)
        old, new = logits.log_softmax(-1), changed.log_softmax(-1)
        kl = (old.exp() * (old - new)).sum(-1)
        each = torch.arange(len(targets))
        losses = -old[each, targets], -new[each, targets]
        choices = logits.argmax(-1), changed.argmax(-1)
        figures = (*losses, choices[0] == targets, choices[1] == targets, kl, choices[0] == choices[1])
        sums += torch.stack([figure.double().sum() for figure in figures])
        count += len(targets)
        length = _length(batch, len(targets))
        for place in kl.topk(min(WORST, len(kl))).indices.tolist():
            row, position = divmod(place, length)
            told = (kl[place].item(), losses[0][place].item(), losses[1][place].item())
            worst.append(Worst(number, row, position, int(targets[place]), *told))
    before, after, right_before, right_after, divergence, agreement = (sums / max(count, 1)).tolist()
    suffering = tuple(heapq.nlargest(WORST, worst, key=lambda token: token.kl))
    return Quality(count, before, after, right_before, right_after, divergence, agreement, suffering)


def predicted(program: Program, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (predictions, classes) in float64 and their targets; ignored targets are left out.

    The targets are those of the batch. Without any, an input of token ids tells them: each token but the first is the target
    of the position before it.

    Raises:
        InputError: there are no targets.
    """
    given = taken(program, inputs_of(batch))
    outputs = run(program, flat_inputs(program, given.args, given.kwargs))
    logits = next((each for each in outputs if each.is_floating_point() and each.dim() > 1), None)
    if logits is None:
        raise InputError("the model has no output of logits", hint="give a model whose first floating output is one")
    targets = targets_of(batch)
    if targets is None:
        tokens = next((each for each in (*given.args, *given.kwargs.values()) if _are_tokens(each, logits)), None)
        if tokens is None:
            hint = f"put them into the data under the key '{TARGETS}', in the shape of the logits without their last axis"
            raise InputError("nothing tells the targets of these inputs", hint=hint)
        logits, targets = logits[:, :-1], tokens[:, 1:]
    elif targets.shape != logits.shape[:-1]:
        raise InputError(f"targets of shape {tuple(targets.shape)} do not fit logits of shape {tuple(logits.shape)}")
    kept = targets.flatten() != IGNORED
    return logits.flatten(0, -2)[kept].double(), targets.flatten()[kept].long()


def _are_tokens(value: Any, logits: Tensor) -> bool:
    """Whether an input has a token id for every prediction."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
        return False
    return value.dim() == 2 and value.shape == logits.shape[:-1]


def _length(batch: Batch, predictions: int) -> int:
    """Predictions per row, as far as every row has as many."""
    first = next(iter(inputs_of(batch).kwargs.values()), None) if not inputs_of(batch).args else inputs_of(batch).args[0]
    rows = first.shape[0] if isinstance(first, Tensor) and first.dim() else 1
    return predictions // rows if predictions % rows == 0 else predictions
