"""Inputs, outputs, plans and machines at the edge of what is sensible: an answer or one clear error, never a crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import normfuse
from normfuse.errors import InputError, InvalidPlan, NormfuseError
from normfuse.planning.planner import Plan
from tests.models import IDS, TRAPS, D, Trap, noise


def pair() -> nn.Module:
    return Trap(lambda: nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, 3)), (), 1).module()


@pytest.mark.parametrize(
    "operator",
    [
        "__class__.__init__",
        "mul.__class__",
        "mul.Tensor._schema",
        "from_file.default",
        "mul_.Tensor",
        "no_such_op.default",
        "mul",
        "",
    ],
)
def test_a_plan_reaches_only_operators_that_compute(operator: str) -> None:
    program = normfuse.Program.trace(pair(), (noise(2, D),))
    data = json.loads(normfuse.plan(program, ["pre_rmsnorm"]).to_json())
    reroute = next(edit for edit in data["rounds"][0][0]["edits"] if "reroute" in edit)
    reroute["by"] = {"call": operator, "args": [{"ref": reroute["reroute"]}]}
    with pytest.raises(InvalidPlan):
        Plan.from_json(json.dumps(data)).apply(program)


def test_the_proof_sees_beside_a_mask() -> None:
    from normfuse.graph.edits import SetTensor
    from normfuse.graph.interpreter import flat_inputs
    from normfuse.proof.cases import cases
    from normfuse.proof.proving import prove

    program = normfuse.Program.trace(TRAPS["masked logits"].module(), IDS)
    plan = normfuse.plan(program, ["pre_rmsnorm"])
    edit = next(e for r in plan.rewrites for e in r.edits if isinstance(e, SetTensor))
    crippled = plan.without(edit)
    assert not prove(program, crippled.apply(program), crippled, cases(program, flat_inputs(program, IDS))).ok


@pytest.mark.parametrize("mean", [300.0, 1e4, 1e6])
def test_a_large_mean_in_the_inputs_is_no_alarm(mean: float) -> None:
    layer = nn.TransformerEncoderLayer(D, 2, 16, batch_first=True, norm_first=True)
    model = Trap(lambda: nn.TransformerEncoder(layer, 2, nn.LayerNorm(D), enable_nested_tensor=False), (), 0).module()
    assert normfuse.rewrite(model, "pre_rmsnorm", inputs=(noise(2, 5, D) + mean,)).report.evidence.ok


def test_an_output_that_is_a_size() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = pair()

        def forward(self, x: Tensor) -> Any:
            return self.inner(x), x.shape[0]

    result = normfuse.rewrite(Sized().eval(), "pre_rmsnorm", inputs=(noise(2, D),), dynamic_shapes=({0: Dim("batch")},))
    assert result.report.norms_after == {"rms_norm": 1}
    assert result.module()(noise(5, D))[1] == 5


def test_a_norm_over_a_dynamic_axis_is_refused() -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.layer_norm(x * 2, x.shape[-1:])

    result = normfuse.rewrite(Wide(), "pre_rmsnorm", inputs=(noise(2, D),), dynamic_shapes=({1: Dim("width", min=2)},))
    assert [refusal.code for refusal in result.report.plan.refusals] == ["NF203"]


def test_a_derived_dim() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = pair()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.reshape(-1, 2, D).sum(1))

    half = Dim("half", min=1)
    result = normfuse.rewrite(Half().eval(), "pre_rmsnorm", inputs=(noise(4, D),), dynamic_shapes=({0: 2 * half},))
    assert result.report.evidence.ok
    assert result.module()(noise(8, D)).shape == (4, 3)


def test_weights_on_meta_can_be_planned_and_not_proven() -> None:
    with torch.device("meta"):
        model = pair()
    x = torch.zeros(2, D, device="meta")
    assert normfuse.rewrite(model, "pre_rmsnorm", inputs=(x,), verify="structure").report.norms_after == {"rms_norm": 1}
    with pytest.raises(NormfuseError, match="does not run"):
        normfuse.rewrite(model, "pre_rmsnorm", inputs=(x,))


@pytest.mark.parametrize(
    "inputs",
    [(), (noise(2, D), noise(2, D)), (noise(3, D),), (noise(2, D).double(),), ([noise(2, D)],), (1.0,)],
    ids=["none", "two", "size", "dtype", "nested", "number"],
)
def test_inputs_that_do_not_fit_a_program(inputs: tuple[Any, ...]) -> None:
    program = normfuse.Program.trace(pair(), (noise(2, D),))
    with pytest.raises(InputError):
        normfuse.rewrite(program, "pre_rmsnorm", inputs=inputs, kwargs={} if inputs else {"x": noise(2, D)})


@pytest.mark.parametrize("model", [None, 3, object(), {}])
def test_what_is_no_model(model: Any) -> None:
    with pytest.raises(NormfuseError, match="not a model"):
        normfuse.rewrite(model, "pre_rmsnorm", inputs=(noise(2, D),))


@pytest.mark.parametrize("passes", [None, [], [3], "", ["pre_rmsnrm"]])
def test_what_is_no_pass(passes: Any) -> None:
    with pytest.raises(NormfuseError, match="pass"):
        normfuse.rewrite(pair(), passes, inputs=(noise(2, D),))


def test_many_ways_to_say_the_same_inputs() -> None:
    x = noise(2, D)
    ways: list[Any] = [(x,), [x], x, {"input": x}, normfuse.Inputs((x,), {}, None)]
    for inputs in ways:
        assert normfuse.rewrite(pair(), ["all", "pre_rmsnorm"], inputs=inputs).report.norms_after == {"rms_norm": 1}
    with pytest.raises(InputError, match="tuple of tensors"):
        normfuse.rewrite(pair(), "pre_rmsnorm", inputs=x.numpy())  # type: ignore[arg-type]


def test_dynamic_shapes_are_added_to_inputs_that_are_given_as_one() -> None:
    result = normfuse.rewrite(pair(), "pre_rmsnorm", normfuse.Inputs((noise(2, D),), {}, None), dynamic_shapes=({0: Dim("b")},))
    assert result.module()(noise(7, D)).shape == (7, 3)


def test_a_result_is_a_model() -> None:
    model = pair()
    result = normfuse.rewrite(model, "pre_rmsnorm", inputs=(noise(2, D),))
    assert normfuse.verify(model, result, inputs=(noise(2, D),)).ok
    assert normfuse.rewrite(result, "pre_rmsnorm").report.plan.rounds == ()


def test_keyword_order_is_no_difference() -> None:
    class One(nn.Module):
        def forward(self, *, a: Tensor, b: Tensor) -> Tensor:
            return a - 2 * b

    class Other(nn.Module):
        def forward(self, *, b: Tensor, a: Tensor) -> Tensor:
            return a - 2 * b

    kwargs = {"a": noise(2, D), "b": noise(2, D) + 1}
    assert normfuse.verify(One(), Other(), kwargs=kwargs).ok


def test_a_state_that_is_updated_differently_is_a_difference() -> None:
    class Counting(nn.Module):
        seen: Tensor

        def __init__(self, step: float) -> None:
            super().__init__()
            self.step = step
            self.register_buffer("seen", torch.zeros(D))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(self.step)
            return x * 2

    assert normfuse.verify(Counting(1.0), Counting(1.0), inputs=(noise(2, D),)).ok
    assert not normfuse.verify(Counting(1.0), Counting(2.0), inputs=(noise(2, D),)).ok


def test_a_half_precision_fold_that_overflows_is_not_written() -> None:
    model = Trap(lambda: nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, 3)), (), 1).module()

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.write, self.norm = model[0], model[1]
            self.gamma = nn.Parameter(torch.full((D,), 3000.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.gamma * self.write(x))

    huge = Scaled().eval()
    with torch.no_grad():
        huge.write.weight.mul_(100.0)
    with pytest.raises(NormfuseError, match="after rounding"):
        normfuse.rewrite(huge.half(), "pre_rmsnorm", inputs=(noise(2, D).half() * 1e-3,))


@pytest.mark.parametrize(("dtype", "mean"), [(torch.float16, 500.0), (torch.bfloat16, 50.0)])
def test_an_explicit_centring_in_half_precision_loses_nothing(dtype: torch.dtype, mean: float) -> None:
    layer = nn.TransformerEncoderLayer(D, 2, 16, batch_first=True, norm_first=True)
    build = lambda: nn.TransformerEncoder(layer, 1, nn.LayerNorm(D), enable_nested_tensor=False)  # noqa: E731
    x = (noise(2, 5, D) + mean).to(dtype)
    evidence = normfuse.rewrite(Trap(build, (), 0).module().to(dtype), "pre_rmsnorm", inputs=(x,)).report.evidence
    assert evidence.ok
    assert evidence.ratio < 8.0


def test_a_channels_first_norm_in_half_precision_does_not_overflow() -> None:
    class ChannelsFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, D, 1), nn.Conv2d(D, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            centred = y - y.mean(1, keepdim=True)
            return self.head(centred / torch.sqrt(y.var(1, keepdim=True, unbiased=False) + 1e-3))

    model = Trap(ChannelsFirst, (), 1).module().half()
    result = normfuse.rewrite(model, "pre_rmsnorm", inputs=((noise(2, 3, 4, 4) * 300).half(),), verify="structure")
    assert result.report.norms_after == {"rms_norm": 1}
    assert result.module()((noise(2, 3, 4, 4) * 300).half()).isfinite().all()


def test_training_mode_is_noted() -> None:
    result = normfuse.rewrite(pair().train(), "pre_rmsnorm", inputs=(noise(2, D),))
    assert any("training mode" in note for note in result.report.to_dict()["notes"])


def test_only_what_is_allowed_runs() -> None:
    result = normfuse.rewrite(pair(), "pre_rmsnorm", inputs=(noise(2, D),), allow="exact")
    (refusal,) = result.report.plan.refusals
    assert refusal.code == "NF102"
    assert "'rounding'" in refusal.reason


def test_export_never_replaces_the_model_nor_a_good_file_by_a_bad_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    from normfuse.exporters import onnxruntime

    result = normfuse.rewrite(pair(), "pre_rmsnorm", inputs=(noise(2, D),))
    saved = result.save(tmp_path / "model.pt2")
    before = saved.read_bytes()
    again = normfuse.rewrite(saved, "pre_rmsnorm")
    for target, why in (("onnx", "is a .onnx file, not model.pt2"), ("aoti", "is the input")):
        with pytest.raises(InputError, match=why):
            normfuse.export(again, saved, to=target)
    assert saved.read_bytes() == before
    good = tmp_path / "model.onnx"
    assert normfuse.export(again, good).ok
    kept = good.read_bytes()
    monkeypatch.setattr(onnxruntime, "_tensors", lambda *args, **kwargs: [noise(2, 3)])
    with pytest.raises(NormfuseError):
        normfuse.export(again, good)
    assert good.read_bytes() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.pt2"]
