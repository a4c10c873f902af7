"""What leaves a live module stands by itself: its class loads it strictly and computes the same, or cannot load it strictly."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse.errors import CannotApply
from normfuse.graph.blocks import rounded
from normfuse.modules.unread_tensors import filled
from tests.models import TRAPS, D, noise
from tests.modules.models import IMAGES, Net
from tests.zoo.spread import spread

pytestmark = pytest.mark.filterwarnings("ignore::normfuse.errors.NormfuseWarning")


class Plus1(nn.LayerNorm):
    """A gain is stored less one (Nemotron)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class Rms(nn.Module):
    """Written out, and multiplied last (Llama); with ``plus`` the gain is stored less one (Gemma)."""

    def __init__(self, d: int, plus: float = 0.0) -> None:
        super().__init__()
        self.weight, self.plus = nn.Parameter(torch.randn(d) + 1 - plus), plus

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return y * (self.weight + self.plus) if self.plus else self.weight * y


class Blocks(nn.Module):
    """Two blocks and a head, with a norm of a kind in front of each reader."""

    def __init__(self, norm: Callable[[], nn.Module], *, bias: bool = True) -> None:
        super().__init__()
        self.inp = nn.Linear(4, D)
        self.norms = nn.ModuleList(norm() for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(D, 2 * D, bias=bias) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(2 * D, D) for _ in range(2))
        self.head = nn.Linear(D, 5, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            x = x + down(F.gelu(up(norm(x))))
        return self.head(self.norms[2](x))


class Encoder(nn.Module):
    """torch's own layers, whose queries, keys and values are one packed weight."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, 2, 2 * D, dropout=0.0, batch_first=True, norm_first=True)
        self.inp, self.body, self.head = nn.Linear(4, D), nn.TransformerEncoder(layer, 2, nn.LayerNorm(D)), nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.inp(x)))


class ZeroGain(Blocks):
    """A feature whose gain is zero and whose shift is not: no shift of a gainless norm stands for it."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__(lambda: nn.LayerNorm(D), bias=bias)


def zero_gain(*, bias: bool) -> nn.Module:
    model: Any = spread(ZeroGain(bias=bias))
    with torch.no_grad():
        for norm in model.norms:
            norm.weight[2] = 0.0
    return model


def shared() -> nn.Module:
    model = Blocks(lambda: nn.LayerNorm(D))
    model.norms[1] = model.norms[0]
    return spread(model)


def parametrized() -> nn.Module:
    model = spread(Blocks(lambda: nn.LayerNorm(D)))
    nn.utils.parametrizations.weight_norm(model.up[0])
    return model


def large_eps() -> nn.Module:
    return spread(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=0.3), nn.ReLU(), nn.Conv2d(4, 2, 1)))


ROWS = (noise(2, 3, 4),)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "layer norm": (lambda: spread(Blocks(lambda: nn.LayerNorm(D))), ROWS),
    "layer norm, readers without biases": (lambda: spread(Blocks(lambda: nn.LayerNorm(D), bias=False)), ROWS),
    "layer norm without a shift": (lambda: spread(Blocks(lambda: nn.LayerNorm(D, bias=False), bias=False)), ROWS),
    "layer norm without tensors": (lambda: spread(Blocks(lambda: nn.LayerNorm(D, elementwise_affine=False))), ROWS),
    "rms norm": (lambda: spread(Blocks(lambda: nn.RMSNorm(D), bias=False)), ROWS),
    "rms norm written out": (lambda: spread(Blocks(lambda: Rms(D), bias=False)), ROWS),
    "a gain less one": (lambda: spread(Blocks(lambda: Rms(D, 1.0), bias=False)), ROWS),
    "a layer norm's gain less one": (lambda: spread(Blocks(lambda: Plus1(D), bias=False)), ROWS),
    "a gain of zero": (lambda: zero_gain(bias=True), ROWS),
    "a gain of zero, readers without biases": (lambda: zero_gain(bias=False), ROWS),
    "one norm in two places": (shared, ROWS),
    "a parametrized reader": (parametrized, ROWS),
    "packed attention": (lambda: spread(Encoder()), ROWS),
    "convolutions": (lambda: spread(Net()), IMAGES),
    "a large eps": (large_eps, IMAGES),
    **{name: (TRAPS[name].module, TRAPS[name].inputs) for name in ("missing biases", "norm before the stream")},
}


