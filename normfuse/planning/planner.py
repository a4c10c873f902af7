"""`plan` judges: it collects what passes propose, checks every edit, settles conflicts, and repeats until nothing is new.

A pass reasons about values; the planner does not take its word for the tensors. Before a rewrite is accepted:

    NF101  An edit changes a stored tensor, or the size of a value, that has a reader outside the rewrite, and that reader would
           notice. The pass overlooked a tied or shared weight, or somebody who reads a stream; the rewrite is refused whole.
    NF102  The rewrite claims less than was allowed: rewrites are exact, equal up to rounding, or approximate, and approximate
           ones never run unasked.
    NF103  The rewrite speaks of a node or a tensor that the program does not have, reads a tensor that the program itself
           updates, or cannot be made: a formula cannot be computed on these tensors, or a call does not take what it would
           read.
    NF105  The norm is inside a body: a branch of `torch.cond`, a step of `while_loop`, `scan` or `map`, a function of flex
           attention. Bodies are run and compared, but not rewritten. Take the norm out of the control flow, or rewrite the
           branches as models of their own.
    NF106  The norm was not chosen: a glob of `--keep` names it, or none of `--only` does. It stays as it is, with its gain and
           its shift, and everything else is planned around it. A rewrite that would change it as well is refused whole.

A rewrite that touches what another one of the same round changes waits for the next round.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch.fx import Node

from normfuse.analysis.choice import EVERYTHING, Choice
from normfuse.analysis.facts import Facts, analyze
from normfuse.errors import InvalidPlan
from normfuse.graph import edits as editing
from normfuse.graph.bodies import Body
from normfuse.graph.edits import Edit, NewTensor, Reroute, Resize, SetTensor, apply
from normfuse.graph.expressions import Formula, Read, reads, uncentered
from normfuse.graph.findings import NO_NORM, Claim, Refusal, Rewrite
from normfuse.graph.ops.lookup import reads_entries
from normfuse.graph.program import Program, Site
from normfuse.graph.views import Norm
from normfuse.limits import OverLimit
from normfuse.planning.registry import Pass, find
from normfuse.strict_json import items, parsed, record, text, texts

_VERSION = 1
_ROUNDS = 32  # every round removes work, so this is never reached; it bounds a faulty pass


@dataclass(frozen=True)
class Plan:
    """The accepted rewrites in rounds, and all refusals. Data: it prints, survives JSON, and applies.

    Attributes:
        passes: the names that were asked for.
        rounds: rewrites accepted together; each round reads the program that the rounds before it made.
        refusals: what the passes, or the planner, would not do.
        choice: the norms that it was asked to rewrite.
    """

    passes: tuple[str, ...]
    rounds: tuple[tuple[Rewrite, ...], ...]
    refusals: tuple[Refusal, ...]
    choice: Choice = EVERYTHING

    @property
    def rewrites(self) -> Iterator[Rewrite]:
        """All accepted rewrites in order."""
        for each in self.rounds:
            yield from each

    def apply(self, program: Program) -> Program:
        """The rewritten program; formulas are composed, not yet evaluated.

        Raises:
            InvalidPlan: the plan was made for another program.
        """
        for rewrites in self.rounds:
            program = _apply_round(program, rewrites)
        return program

    def norms_after(self, before: Mapping[str, int]) -> Counter[str]:
        """How many norms of each kind there will be, of the program's own ``before``."""
        after = Counter(before)
        for each in self.rewrites:
            for was in each.was:
                if was in after:  # some rewrites are of other things than norms
                    after[was] -= 1
                    after[each.becomes] += each.becomes != NO_NORM
        return +after

    def without(self, edit: Edit) -> Plan:
        """The plan with one edit left out wherever it occurs (for tests of the proof itself)."""
        rounds = tuple(
            tuple(replace(each, edits=tuple(e for e in each.edits if e != edit)) for each in rewrites)
            for rewrites in self.rounds
        )
        return replace(self, rounds=rounds)

    def to_json(self) -> str:
        """The plan as JSON text."""
        rounds = [[_rewrite_to_dict(each) for each in rewrites] for rewrites in self.rounds]
        refusals = [each.to_dict() for each in self.refusals]
        data = {"normfuse_plan": _VERSION, "passes": self.passes, "rounds": rounds, "refusals": refusals}
        data |= {"choice": asdict(self.choice)} if self.choice else {}
        return json.dumps(data, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, document: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            InvalidPlan: the document is not a plan of this version, or names what no plan may.
        """
        try:
            data = record(parsed(document))
            if data["normfuse_plan"] != _VERSION:
                raise InvalidPlan(f"this plan has version {data['normfuse_plan']}; this normfuse reads version {_VERSION}")
            rounds = tuple(tuple(map(_rewrite_from_dict, items(rewrites))) for rewrites in items(data["rounds"]))
            refusals = tuple(map(_refusal_from_dict, items(data["refusals"])))
            return cls(texts(data["passes"]), rounds, refusals, _choice_from_dict(data.get("choice")))
        except OverLimit as error:
            raise InvalidPlan(f"this is not a plan that normfuse wrote: {error}", hint=error.hint) from error
        except KeyError as error:
            raise InvalidPlan(f"this is not a plan that normfuse wrote: it has no {error}") from error
        except ValueError as error:
            raise InvalidPlan(f"this is not a plan that normfuse wrote: {error}") from error


def plan(
    program: Program,
    passes: Sequence[str | Pass],
    *,
    allow: Claim = Claim.ROUNDING,
    in_place: bool = False,
    choice: Choice = EVERYTHING,
    variance_of: Callable[[Norm], float | None] | None = None,
) -> Plan:
    """Collect, judge and order what the passes propose for a program.

    Args:
        program: the program; it is not changed.
        passes: names, or passes themselves.
        allow: the weakest claim that may run.
        in_place: whether the plan is for the modules that were traced, which have no room for new tensors.
        choice: the norms that may be rewritten.
        variance_of: the largest variance that a LayerNorm of the program met on data, as in `Facts`.

    Returns:
        The plan; it may be empty, and then its refusals say why.

    Raises:
        InputError: the choice names a norm that the program does not have.
    """
    return plan_and_apply(program, passes, allow=allow, in_place=in_place, choice=choice, variance_of=variance_of)[0]


def plan_and_apply(
    program: Program,
    passes: Sequence[str | Pass],
    *,
    allow: Claim = Claim.ROUNDING,
    in_place: bool = False,
    choice: Choice = EVERYTHING,
    variance_of: Callable[[Norm], float | None] | None = None,
) -> tuple[Plan, Program]:
    """As `plan`; the plan, and the program that it makes, which is not made a second time by `Plan.apply`."""
    chosen = [find(each) if isinstance(each, str) else each for each in passes]
    names = tuple(each.name for each in chosen)
    rounds: list[tuple[Rewrite, ...]] = []
    judged: list[Refusal] = []
    first_said: dict[tuple[str, str], Refusal] = {}
    original = analyze(program, choice=choice)
    choice.require(_norm_sites(original))
    inside = tuple(refusal for each in chosen for refusal in (*_inside_bodies(each, original), *_not_chosen(each, original)))
    for _ in range(_ROUNDS):
        facts = analyze(program, in_place=in_place, choice=choice, variance_of=variance_of)
        accepted: list[Rewrite] = []
        refusals: list[Refusal] = []
        for each in chosen:
            for finding in each.propose(program, facts):
                if isinstance(finding, Refusal):
                    # what stands in the way is told of the user's model, not of what earlier rounds made of it
                    refusals.append(first_said.setdefault((each.name, finding.site.node), finding))
                elif objection := _objection(finding, facts, allow):
                    judged.extend(objection)
                elif not any(_conflict(finding, other) for other in accepted):
                    accepted.append(finding)
        accepted, program, failed = _made(program, accepted)
        judged.extend(failed)
        if not accepted:
            done = {site.node for earlier in rounds for each in earlier for site in each.sites}
            open_still = (refusal for refusal in judged if refusal.site.node not in done)
            stands = (each for each in dict.fromkeys((*refusals, *open_still)) if not _overtaken(each, rounds))
            return Plan(names, tuple(rounds), tuple(dict.fromkeys((*stands, *inside))), choice), program
        rounds.append(tuple(accepted))
    raise InvalidPlan(f"the passes {', '.join(names)} found something new in each of {_ROUNDS} rounds")


def _inside_bodies(by: Pass, facts: Facts) -> Iterator[Refusal]:
    """A refusal for every norm in a body that concerns a pass."""
    for body, norm in facts.norms_in_bodies:
        if by.norms is None or norm.kind in by.norms:
            reason = f"it is inside a body of {body.by}, and bodies are not rewritten"
            hint = "take it out of the control flow, or rewrite the branches as models of their own"
            yield Refusal(by.name, site_in(body, norm.out), "NF105", reason, facts.program.site(body.call), hint)


def _norm_sites(facts: Facts) -> Iterator[Site]:
    yield from (facts.program.site(norm.out) for norm in facts.every_norm)
    yield from (site_in(body, norm.out) for body, norm in facts.norms_in_bodies)


def _not_chosen(by: Pass, facts: Facts) -> Iterator[Refusal]:
    """A refusal for every norm that concerns a pass and is not chosen."""
    for norm in facts.every_norm:
        site = facts.program.site(norm.out)
        why = facts.choice.why_kept(site)
        if why is not None and (by.norms is None or norm.kind in by.norms):
            yield Refusal(by.name, site, "NF106", why)


def site_in(body: Body, node: Node) -> Site:
    """Where a node of a body comes from."""
    return replace(body.program.site(node), node=f"{body.name}.{node.name}")


def _overtaken(refusal: Refusal, rounds: Sequence[Sequence[Rewrite]]) -> bool:
    """Whether another pass has made something else of the norm, so that it does not matter why this one did not."""
    return any(
        each.pass_name != refusal.pass_name and was != each.becomes and str(site) == str(refusal.site)
        for rewrites in rounds
        for each in rewrites
        for site, was in zip(each.sites, each.was, strict=True)
    )


def _made(program: Program, rewrites: list[Rewrite]) -> tuple[list[Rewrite], Program, list[Refusal]]:
    """The rewrites of a round that can be made, the program with them, and refusals of the others."""
    try:
        return rewrites, _apply_round(program, rewrites) if rewrites else program, []
    except InvalidPlan as error:
        if len(rewrites) == 1:
            (alone,) = rewrites
            why = f"it cannot be made: {error}"
            return [], program, [Refusal(alone.pass_name, site, "NF103", why) for site in alone.sites]
    fit: list[Rewrite] = []
    refused: list[Refusal] = []
    for each in rewrites:
        made, _, objections = _made(program, [each])
        fit += made
        refused += objections
    if len(fit) == len(rewrites):  # each can be made, and not all together: the first goes, the others have their turn
        fit = fit[:1]
    made, changed, objections = _made(program, fit)
    return made, changed, [*refused, *objections]


def _apply_round(program: Program, rewrites: Sequence[Rewrite]) -> Program:
    origin = {edit: (each.pass_name, str(each.sites[0])) for each in rewrites for edit in each.edits}
    return apply(program, dict.fromkeys(edit for each in rewrites for edit in each.edits), by=origin)


# -- legality ----------------------------------------------------------------------------------------------------------


def _objection(rewrite: Rewrite, facts: Facts, allow: Claim) -> list[Refusal]:
    """Why a rewrite is not accepted, said at each of its sites; empty when it is."""

    def refuse(code: str, reason: str, hint: str = "") -> list[Refusal]:
        return [Refusal(rewrite.pass_name, site, code, reason, hint=hint) for site in rewrite.sites]

    if rewrite.claim > allow:
        claims = f"its claim is '{rewrite.claim.name.lower()}' and only '{allow.name.lower()}' is allowed: {rewrite.because}"
        return refuse("NF102", claims, f"allow '{rewrite.claim.name.lower()}' to run it")
    if (kept := _changes_kept(rewrite, facts)) is not None:
        return [
            Refusal(rewrite.pass_name, site, "NF106", facts.choice.why_kept(site) or f"it cannot be done without '{kept}'")
            for site in rewrite.sites
        ]
    tensors = set(facts.program.tensor_names()) - facts.program.written
    made: set[str] = set()
    for edit in rewrite.edits:
        match edit:
            case SetTensor(name, formula):
                unknown = [each for each in reads(formula) if each not in tensors]
                if unknown or name not in tensors:
                    return refuse("NF103", f"the formula for '{name}' does not fit the program")
                stray = _stray_reader(name, formula, rewrite, facts)
                if stray is not None:
                    return refuse("NF101", f"the tensor '{name}' is also read by '{stray}', outside this rewrite")
            case NewTensor(name, formula, like):
                unknown = [each for each in (like, *reads(formula)) if each not in tensors]
                if unknown or name in tensors | made | facts.program.nodes.keys():
                    return refuse("NF103", f"the new tensor '{name}' does not fit the program")
                made.add(name)
            case Reroute(node, by, readers, new):
                missing = {node, *(readers or ()), *reads(by)} - facts.program.nodes.keys() - made
                if missing:
                    return refuse("NF103", f"the program has no node '{min(missing)}'")
                made |= {new} if new else set()
            case Resize(node):
                if node not in facts.program.nodes.keys() | made:
                    return refuse("NF103", f"the program has no node '{node}'")
                stray = _reads_old_size(node, rewrite, facts.program)
                if stray is not None:
                    return refuse("NF101", f"the size of '{node}' is also met by '{stray}', outside this rewrite")
    return []


def _changes_kept(rewrite: Rewrite, facts: Facts) -> Site | None:
    """What is not chosen and a rewrite would change: one of its sites, a norm's call, or a tensor that a norm reads."""
    if not facts.choice:
        return None
    for site in rewrite.sites:
        if facts.choice.why_kept(site) is not None:
            return site
    stored = facts.program.stored
    names = {name: node for node in facts.kept for name in (node.name, stored.get(node.name, node.name))}
    for edit in rewrite.edits:
        name = edit.name if isinstance(edit, SetTensor | NewTensor) else edit.node
        beside = isinstance(edit, Reroute) and name in reads(edit.by)  # it is still computed, and others read it changed
        if name in names and not beside:
            return facts.program.site(names[name])
    return None


def _stray_reader(name: str, formula: Formula, rewrite: Rewrite, facts: Facts) -> str | None:
    """A reader of a changed tensor that is outside the rewrite and would notice the change."""
    tensor = facts.program.reader_of(name)
    dims = _centered_dims(formula)
    if dims is not None and name not in facts.program.written and dims <= facts.unseen[tensor]:
        return None  # only means that nobody can see are taken out
    for reader in tensor.users:
        if reader.name not in rewrite.region and reads_entries(reader):
            return reader.name
    return "the program, which updates it" if name in facts.program.written else None


def _reads_old_size(name: str, rewrite: Rewrite, program: Program) -> str | None:
    """A reader of a value that gets another size that is outside the rewrite and goes on reading it."""
    led_away = [edit for edit in rewrite.edits if isinstance(edit, Reroute) and edit.node == name]
    if name not in program.nodes or any(edit.readers is None for edit in led_away):
        return None
    known = rewrite.region.union(*(edit.readers or () for edit in led_away))
    users = (user for user in program.nodes[name].users if reads_entries(user))
    return next((user.name for user in users if user.name not in known), None)


def _centered_dims(formula: Formula) -> frozenset[int] | None:
    """The dims that a formula centres, if that is all it does."""
    of, dims = uncentered(formula)
    return dims if isinstance(of, Read) else None


def _conflict(one: Rewrite, other: Rewrite) -> bool:
    return bool(one.changed & _touched(other) or other.changed & _touched(one))


def _touched(rewrite: Rewrite) -> set[str]:
    read = {name for edit in rewrite.formed for name in reads(edit.formula)}
    return rewrite.changed | rewrite.region | read


# -- JSON --------------------------------------------------------------------------------------------------------------


def _rewrite_to_dict(rewrite: Rewrite) -> dict[str, Any]:
    return {
        "pass": rewrite.pass_name,
        "sites": [site.to_dict() for site in rewrite.sites],
        "was": rewrite.was,
        "becomes": rewrite.becomes,
        "edits": [editing.to_json(edit) for edit in rewrite.edits],
        "region": sorted(rewrite.region),
        "claim": rewrite.claim.name.lower(),
        "because": rewrite.because,
    }


def _rewrite_from_dict(data: Any) -> Rewrite:
    claims = {each.name.lower(): each for each in Claim}
    if text(record(data)["claim"]) not in claims:
        raise ValueError(f"'{data['claim']}' is no claim")
    sites = tuple(map(_site_from_dict, items(data["sites"])))
    if not sites:
        raise ValueError("a rewrite has no site")
    return Rewrite(
        text(data["pass"]),
        sites,
        texts(data["was"]),
        text(data["becomes"]),
        tuple(map(editing.from_json, items(data["edits"]))),
        frozenset(texts(data["region"])),
        claims[data["claim"]],
        text(data["because"]),
    )


def _choice_from_dict(data: Any) -> Choice:
    return EVERYTHING if data is None else Choice(texts(record(data)["only"]), texts(data["skip"]))


def _site_from_dict(data: Any) -> Site:
    return Site(text(record(data)["node"]), text(data["module"]), text(data["source"]))


def _refusal_from_dict(data: Any) -> Refusal:
    at = _site_from_dict(record(data)["at"]) if data["at"] is not None else None
    return Refusal(text(data["pass"]), _site_from_dict(data), text(data["code"]), text(data["reason"]), at, text(data["hint"]))
