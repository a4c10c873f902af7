"""Folders as timm saves them for a hub: config.json with ``architecture``, and the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from normfuse.errors import LoadError
from normfuse.limits import OverLimit
from normfuse.sources.architectures import Build, open_built, timm_builder
from normfuse.sources.configurations import judged
from normfuse.sources.construction import check_settings, no_larger_than
from normfuse.sources.source import Source, files_beside
from normfuse.sources.tensor_files import Weights


def open_timm(name: str, folder: Path, config: Mapping[str, Any], weights: Weights) -> Source:
    """A timm model from its folder.

    Args:
        name: how its owner named it.
        folder: where the configuration is.
        config: the configuration.
        weights: the tensors.

    Raises:
        LoadError: it names no architecture, or the tensors are not that one's.
        MissingExtra: timm is not installed.
    """
    config = judged(folder, config)
    if not isinstance(config.get("architecture"), str):
        raise LoadError(f"{folder / 'config.json'} does not say which architecture it is of", hint="save the folder again")
    build = timm_builder(config["architecture"], folder)
    return open_built(name, _bounded(build, folder, config, weights), weights, folder, files_beside(folder, weights))


def _bounded(build: Build, folder: Path, config: Mapping[str, Any], weights: Weights) -> Build:
    """The same model, no larger than its weights could fill."""

    def bounded() -> nn.Module:
        tensors = weights.tensors()
        try:
            check_settings(config, tensors)
            with no_larger_than(tensors):
                return build()
        except OverLimit as over:
            raise LoadError(f"{folder} is not read: {over}", hint=over.hint) from None

    return bounded
