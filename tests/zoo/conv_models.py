"""The convolutional zoo: where conv_bn must put every BatchNorm, derived by hand from the architecture.

A BatchNorm behind a convolution that nobody else reads folds into it, whatever the kernel, groups and stride. One that
reads a stream, an activation or a maximum folds into all its readers, if these are linear; else it stays as one
multiplication and one addition. Four counts per model say how many go where, and the note says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import torchvision_shim
from tests.zoo.models import tiny

torchvision_shim.install()


@dataclass(frozen=True)
class ConvModel:
    """One architecture with its BatchNorms, spread weights, and what becomes of them.

    Attributes:
        name: unique.
        build: seeded, spread, in eval mode.
        writers: BatchNorms folded into the layers that write their input.
        readers: folded into the layers that read their output.
        halves: the scale folded into these, the shift left as one addition.
        kept: left as one multiplication and one addition.
        note: the reasoning.
        shape: of the input.
    """

    name: str
    build: Callable[[], nn.Module]
    writers: int
    readers: int
    halves: int
    kept: int
    note: str
    shape: tuple[int, ...] = (2, 3, 32, 32)

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Writers, readers, halves, kept."""
        return self.writers, self.readers, self.halves, self.kept

    def inputs(self) -> tuple[Tensor]:
        """Random images, the same at every call."""
        return (torch.randn(self.shape, generator=torch.Generator().manual_seed(1)),)


# --- torchvision and timm ---------------------------------------------------------------------------------------------


def _torchvision(name: str, **options: Any) -> Any:
    import torchvision

    return torchvision.models.get_model(name, weights=None, num_classes=7, **options)


def _densenet() -> Any:
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=4, block_config=(2, 2, 2), num_init_features=8, bn_size=2, num_classes=7)


def _timm(name: str, **options: Any) -> Any:
    import timm

    return timm.create_model(name, num_classes=7, **options)


def _resnetv2(*layers: int) -> Any:
    from timm.layers.create_conv2d import create_conv2d
    from timm.layers.norm_act import BatchNormAct2d
    from timm.models.resnetv2 import ResNetV2

    parts: dict[str, Any] = {"norm_layer": BatchNormAct2d, "conv_layer": create_conv2d}
    return ResNetV2(list(layers), channels=(16, 32), num_classes=7, stem_chs=8, **parts)


def _convmixer() -> Any:
    from timm.models.convmixer import ConvMixer

    return ConvMixer(dim=8, depth=2, kernel_size=3, patch_size=4, num_classes=7)


class MixConv(nn.Module):
    """MixNet's: every half of the channels has a kernel of its own, and one BatchNorm normalizes both."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.enter_norm = nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.small, self.large = (nn.Conv2d(8, 8, k, padding=k // 2, groups=8, bias=False) for k in (3, 5))
        self.norm, self.leave, self.leave_norm = nn.BatchNorm2d(16), nn.Conv2d(16, 7, 1, bias=False), nn.BatchNorm2d(7)

    def forward(self, x: Tensor) -> Tensor:
        one, two = torch.relu(self.enter_norm(self.enter(x))).split(8, 1)
        x = F.hardswish(self.norm(torch.cat([self.small(one), self.large(two)], 1)))
        return torch.relu(self.leave_norm(self.leave(x)))


# --- VGG with normalized classifiers ----------------------------------------------------------------------------------


class Vgg(nn.Module):
    """Convolutions in a row, and a classifier whose hidden layers are normalized too.

    Args:
        activation_first: Linear → ReLU → BatchNorm instead of Linear → BatchNorm → ReLU, and so for convolutions.
    """

    def __init__(self, activation_first: bool = False) -> None:
        super().__init__()

        def layer(write: nn.Module, norm: nn.Module) -> list[nn.Module]:
            return [write, nn.ReLU(), norm] if activation_first else [write, norm, nn.ReLU()]

        def conv(inputs: int, outputs: int) -> list[nn.Module]:
            return [*layer(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)), nn.MaxPool2d(2)]

        self.features = nn.Sequential(*conv(3, 8), *conv(8, 8), *conv(8, 16))
        self.classifier = nn.Sequential(
            *layer(nn.Linear(256, 24), nn.BatchNorm1d(24)),
            nn.Dropout(),
            *layer(nn.Linear(24, 24, bias=False), nn.BatchNorm1d(24, affine=False)),
            nn.Linear(24, 7),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


# --- U-Net ------------------------------------------------------------------------------------------------------------


def _conv_norm(inputs: int, outputs: int, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )  # fmt: skip


class Down(nn.Module):
    """Two convolutions, the second one grouped."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.one, self.two = _conv_norm(inputs, outputs), _conv_norm(outputs, outputs, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


