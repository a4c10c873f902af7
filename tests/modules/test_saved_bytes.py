"""What is kept for backward, counted by saved-tensor hooks: a tuned model keeps what a deployed one keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import normfuse
from tests.models import noise
from tests.modules.models import IMAGES, net


def saved_bytes(model: nn.Module, *inputs: Tensor) -> int:
    """Bytes of everything that autograd keeps, each storage once, the model's own tensors left out."""
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(each: Tensor) -> Tensor:
        kept[each.untyped_storage().data_ptr()] = each  # held, so that no address is used twice
        return each

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        y = model(*inputs)
    assert y.requires_grad
    return sum(each.untyped_storage().nbytes() for place, each in kept.items() if place not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_weight_is_kept(dtype: torch.dtype) -> None:
    original = net(32).to(dtype)
    x = IMAGES[0].to(dtype)
    tuned = normfuse.tune(copy.deepcopy(original), "conv_bn", inputs=(x,), verify="none")
    deployed = normfuse.deploy(copy.deepcopy(original), "conv_bn", inputs=(x,), verify="none")
    assert saved_bytes(tuned, x) == saved_bytes(deployed, x)  # not even a vector more
    assert saved_bytes(tuned, x) < saved_bytes(original, x)


def test_frozen_weights_keep_no_input_either() -> None:
    model = net(32)
    normfuse.tune(model, "conv_bn", inputs=IMAGES, verify="none")
    model.requires_grad_(False)
    x = noise(4, 32, 12, 12).requires_grad_()
    assert saved_bytes(nn.Sequential(model.blocks[0].conv1, model.blocks[0].bn1), x) == 0


def test_shifts_alone_need_no_input() -> None:
    """A BatchNorm's shift is in the bias alone, whose gradient is a sum of the output's."""
    model = net(32)
    normfuse.tune(model, "conv_bn", inputs=IMAGES, verify="none")
    block = nn.Sequential(model.blocks[0].conv1, model.blocks[0].bn1)
    x = noise(4, 32, 12, 12)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "blocks.0.bn1.bias")
    assert saved_bytes(block, x) == 0
    dict(model.named_parameters())["blocks.0.bn1.weight"].requires_grad_()
    assert saved_bytes(block, x) == x.numel() * x.element_size()


def test_a_linear_layer_and_gpt2s_conv1d_keep_no_weight() -> None:
    from transformers.pytorch_utils import Conv1D

    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.write, self.more, self.norm = nn.Linear(64, 64), Conv1D(64, 64), nn.LayerNorm(64)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.more(x) + self.write(x))

    model, x = Stream().eval(), noise(2, 64)
    plain = saved_bytes(model, x)
    normfuse.tune(model, "pre_rmsnorm", inputs=(x,), verify="none")
    assert saved_bytes(model, x) < plain + 64 * 64  # RMSNorm keeps other vectors than LayerNorm
