"""Norms to train with, most of which are constants at inference; needs torch and nothing else.

Constant at inference, so that normfuse folds them: `UnifiedNorm`, `RepBN`, `PRepBN`, `EstimatedBatchNorm`, `PowerNorm` without
group scaling, `FakeLayerNorm` once it is removed, the standardized convolutions (their weight), the BatchNorm in
`BatchChannelNorm` and half of `IBN`. Dependent on the sample, so that a norm remains: `GroupScaling`, the rest of those,
`EvoNormB0` and `EvoNormS0` with their activation, `ScaledLayerNorm` and `ScaledRMSNorm`, and `RMSNorm` and `CRMSNorm`, which
rewritten models have.
"""

from __future__ import annotations

from normfuse.nn.batch_channel_norm import BatchChannelNorm, EstimatedBatchNorm
from normfuse.nn.convert import convert
from normfuse.nn.counting import step
from normfuse.nn.crms_norm import CRMSNorm
from normfuse.nn.evo_norm import EvoNormB0, EvoNormS0
from normfuse.nn.fake_layer_norm import FakeLayerNorm
from normfuse.nn.ibn import IBN
from normfuse.nn.power_norm import GroupScaling, PowerNorm
from normfuse.nn.recalibrate import recalibrate
from normfuse.nn.rep_bn import PRepBN, RepBN
from normfuse.nn.rms_norm import RMSNorm
from normfuse.nn.scaled_layer_norm import ScaledLayerNorm, ScaledRMSNorm
from normfuse.nn.simplified_attention import SimplifiedLinearAttention
from normfuse.nn.standardized_conv import ScaledStdConv1d, ScaledStdConv2d, StdConv1d, StdConv2d
from normfuse.nn.unified_norm import UnifiedNorm

__all__ = [  # noqa: RUF022 - grouped
    # in LayerNorm's place: channels last
    "CRMSNorm", "FakeLayerNorm", "GroupScaling", "PRepBN", "PowerNorm", "RMSNorm", "RepBN", "ScaledLayerNorm",
    "ScaledRMSNorm", "UnifiedNorm",
    # in BatchNorm's place: channels second
    "BatchChannelNorm", "EstimatedBatchNorm", "EvoNormB0", "EvoNormS0", "IBN",
    # convolution and attention
    "ScaledStdConv1d", "ScaledStdConv2d", "SimplifiedLinearAttention", "StdConv1d", "StdConv2d",
    # done to a model
    "convert", "recalibrate", "step",
]  # fmt: skip
