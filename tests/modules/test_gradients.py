"""Live mode: gradients of all original parameters and of the inputs are the original model's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.grad import conv2d_weight

import normfuse
from normfuse.modules import layers
from tests.batch_norms import FOLDS
from tests.models import TRAPS
from tests.modules.models import IMAGES, distance, gradients, loss, net
from tests.zoo.spread import spread

CONVOLUTIONS = (
    "conv without bias", "conv3d", "depthwise conv", "reflecting conv", "grouped transposed conv", "linear", "no affine",
    "two in a row", "to a head", "a norm behind two convs", "a norm twice behind one conv", "keyword arguments",
    "a conv that pads by itself",
)  # fmt: skip
MORE_CONVOLUTIONS = (
    "conv", "conv1d", "grouped conv", "transposed conv", "synchronized", "before a conv", "squeezed", "registration order",
    "an output read twice", "two writers",
)  # fmt: skip
STREAMS = (
    "eps 1e-12", "shared norm", "shared writer, one outside", "mix-ln", "norm before the stream", "missing biases",
    "transposed conv stem", "low-rank addition",
)  # fmt: skip
MORE_STREAMS = (
    "plain", "shared writer, both inside", "data-dependent gate", "layer scale read twice", "conv stem", "zero padding",
    "experts", "concatenated tokens", "layer scale of a square", "masked logits", "output norms",
)  # fmt: skip
CASES = [
    *(("conv_bn", name) for name in CONVOLUTIONS),
    *(("pre_rmsnorm", name) for name in STREAMS),
    *(pytest.param("conv_bn", name, marks=pytest.mark.slow) for name in MORE_CONVOLUTIONS),
    *(pytest.param("pre_rmsnorm", name, marks=pytest.mark.slow) for name in MORE_STREAMS),
]


@pytest.mark.parametrize(("pass_name", "name"), CASES)
def test_gradients_are_the_original_models(pass_name: str, name: str) -> None:
    entry = FOLDS[name] if pass_name == "conv_bn" else TRAPS[name]
    inputs = tuple(each.double() if each.is_floating_point() else each for each in entry.inputs)
    model = entry.module().double()
    original = copy.deepcopy(model)
    normfuse.tune(model, pass_name, inputs=inputs, verify="none")
    assert distance(gradients(model, inputs), gradients(original, inputs)) <= 1e-12
    assert distance({"y": model(*inputs)}, {"y": original(*inputs)}) <= 1e-12 if isinstance(model(*inputs), Tensor) else True


REFUSED = {
    "linear, square (N, C, L)": "multiplication",  # the channel axes are two axes of one size
    "dropout between": "multiplication",  # in training it would stand between
    "a shared conv": "read more than once",
    "functional": "no module of its own",
    "rep tokens": "no module of its own",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_place_on_modules_is_refused_and_nothing_is_changed(name: str) -> None:
    model = FOLDS[name].module()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(normfuse.NormfuseError) as caught:
        normfuse.tune(model, "conv_bn", inputs=FOLDS[name].inputs)
    assert REFUSED[name] in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all("normfuse" not in str(vars(module).keys()) for module in model.modules())


class Layers(nn.Module):
    """Paddings that are words, strides, dilations and groups."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv1d(2, 4, 4, padding="same", dilation=3), nn.BatchNorm1d(4))
        self.two = nn.Sequential(nn.ConvTranspose1d(4, 2, 3, 2, 1, output_padding=1, groups=2, dilation=2), nn.BatchNorm1d(2))
        self.three = nn.Sequential(nn.Conv1d(2, 2, 2, padding="valid", groups=2, bias=False), nn.BatchNorm1d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(self.one(x).tanh()).tanh())


def test_second_derivatives() -> None:
    model = Layers().double().eval()
    x = torch.randn(2, 2, 3, dtype=torch.float64)
    normfuse.tune(model, "conv_bn", inputs=(x,), verify="none")
    names, values = zip(*model.named_parameters(), strict=True)
    values = tuple(torch.randn_like(value).mul(0.5).requires_grad_() for value in values)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    assert gradcheck(run, (x.requires_grad_(), *values))
    assert gradgradcheck(run, (x, *values), atol=1e-4)


