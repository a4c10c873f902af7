"""The comparison itself: what counts as a difference, and that wrong rewrites are noticed."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import normfuse
from normfuse.errors import VerificationFailed
from normfuse.graph.edits import SetTensor
from normfuse.graph.expressions import Read
from normfuse.graph.interpreter import run
from normfuse.proof.cases import Case
from normfuse.proof.differences import distance
from normfuse.proof.equivalence import compare
from normfuse.proof.noise import samples_of_rounding
from normfuse.proof.sides import Side
from tests.models import IDS, TRAPS, Trap, noise

inf, nan = torch.inf, torch.nan


@pytest.mark.parametrize(
    ("truth", "other", "expected"),
    [
        ([1.0, 4.0], [1.0, 4.0], 0.0),
        ([1.0, 4.0], [1.0, 5.0], 0.25),
        ([inf, 1.0], [inf, 1.0], 0.0),
        ([inf, 1.0], [inf, 2.0], 1.0),
        ([inf, 1.0], [-inf, 1.0], math.inf),
        ([nan, 1.0], [nan, 1.0], 0.0),
        ([nan, 1.0], [0.0, 1.0], math.inf),
        ([0.0, 1.0], [nan, 1.0], math.inf),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [0.0, 1e-30], math.inf),
        ([1.0], [1.0, 1.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_distance(truth: list[float], other: list[float], expected: float) -> None:
    assert distance(torch.tensor(truth), torch.tensor(other)) == expected


def test_integers_must_be_equal() -> None:
    assert distance(torch.tensor([1, 2]), torch.tensor([1, 2])) == 0.0
    assert distance(torch.tensor([1, 2]), torch.tensor([1, 3])) == math.inf


def test_a_module_is_equivalent_to_itself_and_to_its_rewrite() -> None:
    model = TRAPS["plain"].module()
    rewritten = normfuse.rewrite(model, "pre_rmsnorm", inputs=IDS).module()
    assert normfuse.verify(model, model, inputs=IDS).ok
    assert normfuse.verify(model, rewritten, inputs=IDS).ok


def _scaled_channel(model: Any) -> None:
    model.mlps[0].up.weight[0] *= 1.001


def _dropped_bias(model: Any) -> None:
    model.mlps[1].down.bias.zero_()


def _half_centred(model: Any) -> None:
    model.mlps[0].down.weight -= model.mlps[0].down.weight.mean(0, keepdim=True)


def _eps(model: Any) -> None:
    model.norms[0].eps = 1e-3


@pytest.mark.parametrize("mutate", [_scaled_channel, _dropped_bias, _eps])
def test_wrong_models_are_noticed(mutate: Any) -> None:
    right, wrong = TRAPS["plain"].module(), TRAPS["plain"].module()
    with torch.no_grad():
        mutate(wrong)
    evidence = normfuse.verify(right, wrong, inputs=IDS)
    assert not evidence.ok
    with pytest.raises(VerificationFailed, match="differ by"):
        evidence.require()


def test_a_harmless_change_is_no_alarm() -> None:
    """Centring a writer of a LayerNorm changes the weight and not the function."""
    right, other = TRAPS["plain"].module(), TRAPS["plain"].module()
    with torch.no_grad():
        _half_centred(other)
    assert normfuse.verify(right, other, inputs=IDS).ok


def test_a_wrong_rewrite_is_refused_and_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that forgets the biases: the proof stops it."""
    from normfuse.planning.planner import Plan, plan

    def forgetful(program: normfuse.Program, names: list[str], **options: object) -> tuple[Plan, normfuse.Program]:
        chosen = plan(program, names)
        biases = [e for r in chosen.rewrites for e in r.edits if isinstance(e, SetTensor) and e.name.endswith("down.bias")]
        for edit in biases:
            chosen = chosen.without(edit)
        return chosen, chosen.apply(program)

    monkeypatch.setattr("normfuse.api.rewriting.plan_and_apply", forgetful)
    with pytest.raises(VerificationFailed) as caught:
        normfuse.rewrite(TRAPS["plain"].module(), "pre_rmsnorm", inputs=IDS)
    assert caught.value.exit_code == 1
    assert not caught.value.report.evidence.ok


