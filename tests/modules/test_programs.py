"""Live programs: the original's own parameters, proven, with the original's gradients, for every pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import normfuse
from normfuse.cli import main
from normfuse.errors import CannotApply, NormfuseError
from tests.batch_norms import FOLDS
from tests.models import IDS, TRAPS, FreeStream, noise
from tests.modules.models import distance, loss
from tests.streams import STREAMS

MODELS: dict[str, Any] = {**TRAPS, **FOLDS, **STREAMS}
PASSES = ("pre_rmsnorm", "pre_crmsnorm", "pre_crmsnorm_compressed", "all")
QUICK = (
    "plain", "tied head", "shared norm", "shared writer, one outside", "layer scale", "mix-ln", "missing biases", "experts",
    "transposed conv stem", "by hand", "bias on one of two readers", "zero padding",
)  # fmt: skip
QUICK_FOLDS = (
    "conv without bias",
    "grouped transposed conv",
    "a second reader",
    "rep norm, post-norm",
    "products",
    "with a token",
)
OWN_BACKWARD_FAILS = ("in-place residual", "layer scale that is updated")
"""models that write over what their own gradients need"""
CASES = [
    *((each, name) for name in QUICK for each in PASSES[:2]),
    *(("pre_crmsnorm_compressed", name) for name in ("plain", "layer scale")),
    *(("all", name) for name in ("plain", "tied head", *QUICK_FOLDS)),
]
OTHERS = [(each, name) for name in MODELS for each in PASSES if (each, name) not in CASES]


def gradients(run: Any, model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Tensor | None]:
    """Gradients of the model's parameters and of floating inputs, of a loss of what ``run`` gives."""
    model.zero_grad()
    given = [each.detach().clone().requires_grad_() if each.is_floating_point() else each for each in inputs]
    loss(run(*given)).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return found | {f"input {place}": each.grad for place, each in enumerate(given) if each.requires_grad}


