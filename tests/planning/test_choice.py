"""Norms that are not chosen stay as they are, and everything else is rewritten around them: for every model, at random."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import normfuse
from normfuse.analysis.choice import Choice
from normfuse.analysis.facts import Facts, analyze
from normfuse.cli import main
from normfuse.errors import InputError
from normfuse.graph.edits import Edit, Reroute, SetTensor
from normfuse.graph.expressions import Read, Ref
from normfuse.graph.findings import Claim, Finding, Rewrite
from normfuse.graph.interpreter import flat_inputs
from normfuse.graph.program import Program
from normfuse.planning.lockfile import drift
from normfuse.planning.planner import Plan, plan
from normfuse.planning.registry import Pass, codes, passes
from normfuse.proof.cases import cases
from normfuse.proof.proving import prove
from tests.every_model import MODELS
from tests.models import TRAPS, tokens

EVERY_PASS = [name for name in passes() if not name.startswith("pre_crmsnorm")]


def places(program: Program) -> list[str]:
    return list(dict.fromkeys(str(program.site(norm.out)) for norm in analyze(program).every_norm))


def is_untouched(program: Program, rewritten: Program, choice: Choice) -> None:
    """The kept norms' calls are there as they were but for what they normalize, and so are their tensors."""
    facts = Facts(program, choice=choice)
    for norm in facts.every_norm:
        if facts.takes(norm.out):
            continue
        for node in norm.inner:
            now = rewritten.nodes[node.name]
            assert now.target is node.target
            before = [each for each in node.args if each is not norm.x]
            after = [each for each, was in zip(now.args, node.args, strict=True) if was is not norm.x]
            assert str(after) == str(before)
            assert str(now.kwargs) == str(node.kwargs)
    for node in facts.kept:
        if node.name in program.stored:
            name = program.stored[node.name]
            assert name not in rewritten.formulas
            assert rewritten.tensor(name) is program.tensor(name) or torch.equal(rewritten.tensor(name), program.tensor(name))


@pytest.mark.parametrize("name", MODELS)
def test_kept_norms_are_untouched_and_the_rest_is_the_same_function(name: str) -> None:
    draw = random.Random(name)
    program = Program.trace(MODELS[name].module(), MODELS[name].inputs)
    norms = places(program)
    if not norms:
        pytest.skip("no norm")
    given = flat_inputs(program, MODELS[name].inputs)
    for names in (EVERY_PASS, ["pre_crmsnorm"]):
        picked = tuple(draw.sample(norms, draw.randint(1, len(norms))))
        choice = draw.choice([Choice(only=picked), Choice(skip=picked)])
        chosen = plan(program, names, choice=choice)
        rewritten = chosen.apply(program)
        is_untouched(program, rewritten, choice)
        assert not any(choice.why_kept(site) for each in chosen.rewrites for site in each.sites)
        assert Plan.from_json(chosen.to_json()) == chosen
        if chosen.rounds:
            assert prove(program, rewritten, chosen, list(cases(program, given))[:1]).ok


def stream() -> Program:
    return Program.trace(TRAPS["plain"].module(), (tokens(),))


def rewritten_places(chosen: Plan) -> set[str]:
    return {str(site) for each in chosen.rewrites for site in each.sites}


def test_only_and_keep_choose_by_path() -> None:
    assert rewritten_places(plan(stream(), ["pre_rmsnorm"], choice=Choice.of("norms.*"))) == {"norms.0", "norms.1"}
    assert rewritten_places(plan(stream(), ["pre_rmsnorm"], choice=Choice.of(skip="norms.*"))) == {"final"}
    assert rewritten_places(plan(stream(), ["pre_rmsnorm"], choice=Choice.of("norms.*", "*.1"))) == {"norms.0"}


