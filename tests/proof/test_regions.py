"""A rewrite proven region by region: what is wrong is found and named, what is right holds, whatever it relies on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.errors import NormfuseError, VerificationFailed
from normfuse.graph.blocks import rounded
from normfuse.graph.edits import Reroute, apply
from normfuse.graph.expressions import Number, Read, Ref
from normfuse.graph.interpreter import flat_inputs
from normfuse.graph.program import Program
from normfuse.modules import written_regions
from normfuse.planning import registry
from normfuse.planning.planner import Plan, plan
from normfuse.proof.cases import Case, cases
from normfuse.proof.evidence import Evidence, Verdict
from normfuse.proof.proving import prove
from normfuse.proof.regions import Search
from tests.every_model import MODELS
from tests.models import D, Mlp, noise, tokens
from tests.mutation.models import MODELS as MUTATED
from tests.mutation.plans import mutants
from tests.sources.test_brought_back import GPT2, saved
from tests.zoo.spread import spread

IDS = (tokens(),)


def rewritten(module: nn.Module, inputs: tuple[Any, ...], *passes: str) -> tuple[Program, Program, Plan]:
    program = Program.trace(spread(module).eval(), inputs)
    chosen = plan(program, passes)
    return program, chosen.apply(program), chosen


def proven(program: Program, other: Program, chosen: Plan, inputs: tuple[Any, ...], level: str = "regions") -> Evidence:
    return prove(program, other, chosen, list(cases(program, flat_inputs(program, inputs))), level=level)


def of(name: str, *passes: str) -> tuple[Program, Program, Plan]:
    return rewritten(MODELS[name].module(), MODELS[name].inputs, *passes)


def sites(evidence: Evidence) -> list[str]:
    return list(dict.fromkeys(row.case.rpartition(": ")[0] for row in evidence.algebra))


@pytest.fixture
def grown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The regions that had to take more in."""
    found: list[str] = []
    grow = Search.grow

    def watched(search: Search, node: Any, depth: int) -> bool:
        found.append(node.name)
        return grow(search, node, depth)

    monkeypatch.setattr(Search, "grow", watched)
    return found


# -- what is right holds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("plain", ("pre_rmsnorm",)),
        ("plain", ("pre_rmsnorm", "fold_affine")),
        ("plain", ("pre_crmsnorm_compressed",)),
        ("tied head", ("pre_rmsnorm",)),
        ("bias on one of two readers", ("fold_affine",)),
        ("shared norm", ("pre_rmsnorm",)),
        ("raw reader before, one centring behind", ("pre_rmsnorm",)),
        ("experts", ("pre_rmsnorm",)),
        ("rms norms", ("fold_affine",)),
    ],
)
def test_regions_hold_each_by_itself(name: str, passes: tuple[str, ...], grown: list[str]) -> None:
    evidence = proven(*of(name, *passes), MODELS[name].inputs)
    assert evidence.ok, evidence.complaint()
    assert (evidence.level, grown) == ("regions", [])
    assert len(sites(evidence)) > 2
    assert {"as seen", "large mean", "zeros", "other weights"} <= {row.case.rpartition(": ")[2] for row in evidence.algebra}
    assert evidence.sensitivity is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_contract_holds_where_the_whole_does(name: str) -> None:
    for each in registry.passes():
        program, other, chosen = of(name, each)
        if chosen.rounds:
            tried = list(cases(program, flat_inputs(program, MODELS[name].inputs)))
            whole = prove(program, other, chosen, tried[:1])
            assert prove(program, other, chosen, tried, level="regions").verdict is whole.verdict, each