@pytest.mark.parametrize(("passes", "name"), [*CASES, *(pytest.param(*each, marks=pytest.mark.slow) for each in OTHERS)])
def test_is_the_model_that_it_was(passes: str, name: str) -> None:
    """Outputs are proven, gradients compared, and the parameters are the very same objects."""
    entry = MODELS[name]
    model = entry.module().double()
    inputs = tuple(each.double() if each.is_floating_point() else each for each in entry.inputs)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    result = normfuse.rewrite(model, passes, inputs=inputs, mode="live")
    assert result.report.evidence.ok
    assert result.report.evidence.relative <= 1e-11
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    own = {id(parameter) for parameter in model.parameters()}
    live = result.module()
    assert {id(parameter) for parameter in live.parameters()} <= own
    assert {name for name, _ in live.named_parameters()} <= {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if result.report.plan.rounds and own and name not in OWN_BACKWARD_FAILS:
        model.load_state_dict(state)  # some models keep state
        expected = gradients(model, model, inputs)
        model.load_state_dict(state)
        found = gradients(result.module(), model, inputs)
        assert distance(found, expected) <= 1e-11


def test_every_changed_tensor_follows_the_parameters() -> None:
    """Other values put into the parameters are what the live program computes with; the deployed one keeps its own."""
    model, other = TRAPS["plain"].module(), TRAPS["plain"].module()
    live, deployed = (normfuse.rewrite(model, "pre_crmsnorm", inputs=IDS, mode=mode).module() for mode in ("live", "deploy"))
    with torch.no_grad():
        for each in (model, other):
            torch.manual_seed(1)
            for parameter in each.parameters():
                parameter.add_(torch.randn_like(parameter))
    torch.testing.assert_close(live(*IDS), other(*IDS), rtol=1e-4, atol=1e-4)
    assert (deployed(*IDS) - other(*IDS)).abs().max() > 0.1
    again = normfuse.rewrite(model, "pre_crmsnorm", inputs=IDS).module()  # what was trained is deployed
    torch.testing.assert_close(again(*IDS), other(*IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("passes", ["pre_rmsnorm", "pre_crmsnorm"])
def test_half_precisions_are_computed_in_float32(passes: str, dtype: torch.dtype) -> None:
    model = TRAPS["plain"].module().to(dtype)
    result = normfuse.rewrite(model, passes, inputs=IDS, mode="live")
    assert result.report.evidence.ok
    assert result.report.evidence.relative <= 1e-11
    deployed = normfuse.rewrite(model, passes, inputs=IDS).module()
    torch.testing.assert_close(result.module()(*IDS), deployed(*IDS), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    loss(result.module()(*IDS)).backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == dtype for parameter in model.parameters())


def test_frozen_parameters_stay_frozen() -> None:
    model = TRAPS["plain"].module()
    model.embed.requires_grad_(False)
    live = normfuse.rewrite(model, "pre_crmsnorm", inputs=IDS, mode="live").module()
    loss(live(*IDS)).backward()
    assert model.embed.weight.grad is None
    assert model.head.weight.grad is not None


def test_dynamic_dims_stay_dynamic() -> None:
    model = TRAPS["plain"].module()
    free = FreeStream()
    free.load_state_dict(model.state_dict())
    shapes = ({0: torch.export.Dim("batch", max=9), 1: torch.export.Dim("length", max=32)},)
    live = normfuse.rewrite(free, "pre_crmsnorm", inputs=IDS, dynamic_shapes=shapes, mode="live").module()
    ids = torch.arange(21).view(7, 3) % 11
    torch.testing.assert_close(live(ids), free(ids), rtol=1e-4, atol=1e-4)


def test_an_exported_program_comes_to_life_too() -> None:
    model = TRAPS["plain"].module()
    exported = torch.export.export(model, IDS)
    live = normfuse.rewrite(exported, ["pre_rmsnorm", "fold_affine"], inputs=IDS, mode="live").module()
    loss(live(*IDS)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# -- files and refusals ------------------------------------------------------------------------------------------------


def test_saved_it_stays_live(tmp_path: Path) -> None:
    model = TRAPS["layer scale"].module()
    normfuse.rewrite(model, "pre_crmsnorm", inputs=IDS, mode="live").save(tmp_path / "live.pt2")
    program = torch.export.load(tmp_path / "live.pt2")
    assert all(torch.equal(value, program.state_dict[key]) for key, value in model.state_dict().items())
    live = program.module()
    optimizer = torch.optim.SGD(live.parameters(), lr=0.1)
    before = loss(live(*IDS))
    before.backward()
    optimizer.step()
    assert loss(live(*IDS)) < before
    model.load_state_dict(live.state_dict())
    torch.testing.assert_close(live(*IDS), model(*IDS), rtol=1e-4, atol=1e-4)


def test_the_command_line_writes_one(tmp_path: Path) -> None:
    model = TRAPS["plain"].module()
    torch.export.save(torch.export.export(model, IDS), tmp_path / "model.pt2")
    words = ["rewrite", str(tmp_path / "model.pt2"), "--pass", "pre_crmsnorm", "--mode", "live", "--json"]
    answer = CliRunner().invoke(main, [*words, "-o", str(tmp_path / "live.pt2")])
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["norms"]["after"] == {"rms_norm": 3}
    program = torch.export.load(tmp_path / "live.pt2")
    assert {key: value.shape for key, value in program.state_dict.items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    compared = CliRunner().invoke(main, ["verify", str(tmp_path / "model.pt2"), str(tmp_path / "live.pt2")])
    assert compared.exit_code == 0, compared.output


def test_what_is_for_training_is_not_served(tmp_path: Path) -> None:
    model = TRAPS["plain"].module()
    result = normfuse.rewrite(model, "pre_rmsnorm", inputs=IDS, mode="live")
    with pytest.raises(NormfuseError, match="for training") as caught:
        normfuse.rewrite(result, "fold_affine")
    assert "rewrite(model" in (caught.value.hint or "")
    with pytest.raises(CannotApply, match="no plan for modules"):
        result.apply_to(model)
    assert not list(tmp_path.iterdir())


def test_an_export_evaluates_it_first(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    result = normfuse.rewrite(TRAPS["plain"].module(), "pre_rmsnorm", inputs=IDS, mode="live")
    assert normfuse.export(result, tmp_path / "model.onnx").ok
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert not [node for node in graph.node if all(each in {i.name for i in graph.initializer} for each in node.input if each)]


def test_there_are_two_modes() -> None:
    with pytest.raises(NormfuseError, match="no mode 'tune'"):
        normfuse.rewrite(nn.LayerNorm(3), "pre_rmsnorm", inputs=(noise(2, 3),), mode="tune")