def distance(found: Any, expected: Any) -> float:
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else ((found, expected),)
    return max(((a - b).double().norm() / b.double().norm()).item() for a, b in pairs)


def _deploy(model: nn.Module, passes: Any, inputs: Any) -> None:
    normfuse.deploy(model, passes, inputs=inputs, verify="none")


def _deploy_and_prove(model: nn.Module, passes: Any, inputs: Any) -> None:
    normfuse.deploy(model, passes, inputs=inputs)


def _tune_and_deploy(model: nn.Module, passes: Any, inputs: Any) -> None:
    normfuse.deploy(normfuse.tune(model, passes, inputs=inputs, verify="none"))


def _apply(model: nn.Module, passes: Any, inputs: Any) -> None:
    normfuse.rewrite(model, passes, inputs=inputs, verify="none").apply_to(model)


WAYS = [(_deploy_and_prove, "all"), (_deploy, "fold_affine"), (_tune_and_deploy, "all"), (_apply, "all")]
EVERY_WAY = ("layer norm without a shift", "convolutions")
FOLDED = (
    "layer norm, readers without biases",
    "rms norm written out",
    "a gain less one",
    "a gain of zero, readers without biases",
)


def _cases() -> Iterator[Any]:
    """Each model by one way and every way by two models; all of all in the slow suite."""
    for name in MODELS:
        quick = WAYS if name in EVERY_WAY else [(_deploy, "fold_affine")] if name in FOLDED else [(_deploy, "all")]
        yield from (pytest.param(name, *each, id=f"{name}, {each[0].__name__}, {each[1]}") for each in quick)
        slow = [each for each in WAYS if each not in quick]
        yield from (
            pytest.param(name, *each, marks=pytest.mark.slow, id=f"{name}, {each[0].__name__}, {each[1]}") for each in slow
        )


def stands(model: nn.Module, original: nn.Module, inputs: Any, bound: float) -> bool:
    """Whether the class itself computes the same of what the model saves; False where it refuses to load it strictly."""
    expected = original(*inputs)
    assert distance(model(*inputs), expected) <= bound
    assert distance(copy.deepcopy(model)(*inputs), expected) <= bound
    if not any(map(nn.utils.parametrize.is_parametrized, model.modules())):  # torch does not pickle those
        assert distance(pickle.loads(pickle.dumps(model))(*inputs), expected) <= bound
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()))
    stock = copy.deepcopy(original)
    with torch.no_grad():
        for tensor in itertools.chain(stock.parameters(), stock.buffers()):
            tensor.fill_(3)  # what the state dict does not bring is seen
    try:
        stock.load_state_dict(state, strict=True)
    except RuntimeError:
        return False
    assert distance(stock(*inputs), expected) <= bound
    return True


@pytest.mark.parametrize(("name", "way", "passes"), [*_cases()])
def test_stands_by_itself(name: str, way: Callable[..., None], passes: Any) -> None:
    """In float64, where nothing hides."""
    build, inputs = MODELS[name]
    inputs = tuple(each.double() if each.is_floating_point() else each for each in inputs)
    model = build().eval().double()
    original = copy.deepcopy(model)
    told: CannotApply | None = None
    try:
        way(model, passes, inputs)
    except CannotApply as error:
        told = error
    if told is not None:
        assert all(each.hint for each in told.obstacles)
        assert [*model.state_dict()] == [*original.state_dict()]
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), original.state_dict().values(), strict=True))
        return
    standing = stands(model, original, inputs, 1e-12)
    if way is not _apply and name not in ("a gain of zero, readers without biases",):
        assert standing
        assert [*model.state_dict()] == [*original.state_dict()]


