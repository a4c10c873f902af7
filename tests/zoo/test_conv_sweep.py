"""conv_bn on one network of nearly every family of timm that has BatchNorms: none stays, and the result is proven.

The small table of `conv_models` says where each must go. Here an independent count is the judge: a BatchNorm whose input is a
convolution's result that nobody else reads has to be folded into that convolution, however the network goes on.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.fx import Node

import normfuse
from normfuse.transforms.constant_norms import WRITERS
from tests.zoo.models import tiny

pytestmark = [pytest.mark.zoo, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

aten = torch.ops.aten

AT_64 = (
    "resnet18", "resnet26t", "resnetrs50", "resnext50_32x4d", "seresnet33ts", "ecaresnet26t", "resnetblur50",
    "legacy_seresnet18", "skresnet18", "resnest14d", "res2net50_48w_2s", "resnetv2_18", "resnetv2_50", "botnet26t_256",
    "gcresnext26ts", "gernet_s", "tresnet_m", "selecsls42", "dpn48b", "dla34", "dla60_res2net", "densenet121",
    "densenetblur121d", "hrnet_w18_small", "vovnet39a", "ese_vovnet19b_slim_dw", "cs3darknet_s", "cspresnet50",
    "cspnext_tiny", "hgnet_tiny", "hgnetv2_b0", "regnetx_002", "regnety_002", "regnetz_005", "rexnet_100",
    "legacy_xception", "xception41", "xception41p", "efficientnet_b0", "tf_efficientnet_lite0", "efficientnetv2_rw_t",
    "mixnet_s", "mnasnet_small", "fbnetc_100", "spnasnet_100", "semnasnet_075", "tinynet_e", "hardcorenas_a",
    "mobilenetv3_small_050", "mobilenetv4_conv_small", "lcnet_050", "lcnetv2_small", "ghostnet_050", "ghostnetv2_100",
    "ghostnetv3_050", "repghostnet_050", "repvgg_a0", "mobileone_s0", "repvit_m0_9", "fastvit_t8", "fasternet_t0",
    "starnet_s050", "shvit_s1", "swiftformer_xs", "iformer_t", "inception_next_atto", "convmixer_768_32",
    "efficientformerv2_s0", "efficientvim_m1", "efficientvit_b0", "efficientvit_m0", "levit_128s", "lowformer_b0",
    "mobilevit_xxs", "mobilevitv2_050", "nextvit_small", "coatnet_nano_rw_224", "maxvit_nano_rw_256", "tiny_vit_5m_224",
    "xcit_nano_12_p16_224", "vit_small_resnet26d_224",
)  # fmt: skip

SIZES = {
    **dict.fromkeys(AT_64, 64),
    **dict.fromkeys(("inception_v3", "inception_v4", "inception_resnet_v2"), 96),  # valid convolutions use the rest up
    "halonet26t": 256,  # blocks of 8 in a map of one thirty-second
    "efficientformer_l1": 224,  # its table of positions is for 7×7
    "visformer_tiny": 224,
}


def built(name: str, size: int) -> Any:
    import timm

    try:
        return timm.create_model(name, num_classes=7, img_size=size)
    except TypeError:  # a network for any size
        return timm.create_model(name, num_classes=7)


def behind_a_convolution(program: torch.export.ExportedProgram) -> int:
    """BatchNorms that alone read what a convolution gives, whose weight nobody else reads."""

    def alone(node: Node) -> bool:
        return len(node.users) == 1

    def is_convolution(node: Node) -> bool:
        return "conv" in str(node.target) and node.op == "call_function"

    norms = [node for node in program.graph.nodes if "batch_norm" in str(node.target)]
    layers = [norm.all_input_nodes[0] for norm in norms]
    return sum(is_convolution(layer) and alone(layer) and alone(layer.all_input_nodes[1]) for layer in layers)


@pytest.mark.parametrize("name", SIZES)
def test_no_batch_norm_is_left(name: str) -> None:
    model = tiny(built, name, SIZES[name])()
    images = torch.randn(1, 3, SIZES[name], SIZES[name], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        program = torch.export.export(model, (images,), strict=False)
    result = normfuse.rewrite(program, ["conv_bn"], inputs=(images,))
    report = result.report.to_dict()
    ways = Counter(each["because"] for each in report["rewrites"])
    assert report["refusals"] == []
    assert report["norms"]["before"]["batch_norm"] > 0
    assert report["norms"]["after"].get("batch_norm", 0) == 0
    assert ways[WRITERS] >= behind_a_convolution(program.run_decompositions({}))
    evidence = result.report.evidence
    assert evidence.ok
    assert evidence.relative <= 1e-11