class Up(nn.Module):
    """A grouped transposed convolution, the skip beside it, and two convolutions.

    Args:
        norm_skips: normalize the concatenation once more and mix it by a 1×1 convolution.
    """

    def __init__(self, inputs: int, outputs: int, norm_skips: bool) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, outputs, 2, 2, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3)
        mix = [nn.BatchNorm2d(2 * outputs), nn.Conv2d(2 * outputs, 2 * outputs, 1)] if norm_skips else []
        self.mix = nn.Sequential(*mix)
        self.down = Down(2 * outputs, outputs)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = torch.cat([torch.relu(self.norm(self.up(x))), skip], 1)
        return self.down(self.mix(x))


class UNet(nn.Module):
    """Two levels down and up."""

    def __init__(self, norm_skips: bool = False) -> None:
        super().__init__()
        self.outer, self.inner, self.bottom = Down(3, 8), Down(8, 16), Down(16, 32)
        self.up_inner, self.up_outer = Up(32, 16, norm_skips), Up(16, 8, norm_skips)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        outer = self.outer(x)
        inner = self.inner(F.max_pool2d(outer, 2))
        x = self.up_inner(self.bottom(F.max_pool2d(inner, 2)), inner)
        return self.head(self.up_outer(x, outer))


# --- YOLO -------------------------------------------------------------------------------------------------------------


class Conv(nn.Module):
    """Convolution, BatchNorm with YOLO's eps, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)), inplace=True)


class Bottleneck(nn.Module):
    """Two convolutions and a shortcut: two BatchNorms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = Conv(width, width, 3), Conv(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.one(x))


