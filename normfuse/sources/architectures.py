"""Architectures by name, for weights that come without their model: ``--model`` beside a file of tensors.

    timm:resnet50               a model of timm; timm:resnet50,num_classes=7 with settings of its own
    torchvision:resnet50        a model of torchvision, likewise
    transformers:FOLDER         what a folder's config.json, or a configuration file, describes; also of the hub: org/name
    FILE.py:NAME                what the function NAME of a file of the user's own makes; the file is run

The tensors are put into the model one by one, under its own names: what is missing, left over or of another shape is an error.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normfuse.errors import InputError, LoadError, NormfuseError, did_you_mean, first_line
from normfuse.limits import OverLimit
from normfuse.sources.hub import from_hub, is_hub_id
from normfuse.sources.input_files import run_script
from normfuse.sources.packages import package
from normfuse.sources.source import Source, Stored, require_fit, require_floats, same_memory
from normfuse.sources.tensor_files import Weights, open_weights
from normfuse.sources.transformers_folder import CONFIG, open_transformers, read_config

FORMS = "timm:NAME (or timm:NAME,num_classes=7), torchvision:NAME, transformers:FOLDER, or FILE.py:NAME, your own code"
_FORM = re.compile(r"(?P<package>timm|torchvision|transformers):(?P<name>.+)|(?P<file>.+\.py):(?P<function>\w+)")
Build = Callable[[], nn.Module]


def is_architecture(text: str) -> bool:
    """Whether a text has the form of an architecture's name."""
    return _FORM.fullmatch(text) is not None


def open_architecture(name: str, architecture: str, path: Path, *, trust_remote_code: bool = False) -> Source:
    """A model of an architecture with the tensors of a file or a folder.

    Args:
        name: how its owner named it.
        architecture: one of `FORMS`.
        path: where the tensors are.
        trust_remote_code: run the code that a folder of transformers brings.

    Raises:
        InputError: there is no such architecture.
        LoadError: the tensors cannot be read, or are not this architecture's.
        MissingExtra: the package that has it is not installed.
    """
    match = _FORM.fullmatch(architecture)
    if match is None:
        raise InputError(f"'{architecture}' names no architecture", hint=f"write {FORMS}")
    weights = open_weights(path)
    if match["package"] == "transformers":
        place = Path(match["name"])
        if not place.exists() and is_hub_id(match["name"]):
            place = from_hub(match["name"])
        config = place if place.is_file() else place / CONFIG
        return open_transformers(name, config.parent, read_config(config), weights, path, trust_remote_code=trust_remote_code)
    return open_built(name, _builder(match), weights, path)


def open_built(name: str, build: Build, weights: Weights, path: Path, beside: tuple[Path, ...] = ()) -> Source:
    """What `build` makes, with the tensors of a file or a folder.

    Args:
        name: how its owner named it.
        build: makes the model.
        weights: the tensors.
        path: where they are.
        beside: files of the folder that are no tensors.

    Raises:
        LoadError: they are not this model's.
    """
    model = build()
    weights = weights.fitted(model.state_dict())
    tensors = weights.tensors()
    fill(name, model, tensors)
    stored = Stored(
        path,
        weights,
        same_memory(model, tensors),
        lambda other: open_built(str(other), build, open_weights(other), other, beside),
        beside,
    )
    return Source(name, model.eval(), tuple(dict.fromkeys((path, *weights.files))), tuple(weights.notes), stored)