class Late(nn.Module):
    """Layers whose weights are larger than what they give, where the scale is applied to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.one: Any = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8))
        self.two = nn.Sequential(nn.Conv2d(8, 8, 1, groups=2), nn.BatchNorm2d(8, affine=False))
        self.three = nn.Sequential(nn.Conv2d(8, 4, 2, padding=1), nn.BatchNorm2d(4))
        self.four: Any = nn.Sequential(nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.four(self.three(self.two(self.one(x).tanh()).tanh()).flatten(1).tanh())


@pytest.mark.parametrize("frozen", [(), ("weight",), ("one.0.weight", "four.1.weight", "four.1.bias"), ("1.weight", "1.bias")])
def test_a_scale_outside_is_the_same_function(frozen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A gain of zero too, through which the weight's gradient cannot be divided."""
    model: Any = spread(Late()).double().eval()
    with torch.no_grad():
        model.one[1].weight[2] = 0.0
        model.four[1].weight[:3] = 0.0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(frozen) if frozen else True)
    original, x = copy.deepcopy(model), (torch.randn(1, 6, 2, 2, dtype=torch.float64),)
    normfuse.tune(model, "conv_bn", inputs=x, verify="none")
    calls: list[Any] = []
    scaled = layers.LayerOperator.forward_scaled

    def counted(layer: Any, *args: Any) -> Tensor:
        calls.append(layer)
        return scaled(layer, *args)

    monkeypatch.setattr(layers.LayerOperator, "forward_scaled", counted)
    assert distance(gradients(model, x), gradients(original, x)) <= 1e-12
    assert len(calls) == 4
    assert distance({"y": model(*x)}, {"y": original(*x)}) <= 1e-12


def test_frozen_parameters_cost_nothing_and_get_nothing() -> None:
    model, original = net().double(), net().double()
    x = (IMAGES[0].double(),)
    normfuse.tune(model, "conv_bn", inputs=x, verify="none")
    for each in (model, original):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_("bn2" in name or "stem" in name or name == "blocks.1.conv1.weight")
    assert distance(gradients(model, x), gradients(original, x)) <= 1e-12
    model.requires_grad_(False)
    assert not model(*x).requires_grad


class Doubled(torch.autograd.Function):
    """A function of the user's own, which torch gives its arguments as they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.nn.functional.conv2d(x, weight * 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        return None, conv2d_weight(x, [4, 3, 1, 1], grad) * 2


def test_a_function_that_hides_the_weight_from_torch_fails_loudly() -> None:
    """Its gradient has no way to the parameters: an error, not a parameter that silently stays."""
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    normfuse.tune(model, "conv_bn", inputs=IMAGES, verify="none")
    with pytest.raises(RuntimeError):
        Doubled.apply(*IMAGES, model[0].weight).sum().backward()
    y = Doubled.apply(*IMAGES, model[0].weight * 1)
    y.sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if name.endswith("weight"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_forms_the_weight_in_float32(dtype: torch.dtype) -> None:
    """The live weight is the float64 one rounded once, or next to it."""
    model = net().to(dtype)
    truth = copy.deepcopy(model).double()
    normfuse.tune(model, "conv_bn", inputs=(IMAGES[0].to(dtype),), verify="none")
    scale = truth.norm.weight / (truth.norm.running_var + truth.norm.eps).sqrt()
    exact = truth.stem.weight * scale[:, None, None, None]
    assert model.stem.weight.dtype == dtype
    error = ((model.stem.weight.double() - exact) / exact).abs().max()
    assert error <= torch.finfo(dtype).eps / 2 * (1 + 1e-3)
    loss(model(IMAGES[0].to(dtype))).backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())


def test_autocast_rounds_once() -> None:
    """Formed in float32, cast for the operation; gradients arrive in float32, as near the truth as the original's."""
    model, original, truth = net(), net(), net().double()
    normfuse.tune(model, "conv_bn", inputs=IMAGES, verify="none")
    exact = gradients(truth, (IMAGES[0].double(),))
    found = []
    for each in (model, original):
        each.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = each(*IMAGES)
        assert y.dtype == torch.bfloat16
        loss(y.float()).backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in each.parameters())
        grads = {name: p.grad.double() for name, p in each.named_parameters() if p.grad is not None}
        found.append(distance(grads, {name: exact[name] for name in grads}))
    assert found[0] <= 2 * found[1]
