"""Deploy on live modules: tensors take their formulas' values, ties stay ties, and there is a way back."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.errors import CannotApply
from normfuse.modules.make_live import make_live
from tests.batch_norms import FOLDS
from tests.models import TRAPS, Stream
from tests.modules.models import IMAGES, Net, net
from tests.zoo.spread import spread


def close(a: Any, b: Any) -> bool:
    pairs = zip(a, b, strict=True) if isinstance(a, tuple) else ((a, b),)
    return all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in pairs)


@pytest.mark.parametrize(
    ("pass_name", "name", "level"),
    [
        ("conv_bn", "grouped transposed conv", "none"), ("conv_bn", "two in a row", "none"),
        ("conv_bn", "dropout between", "full"), ("conv_bn", "squeezed", "none"), ("conv_bn", "to a head", "none"),
        ("conv_bn", "a norm twice behind one conv", "none"), ("pre_rmsnorm", "shared norm", "none"),
        ("pre_rmsnorm", "norm before the stream", "full"), ("pre_rmsnorm", "missing biases", "none"),
        ("pre_rmsnorm", "in-place residual", "full"),
    ],
)  # fmt: skip
def test_deployed(pass_name: str, name: str, level: str) -> None:
    entry: Any = FOLDS[name] if pass_name == "conv_bn" else TRAPS[name]
    model = entry.module()
    original = copy.deepcopy(model)
    assert normfuse.deploy(model, pass_name, inputs=entry.inputs, verify=level) is model
    assert type(model) is type(original)
    assert close(model(*entry.inputs), original(*entry.inputs))
    assert close(copy.deepcopy(model)(*entry.inputs), original(*entry.inputs))


def test_values_are_the_float64_ones_rounded_once() -> None:
    model = net().to(torch.bfloat16)
    truth = copy.deepcopy(model).double()
    normfuse.deploy(model, "conv_bn", inputs=(IMAGES[0].to(torch.bfloat16),), verify="none")
    scale = truth.norm.weight / (truth.norm.running_var + truth.norm.eps).sqrt()
    assert torch.equal(model.stem.weight, (truth.stem.weight * scale[:, None, None, None]).to(torch.bfloat16))
    assert torch.equal(model.stem.bias, (truth.norm.bias - truth.norm.running_mean * scale).to(torch.bfloat16))


def test_norms_that_are_gone_do_nothing_in_the_class_itself() -> None:
    """They are left without an effect, and hold the biases that their convolutions did not have; no key comes or goes."""
    model, original = net(), net()
    normfuse.deploy(model, "conv_bn", inputs=IMAGES)
    assert list(model.state_dict()) == list(original.state_dict())
    assert model.stem.bias is model.norm.bias
    assert model.blocks[0].bn1(IMAGES[0]) is IMAGES[0]
    stock = Net().eval()
    stock.load_state_dict(model.state_dict(), strict=True)
    assert close(stock(*IMAGES), original(*IMAGES))
    for name, number in {"weight": 1.0, "running_mean": 0.0, "running_var": 1.0 - 1e-5}.items():
        assert torch.equal(getattr(stock.norm, name), torch.full((8,), number)), name


class Doubled(nn.Module):
    """A BatchNorm beside a path around it: no number of its tensors makes it nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), Beside(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class Beside(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.alpha = nn.BatchNorm2d(width), nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * x + self.norm(x)


def test_what_cannot_do_nothing_leaves_the_state_dict() -> None:
    """Beside the changed weights it would make the stock class apply it twice: a strict load must not go through."""
    torch.manual_seed(0)
    model: Any = spread(Doubled()).eval()
    original = copy.deepcopy(model)
    normfuse.deploy(model, "conv_bn", inputs=IMAGES)
    assert close(model(*IMAGES), original(*IMAGES))
    with pytest.raises(RuntimeError, match=r"norm\.alpha"):
        Doubled().load_state_dict(model.state_dict(), strict=True)
    fresh = normfuse.deploy(spread(Doubled()).eval(), "conv_bn", inputs=IMAGES, verify="none")
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(*IMAGES), model(*IMAGES))


class SharedTable(Stream):
    """Two names for one table, and two Parameters over one memory for the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.same_table = nn.Embedding(11, 8)
        self.same_table.weight = self.embed.weight
        self.same_positions = nn.Parameter(self.positions.data)

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids) + self.same_table(ids.flip(1)) + self.positions + self.same_positions.flip(0)
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x = self.block(x, norm, mlp)
        return self.finish(x)


@pytest.mark.parametrize("live", [False, True])
def test_ties_stay_ties(live: bool) -> None:
    torch.manual_seed(0)
    model = SharedTable().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.2)
    original, inputs = copy.deepcopy(model), TRAPS["plain"].inputs
    (normfuse.tune if live else normfuse.deploy)(model, "pre_rmsnorm", inputs=inputs, verify="none")
    if live:
        normfuse.deploy(model)
    assert model.embed.weight is model.same_table.weight
    assert model.positions.data_ptr() == model.same_positions.data_ptr()
    assert close(model(*inputs), original(*inputs))
    assert model.embed.weight.mean(1).abs().max() < 1e-6


def test_tune_deploy_and_back() -> None:
    model, original = net(), net()
    normfuse.tune(model, "conv_bn", inputs=IMAGES, verify="none")
    parameters = dict(model.named_parameters())
    normfuse.deploy(model, keep=True)
    assert model.blocks[0].bn1(IMAGES[0]) is IMAGES[0]
    assert close(model(*IMAGES), original(*IMAGES))
    normfuse.restore(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), original.state_dict().values(), strict=True))
    assert list(model.state_dict()) == list(original.state_dict())
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert torch.equal(model(*IMAGES), original(*IMAGES))


def test_without_keeping_there_is_no_way_back_and_it_says_so() -> None:
    model = normfuse.deploy(net(), "conv_bn", inputs=IMAGES, verify="none")
    before = model(*IMAGES)
    with pytest.raises(normfuse.NormfuseError, match="cannot be put back") as caught:
        normfuse.restore(model)
    assert "keep=True" in (caught.value.hint or "")
    with pytest.raises(normfuse.NormfuseError, match="not tuned"):
        normfuse.deploy(model)
    assert torch.equal(model(*IMAGES), before)


def test_tune_deploy_saved_file() -> None:
    model, original = net(), net()
    normfuse.deploy(normfuse.tune(model, "conv_bn", inputs=IMAGES, verify="none"))
    file = io.BytesIO()
    torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert torch.equal(loaded(*IMAGES), model(*IMAGES))
    assert close(loaded(*IMAGES), original(*IMAGES))
    assert list(loaded.state_dict()) == list(model.state_dict())
    exported = torch.export.export(loaded, IMAGES)
    assert "batch_norm" not in str(exported.graph)


def test_a_result_is_applied_to_the_live_module() -> None:
    model, original = net(), net()
    result = normfuse.rewrite(model, "conv_bn", inputs=IMAGES)
    assert result.apply_to(model) is model
    assert torch.allclose(model(*IMAGES), result.module()(*IMAGES), rtol=1e-5, atol=1e-6)
    assert close(model(*IMAGES), original(*IMAGES))


def test_a_result_that_has_no_place_on_modules_changes_nothing() -> None:
    model = FOLDS["functional"].module()
    result = normfuse.rewrite(model, "conv_bn", inputs=FOLDS["functional"].inputs)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CannotApply, match="no module of its own"):
        result.apply_to(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Mixed(nn.Module):
    """One norm that modules have a place for, and one that they do not."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.two, self.norm, self.scale = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.scale * self.norm(self.two(torch.relu(self.one(x)))))


def test_what_cannot_be_done_is_told_and_the_rest_is_done() -> None:
    model: Any = Mixed().eval()
    original = copy.deepcopy(model)
    with pytest.warns(normfuse.errors.NormfuseWarning, match=r"1 norms stay .*norm.*no module of its own"):
        normfuse.deploy(model, "conv_bn", inputs=IMAGES)
    assert model.one[1](IMAGES[0]) is IMAGES[0]
    assert "norm.running_mean" in model.state_dict()
    assert close(model(*IMAGES), original(*IMAGES))


def test_a_wrong_result_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, original = net(), net()

    def lossy(program: Any, changes: Any, model: Any, guards: Any) -> None:
        make_live(program, changes, model, guards)
        del model.norm._normfuse.change
        model.norm._normfuse.change = None  # folded into the convolution, and applied again

    for recipe in ("tune", "deploy"):
        monkeypatch.setattr(f"normfuse.modules.{recipe}.make_live", lossy)
    for call in (normfuse.tune, normfuse.deploy):
        with pytest.raises(normfuse.VerificationFailed):
            call(model, "conv_bn", inputs=IMAGES)
        assert all(type(a) is type(b) for a, b in zip(model.modules(), original.modules(), strict=True))
        assert torch.equal(model(*IMAGES), original(*IMAGES))
