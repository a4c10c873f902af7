"""Norms swapped in a model: what means the same stays, what would be wrong is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.nn import BatchChannelNorm, EvoNormS0, PowerNorm, PRepBN, RepBN, ScaledLayerNorm, UnifiedNorm, convert

C = 8


def model() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(C, C), nn.LayerNorm(C), nn.GELU(), nn.Sequential(nn.LayerNorm(C, eps=1e-3), nn.Linear(C, 2)))
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def test_in_place_and_returned() -> None:
    made = model()
    old = made[1]
    assert convert(made, nn.LayerNorm, warmup_iters=7) is made
    assert isinstance(made[1], UnifiedNorm)
    assert made[1].warmup_iters == 7
    assert made[1].weight is old.weight
    assert made[1].bias is old.bias
    assert isinstance(made.get_submodule("3.0"), UnifiedNorm)
    assert made(torch.randn(3, C)).shape == (3, 2)


def test_a_norm_alone_is_replaced() -> None:
    assert isinstance(convert(nn.LayerNorm(C), nn.LayerNorm, to=RepBN, alpha=0.5), RepBN)


@pytest.mark.parametrize("to", [UnifiedNorm, RepBN, PRepBN, PowerNorm, nn.RMSNorm])
def test_gain_and_shift_are_handed_over(to: type[nn.Module]) -> None:
    old = nn.LayerNorm(C, dtype=torch.float64).eval()
    nn.init.normal_(old.weight)
    nn.init.normal_(old.bias)
    new: Any = convert(old, nn.LayerNorm, to=to)
    place = new.norm2.bn if to is PRepBN else new.bn if to is RepBN else new
    assert torch.equal(place.weight, old.weight)
    assert to is nn.RMSNorm or torch.equal(place.bias, old.bias)
    assert not any(module.training for module in new.modules() if module is not new)
    assert all(value.dtype == torch.float64 for value in new.parameters())


def test_prepbn_starts_as_the_old_norm() -> None:
    made, x = model(), torch.randn(3, C)
    expected = made(x)
    convert(made, nn.LayerNorm, to=PRepBN, warmup=3, total=10)
    torch.testing.assert_close(made(x), expected)
    ids = [id(parameter) for parameter in made.parameters()]
    assert len(ids) == len(set(ids))


def test_on_white_data_unified_norm_is_layer_norm() -> None:
    """Zero mean and unit variance in every channel and token: where both norms are the same function."""
    x = F.layer_norm(torch.randn(4000, 256), (256,))
    old = nn.LayerNorm(256)
    nn.init.normal_(old.weight)
    expected = old(x)
    torch.testing.assert_close(convert(old, nn.LayerNorm)(x), expected, rtol=0.1, atol=0.1)


def test_shared_norms_stay_one() -> None:
    shared = nn.LayerNorm(C)
    made = nn.ModuleDict({"a": nn.Sequential(shared), "b": shared, "c": nn.LayerNorm(C)})
    convert(made, nn.LayerNorm)
    assert made["a"][0] is made["b"]  # type: ignore[index]
    assert made["b"] is not made["c"]
    assert list(made) == ["a", "b", "c"]


def test_tied_gains_stay_tied() -> None:
    made = nn.Sequential(nn.LayerNorm(C), nn.LayerNorm(C))
    made[1].weight = made[0].weight
    convert(made, nn.LayerNorm)
    assert made[0].weight is made[1].weight
    assert made[0].bias is not made[1].bias


class Mine(nn.LayerNorm):
    """Another function, for all that anybody knows."""


def test_subclasses_are_named_and_left() -> None:
    made = nn.Sequential(nn.LayerNorm(C), Mine(C))
    with pytest.warns(UserWarning, match="Mine"):
        convert(made, nn.LayerNorm)
    assert isinstance(made[0], UnifiedNorm)
    assert isinstance(made[1], Mine)
    with pytest.raises(ValueError, match=r"subclasses there are: .*Mine"):
        convert(nn.Sequential(Mine(C)), nn.LayerNorm)
    convert(made, (nn.LayerNorm, Mine))
    assert isinstance(made[1], UnifiedNorm)


class Foreign(nn.Module):
    """A norm of somebody else's, known by its gain alone."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_norms_of_others() -> None:
    made = nn.Sequential(Foreign(C))
    gain = made[0].weight
    convert(made, Foreign)
    assert made[0].weight is gain
    with pytest.raises(ValueError, match="how many channels"):
        convert(nn.Sequential(nn.GELU()), nn.GELU)


def test_a_function_makes_what_it_likes() -> None:
    layers = iter(range(1, 9))

    def scaled(norm: nn.LayerNorm, **options: Any) -> nn.Module:
        new = ScaledLayerNorm(norm.normalized_shape, next(layers), eps=norm.eps, **options)
        new.load_state_dict(norm.state_dict())
        return new

    made = convert(model(), nn.LayerNorm, to=scaled)
    found = [module for module in made.modules() if isinstance(module, ScaledLayerNorm)]
    assert sorted(norm.layer for norm in found) == [1, 2]
    assert {norm.eps for norm in found} == {1e-5, 1e-3}


def test_batch_norm_keeps_its_statistics() -> None:
    old = nn.BatchNorm2d(C)
    for _ in range(3):
        old(torch.randn(2, C, 3, 3) * 2 + 1)
    new = convert(old, nn.BatchNorm2d, to=BatchChannelNorm, num_groups=2)
    assert isinstance(new, BatchChannelNorm)
    assert torch.equal(new.bn.running_var, old.running_var)  # type: ignore[arg-type]
    assert new.bn.weight is old.weight
    assert isinstance(convert(nn.GroupNorm(2, C), nn.GroupNorm, to=EvoNormS0, num_groups=2), EvoNormS0)


@pytest.mark.parametrize(
    ("old", "to"), [(nn.BatchNorm2d(C), UnifiedNorm), (nn.GroupNorm(2, C), RepBN), (nn.LayerNorm(C), BatchChannelNorm)]
)
def test_axes_must_agree(old: nn.Module, to: type[nn.Module]) -> None:
    with pytest.raises(TypeError, match="different axes"):
        convert(old, type(old), to=to)


def test_several_axes_are_refused() -> None:
    made = nn.Sequential(nn.LayerNorm(C), nn.LayerNorm((3, C)))
    with pytest.raises(ValueError, match="2 axes"):
        convert(made, nn.LayerNorm)
    assert isinstance(made[0], nn.LayerNorm), "nothing is converted when something cannot be"


@pytest.mark.parametrize("to", [UnifiedNorm, RepBN])
def test_torch_s_encoder_does_not_go_on_with_layer_norm(to: type[nn.Module]) -> None:
    """Its fast path in eval reads gain, shift and eps of the norms and computes LayerNorm."""
    layer = nn.TransformerEncoderLayer(C, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    convert(encoder, nn.LayerNorm, to=to)
    x = torch.randn(3, 5, C)
    for _ in range(3):
        encoder(x)
    encoder.eval()
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    expected = encoder(x, src_key_padding_mask=padding).detach()
    with torch.no_grad():
        ours = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(ours, expected)
