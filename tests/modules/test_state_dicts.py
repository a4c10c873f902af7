"""What a deployed model loads: a whole checkpoint, the original's or a deployed one's, is right; a part is refused."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import normfuse
from normfuse.errors import NormfuseError
from tests.models import noise
from tests.modules.models import IMAGES, net
from tests.modules.test_deploy import Doubled, close
from tests.modules.test_unread_tensors import MODELS
from tests.zoo.spread import spread

pytestmark = pytest.mark.filterwarnings("ignore::normfuse.errors.NormfuseWarning")

X = (noise(2, 3, 4),)
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], str]] = {
    "centred": (MODELS["layer norm"][0], X, "pre_rmsnorm"),
    "centred, and folded": (MODELS["layer norm"][0], X, "all"),
    "only folded": (MODELS["layer norm"][0], X, "fold_affine"),
    "borrowing": (lambda: net(), IMAGES, "conv_bn"),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[Any, nn.Module, tuple[Any, ...], str]:
    """An original, another one of its kind, inputs, and a pass."""
    build, inputs, passes = KINDS[request.param]
    original = build().eval()
    other = copy.deepcopy(original)
    with torch.no_grad():
        for place, tensor in enumerate(other.parameters()):
            tensor.copy_(tensor.flip(0) * 1.5 + 0.01 * place)
    return original, other, inputs, passes


def _deployed(model: nn.Module, passes: str, inputs: Any, *, keep: bool = False) -> nn.Module:
    return normfuse.deploy(copy.deepcopy(model), passes, inputs=inputs, verify="none", keep=keep)


def test_a_whole_checkpoint_is_right(kind: Any) -> None:
    """Of an original and of a deployed model, also another one, into the model, a copy, and what it is wrapped in."""
    original, other, inputs, passes = kind
    once, saved = _deployed(original, passes, inputs), {"original": original.state_dict(), "other": other.state_dict()}
    saved |= {"deployed": once.state_dict(), "other deployed": _deployed(other, passes, inputs).state_dict()}
    for name, state in saved.items():
        expected, model = (other if "other" in name else original)(*inputs), copy.deepcopy(once)
        model.load_state_dict(state, strict=True)
        assert close(model(*inputs), expected), name
        wrapped = torch.optim.swa_utils.AveragedModel(once)
        wrapped.load_state_dict({f"module.{key}": value for key, value in state.items()}, strict=False)
        assert close(wrapped(*inputs), expected), name
    model.load_state_dict(saved["other"])
    assert close(normfuse.deploy(model, passes, inputs=inputs, verify="none")(*inputs), other(*inputs))


def test_what_was_loaded_is_not_replaced_by_restore(kind: Any) -> None:
    original, other, inputs, passes = kind
    model = _deployed(original, passes, inputs, keep=True)
    model.load_state_dict(other.state_dict())
    normfuse.restore(model)
    assert close(model(*inputs), other(*inputs))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", ["centred", "borrowing"])
def test_a_part_is_refused_and_nothing_is_loaded(name: str) -> None:
    build, inputs, passes = KINDS[name]
    original = build().eval()
    model: Any = _deployed(original, passes, inputs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    part = dict(list(original.state_dict().items())[:3])
    with pytest.raises(NormfuseError, match="this model was deployed") as caught:
        model.load_state_dict(part, strict=False)
    assert "restore(model) first" in str(caught.value.hint)
    inner, path = (model.norms, "norms") if name == "centred" else (model.blocks, "blocks")
    with pytest.raises(NormfuseError, match=path):
        inner.load_state_dict(original.get_submodule(path).state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert close(model(*inputs), original(*inputs))


def test_names_that_came_or_went_are_refused_where_nothing_is_strict() -> None:
    original = spread(Doubled()).eval()
    model = _deployed(original, "conv_bn", IMAGES)
    state = model.state_dict()
    with pytest.raises(NormfuseError, match="this model was deployed"):
        model.load_state_dict(original.state_dict(), strict=False)
    model.load_state_dict(state)
    assert close(model(*IMAGES), original(*IMAGES))


def test_an_adapter_that_replaces_layers_goes_on_a_deployed_model() -> None:
    """Its weights alone are loaded, and the rewrites stay."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base_layer, self.down = base, nn.Linear(base.in_features, 2, bias=False)
            self.up = nn.Linear(2, base.out_features, bias=False)

        def forward(self, x: Any) -> Any:
            return self.base_layer(x) + self.up(self.down(x))

    build, inputs, _ = KINDS["centred"]
    original: Any = build().eval()
    model: Any = _deployed(original, "all", inputs)
    for each in (model, original):
        each.up[0] = Adapted(each.up[0])
        nn.init.zeros_(each.up[0].up.weight)
    weights = {f"up.0.{name}.weight": torch.zeros_like(getattr(model.up[0], name).weight) for name in ("down", "up")}
    kinds = [type(each) for each in model.modules()]
    model.load_state_dict(weights, strict=False)
    assert [type(each) for each in model.modules()] == kinds
    assert close(model(*inputs), original(*inputs))


def test_a_deployed_model_is_cast_copied_and_saved_whole(kind: Any) -> None:
    original, _, inputs, passes = kind
    model = _deployed(original, passes, inputs)
    file = io.BytesIO()
    torch.save(model, file)
    again = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    for each in (again, copy.deepcopy(model)):
        assert close(each(*inputs), original(*inputs))
        each.load_state_dict(original.state_dict())
        assert close(each(*inputs), original(*inputs))
    half = tuple(each.bfloat16() for each in inputs)
    found, expected = copy.deepcopy(model).to(torch.bfloat16)(*half), copy.deepcopy(original).to(torch.bfloat16)(*half)
    assert (found - expected).abs().max() <= 0.1 * expected.abs().max()
    assert {id(each) for each in model.parameters()} == {id(each) for each in model.double().parameters()}


def test_a_tuned_model_loads_as_before(kind: Any) -> None:
    original, other, inputs, passes = kind
    model = normfuse.tune(copy.deepcopy(original), passes, inputs=inputs, verify="none")
    model.load_state_dict(other.state_dict())
    if passes == "conv_bn":  # other rewrites follow the tensors too
        assert close(model(*inputs), other(*inputs))
    normfuse.deploy(model)
    assert close(model(*inputs), other(*inputs))
    model.load_state_dict(original.state_dict())
    assert close(model(*inputs), original(*inputs))
