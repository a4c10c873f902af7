"""A plan as a lock file: would this model still be rewritten as it was when somebody looked at it?

Node names and source lines come and go with versions of torch and of the model's code, so they do not count. What counts:
which norm of which module becomes what, by which claim, which tensors change, and what is refused for which reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

from normfuse.errors import InputError, InvalidPlan, first_line
from normfuse.graph.findings import Finding, Refusal, Rewrite
from normfuse.limits import OverLimit
from normfuse.planning.planner import Plan
from normfuse.strict_json import read_file

Where: TypeAlias = tuple[str, str]


def read_lock(path: str | Path) -> Plan:
    """The plan of a lock file.

    Raises:
        InputError: there is no such file, or it is no plan.
    """
    try:
        return Plan.from_json(read_file(path))
    except (OSError, ValueError, OverLimit, InvalidPlan) as error:
        reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
        raise InputError(f"{path} is no lock file: {reason}", hint="--plan FILE writes one") from error


def drift(locked: Plan, now: Plan) -> list[str]:
    """What a plan does differently from the locked one, a sentence each; empty where they agree.

    Args:
        locked: the plan of the lock file.
        now: the plan for the model of today.
    """
    if locked.passes != now.passes:
        return [f"the locked plan is of {', '.join(locked.passes)}; this one is of {', '.join(now.passes)}"]
    if locked.choice != now.choice:
        return [f"the locked plan is of {locked.choice}; this one is of {now.choice}"]
    then, today = dict(_fates(locked)), dict(_fates(now))
    sentences = [
        f"{_at(where)}: {today.get(where, 'nothing to do')}; locked: {then.get(where, 'nothing to do')}"
        for where in dict.fromkeys([*then, *today])
        if then.get(where) != today.get(where)
    ]
    changed, before = _tensors(now), _tensors(locked)
    if not sentences and changed != before:
        more, fewer = sorted(changed - before), sorted(before - changed)
        sentences += [f"also changes {', '.join(more)}"] * bool(more) + [f"no longer changes {', '.join(fewer)}"] * bool(fewer)
    return sentences


def _fates(plan: Plan) -> Iterator[tuple[Where, str]]:
    """(pass, place) -> what happens there; several norms of one module are counted."""
    counted: dict[Where, Counter[str]] = {}
    findings: list[Finding] = [*plan.rewrites, *plan.refusals]
    for finding in findings:
        for place, fate in _each(finding):
            counted.setdefault((finding.pass_name, place), Counter())[fate] += 1
    for where, fates in counted.items():
        yield where, ", ".join(fate if times == 1 else f"{times} × {fate}" for fate, times in sorted(fates.items()))


def _each(finding: Finding) -> Iterable[tuple[str, str]]:
    if isinstance(finding, Refusal):
        return [(str(finding.site), f"refused ({finding.code})")]
    return [
        (str(site), f"{was} → {finding.becomes} ({finding.claim.name.lower()})")
        for site, was in zip(finding.sites, _padded(finding), strict=False)
    ]


def _padded(rewrite: Rewrite) -> tuple[str, ...]:
    return rewrite.was + rewrite.was[-1:] * (len(rewrite.sites) - len(rewrite.was))


def _at(where: Where) -> str:
    return f"{where[1]} ({where[0]})"


def _tensors(plan: Plan) -> set[str]:
    return {edit.name for rewrite in plan.rewrites for edit in rewrite.formed}
