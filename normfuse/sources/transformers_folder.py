"""Folders of transformers' `save_pretrained`: a configuration, the tensors, and what goes along.

The class is the one that `architectures` names, of the installed transformers; a folder's own code (`auto_map`) runs only
where its owner trusts it. Transformers itself puts the tensors into the class, so that what it knows of old names, prefixes
and ties holds here too; what of a folder the class did not take, or did not get, is an error and never a guess.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from normfuse.errors import LoadError, NormfuseError, first_line
from normfuse.limits import OverLimit
from normfuse.sources.configurations import judged, offline
from normfuse.sources.construction import check_settings, no_larger_than
from normfuse.sources.loading import ADAPTER, adapter
from normfuse.sources.packages import needed, not_imported, package, wanted_by_code
from normfuse.sources.source import (
    Source,
    Stored,
    files_beside,
    left_behind,
    made_anew,
    require_fit,
    require_floats,
    same_memory,
)
from normfuse.sources.tensor_files import Weights, open_weights
from normfuse.strict_json import parsed, read_file, record

CONFIG = "config.json"


def read_config(path: Path) -> dict[str, Any]:
    """A folder's configuration.

    Raises:
        LoadError: it cannot be read, or is no JSON object.
    """
    try:
        return record(parsed(read_file(path)))
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror}", hint="check the path and its permissions") from error
    except OverLimit as over:
        raise LoadError(f"{path} is not read: {over}", hint=over.hint) from None
    except ValueError as error:
        raise LoadError(f"{path} is no configuration: {first_line(error)}", hint="fetch or save the folder again") from error


def open_transformers(
    name: str, folder: Path, config: Mapping[str, Any], weights: Weights, path: Path, *, trust_remote_code: bool = False
) -> Source:
    """A transformers model from its configuration and its tensors.

    Args:
        name: how its owner named it.
        folder: where the configuration and what goes along are.
        config: the configuration.
        weights: the tensors.
        path: where they are: the folder, or a file that comes without a configuration.
        trust_remote_code: run the folder's own code.

    Raises:
        LoadError: the class is not known, wants code of its own, or does not fit the tensors.
        MissingExtra: transformers is not installed.
    """
    if (folder / ADAPTER).exists():
        raise adapter(folder)
    tensors = weights.tensors()
    with _told(folder, "the configuration"):
        check_settings(config, tensors)
    cls, settings = class_of(folder, config, trust_remote_code=trust_remote_code)
    fill = partial(_filled, name, cls, settings, online=trust_remote_code)
    model, unfit = fill(tensors)
    if any(unfit):  # perhaps the names are those of a training's wrapper
        weights = weights.fitted(model.state_dict())
        tensors = weights.tensors()
        model, unfit = fill(tensors)
    require_fit(name, *unfit)
    require_floats(name, model, tensors)
    whole = path.is_dir() and path.samefile(folder)
    beside = files_beside(folder, weights) if whole else ()
    notes = (*weights.notes, *(left_behind(folder) if whole else ()))

    def again(other: Path) -> Source:
        return open_transformers(str(other), folder, config, open_weights(other), other, trust_remote_code=trust_remote_code)

    keys = same_memory(model, tensors)
    stored, notes = Stored(path, weights, keys, again, beside), (*notes, *made_anew(model, tensors, keys))
    return Source(name, model, tuple(dict.fromkeys((path, *weights.files))), notes, stored)


def class_of(folder: Path, config: Mapping[str, Any], *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """The class that a configuration names, and the configuration as that class has it.

    Raises:
        LoadError: there is no such class, or it would be the folder's own code, which is not trusted.
        MissingExtra: transformers is not installed.
    """
    named = config.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        said = (
            f"names {len(named)} architectures"
            if isinstance(named, list) and len(named) > 1
            else "does not say which class it is of"
        )
        raise LoadError(f"{folder / CONFIG} {said}", hint='"architectures" in it must name one class, such as GPT2LMHeadModel')
    config = judged(folder, config, trust_remote_code=trust_remote_code)
    transformers = package("transformers")
    with _told(folder, "the configuration"), contextlib.nullcontext() if trust_remote_code else offline():
        if config.get("auto_map"):
            return _own_class(folder, config, named[0])
        cls = _stock_class(folder, transformers, named[0])
        known: Any = cls.config_class
        wanted = known.model_type
        if config.get("model_type", wanted) != wanted:
            said = f"its model_type is '{config['model_type']}', and {named[0]} is for '{wanted}'"
            raise LoadError(f"{folder / CONFIG} names two models: {said}", hint="fetch or save the folder again")
        return cls, known.from_dict(config)


def _stock_class(folder: Path, transformers: Any, name: str) -> Any:
    try:
        cls: Any = getattr(transformers, name, None) if name.isidentifier() else None
    except ImportError as error:
        raise not_imported(f"{name} of transformers", error) from error
    if getattr(type(cls), "is_dummy", False):
        raise needed(f"{name} of transformers", cls._backends)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        said = f"the installed transformers {transformers.__version__} has no model class '{name}'"
        raise LoadError(f"{folder}: {said}", hint='pip install -U transformers, or check "architectures" in config.json')
    return cls


def _own_class(folder: Path, config: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    places = [each for each in dict(config["auto_map"]).values() if isinstance(each, str) and each.rpartition(".")[2] == name]
    if not places:
        raise LoadError(f"{folder / CONFIG} has no code for {name} (auto_map)", hint="fetch or save the folder again")
    settings = AutoConfig.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    return get_class_from_dynamic_module(places[0], str(folder), local_files_only=True), settings


Unfit: TypeAlias = tuple[Collection[str], Collection[str], Collection[tuple[str, Any, Any]]]


def _filled(name: str, cls: Any, settings: Any, tensors: dict[str, Tensor], *, online: bool) -> tuple[nn.Module, Unfit]:
    """The model, and what of it or of the tensors was not used: as for `require_fit`."""
    own = contextlib.nullcontext() if online else offline()
    with _told(Path(name), "the model"), _quietly(), own, no_larger_than(tensors):
        model, info = cls.from_pretrained(
            None, config=settings, state_dict=dict(tensors), dtype=_dtype_of(tensors), output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    if info.get("error_msgs"):
        raise LoadError(f"the weights of {name} do not fit its architecture: {info['error_msgs'][0]}")
    return model.eval(), (info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])


def _dtype_of(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that most of the stored entries have; transformers' classes compute in one."""
    sizes: dict[torch.dtype, int] = {}
    for each in tensors.values():
        if each.is_floating_point():
            sizes[each.dtype] = sizes.get(each.dtype, 0) + each.numel()
    return max(sizes, key=sizes.__getitem__, default=torch.float32)


@contextlib.contextmanager
def _told(folder: Path, what: str) -> Iterator[None]:
    """Classes and configurations are code on settings that can be anything: whatever they raise is one line."""
    try:
        yield
    except NormfuseError:
        raise
    except OverLimit as over:
        raise LoadError(f"{folder} is not read: {over}", hint=over.hint) from None
    except ImportError as error:
        told = wanted_by_code(folder, error) or not_imported(f"{what} of {folder}", error)
        raise told from error
    except Exception as error:
        hint = f"check {CONFIG}, and that the installed transformers is the one that the folder was saved for"
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise LoadError(f"transformers cannot make {what} of {folder}: {reason}", hint=hint) from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    import logging as levels

    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(levels.CRITICAL)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
