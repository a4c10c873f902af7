"""What to do where a model's classes are of a package that is not installed.

A name in a model file is its author's word. Whoever registers a package of that name would be installed by a hint that repeats
it, so only well-known packages are named to be installed, and never one that is called like a file or folder at hand.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

KNOWN = {
    "accelerate": "accelerate", "compressai": "compressai", "diffusers": "diffusers",
    "efficientnet_pytorch": "efficientnet-pytorch",
    "einops": "einops", "kornia": "kornia", "lightning": "lightning", "monai": "monai", "open_clip": "open_clip_torch",
    "peft": "peft", "pytorch_lightning": "pytorch-lightning", "segmentation_models_pytorch": "segmentation-models-pytorch",
    "sentence_transformers": "sentence-transformers", "speechbrain": "speechbrain", "timm": "timm",
    "torch_geometric": "torch-geometric", "torchaudio": "torchaudio", "torchvision": "torchvision",
    "transformers": "transformers", "ultralytics": "ultralytics",
}  # fmt: skip
"""Module that models have their classes from -> the name under which pip knows its package."""


def own_files(modules: Collection[str], beside: Path) -> dict[str, Path]:
    """The files or folders in the working directory, or beside a model, that modules are called like."""
    found: dict[str, Path] = {}
    for module in sorted(modules):
        for folder in dict.fromkeys((Path(), beside)):
            named = (folder / f"{module}.py", folder / module)
            here = next((each for each in named if each.exists()), None)
            if here is not None:
                found.setdefault(module, here)
    return found


def what_to_do(missing: Collection[str], beside: Path) -> str:
    """What to do about modules that are not installed, as a sentence; empty where all are.

    Args:
        missing: their top-level names.
        beside: the folder of the model file.
    """
    own = own_files(missing, beside)
    known = sorted(KNOWN[each] for each in missing if each in KNOWN and each not in own)
    strange = sorted(each for each in missing if each not in KNOWN and each not in own)
    told = []
    if scripts := [path for path in own.values() if path.suffix == ".py"]:
        told.append(f"if {scripts[0]} is your own code, --model {scripts[0]} runs it and reads the model with its classes")
    if folders := [str(path) for path in own.values() if path.suffix != ".py"]:
        told.append(f"{', '.join(folders)} is a folder here and no installed package: if it is your own, make it one")
    if known:
        told.append(f"pip install {' '.join(known)}")
    if strange:
        names = ", ".join(strange)
        told.append(f"{names}: not installed; a package of that name may be a stranger's, so ask who made the model")
    return "; ".join(told)


def how_to_install(*modules: str) -> str:
    """How to install what an installed package needs; never what is called like a file or folder at hand."""
    if own := own_files(modules, Path()):
        name, file = next(iter(own.items()))
        return f"{file} is called like a package, {name}, that is meant here: start normfuse from another folder"
    return f"pip install {' '.join(KNOWN.get(each, each) for each in modules)}"
