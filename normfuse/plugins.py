"""What other packages add to normfuse: the entry points of a group, such as ``normfuse.passes``.

Each names a module, imported when the group is asked for. One that cannot be used is left out with a warning, so that a
broken package stands in nobody's way (`docs/plugins.md`).
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import EntryPoint, distributions
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from normfuse.errors import NormfuseError, NormfuseWarning, first_line

Part = TypeVar("Part")


def parts_of(group: str, own: Iterable[str], read: Callable[[str, ModuleType, str], Part]) -> Iterator[tuple[str, Part]]:
    """What other packages add, each with its name.

    Args:
        group: of the entry points.
        own: names that normfuse itself has there.
        read: makes a part of its name, its module and its package, named with its version; raises where the module is none.

    Raises:
        NormfuseError: two packages have the same name there, or one has a name of normfuse's own.
    """
    owners = dict.fromkeys(own, "normfuse")
    for entry, package in sorted(_entries(group), key=lambda pair: pair[0].name):
        if other := owners.get(entry.name):
            what = f"two packages have '{entry.name}' in {group}: {other} and {package}"
            raise NormfuseError(what, hint="uninstall one of them; pip show -f NAME tells what a package holds")
        owners[entry.name] = package
        try:
            part = read(entry.name, importlib.import_module(entry.module), package)
        except (Exception, SystemExit) as error:  # a module of somebody else's raises anything
            warnings.warn(f"'{entry.name}' of {package} is left out: {first_line(error)}", NormfuseWarning, stacklevel=2)
        else:
            yield entry.name, part


def _entries(group: str) -> Iterator[tuple[EntryPoint, str]]:
    """The entry points of a group, each with its package.

    Not those that lie in the working directory: people come to where they keep models, and these bring no code.
    """
    here = Path.cwd()
    found = list(distributions(path=[each for each in sys.path if each and Path(each).resolve() != here]))
    if not any(f"[{group}]" in (each.read_text("entry_points.txt") or "") for each in found):
        return  # without reading who all the packages are, which takes long
    packages = {each.name.lower().replace("_", "-"): each for each in reversed(found) if each.name}  # the first one counts
    for package in packages.values():
        yield from ((entry, f"{package.name} {package.version}") for entry in package.entry_points if entry.group == group)
