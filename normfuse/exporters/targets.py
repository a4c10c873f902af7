"""What a model can be written for, and what opens which file: normfuse's own exporters, and those of other packages."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from normfuse.errors import NormfuseError, one_of
from normfuse.plugins import parts_of

if TYPE_CHECKING:
    from normfuse.proof.artifacts import Artifact


@dataclass(frozen=True)
class Target:
    """A runtime to write for.

    Attributes:
        name: what users call it.
        suffixes: how its files end, the usual way first.
        writer: the module whose ``export`` writes them.
        opener: the module whose ``open_artifact`` opens them.
        package: the package that adds it, with its version; empty for normfuse's own.
    """

    name: str
    suffixes: tuple[str, ...]
    writer: str
    opener: str
    package: str = ""

    def module(self) -> ModuleType:
        """What writes for it."""
        return importlib.import_module(self.writer)

    def opened(self, path: Path) -> Artifact:
        """One of its files in its runtime."""
        artifact: Artifact = importlib.import_module(self.opener).open_artifact(path)
        return artifact


def _own(name: str, *suffixes: str, opener: str = "") -> Target:
    return Target(name, suffixes, f"normfuse.exporters.{name}", f"normfuse.exporters.{opener or name}")


OWN: Mapping[str, Target] = {
    each.name: each
    for each in (
        _own("onnx", ".onnx", opener="onnxruntime"),
        _own("tensorrt", ".engine", ".plan"),
        _own("openvino", ".xml"),
        _own("executorch", ".pte"),
        _own("aoti", ".pt2"),
    )
}
"""normfuse's own, by name."""


@cache
def targets() -> dict[str, Target]:
    """All targets by name, normfuse's own first.

    Raises:
        NormfuseError: two packages have a target of the same name, or files that end alike.
    """
    found = dict(OWN)
    for name, target in parts_of("normfuse.exporters", OWN, _target_of):
        for other in found.values():
            if alike := set(target.suffixes) & set(other.suffixes):
                owners = f"'{other.name}' of {other.package or 'normfuse'} and '{name}' of {target.package}"
                raise NormfuseError(f"two targets write {min(alike)} files: {owners}", hint="uninstall one of them")
        found[name] = target
    return found


def _target_of(name: str, module: ModuleType, package: str) -> Target:
    """The target that a module of another package is for.

    Raises:
        Exception: it is for none.
    """
    missing = [each for each in ("SUFFIXES", "export", "open_artifact") if not hasattr(module, each)]
    if missing:
        raise ValueError(f"{module.__name__} has no {missing[0]}")
    suffixes = tuple(module.SUFFIXES)
    if not suffixes or not all(str(each).startswith(".") for each in suffixes):
        raise ValueError(f"SUFFIXES of {module.__name__} must be endings such as ('.onnx',), not {suffixes}")
    return Target(name, suffixes, module.__name__, module.__name__, package)


def target_of(to: str | None, path: str | Path) -> Target:
    """The target that is asked for, or else the one whose files end like ``path``; ONNX where none does.

    Raises:
        InputError: there is no such target.
    """
    if to is None:
        found = opener_of(path)
        to = "onnx" if found is None or found.name == "aoti" else found.name  # a .pt2 file may be a program as well
    return targets()[one_of(to, targets(), "target")]


def opener_of(path: str | Path) -> Target | None:
    """The target whose files end like ``path``; None where no target's do."""
    suffix = Path(path).suffix
    own = next((each for each in OWN.values() if suffix in each.suffixes), None)
    return own or next((each for each in targets().values() if suffix in each.suffixes), None)
