"""What runs in a process of its own for `test_canaries`: every class and every function that the rules allow, watched.

    python -m tests.sources.canaries classes torch timm     what of their code runs when each class is built from forged states
    python -m tests.sources.canaries functions FOLDER       what each function does with each kind of thing that a file can hold

Prints one JSON object: how much was tried, and all that acted.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import importlib
import itertools
import json
import os
import pkgutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from normfuse.sources import allowlist, constructors
from normfuse.sources.allowlist import Inert, NotAllowed
from normfuse.sources.building import REVIEWED, Builder, _shadows
from normfuse.sources.pickles import Made, Name, Unreadable
from tests.zoo import torchvision_shim

partial: Any = functools.partial  # with arguments of all kinds
ACTS = ("os.", "subprocess.", "socket.", "shutil.", "pty.", "ftplib.", "urllib.", "webbrowser.", "ctypes.")
HARMLESS = ("os.listdir", "os.scandir", "os.fspath", "os.getxattr", "os.walk", "ctypes.dlsym")


class Watch:
    """Notes what the process does while it is on (an audit hook cannot be taken away again)."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        written = event == "open" and (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"))
        named = any("canary" in str(argument) for argument in arguments)
        if written or named or (event.startswith(ACTS) and event not in HARMLESS):
            self.seen.append(f"{event} {arguments!r}"[:200])

    def during(self, act: Callable[[], Any]) -> list[str]:
        """What is seen while `act` runs."""
        self.seen = []
        self.on = True
        try:
            act()
        except Exception:  # what matters is what it did, not what came of it
            self.on = False
        self.on = False
        return self.seen


# ---- classes


def modules_of(package: str) -> Iterator[str]:
    if package == "transformers":
        models = Path(importlib.import_module("transformers.models").__file__ or "").parent
        for kind in ("modeling", "configuration"):
            for file in sorted(models.glob(f"*/{kind}_*.py")):
                yield f"transformers.models.{file.parent.name}.{file.stem}"
        return
    for name in ("torch.nn", "torch.ao.nn") if package == "torch" else (package,):
        for found in pkgutil.walk_packages(importlib.import_module(name).__path__, f"{name}."):
            if "__main__" not in found.name and ".data" not in found.name and "onnx" not in found.name:
                yield found.name


def classes_of(package: str) -> list[type]:
    found: dict[type, None] = {}
    for name in modules_of(package):
        try:
            module = importlib.import_module(name)
        except (Exception, SystemExit):  # a package that it needs is not installed
            continue
        found |= dict.fromkeys(each for each in vars(module).values() if isinstance(each, type) and each.__module__ == name)
    return list(found)


def forged_states() -> Iterator[Any]:
    text = "canary"
    yield None
    yield {}
    yield (text, text)
    yield {"training": True, "path": text, "filename": text, "config": text, "_modules": {}, "_keys": {"apply": None}}
    yield {"_flat_weights_names": [[text]], "_all_weights": [[text]], "_flat_weights": [[text]], "num_layers": 1 << 62}
    for name in ("forward", "__call__", "__class__", "to", "config", "attribute_map"):
        yield {name: Name("torch.nn.functional.gelu")}


def replaceable(cls: type) -> list[str]:
    """Attributes of a class, methods above all, in whose place a file could put a function of its choice."""
    return [name for base in cls.__mro__ for name in vars(base) if not _shadows(cls, name, F.gelu)]


