"""One way to open whatever a model is kept in: `open_source` looks at the content and asks the file of its kind."""

from __future__ import annotations

import os
from pathlib import Path

from normfuse.sources.loading import load
from normfuse.sources.source import Source
from normfuse.sources.tensor_files import open_weights
from normfuse.sources.transformers_folder import CONFIG, open_transformers, read_config


def open_source(what: str | os.PathLike[str], *, trust_pickle: bool = False, trust_remote_code: bool = False) -> Source:
    """The model that somebody holds, with what is needed to give the same kind back.

    Args:
        what: a file of `torch.save` or `torch.export.save`, or a folder of transformers' `save_pretrained`.
        trust_pickle: unpickle a module without any check. The file can then run code of its own.
        trust_remote_code: run the code that a folder brings.

    Raises:
        LoadError: it is not a model, or asks for more than is allowed.
        MissingExtra: the package that has its class is not installed.
    """
    name, path = os.fspath(what), Path(what)
    if (path / CONFIG).is_file():
        return open_transformers(
            name, path, read_config(path / CONFIG), open_weights(path), trust_remote_code=trust_remote_code
        )
    return Source(name, load(path, trust_pickle=trust_pickle), (path,))
