"""Optional packages, imported where they are needed; what is in the way of one is told by its own name.

A class of transformers may need torchvision, which is not there or was built for another torch; what the user then reads names
torchvision and what to do about it, not only the class.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from normfuse.errors import LoadError, MissingExtra, NormfuseError, first_line, listed
from normfuse.sources.missing_packages import KNOWN, how_to_install, what_to_do


def package(name: str, extra: str = "zoo") -> Any:
    """An optional package, or a module of one.

    Args:
        name: of the package or module.
        extra: of normfuse, which brings it.

    Raises:
        MissingExtra: it is not installed.
        LoadError: it cannot be imported, or something that it needs.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # an import may raise anything
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise MissingExtra(name, extra) from error
        raise not_imported(name, error) from error


def not_imported(what: str, error: BaseException) -> NormfuseError:
    """Why something of an installed package cannot be imported, as an error that names the package which is in the way.

    Args:
        what: what was to be imported.
        error: what the import raised; the packages' own words hide the reason in its causes.
    """
    *_, cause = _causes(error)
    if isinstance(cause, ModuleNotFoundError) and cause.name:
        missing = cause.name.partition(".")[0]
        return LoadError(_lacks(what, [missing]), hint=how_to_install(missing))
    at = _importing(cause)
    if at is None and (match := re.search(r"requires the (\w+) library", str(cause))):
        return LoadError(_lacks(what, [match[1]]), hint=how_to_install(match[1]))
    if at is None:
        return LoadError(f"{what} cannot be made here: {first_line(cause)[:200]}", hint="install what it names")
    needs = f"the package '{at}'" if at == what else f"{what} needs the package '{at}', which"
    return LoadError(f"{needs} is installed but cannot be imported here ({first_line(cause)[:200]})", hint=_repair(at))


def needed(what: str, backends: Collection[str]) -> NormfuseError:
    """Why a class is only a placeholder: packages are not installed."""
    return LoadError(_lacks(what, backends), hint=how_to_install(*backends))


def wanted_by_code(folder: Path, error: ImportError) -> NormfuseError | None:
    """What a folder's own code wants that is not installed: its author's word, so that few of it are to be installed."""
    if match := re.search(r"packages that were not found in your environment: (.+?)\. Run", str(error)):
        names = match[1].split(", ")
        return LoadError(_lacks(f"the code of {folder}", names), hint=what_to_do(names, folder))
    return None


def _lacks(what: str, modules: Collection[str]) -> str:
    named = listed(f"'{each}'" for each in sorted(modules))
    return f"{what} needs {named}, {'a package' if len(modules) == 1 else 'packages'} not installed here"


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        yield at
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)


def _importing(error: BaseException) -> str | None:
    """The package in whose files an import was under way when it failed."""
    found, trace = None, error.__traceback__
    while trace is not None:
        frame, trace = trace.tb_frame, trace.tb_next
        if frame.f_code.co_name == "<module>":
            found = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return found if found not in ("__main__", "") else None


def _repair(module: str) -> str:
    import torch

    name = KNOWN.get(module, module)
    again = f"pip install --force-reinstall {name}"
    return f"install the build of {name} that fits torch {torch.__version__}: {again}" if module.startswith("torch") else again