def calls_of_others(act: Callable[[], Any]) -> list[str]:
    """Functions of installed packages that run during `act`, but for reviewed ones and `nn.Module`'s own."""
    ran: set[str] = set()
    home = str(Path(torch.__file__).parent.parent)
    reviewed = {importlib.import_module(name.rpartition(".")[0]).__file__ for name in REVIEWED}
    reviewed |= {importlib.import_module(f"torch.nn.{name}").__file__ for name in ("modules.module", "parameter")}

    def note(frame: Any, event: str, _argument: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(home) and file not in reviewed and "normfuse" not in file:
            ran.add(f"{file}:{frame.f_code.co_name}")

    sys.setprofile(note)
    try:
        act()
    except (NotAllowed, Unreadable):
        pass
    except Exception as error:  # told as "cannot be read"
        ran |= {f"raised {error!r}"} if isinstance(error, AssertionError) else set()
    finally:
        sys.setprofile(None)
    return sorted(ran)


def build(name: str, thing: Any, state: Any, *, called: bool = False) -> Any:
    shown = Made(Name(name), (), called, states=[] if state is None else [state])
    return Builder({name: thing, "torch.nn.functional.gelu": F.gelu}, lambda _reference: None).build(shown)  # type: ignore[arg-type,return-value]


def try_classes(packages: list[str]) -> dict[str, Any]:
    watch = Watch()
    tried, built, acted = 0, 0, {}
    for cls in itertools.chain.from_iterable(map(classes_of, packages)):
        name = allowlist.name_of(cls)
        if "<" in name or allowlist._permitted(name) is not cls:
            continue
        tried += 1
        for state in forged_states():
            seen = watch.during(functools.partial(build, name, cls, state))
            seen += calls_of_others(functools.partial(build, name, cls, state))
            seen += [f"{each} can be replaced" for each in replaceable(cls)]
            if seen:
                acted[f"{name} {state!r}"[:200]] = seen
        with contextlib.suppress(NotAllowed, Unreadable, TypeError):  # TypeError: an abstract class
            build(name, cls, {})
            built += 1
    return {"tried": tried, "built": built, "acted": acted}


# ---- functions


def functions() -> dict[str, Callable[..., Any]]:
    """Every function that a file may name."""
    homes = ["torch.nn.functional", *sorted(allowlist.TENSOR_BUILTINS)]
    found = {f"{home}.{name}": thing for home in homes for name, thing in vars(importlib.import_module(home)).items()}
    named = {
        name: thing
        for name, thing in found.items()
        if not isinstance(thing, type) and allowlist._is_tensor_function(thing, name.rpartition(".")[0])
    }
    return named | {f"torch.{name}": thing for name, thing in constructors._FUNCTIONS.items()}


def things(target: str) -> dict[str, Any]:
    """A thing of every kind that a file can hold, as bent to a file's purpose as the rules allow."""
    from transformers import BertConfig, GenerationConfig

    bent = {
        "x": target,
        "filename": target,
        "path": target,
        "dim": target,
        "shape": target,
        "softmax": F.softmax,
        "size": F.gelu,
    }
    config = BertConfig.__new__(BertConfig)
    config.__dict__.update(bent)
    generation = GenerationConfig.__new__(GenerationConfig)
    generation.__dict__.update(bent)
    module: Any = nn.Sequential(nn.Linear(2, 2))
    module.__dict__.update(bent)
    return {
        "config": config,
        "generation": generation,
        "module": module,
        "parameters": nn.ParameterDict({"softmax": torch.ones(2)}),
        "namespace": argparse.Namespace(**bent),
        "partial": partial(F.softmax, target),
        "function": F.softmax,
        "class": nn.Linear,
        "inert": Inert("os.system"),
        "text": target,
        "command": f"touch {target}",
        "bytes": target.encode(),
        "list": [target, target],
        "dict": {"filename": target},
        "ordered": collections.OrderedDict(filename=target),
        "default": collections.defaultdict(list, filename=[target]),
        "number": 3,
        "none": None,
        "dtype": torch.float32,
        "size": torch.Size([2]),
        "tensor": torch.ones(2, 2),
        "long": torch.ones(2, dtype=torch.int64),
    }


def try_functions(target: str) -> dict[str, Any]:
    watch = Watch()
    given = things(target)
    acted: dict[str, list[str]] = {}
    names = functions()
    for name, function in names.items():
        build_call = functools.partial(build, name, function, None, called=True)
        seen = watch.during(build_call)
        try:
            build_call()
            seen = [*seen, "was called while the file was read"]
        except NotAllowed:
            pass
        for first, second in itertools.product(given, repeat=2):
            for arguments, keywords in (
                ((given[first],), {}),
                ((given[first], given[second]), {}),
                ((given[first], given[second], target), {}),
                ((given[first],), {"out": given[second]}),
            ):
                seen = seen + watch.during(functools.partial(function, *arguments, **keywords))
        if seen:
            acted[name] = seen[:3]
    environment = sorted(name for name in os.environ if "canary" in name)
    return {
        "tried": len(names),
        "kinds": len(given),
        "acted": acted,
        "environment": environment,
        "control": control(watch, target),
    }


def control(watch: Watch, target: str) -> list[str]:
    """What the watch sees of an attack that the rules refuse; without it, that nothing is seen would show nothing."""
    config = things(target)["config"]
    config.__dict__["attribute_map"] = {"softmax": "to_json_file"}
    return watch.during(partial(F.softmax, config, f"{target}.control"))


def main() -> None:
    warnings.simplefilter("ignore")
    torchvision_shim.install()
    signal.alarm(900)
    what, *arguments = sys.argv[1:]
    print(json.dumps(try_classes(arguments) if what == "classes" else try_functions(*arguments)))


if __name__ == "__main__":
    main()
