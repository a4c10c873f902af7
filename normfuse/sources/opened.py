"""One way to open whatever a model is kept in: `open` looks at the content and asks the file of its kind."""

from __future__ import annotations

import os
import re
from pathlib import Path

from normfuse.errors import InputError, LoadError
from normfuse.sources.architectures import is_architecture, open_architecture
from normfuse.sources.dcp_folder import METADATA as DCP_FILE
from normfuse.sources.hub import from_hub, is_hub_id
from normfuse.sources.loading import load
from normfuse.sources.source import Source
from normfuse.sources.tensor_files import open_weights
from normfuse.sources.timm_folder import open_timm
from normfuse.sources.transformers_folder import CONFIG, open_transformers, read_config

_SHARD = re.compile(r"-\d{5}-of-(?!00001)(\d{5})\.(safetensors|bin)$")


def open(
    what: str | os.PathLike[str],
    *,
    architecture: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    trust_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Source:
    """The model that somebody holds, with what is needed to give the same kind back.

    Whatever takes a model takes what this returns.

    Args:
        what: a file of `torch.save` or `torch.export.save`; a folder of transformers' ``save_pretrained``, or as timm saves one
            for a hub; a hub's id (``org/name`` or ``org/name@revision``); a file of tensors or a folder of
            `torch.distributed.checkpoint`, with its architecture; or an architecture, with its weights.
        architecture: what model the tensors are of: ``timm:resnet50``, ``torchvision:resnet50``, ``transformers:FOLDER``, or
            ``FILE.py:NAME``, a function of your own that makes it.
        weights: where the tensors are, if not in what is named.
        trust_pickle: unpickle a module without any check. The file can then run code of its own.
        trust_remote_code: run the code that a folder brings.

    Raises:
        LoadError: it is not a model, or asks for more than is allowed.
        InputError: there is no such architecture.
        MissingExtra: the package that has its class is not installed.
    """
    name = os.fspath(what)
    if weights is not None and architecture is None:
        architecture, what = (name if is_architecture(name) else f"transformers:{name}"), weights
    elif weights is not None:
        raise InputError("an architecture, weights and a model were given", hint="give the weights in the model's place")
    if Path(what).suffix == ".distcp" or Path(what).name == DCP_FILE:
        raise LoadError(
            f"{what} is a part of a checkpoint of torch.distributed.checkpoint", hint="name its folder, with --model"
        )
    if shard := _SHARD.search(Path(what).name):
        said = f"{what} is one of {int(shard[1])} files that belong together"
        raise LoadError(said, hint="name their folder, or their index (….index.json) with --model")
    if architecture is not None and Path(what).suffix == ".pt2":  # as where weights are compared with what was made of them
        note = f"{what} is a whole program, for which {architecture} was not needed"
        return Source(name, load(what, trust_pickle=trust_pickle), (Path(what),), (note,))
    if architecture is not None and Path(architecture).suffix == ".py":
        return Source(name, load(what, code=architecture, trust_pickle=trust_pickle), (Path(what), Path(architecture)))
    if architecture is not None:
        return open_architecture(name, architecture, Path(what), trust_remote_code=trust_remote_code)
    path = Path(what)
    if not os.path.lexists(path):
        if is_architecture(name):
            raise InputError(f"{name} is an architecture without weights", hint="name its weights: --weights FILE")
        if is_hub_id(name):
            return _open_folder(name, from_hub(name), trust_remote_code)
        if path.name == name and not path.suffix:
            said = "check the path; a model of the hub is named by its owner too, such as openai-community/gpt2"
            raise LoadError(f"there is no file or folder {name}", hint=said)
    if os.path.lexists(path / CONFIG):
        return _open_folder(name, path, trust_remote_code)
    return Source(name, load(path, trust_pickle=trust_pickle), (path,))


def _open_folder(name: str, folder: Path, trust_remote_code: bool) -> Source:
    config = read_config(folder / CONFIG)
    if "architecture" in config and "architectures" not in config:
        return open_timm(name, folder, config, open_weights(folder))
    return open_transformers(name, folder, config, open_weights(folder), folder, trust_remote_code=trust_remote_code)
