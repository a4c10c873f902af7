"""What a model file may name: the rules behind "loading never executes a stranger's code".

A pickle is a program whose only words are names and calls. What it calls is `constructors`' and `building`'s matter: a
closed table, whatever the names are. This file decides, name by name, which classes and functions of installed packages a
file may have at all, by rule and not by model:

    module classes      any `nn.Module` class of an installed package; of torch itself only `torch.nn` and `torch.ao.nn`
    settings classes    dataclasses, enums, transformers' configs: classes that hold values
    tensor functions    `torch.nn.functional.*` and the builtins behind it, such as `torch._C._nn.gelu`

But for a file that the user names (`own_classes`), a name outside an installed package is refused before anything is
imported: neither the working directory nor `__main__` is a package, and a folder there that shadows an installed package is
found out by its place on the disk.

While a file is read, classes and functions are values that nothing calls. Afterwards a module's own forward may call what
it holds: tensor functions and the classes of `torch.nn.modules`, whose constructors only allocate, can be called then; any
other class is an `Inert` name, which refuses.

What remains: a module's forward is code of an installed package that runs on the file's data when the model is traced.
Nothing here judges that code, only whose it is, and that its class and its settings cannot be turned into others.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import re
import site
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch
import torch.fx
from torch import nn


class NotAllowed(Exception):
    """The file asks for something that no rule allows; ``names`` says for what, all at once."""

    def __init__(self, *names: str) -> None:
        # The names are a stranger's text on their way to a terminal: nothing in them may be a control character.
        self.names = tuple(name if name.isprintable() else ascii(name) for name in names)
        super().__init__(", ".join(self.names))


class Broken(Exception):
    """A module that a file rightly names is installed and cannot be imported."""

    def __init__(self, module: str, error: BaseException) -> None:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        super().__init__(f"{module}, which is installed but cannot be imported here ({reason})")


class Inert:
    """A class that a file names as a value: it can be held, saved and printed, and not called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse."""
        raise NotAllowed(f"a call of {self.name}()")

    def __repr__(self) -> str:
        return f"<{self.name}, which cannot be called>"


def name_of(cls: type) -> str:
    """The full name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


# Modules of C functions from tensors to tensors. `torch` itself is not among them: it has load, save and from_file.
TENSOR_BUILTINS = frozenset({"torch._C._nn", "torch._C._fft", "torch._C._special", "torch._C._linalg"})
SETTINGS_BASES = frozenset(
    {
        "transformers.configuration_utils.PreTrainedConfig",
        "transformers.configuration_utils.PretrainedConfig",
        "transformers.generation.configuration_utils.GenerationConfig",
    }
)
PACKAGING_TOOLS = frozenset({"pip", "setuptools", "pkg_resources", "_distutils_hack", "wheel"})
# Modules that carry code as data: what they do is in the file, not in the installed package.
CODE_CARRIERS = (torch.fx.GraphModule, torch.jit.ScriptModule)


_NONE: Mapping[str, ModuleType] = {}


def resolve(names: Iterable[str], own: Mapping[str, ModuleType] = _NONE) -> dict[str, Any]:
    """The class or function behind each name that a file uses.

    Args:
        names: as the file has them.
        own: modules of the user's own (`own_classes`), by the names that the file has for them; the same rules hold for theirs.

    Raises:
        NotAllowed: with all names that no rule allows. Unless every name's package is installed, nothing is imported.
        Broken: a package that is needed cannot be imported.
    """
    ours = {name: own[module] for name in set(names) if (module := name.rpartition(".")[0]) in own}
    installed = {name: name in ours or is_installed(name.rpartition(".")[0]) for name in sorted(set(names))}
    judged = [
        name
        for name, known in installed.items()
        if known and (all(installed.values()) or name in ours or name.rpartition(".")[0] in sys.modules)
    ]
    found: dict[str, Any] = {}
    broken: Broken | None = None
    for name in judged:
        try:
            found[name] = _own_class(name, ours[name]) if name in ours else _permitted(name)
        except Broken as error:
            found[name], broken = error, error
    if strangers := [name for name, known in installed.items() if not known or found.get(name, name) is None]:
        raise NotAllowed(*strangers)
    if broken is not None:
        raise broken
    return found


