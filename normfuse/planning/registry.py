"""The folder is the registry: every module of `normfuse.passes` is a pass, its function has the module's name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import normfuse.passes
from normfuse.analysis.facts import Facts
from normfuse.errors import NormfuseError, one_of
from normfuse.graph.findings import Finding
from normfuse.graph.program import Program

ALL = ("offline_norm", "pre_rmsnorm", "fold_affine")
"""What ``all`` stands for: the passes that cost nothing at inference; each other one is a part or a variant of these."""


@dataclass(frozen=True)
class Pass:
    """A pass as the registry knows it.

    Attributes:
        name: the module's name, which is also its function's.
        propose: yields rewrites and refusals; never changes anything.
        manual: the module's docstring.
        norms: the kinds of norm that concern it, its module's ``NORMS``; None for all of them.
    """

    name: str
    propose: Callable[[Program, Facts], Iterator[Finding]]
    manual: str
    norms: tuple[str, ...] | None = None

    @property
    def summary(self) -> str:
        """The first line of the manual."""
        return self.manual.splitlines()[0]

    @property
    def codes(self) -> dict[str, str]:
        """Refusal code -> its story, from the manual."""
        return stories(self.manual)


def stories(manual: str) -> dict[str, str]:
    """Every ``NFnnn  story`` paragraph of a manual, unwrapped."""
    found = re.findall(r"^ +(NF\d{3})  (.*(?:\n {6,}\S.*)*)", manual, flags=re.MULTILINE)
    return {code: re.sub(r"\s+", " ", story).strip() for code, story in found}


@cache
def passes() -> dict[str, Pass]:
    """All passes by name."""
    found: dict[str, Pass] = {}
    for module_info in pkgutil.iter_modules(normfuse.passes.__path__):
        if module_info.name.startswith("_"):
            continue
        module = importlib.import_module(f"normfuse.passes.{module_info.name}")
        propose, manual = getattr(module, module_info.name), inspect.getdoc(module) or ""
        found[module_info.name] = Pass(module_info.name, propose, manual, getattr(module, "NORMS", None))
    return found


def find(name: str) -> Pass:
    """The pass of this name.

    Raises:
        InputError: there is none.
    """
    return passes()[one_of(name, passes(), "pass")]


@cache
def codes() -> dict[str, str]:
    """Every refusal code with its story: the passes', the planner's and the appliers'."""
    everything: dict[str, str] = {}
    for name in ("planning.planner", "modules.placement"):
        everything |= stories(inspect.getdoc(importlib.import_module(f"normfuse.{name}")) or "")
    for each in passes().values():
        everything |= each.codes
    return dict(sorted(everything.items()))


def requested(names: Any) -> list[str]:
    """The requested passes, each once; ``"all"`` stands for all of them."""
    asked = [names] if isinstance(names, str) else list(names) if isinstance(names, Iterable) else []
    if not asked or not all(isinstance(each, str) for each in asked):
        raise NormfuseError("name the passes to run, such as passes=['pre_rmsnorm']", hint=f"there are {', '.join(passes())}")
    return list(dict.fromkeys(name for each in asked for name in (ALL if each == "all" else [each])))