class C2f(nn.Module):
    """YOLOv8's: half of the channels goes through n bottlenecks, and every stage to the end. 2 + 2n BatchNorms."""

    def __init__(self, inputs: int, outputs: int, n: int) -> None:
        super().__init__()
        half = outputs // 2
        self.enter, self.leave = Conv(inputs, outputs), Conv((2 + n) * half, outputs)
        self.blocks = nn.ModuleList(Bottleneck(half) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class Csp(nn.Module):
    """YOLOv5's C3: two convolutions of one input, n bottlenecks behind one of them. 3 + 2n BatchNorms."""

    def __init__(self, width: int, n: int) -> None:
        super().__init__()
        self.one, self.two, self.leave = Conv(width, width // 2), Conv(width, width // 2), Conv(width, width)
        self.blocks = nn.Sequential(*(Bottleneck(width // 2) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.cat([self.blocks(self.one(x)), self.two(x)], 1))


class Sppf(nn.Module):
    """Three maxima in a row, all of them kept. 2 BatchNorms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.leave, self.pool = Conv(width, width // 2), Conv(2 * width, width), nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.enter(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class RepConv(nn.Module):
    """3×3, 1×1 and identity, each with a BatchNorm, summed: 2 behind convolutions and one on the input itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.wide_norm = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.point, self.point_norm = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)
        self.identity = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.wide_norm(self.wide(x)) + self.point_norm(self.point(x)) + self.identity(x))


class Detect(nn.Module):
    """A head on one scale, flattened for the sort of boxes. 2 BatchNorms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Sequential(Conv(width, width, 3), Conv(width, width, 3), nn.Conv2d(width, 9, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).flatten(2)


class Yolo(nn.Module):
    """Backbone, neck with upsampling and concatenation, heads on two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shallow = Conv(3, 8, 3, 2), nn.Sequential(Conv(8, 16, 3, 2), C2f(16, 16, 2))
        self.deep = nn.Sequential(Conv(16, 16, 3, 2), Csp(16, 1), Sppf(16))
        self.neck = nn.Sequential(C2f(32, 16, 1), RepConv(16))
        self.heads = nn.ModuleList([Detect(16), Detect(16)])

    def forward(self, x: Tensor) -> Tensor:
        shallow = self.shallow(self.stem(x))
        deep = self.deep(shallow)
        mixed = self.neck(torch.cat([F.interpolate(deep, scale_factor=2.0), shallow], 1))
        return torch.cat([head(x) for head, x in zip(self.heads, (mixed, deep), strict=True)], 2)


# --- attention on a map -----------------------------------------------------------------------------------------------


class MapAttention(nn.Module):
    """BoTNet's middle: tokens of a map attend to each other in heads and get the map's shape back before their BatchNorm.

    The projection has a BatchNorm of its own, as in LeViT.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.qkv_norm = nn.Conv2d(width, 3 * width, 1, bias=False), nn.BatchNorm2d(3 * width)
        self.norm, self.head = nn.BatchNorm2d(width), nn.Conv2d(width, 7, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.qkv_norm(self.qkv(x)).flatten(2).transpose(1, 2)
        q, k, v = (self._split(part) for part in tokens.chunk(3, 2))
        y = torch.softmax(q @ k.transpose(1, 2) / 4, -1) @ v
        y = y.transpose(1, 2).reshape(x.shape)
        return self.head(torch.relu(self.norm(y)))

    def _split(self, tokens: Tensor) -> Tensor:
        """Heads in the place of more images."""
        b, n, c = tokens.shape
        return tokens.reshape(b, n, self.heads, c // self.heads).transpose(1, 2).reshape(b * self.heads, n, -1)


# --- the table --------------------------------------------------------------------------------------------------------

ALL = "every BatchNorm is behind a convolution of its own"

_vgg, _unet = partial(tiny, Vgg), partial(tiny, UNet)

MODELS = (
    ConvModel(
        "resnet50", tiny(_torchvision, "resnet50", width_per_group=8), 53, 0, 0, 0,
        f"{ALL}: stem, 3 in each of 3 + 4 + 6 + 3 blocks, 4 on shortcuts",
    ),
    ConvModel(
        "mobilenet_v2", tiny(_torchvision, "mobilenet_v2", width_mult=0.25), 52, 0, 0, 0,
        f"{ALL}, half of these depthwise: stem, 2 in the block that does not expand, 3 in 16 blocks, last layer",
    ),
    ConvModel(
        "mobilenet_v3", tiny(_torchvision, "mobilenet_v3_small", width_mult=0.5), 34, 0, 0, 0,
        f"{ALL}: stem, 2 in the block that does not expand, 3 in 10, last layer; squeeze-and-excitation has none",
    ),
    ConvModel(
        "efficientnet", tiny(_torchvision, "efficientnet_b0"), 49, 0, 0, 0,
        f"{ALL}: stem, 2 in the block that does not expand, 3 in 15, last layer; dropped paths are whole in evaluation",
    ),
    ConvModel(
        "regnet", tiny(_torchvision, "regnet_y_400mf"), 53, 0, 0, 0,
        f"{ALL}, a third of these grouped: stem, 3 in each of 1 + 3 + 6 + 6 blocks, 4 on shortcuts",
    ),
    ConvModel(
        "shufflenet", tiny(_torchvision, "shufflenet_v2_x0_5"), 56, 0, 0, 0,
        f"{ALL}: 2 at the ends, 5 in each first unit of 3 stages, 3 in 3 + 7 + 3 others; the shuffle comes behind",
    ),
    ConvModel(
        "densenet", tiny(_densenet), 7, 0, 0, 9,
        "the stem's and the second in 6 layers are behind convolutions; the first in each layer, 2 in transitions and the "
        "last read concatenations of values that other layers read too, and ReLUs read them",
    ),
    ConvModel(
        "resnetv2_shallow", tiny(_resnetv2, 1, 1), 6, 0, 0, 1,
        "2 in each block, and the one of stage 2 and the last: they alone read a sum of two convolutions; the first "
        "block's reads a maximum, and a ReLU reads it",
    ),
    ConvModel(
        "resnetv2", tiny(_resnetv2, 2, 2), 8, 0, 0, 5,
        "2 in each of 4 blocks; the first in every block and the last read the stream, which the shortcut reads too, or "
        "read a sum with such a stream in it",
    ),
    ConvModel(
        "convnextv2", tiny(_timm, "convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)), 0, 0, 0, 0,
        "LayerNorms and response normalization alone",
    ),
    ConvModel(
        "inception_next", tiny(_timm, "inception_next_atto", depths=(1, 1, 1, 1), dims=(16, 16, 16, 16)), 1, 7, 0, 0,
        "the stem's is behind its convolution; 4 read depthwise convolutions joined with channels left as they are, and 3 "
        "at the stages' beginnings the stream, and 1×1 or unpadded convolutions read them",
    ),
    ConvModel(
        "vgg", _vgg(), 5, 0, 0, 0, "3 behind convolutions, 2 behind linear layers",
    ),
    ConvModel(
        "vgg_activation_first", _vgg(activation_first=True), 0, 2, 0, 3,
        "all read a ReLU; linear layers read 2, maxima the others, and a maximum does not commute with a negative gain",
    ),
    ConvModel(
        "unet", _unet(), 12, 0, 0, 0, "6 behind convolutions on the way down, 2 behind transposed ones, 4 behind convolutions",
    ),
    ConvModel(
        "unet_norm_skips", _unet(norm_skips=True), 12, 2, 0, 0,
        "as unet; 2 read a skip that goes down too, and 1×1 convolutions read them",
    ),
    ConvModel(
        "yolo", tiny(Yolo), 26, 0, 0, 1,
        "1 + 1 + 6 in stem and shallow, 1 + 5 + 2 in deep, 4 + 2 in the neck, 2 + 2 in the heads; the identity's in RepConv "
        "reads what the other branches read, and a sum reads it",
    ),
    ConvModel(
        "convmixer", tiny(_convmixer), 0, 1, 0, 4,
        "all read a GELU; the head reads the mean of the last one, sums of a residual stream read the others",
    ),
    ConvModel(
        "mixconv", tiny(MixConv), 3, 0, 0, 0, "one behind two depthwise convolutions, each of which takes its half",
    ),
    ConvModel(
        "map_attention", tiny(MapAttention, 16, 2), 1, 0, 0, 1,
        "one behind the projection, whose map becomes tokens; the other reads heads that were joined, and a ReLU reads it",
        (2, 16, 4, 4),
    ),
)  # fmt: skip

CONV_ZOO: dict[str, ConvModel] = {entry.name: entry for entry in MODELS}
