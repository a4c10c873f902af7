"""What every pass owes its users, whichever it is: these run on every pass there is or will be."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import pytest
import torch

from normfuse.analysis.facts import analyze
from normfuse.errors import InvalidPlan
from normfuse.graph.edits import Reroute
from normfuse.graph.findings import Refusal
from normfuse.graph.interpreter import flat_inputs
from normfuse.graph.program import Program
from normfuse.planning import registry
from normfuse.planning.planner import Plan, plan
from normfuse.proof.cases import cases
from normfuse.proof.proving import prove
from tests.every_model import MODELS, REWRITTEN

PASSES = sorted(registry.passes())
HEADINGS = ("What", "Formula", "Needs", "Refuses", "Claim", "Reference")


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in MODELS])
def trap(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@cache
def traced(name: str) -> Program:
    return Program.trace(MODELS[name].module(), MODELS[name].inputs)


def flat(name: str) -> list[object]:
    return flat_inputs(traced(name), MODELS[name].inputs)


@dataclass(frozen=True)
class Planned:
    """What a pass does to a model: planned once for all the tests that look at it."""

    plan: Plan
    applied: Program
    changed: tuple[str, ...]
    """what planning and applying changed in the program that they were given"""


@cache
def planned(name: str, trap: str) -> Planned:
    program = traced(trap)
    graph = str(program.graph)
    state = {key: program.tensor(key).clone() for key in program.tensor_names()}
    chosen = plan(program, [name])
    applied = chosen.apply(program).baked()
    changed = [key for key, value in state.items() if not torch.equal(program.tensor(key), value)]
    changed += ["the graph"] * (str(program.graph) != graph) + ["the formulas"] * bool(program.formulas)
    return Planned(chosen, applied, tuple(changed))


def does_not_change_its_input(name: str, trap: str) -> None:
    assert not planned(name, trap).changed


def calls(program: Program) -> int:
    return sum(node.op == "call_function" for node in program.graph.nodes)


def finds_the_same_twice(name: str, trap: str) -> None:
    assert plan(traced(trap), [name]) == planned(name, trap).plan


def a_second_run_finds_nothing_to_do(name: str, trap: str) -> None:
    first = planned(name, trap)
    if first.plan.rounds:  # otherwise the second run is the first one
        second = plan(first.applied, [name])
        assert second.rounds == ()
        assert {r.site.node for r in second.refusals} == {r.site.node for r in first.plan.refusals}


def the_plan_survives_json(name: str, trap: str) -> None:
    program, chosen = traced(trap), planned(name, trap).plan
    again = Plan.from_json(chosen.to_json())
    assert again == chosen
    if chosen.rounds:
        assert str(again.apply(program).graph) == str(chosen.apply(program).graph)
        assert again.apply(program).formulas == chosen.apply(program).formulas


def every_edit_is_needed(name: str, trap: str, most: int | None = None) -> None:
    """Leaving out any one edit makes verification fail, so the proof sees every edit; or more is computed than with it.

    Of ``most`` edits, spread over the plan, where all of them would take too long.
    """
    program, chosen = traced(trap), planned(name, trap).plan
    edits = list(dict.fromkeys(edit for rewrite in chosen.rewrites for edit in rewrite.edits))
    tried = list(cases(program, flat(trap)))[:1]
    for edit in edits[:: -(-len(edits) // most) or 1] if most else edits:
        crippled = chosen.without(edit)
        try:
            rewritten = crippled.apply(program)
        except InvalidPlan:
            continue  # another edit needs it by name: nothing can be applied at all
        more = isinstance(edit, Reroute) and calls(rewritten) > calls(planned(name, trap).applied)
        assert more or not prove(program, rewritten, crippled, tried).ok, f"nobody noticed that '{edit}' was left out"


def refusals_are_documented(name: str, trap: str) -> None:
    for refusal in planned(name, trap).plan.refusals:
        assert refusal.code in registry.codes()
        assert refusal.pass_name == name
        assert refusal.reason
        assert refusal.reason.strip() == refusal.reason


def no_site_is_both_rewritten_and_refused(name: str, trap: str) -> None:
    chosen = planned(name, trap).plan
    rewritten = {site.node for rewrite in chosen.rewrites for site in rewrite.sites}
    assert not rewritten & {refusal.site.node for refusal in chosen.refusals}


FEW = 3
PROMISES = (
    finds_the_same_twice,
    a_second_run_finds_nothing_to_do,
    the_plan_survives_json,
    refusals_are_documented,
    no_site_is_both_rewritten_and_refused,
)


@pytest.mark.parametrize("name", PASSES)
def test_every_promise_is_kept(name: str, trap: str, subtests: pytest.Subtests, pytestconfig: pytest.Config) -> None:
    does_not_change_its_input(name, trap)
    found = planned(name, trap).plan
    for promise in PROMISES if found.rounds or found.refusals else ():  # of nothing there is nothing else to say
        with subtests.test(promise.__name__):
            promise(name, trap)
    with subtests.test(every_edit_is_needed.__name__):
        every_edit_is_needed(name, trap, None if pytestconfig.getoption("--run-slow") else FEW)


def test_every_pass_rewrites_some_of_the_models() -> None:
    idle = set(PASSES) - set(REWRITTEN)
    assert not idle
    for name, trap in REWRITTEN.items():
        assert planned(name, trap).plan.rounds, f"{name} no longer rewrites '{trap}'"


@pytest.mark.parametrize("name", PASSES)
def test_the_file_is_the_manual(name: str) -> None:
    manual = registry.find(name).manual
    assert [line for line in manual.splitlines() if line in HEADINGS] == list(HEADINGS)
    assert manual.splitlines()[0].endswith(".")


@pytest.mark.parametrize("name", PASSES)
def test_every_code_in_the_file_has_its_story(name: str) -> None:
    import inspect

    module = inspect.getmodule(registry.find(name).propose)
    assert module is not None
    source = inspect.getsource(module)
    used = set(re.findall(r"NF\d{3}", source.replace(module.__doc__ or "", "")))
    assert used <= set(registry.find(name).codes)
    assert all(len(story) > 40 for story in registry.codes().values())


def test_codes_are_unique() -> None:
    def claimed() -> Iterator[str]:
        for each in registry.passes().values():
            yield from each.codes

    everything = list(claimed())
    assert len(everything) == len(set(everything))


def test_a_refusal_never_stands_for_an_exception() -> None:
    """A pass that has nothing to say of a program without norms says nothing."""
    program = Program.trace(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    for each in registry.passes().values():
        findings = list(each.propose(program, analyze(program)))
        assert not [finding for finding in findings if isinstance(finding, Refusal)]
