"""A stranger's config.json, judged before anything is made by it: what asks for code, or of rounded weights, is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from normfuse.errors import LoadError
from normfuse.sources.source import rounded

TRUST = "--trust-remote-code (trust_remote_code=True) runs that code on this machine: your own decision"

_ROUNDED = ("quantization_config", "compression_config", "quantization")
_IMPLEMENTATIONS = (
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal",
)  # fmt: skip
"""Settings that choose who computes; transformers fetches and runs what they name, which may be anybody's."""
_OF_TORCH = ("eager", "sdpa")


def judged(folder: Path, config: Mapping[str, Any], *, trust_remote_code: bool = False) -> dict[str, Any]:
    """A configuration without what chooses among implementations, which compute the same.

    Args:
        folder: where it is from.
        config: the configuration.
        trust_remote_code: the folder's own code may run.

    Raises:
        LoadError: the weights are quantized, or code would run that is not trusted.
    """
    for each in _parts(config):
        if (told := next((each[key] for key in _ROUNDED if each.get(key) is not None), None)) is not None:
            raise rounded(str(folder), _method(told))
        if each.get("auto_map") and not trust_remote_code:
            raise LoadError(f"{folder} brings code of its own (config.json: auto_map); it is not run", hint=TRUST)
    kept: dict[str, Any] = _without_implementations(config)
    return kept


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Nothing inside asks the hub, as configurations may want that name a part of their model."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _parts(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, Mapping):
        yield value
        for each in value.values():
            yield from _parts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _parts(each)


def _without_implementations(value: Any) -> Any:
    if isinstance(value, Mapping):
        chosen = {key: each for key, each in value.items() if key not in _IMPLEMENTATIONS or each in _OF_TORCH}
        return {key: _without_implementations(each) for key, each in chosen.items()}
    return [_without_implementations(each) for each in value] if isinstance(value, list) else value


def _method(told: Any) -> str:
    if isinstance(told, Mapping) and isinstance(method := told.get("quant_method"), str):
        return method
    bits = isinstance(told, Mapping) and (told.get("load_in_8bit") or told.get("load_in_4bit"))
    return "bitsandbytes" if bits else "by a method that it does not name"
