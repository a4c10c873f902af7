"""Folders as timm saves them for a hub: config.json with ``architecture``, and the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normfuse.errors import LoadError
from normfuse.sources.architectures import open_built, timm_builder
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
    if not isinstance(config.get("architecture"), str):
        raise LoadError(f"{folder / 'config.json'} does not say which architecture it is of", hint="save the folder again")
    timm_builder(config["architecture"])  # a name that timm does not have is told as such
    build = timm_builder(f"local-dir:{folder}")  # with the settings of the configuration
    return open_built(name, build, weights, folder, files_beside(folder, weights))