def is_installed(module: str) -> bool:
    """Whether `module` belongs to an installed distribution, and would be imported from where that one lives."""
    # Importing a package's `__main__` runs its command line.
    parts = module.split(".")
    return is_identifier_path(module) and "__main__" not in parts and _is_installed_package(parts[0])


def is_identifier_path(name: str) -> bool:
    """Whether `name` could be a dotted Python name, such as ``torch.nn``."""
    return all(_IDENTIFIER.fullmatch(part) for part in name.split("."))


_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def _is_installed_package(top: str) -> bool:
    # Looking for pip has an effect: setuptools' import hook takes this process for an installer from then on, and
    # setuptools, which inductor needs, can no longer be imported. No model has a class of a packaging tool.
    distributions = [] if top in PACKAGING_TOOLS else _distributions().get(top, [])
    try:
        spec = importlib.util.find_spec(top) if distributions else None  # of a top-level name: imports nothing
    except (ImportError, ValueError):
        return False
    if spec is None or not spec.has_location or spec.origin is None:
        return False
    sites = _site_folders()
    return any(Path(spec.origin).resolve().is_relative_to(home) for home in sites + _sources(distributions, sites))


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def _site_folders() -> list[Path]:
    folders = [*site.getsitepackages(), *(p for p in sys.path if Path(p).name in ("site-packages", "dist-packages"))]
    return [Path(folder).resolve() for folder in [*folders, site.getusersitepackages()] if folder]


def _sources(distributions: Iterable[str], sites: list[Path]) -> list[Path]:
    """The source folders of those distributions that the user installed in place (`pip install -e`)."""
    found = []
    for dist in (d for name in distributions for d in importlib.metadata.distributions(name=name)):
        # A stranger's folder can hold a .dist-info too; only one inside site-packages was put there by an installer.
        if Path(str(dist.locate_file(""))).resolve() in sites:
            link = json.loads(dist.read_text("direct_url.json") or "{}")
            if link.get("dir_info", {}).get("editable"):
                found.append(Path(url2pathname(urlparse(link["url"]).path)).resolve())
    return found


def _own_class(name: str, module: ModuleType) -> Any | None:
    """The class of a module of the user's own, made there; None where no rule allows it."""
    thing = vars(module).get(name.rpartition(".")[2])
    if not isinstance(thing, type) or thing.__module__ != module.__name__:
        return None
    return thing if _is_permitted_class(thing) else None


def _permitted(name: str) -> Any | None:
    """The class or function behind `name`; None where no rule allows it."""
    module, _, attribute = name.rpartition(".")
    try:
        thing = vars(importlib.import_module(module)).get(attribute)
    except (Exception, SystemExit) as error:  # an import may raise anything
        raise Broken(module, error) from error
    if isinstance(thing, type):
        return thing if _is_permitted_class(thing) else None
    return thing if _is_tensor_function(thing, module) else None


def _is_permitted_class(cls: type) -> bool:
    if any("__del__" in vars(base) or vars(base).get("__slots__") for base in cls.__mro__[:-1]):
        return False  # code that runs by itself, and places that an instance's __dict__ does not show
    if issubclass(cls, nn.Module):
        inside = f"{cls.__module__}."
        ours = not inside.startswith("torch.") or inside.startswith(("torch.nn.", "torch.ao.nn."))
        return ours and not issubclass(cls, CODE_CARRIERS)
    if issubclass(cls, enum.Enum):
        return len(cls) > 0  # an enum without members is a factory of classes
    acts = any(name in vars(base) for base in cls.__mro__ for name in ("__call__", "__setstate__"))
    return (dataclasses.is_dataclass(cls) or bool({name_of(base) for base in cls.__mro__} & SETTINGS_BASES)) and not acts


def _is_tensor_function(thing: Any, module: str) -> bool:
    if inspect.isbuiltin(thing):
        return module in TENSOR_BUILTINS and not thing.__name__.startswith("_")
    if not inspect.isfunction(thing) or not thing.__module__ == module == "torch.nn.functional":
        return False
    # `distance_function`: not the one function that calls a function given to it.
    return not thing.__name__.startswith("_") and "distance_function" not in inspect.signature(thing).parameters
