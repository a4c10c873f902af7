"""The folder is the registry: every module of `normfuse.passes` is a pass, its function has the module's name.

Other packages add theirs by entry points (`docs/plugins.md`); these run only where they are asked for by name.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from types import ModuleType
from typing import Any

import normfuse.passes
from normfuse.analysis.facts import Facts
from normfuse.errors import NormfuseError, first_line, one_of
from normfuse.graph.findings import Finding
from normfuse.graph.program import Program
from normfuse.plugins import parts_of

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
        package: the package that adds it, with its version; empty for normfuse's own.
    """

    name: str
    propose: Callable[[Program, Facts], Iterator[Finding]]
    manual: str
    norms: tuple[str, ...] | None = None
    package: str = ""

    @property
    def summary(self) -> str:
        """The first line of the manual."""
        return self.manual.splitlines()[0]

    @property
    def codes(self) -> dict[str, str]:
        """Refusal code -> its story, from the manual."""
        return stories(self.manual)


_NONE: Mapping[str, str] = {}


def stories(manual: str) -> dict[str, str]:
    """Every ``NFnnn  story`` (or with other letters) paragraph of a manual, unwrapped."""
    found = re.findall(r"^ +([A-Z]{2,}\d{3})  (.*(?:\n {6,}\S.*)*)", manual, flags=re.MULTILINE)
    return {code: re.sub(r"\s+", " ", story).strip() for code, story in found}


@cache
def passes() -> dict[str, Pass]:
    """All passes by name, normfuse's own first.

    Raises:
        NormfuseError: two packages have a pass of the same name.
    """
    found: dict[str, Pass] = {}
    for module_info in pkgutil.iter_modules(normfuse.passes.__path__):
        if not module_info.name.startswith("_"):
            module = importlib.import_module(f"normfuse.passes.{module_info.name}")
            found[module_info.name] = _pass_of(module_info.name, module)
    taken = {code: each.name for each in found.values() for code in each.codes}
    return found | dict(parts_of("normfuse.passes", list(found), partial(_pass_of, taken=taken)))


def _pass_of(name: str, module: ModuleType, package: str = "", taken: Mapping[str, str] = _NONE) -> Pass:
    """The pass that a module holds.

    Raises:
        Exception: it holds none.
    """
    propose, manual = getattr(module, name), inspect.getdoc(module)
    if not manual:
        raise ValueError(f"{module.__name__} has no docstring, which is the manual")
    made = Pass(name, propose, manual, getattr(module, "NORMS", None), package)
    if clash := next((code for code in made.codes if code in taken), None):
        raise ValueError(f"its refusal code {clash} is one of {taken[clash]}")
    return replace(made, propose=_with_its_package(made)) if package else made


def _with_its_package(made: Pass) -> Callable[[Program, Facts], Iterator[Finding]]:
    """What a pass of another package yields; an error of its own is not taken for one of normfuse's."""

    def propose(program: Program, facts: Facts) -> Iterator[Finding]:
        try:
            yield from made.propose(program, facts)
        except NormfuseError:
            raise
        except Exception as error:
            what = f"the pass '{made.name}' of {made.package} failed: {type(error).__name__}: {first_line(error)}"
            raise NormfuseError(what, hint="tell those who made that package") from error

    return propose


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