def test_a_kept_norm_is_refused_by_every_pass_that_it_concerns_and_reads_a_zero_mean_stream() -> None:
    program = stream()
    chosen = plan(program, ["pre_rmsnorm", "fold_affine", "conv_bn"], choice=Choice.of(skip="norms.0"))
    kept = [each for each in chosen.refusals if each.code == "NF106"]
    assert {(each.pass_name, str(each.site)) for each in kept} == {("pre_rmsnorm", "norms.0"), ("fold_affine", "norms.0")}
    assert kept[0].reason == "it is kept, as 'norms.0' asks"
    assert "embed.weight" in chosen.apply(program).formulas  # centred all the same
    assert chosen.norms_after({"layer_norm": 3}) == {"layer_norm": 1, "rms_norm": 2}
    assert "NF106" in codes()


@pytest.mark.parametrize("choice", [Choice(only=("norm.*",)), Choice(skip=("norm.*",))])
def test_a_glob_of_no_norm_is_an_error_that_names_the_nearest(choice: Choice) -> None:
    with pytest.raises(InputError, match=r"'norm.\*' is the path of no norm") as told:
        plan(stream(), ["pre_rmsnorm"], choice=choice)
    assert told.value.hint == "did you mean norms.1 or norms.0?"


def test_a_glob_is_text() -> None:
    with pytest.raises(InputError, match="globs"):
        Choice.of([1])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "edit", [SetTensor("norms.0.weight", Read("norms.0.weight") * 2.0), Reroute("layer_norm", Ref("embedding"))], ids=str
)
def test_what_a_pass_overlooks_the_planner_refuses(edit: Edit) -> None:
    def propose(program: Program, facts: Facts) -> Iterator[Finding]:
        site = program.site(program.nodes["layer_norm_1"])
        every = frozenset(program.nodes)
        yield Rewrite("careless", (site,), ("layer_norm",), "layer_norm", (edit,), every, Claim.ROUNDING, "nobody asked")

    chosen = plan(stream(), [Pass("careless", propose, "", ())], choice=Choice.of(skip="norms.0"))
    (refusal,) = chosen.refusals
    assert (refusal.code, str(refusal.site)) == ("NF106", "norms.1")
    assert not chosen.rounds


def test_a_lock_file_carries_the_choice() -> None:
    some, every = (plan(stream(), ["pre_rmsnorm"], choice=choice) for choice in (Choice.of("norms.*"), Choice()))
    assert drift(Plan.from_json(some.to_json()), some) == []
    assert "choice" not in every.to_json()
    assert drift(some, every) == ["the locked plan is of only norms.*; this one is of all norms"]


@pytest.mark.parametrize("does", [normfuse.tune, normfuse.deploy])
def test_live_modules_keep_what_is_kept(does: object) -> None:
    model = TRAPS["plain"].module()
    before = {name: value.clone() for name, value in model.norms[0].state_dict().items()}
    given = tokens()
    expected = model(given)
    does(model, ["pre_rmsnorm", "fold_affine"], (given,), skip="norms.0")  # type: ignore[operator]
    torch.testing.assert_close(model(given), expected)
    now = model.norms[0].state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], before[name]) for name in before)


def test_the_command_line_chooses(tmp_path: Path) -> None:
    file, lock = tmp_path / "model.pt2", tmp_path / "lock.json"
    stream().save(file)

    def told(*words: str | Path) -> tuple[int, str]:
        result = CliRunner().invoke(main, ["rewrite", str(file), "--pass", "pre_rmsnorm", "--dry-run", *map(str, words)])
        return result.exit_code, " ".join(result.output.split())

    code, said = told("--only", "norms.*", "--keep", "norms.1", "--plan", lock)
    assert (code, "it is kept, as 'norms.1' asks" in said) == (0, True)
    assert told("--only", "norms.*", "--keep", "norms.1", "--locked", lock)[0] == 0
    code, said = told("--locked", lock)
    assert (code, "the locked plan is of only norms.*, without norms.1; this one is of all norms" in said) == (1, True)
    code, said = told("--keep", "norm.1")
    assert (code, "did you mean norms.1" in said) == (2, True)