class _Centred(nn.Module):
    """Its norm's input has no mean whatever the weights are: a region behind the subtraction does not know that."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mlp = nn.Linear(D, D), Mlp()
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = x - x.mean(-1, keepdim=True)
        return self.mlp(self.norm(x))


def test_a_region_that_relies_on_what_feeds_it_takes_it_in(grown: list[str]) -> None:
    inputs = (noise(2, 3, D),)
    program, other, chosen = rewritten(_Centred(), inputs, "pre_rmsnorm")
    assert chosen.rounds
    assert "mean" not in "".join(str(edit) for each in chosen.rewrites for edit in each.edits)  # nothing centres it again
    assert proven(program, other, chosen, inputs).ok
    assert grown


def test_what_nobody_reads_of_a_value_does_not_matter() -> None:
    """A row of ones has no variance at all: what a norm makes of it is noise, which the output leaves out."""
    evidence = proven(*of("padding with ones", "pre_crmsnorm"), MODELS["padding with ones"].inputs)
    assert evidence.ok, evidence.complaint()


class _Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp, self.head = nn.LayerNorm(D), Mlp(), nn.Linear(D, 3)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.mlp(self.norm(x))) + x)


def test_live_dropout_draws_the_same_in_both() -> None:
    inputs = (noise(2, 3, D),)
    program = Program.trace(spread(_Dropping()), inputs, trains=lambda module: isinstance(module, nn.Dropout))
    chosen = plan(program, ["fold_affine"])
    assert chosen.rounds
    assert proven(program, chosen.apply(program), chosen, inputs).ok


def test_dynamic_sizes_are_tried_at_their_ends() -> None:
    batch = torch.export.Dim("batch", min=2, max=6)
    program = Program.trace(MODELS["plain"].module(), IDS, dynamic_shapes=({0: batch},))
    chosen = plan(program, ["pre_rmsnorm"])
    evidence = proven(program, chosen.apply(program), chosen, IDS)
    assert evidence.ok
    assert any("largest dynamic dims" in row.case for row in evidence.algebra)


# -- what is wrong is found --------------------------------------------------------------------------------------------


def _off(program: Program, name: str) -> Program:
    """A formula of the program off by one part in ten thousand."""
    return replace(program, formulas={**program.formulas, name: program.formulas.get(name, Read(name)) * Number(1.0001)})


@pytest.mark.parametrize(
    ("name", "site"),
    [("mlps.0.down.weight", "mlps.0.down"), ("mlps.1.up.weight", "norms.1"), ("mlps.1.down.bias", "mlps.1.down")],
)
def test_a_wrong_formula_is_disproven_and_its_region_named_by_where_it_begins(name: str, site: str) -> None:
    program, other, chosen = of("plain", "pre_rmsnorm", "fold_affine")
    evidence = proven(program, _off(other, name), chosen, IDS)
    assert evidence.verdict is Verdict.DISPROVEN
    assert f"on the case '{site}: " in evidence.complaint()


def test_an_edit_outside_of_all_regions_is_disproven() -> None:
    program, other, chosen = of("plain", "pre_rmsnorm")
    gelu = next(node.name for node in other.graph.nodes if "gelu" in node.name)
    for wrong in (_off(other, "head.weight"), apply(other, [Reroute(gelu, Ref(gelu) * 1.0001)])):
        assert proven(program, wrong, chosen, IDS).verdict is Verdict.DISPROVEN


class Masked(nn.Module):
    """What is masked depends on the inputs: on token ids or on a mask."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by, self.embed, self.first, self.between = by, nn.Embedding(20, D), nn.LayerNorm(D), nn.Linear(D, D)
        self.second, self.head = nn.LayerNorm(D), nn.Linear(D, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        keep = {"ids": ids != 0, "mask": mask != 0}[self.by][..., None]
        found: Tensor = self.head(self.second(self.between(torch.where(keep, self.first(x), torch.zeros_like(x)))))
        return found


@pytest.mark.parametrize("by", ["ids", "mask"])
def test_what_is_wrong_where_only_other_inputs_reach_is_disproven(by: str) -> None:
    ids, mask = torch.arange(1, 11).view(2, 5), torch.ones(2, 5, dtype=torch.long)
    program, right, chosen = rewritten(Masked(by), (ids, mask), "fold_affine")
    wrong = apply(right, [Reroute("zeros_like", Ref("embedding"))])
    padded = mask.clone()
    padded[0, 3:] = 0
    tried = [*cases(program, flat_inputs(program, (ids, mask))), Case("another", (ids, padded), given=True)]
    for level in ("full", "regions"):
        assert prove(program, right, chosen, tried, level=level).ok
        assert prove(program, wrong, chosen, tried, level=level).verdict is Verdict.DISPROVEN


@pytest.mark.parametrize("clamped", [0, 1])
def test_two_outputs_that_became_one_are_both_proven(clamped: int) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = self.head(self.norm(x))
            both = (y.clamp(-2.5, 2.5), y)
            return both if clamped == 0 else both[::-1]

    program, right, chosen = rewritten(Two(), (noise(2, 5, D),), "fold_affine")
    (outputs,) = right.graph.output_node().args
    wrong = apply(right, [Reroute("clamp", Ref(outputs[1 - clamped].name))])  # type: ignore[index, union-attr, arg-type]
    for level in ("full", "regions"):
        found = proven(program, wrong, chosen, (noise(2, 5, D),), level)
        assert found.verdict is Verdict.DISPROVEN


def test_another_stored_value_is_disproven() -> None:
    program, other, chosen = of("plain", "pre_rmsnorm")
    state = dict(other.exported.state_dict)
    state["head.weight"] = nn.Parameter(state["head.weight"].detach() * 1.0001)
    wrong = Program(other.rebuilt(other.exported.graph_module, other.graph, state), other.formulas)
    assert proven(program, wrong, chosen, IDS).verdict is Verdict.DISPROVEN


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATED)
def test_no_mutant_survives_that_the_whole_proof_kills(name: str) -> None:
    _kill(name, 1)


def test_no_mutant_of_some_survives() -> None:
    _kill("plain", 7)


def _kill(name: str, step: int) -> None:
    """Every mutant of a plan that the whole proof kills, or one of so many."""
    program = Program.trace(MUTATED[name].module(), MUTATED[name].inputs)
    chosen = plan(program, ["pre_rmsnorm"])
    for mutant in list(mutants(chosen, program))[::step]:
        try:
            wrong = mutant.plan.apply(program)
            whole = proven(program, wrong, mutant.plan, MUTATED[name].inputs, "full")
        except (NormfuseError, RuntimeError, ValueError, KeyError, AssertionError):
            continue
        assert whole.ok or not proven(program, wrong, mutant.plan, MUTATED[name].inputs).ok, mutant


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_a_folder_is_proven_by_its_tensors_and_the_regions_of_its_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "m", "GPT2LMHeadModel", GPT2)
    result = normfuse.rewrite(normfuse.open(tmp_path / "m"), "pre_rmsnorm", verify="regions")
    written = result.write_back(tmp_path / "out")
    assert written.evidence is not None
    assert (written.evidence.level, written.evidence.ok) == ("regions", True)
    monkeypatch.setattr(written_regions, "rounded", lambda *args: torch.nextafter(rounded(*args), torch.tensor(9.0)))
    with pytest.raises(VerificationFailed, match=r"the tensor 'transformer\..*' that was written is not what the plan says"):
        result.write_back(tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
