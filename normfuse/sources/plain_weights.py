"""Tensors of a folder with safetensors; a stand-in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class PlainWeights:
    """Tensors of safetensors files."""

    path: Path
    files: tuple[Path, ...]
    names: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def tensors(self) -> Mapping[str, Tensor]:
        """All of them."""
        return {name: each for file in self.files if file.suffix == ".safetensors" for name, each in load_file(file).items()}

    def write(self, target: Path, changed: Mapping[str, Tensor], dropped: Collection[str] = ()) -> None:
        """Write the same files."""
        for file in self.files:
            if file.suffix != ".safetensors":
                (target / file.name).write_bytes(file.read_bytes())
                continue
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata()
            tensors = load_file(file)
            new = {name: changed.get(name, each).to(each.dtype).contiguous() for name, each in tensors.items()}
            save_file(new, target / file.name, metadata)


def open_weights(path: Path) -> PlainWeights:
    """The tensors of a folder."""
    files = tuple(sorted([*path.glob("*.safetensors"), *path.glob("*.safetensors.index.json")]))
    names: dict[str, str] = {}
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                names |= {name: name for name in opened.keys()}  # noqa: SIM118
    return PlainWeights(path, files, names)