def test_the_planner_does_not_trust_a_pass_with_tied_tensors() -> None:
    """A pass that overlooks the tied head's reading of the table is refused, whole."""
    from normfuse.graph.findings import Claim, Rewrite
    from normfuse.planning.planner import plan
    from normfuse.planning.registry import Pass

    program = normfuse.Program.trace(TRAPS["tied head"].module(), IDS)
    (name,) = [each for each in program.stored.values() if each in ("embed.weight", "head.weight") and _is_read(program, each)]

    def careless(program: normfuse.Program, facts: object) -> object:
        site = program.site(next(node for node in program.graph.nodes if node.name == "layer_norm"))
        edits = (SetTensor(name, Read(name).centered(1)),)
        yield Rewrite("careless", (site,), ("layer_norm",), "layer_norm", edits, frozenset({"embedding"}), Claim.ROUNDING, "")

    chosen = plan(program, [Pass("careless", careless, "")])  # type: ignore[arg-type]
    assert chosen.rounds == ()
    assert [refusal.code for refusal in chosen.refusals] == ["NF101"]


def _is_read(program: normfuse.Program, name: str) -> bool:
    return bool(program.reader_of(name).users)


def test_noise_is_the_models_own() -> None:
    """An ill-conditioned model is allowed the noise that it has, and no more."""

    class Touchy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.write, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8, eps=1e-12), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.sin(1e6 * self.norm(self.write(x))))

    model = Trap(Touchy, (), 1).module()
    evidence = normfuse.rewrite(model, "pre_rmsnorm", inputs=(noise(4, 8),)).report.evidence
    assert evidence.ok
    assert evidence.noise > 1e-11


def test_every_example_of_a_loader_is_compared() -> None:
    """An entry of a table that only the third batch reads is wrong: no drawn index is needed to see it."""
    table = nn.Embedding(1000, 4)
    wrong = copy.deepcopy(table)
    with torch.no_grad():
        wrong.weight[777] *= 1.001
    words: Any = torch.tensor([[1, 2], [3, 4], [5, 777]])
    batches: Any = DataLoader(words, batch_size=1)
    assert normfuse.verify(table, table, batches).ok
    evidence = normfuse.verify(table, wrong, batches)
    assert [row.case for row in evidence.algebra if not row.ok] == ["example 3"]


def test_files_are_compared_on_every_example_of_a_loader(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    batches = [(torch.full((2, 4), float(n)),) for n in range(3)]
    model = nn.Linear(4, 3)
    for name in ("a.onnx", "b.onnx"):
        normfuse.export(model, tmp_path / name, inputs=iter(batches))
    evidence = normfuse.verify(tmp_path / "a.onnx", tmp_path / "b.onnx", iter(batches))
    assert evidence.ok
    assert [row.case for row in evidence.algebra[-2:]] == ["example 2", "example 3"]
    labelled = normfuse.verify(tmp_path / "a.onnx", tmp_path / "b.onnx", iter([(torch.ones(2, 4), torch.ones(2))]))
    assert labelled.ok
    assert any("labels are none" in note for note in labelled.notes)


# -- an error that is small by luck ------------------------------------------------------------------------------------


class Masked(nn.Module):
    """A sum of entries that a mask of ones and zeros lets through, compared with one."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask * 1.0 == 1.0, x * x, torch.full_like(x, 3.0)).sum(-1)


def test_the_noise_of_rounding_is_of_the_size_of_a_rounding() -> None:
    x, mask = noise(4, 64), torch.arange(64).remainder(2).expand(4, 64).float()
    program = normfuse.Program.trace(Masked(), (x, mask))
    (truth,) = run(program, [x, mask], wide=True)
    for (sample,) in samples_of_rounding(program, [x, mask]):
        assert 1e-8 < distance(truth, sample) < 1e-6, "the mask is compared with whole numbers, which no rounding changes"


@pytest.mark.parametrize(("error", "ok"), [(4e-7, True), (3e-6, False)])
def test_a_lucky_run_of_the_reference_is_no_alarm(error: float, ok: bool) -> None:
    x, calls = torch.linspace(0.5, 1.0, 7), []
    truth = [x.double()]

    def rounding(case: Case) -> Any:
        calls.append(case.name)
        return [[x.double() * (1 + 1e-7)]]

    def lucky_nudge(case: Case, size: float | None, draw: int) -> Any:
        return [x.double() * (1 + 1e-8)]

    lucky = Side("a", "", {"": lambda case: truth}, lambda case: truth, lucky_nudge, None, rounding)
    off = Side("b", "", {"": lambda case: [x.double() * (1 + error)]}, lambda case: truth)
    wrong = replace(off, wide=lambda case: [x.double() * (1 + 1e-6)])
    tried = [Case("as given", (x,))]
    assert compare(lucky, off, tried).ok is ok
    assert calls == ["as given"]
    assert not compare(lucky, wrong, tried).ok
    assert len(calls) == 1, "what differs where nothing is rounded is not excused by rounding"