@pytest.mark.parametrize(
    "dtype", [*[pytest.param(each, marks=pytest.mark.slow) for each in (torch.float32, torch.float16)], torch.bfloat16]
)
@pytest.mark.parametrize("name", ["layer norm, readers without biases", "a layer norm's gain less one", "convolutions"])
def test_stands_in_its_own_dtype(name: str, dtype: torch.dtype) -> None:
    build, inputs = MODELS[name]
    inputs = tuple(each.to(dtype) for each in inputs)
    model = build().eval().to(dtype)
    original = copy.deepcopy(model)
    normfuse.deploy(model, "all", inputs=inputs, verify="none")
    assert stands(model, original, inputs, 64 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("eps", [1e-3, 1e-5, 1e-6, 1e-8, 0.1])
def test_a_batch_norm_that_does_nothing(dtype: torch.dtype, eps: float) -> None:
    """Mean 0 and variance 1 - eps: the identity, to the last digit but one of its dtype."""
    norm = nn.BatchNorm2d(4, eps=eps).to(dtype).eval()
    assert norm.running_var is not None
    norm.running_var.copy_(rounded(filled("v", 1.0 - eps), {"v": norm.running_var}.__getitem__, dtype))
    x = (noise(2, 4, 5, 5) * 100).to(dtype)
    assert ((norm(x) - x).abs() <= torch.finfo(dtype).eps * x.abs()).all()


def test_nothing_changes_where_it_fails_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class itself would compute something else: the model is as before, to the byte."""
    from normfuse.modules import placement as eager

    build, inputs = MODELS["layer norm"]
    model = build().eval()
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(eager, "filled", lambda name, number: filled(name, number + 0.5))
    for call in (normfuse.tune, normfuse.deploy):
        with pytest.raises(normfuse.VerificationFailed):
            call(model, "fold_affine", inputs=inputs)
        assert {type(each) for each in model.modules()} == {type(each) for each in build().modules()}
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_second_deploy_goes_on_and_the_way_back_is_to_the_byte() -> None:
    build, inputs = MODELS["layer norm, readers without biases"]
    model: Any = build().eval()
    original = copy.deepcopy(model)
    for passes in ("pre_rmsnorm", "fold_affine", "fold_affine"):
        normfuse.deploy(model, passes, inputs=inputs, keep=True, verify="none")
        assert stands(model, original, inputs, 1e-5)
    assert all(torch.equal(norm.weight, torch.ones(D)) for norm in model.norms)
    normfuse.restore(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), original.state_dict().values(), strict=True))
    assert {type(each) for each in model.modules()} == {type(each) for each in original.modules()}


def test_deploying_a_tuned_model_with_another_pass_does_both() -> None:
    build, inputs = MODELS["layer norm"]
    model: Any = build().eval()
    original = copy.deepcopy(model)
    normfuse.tune(model, "fold_affine", inputs=inputs, verify="none")
    normfuse.deploy(model, "pre_rmsnorm", inputs=inputs, verify="none")
    assert stands(model, original, inputs, 1e-5)
    assert all(torch.equal(norm.weight, torch.ones(D)) for norm in model.norms)


def test_what_was_given_up_is_not_promised_back() -> None:
    """Also where nothing is left on the modules that tells of the first deploy."""
    build, inputs = MODELS["layer norm"]
    model = normfuse.deploy(build().eval(), "fold_affine", inputs=inputs, verify="none")
    normfuse.deploy(model, "pre_rmsnorm", inputs=inputs, keep=True, verify="none")
    with pytest.raises(normfuse.NormfuseError, match="cannot be put back"):
        normfuse.restore(model)


def test_what_is_wrapped_says_what_to_give() -> None:
    build, inputs = MODELS["layer norm"]
    model = build().eval()
    compiled: Any = torch.compile(model)
    for wrapped, inside in ((compiled, "_orig_mod"), (nn.DataParallel(model), "model.module")):
        for call in (normfuse.deploy, normfuse.tune):
            with pytest.raises(CannotApply) as caught:
                call(wrapped, "fold_affine", inputs=inputs)
            assert inside in caught.value.obstacles[0].hint
            assert inside in (caught.value.hint or "")
