"""Folders of the Hugging Face hub, by their names: ``org/name`` or ``org/name@revision``; the local cache is asked first."""

from __future__ import annotations

import re
from pathlib import Path

from normfuse.errors import LoadError, first_line
from normfuse.sources.packages import package

_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>(?!.*\.\.)[\w.][\w./-]*))?")
_ENDINGS = (".pt", ".pth", ".pt2", ".bin", ".ckpt", ".safetensors", ".json", ".onnx", ".py", ".xml", ".engine", ".pte", ".zip")
_OTHER_FORMS = ["*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ot", "*.tflite", "onnx/*", "original/*", "openvino/*", "coreml/*"]


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a hub's id; one of a file or a folder may have it as well."""
    return _ID.fullmatch(text) is not None and not text.endswith(_ENDINGS)


def from_hub(text: str) -> Path:
    """The folder of a hub's id, in the local cache.

    Raises:
        LoadError: there is no such id, or it is not in the cache and the hub is not reached.
        MissingExtra: huggingface_hub is not installed.
    """
    hub, errors = (package(name) for name in ("huggingface_hub", "huggingface_hub.errors"))
    match = _ID.fullmatch(text)
    assert match is not None, "the caller asks of what `is_hub_id` knows"
    repo, revision = match["repo"], match["revision"]
    cached: Path | None = None
    try:
        cached = Path(hub.snapshot_download(repo, revision=revision, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        pass
    except Exception as error:
        raise LoadError(f"{text} cannot be looked up: {first_line(error)}", hint="check the name") from error
    if cached is not None and _is_whole(cached):
        return cached
    hint = f"check the name and the network; or fetch it elsewhere (hf download {repo}) and give its folder"
    try:
        found = Path(hub.snapshot_download(repo, revision=revision, ignore_patterns=_OTHER_FORMS))
    except Exception as error:  # of the network, or of the hub
        away = hub.constants.HF_HUB_OFFLINE and isinstance(error, errors.LocalEntryNotFoundError)
        why = "it is not in the cache, and HF_HUB_OFFLINE is set" if away else first_line(error)[:200]
        raise LoadError(f"there is no file or folder {text}, and the hub does not give it: {why}", hint=hint) from error
    if not _is_whole(found):
        raise LoadError(f"of {text} only a part without weights is in the cache, or it has none", hint=hint)
    return found


def _is_whole(folder: Path) -> bool:
    """Whether a folder of the cache has weights, and not just a configuration that something looked at."""
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