def fill(name: str, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make a model hold these tensors in place of its own; tied ones stay tied.

    Raises:
        LoadError: they are not this model's.
    """
    own = {key: each for key, each in model.state_dict(keep_vars=True).items() if isinstance(each, Tensor)}
    tied: dict[int, list[str]] = {}
    for key, each in own.items():
        tied.setdefault(id(each), []).append(key)
    found = {key: next((other for other in tied[id(each)] if other in tensors), None) for key, each in own.items()}
    # torch's own loader forgives a batch counter too: checkpoints from before torch 0.4.1 have none, and nothing reads it.
    missing = [key for key, at in found.items() if at is None and not key.endswith("num_batches_tracked")]
    both = {key: tensors[at] for key, at in found.items() if at is not None}
    sizes = [(key, tuple(both[key].shape), tuple(own[key].shape)) for key in both if both[key].shape != own[key].shape]
    require_fit(name, missing, tensors.keys() - own.keys(), sizes)
    require_floats(name, model, tensors)
    for keys in tied.values():
        stored = [tensors[key] for key in keys if key in tensors]
        if any(not each.equal(stored[0]) for each in stored[1:]):
            raise LoadError(f"{name} holds two values for one tensor of the model: {' and '.join(keys)}")
    for key, tensor in both.items():
        own[key].data = tensor


def _builder(match: re.Match[str]) -> Build:
    if match["file"]:
        return _own_builder(match["file"], match["function"])
    name, settings = _named(match["name"])
    return (timm_builder if match["package"] == "timm" else _torchvision_builder)(name, **settings)


def _named(text: str) -> tuple[str, dict[str, Any]]:
    """The name of an architecture and its settings, which are Python's literals or words that stand for themselves."""
    name, _, rest = text.partition(",")
    source = f"dict({rest})"
    with contextlib.suppress(ValueError, SyntaxError):
        call = ast.parse(source, mode="eval").body
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
            settings = {each.arg: _setting(each.value, source) for each in call.keywords}
            if None not in settings:
                return name, {str(key): value for key, value in settings.items()}
    raise InputError(f"'{rest}' is no setting of a model", hint="write NAME,SETTING=VALUE, such as resnet50,num_classes=7")


def _setting(value: ast.expr, source: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return ast.get_source_segment(source, value)


def timm_builder(name: str, folder: Path | None = None, **settings: Any) -> Build:
    """What makes a model of timm, without its trained weights.

    Args:
        name: of the architecture.
        folder: whose configuration has further settings.
        settings: of the architecture.

    Raises:
        InputError: timm has no such model.
        MissingExtra: timm is not installed.
    """
    timm = package("timm")
    own = folder is None and name.startswith("local-dir:")
    if not own and name.partition(".")[0] not in timm.list_models():
        raise InputError(f"timm has no model '{name}'", hint=did_you_mean(name, timm.list_models(), "see timm.list_models()"))
    place = name if folder is None else f"local-dir:{folder}"
    return _made(f"timm:{name}", lambda: timm.create_model(place, pretrained=False, **settings))


def _torchvision_builder(name: str, **settings: Any) -> Build:
    models = package("torchvision").models
    if name not in models.list_models():
        hint = did_you_mean(name, models.list_models(), "see torchvision.models.list_models()")
        raise InputError(f"torchvision has no model '{name}'", hint=hint)
    off = {each: None for each in ("weights", "weights_backbone") if each in _parameters(models.get_model_builder(name))}
    return _made(f"torchvision:{name}", lambda: models.get_model(name, **off, **settings))


def _parameters(builder: Callable[..., Any]) -> Collection[str]:
    return inspect.signature(builder).parameters


def _own_builder(file: str, function: str) -> Build:
    def build() -> nn.Module:
        made = run_script(file, function)()
        if not isinstance(made, nn.Module):
            raise InputError(f"{file}:{function} makes a {type(made).__name__}, not a model", hint="return an nn.Module")
        return made

    return _made(f"{file}:{function}", build, f"the error is in {file}")


def _made(name: str, build: Build, hint: str = "check the settings that it is given") -> Build:
    def told() -> nn.Module:
        try:
            return build()
        except (NormfuseError, OverLimit):
            raise
        except (Exception, SystemExit) as error:  # the package's code, or the user's own
            said = f"{name} cannot be built: {type(error).__name__}: {first_line(error)[:200]}"
            raise InputError(said, hint=hint) from error

    return told
