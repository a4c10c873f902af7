"""The pass on every trap of tests/models.py: what it converts, what it refuses and why, and that the result is exact."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import nn
from torch.export import Dim

import normfuse
from normfuse.errors import InputError
from normfuse.graph.interpreter import flat_inputs, run
from normfuse.graph.program import Program
from tests.models import IDS, TRAPS, D, LayerScaled, Stream, Tied, Trap, noise, tokens


@cache  # not a fixture of the module: shuffled tests would rewrite each model again and again
def rewritten(name: str) -> normfuse.Result:
    return normfuse.rewrite(TRAPS[name].module(), ["pre_rmsnorm"], inputs=TRAPS[name].inputs)


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in TRAPS])
def trap(request: pytest.FixtureRequest) -> tuple[Trap, normfuse.Result]:
    return TRAPS[request.param], rewritten(request.param)


def test_converts_what_it_should(trap: tuple[Trap, normfuse.Result]) -> None:
    expected, result = trap
    report = result.report.to_dict()
    assert len(report["rewrites"]) == expected.converted
    assert tuple(refusal["code"] for refusal in report["refusals"]) == expected.codes
    assert report["norms"]["after"].get("layer_norm", 0) == report["norms"]["before"].get("layer_norm", 0) - expected.converted
    assert sum("sub.Tensor" in edit["edit"] for edit in report["edits"]) == expected.paid


def test_result_is_exact(trap: tuple[Trap, normfuse.Result]) -> None:
    expected, result = trap
    assert result.report.evidence.ok
    assert result.report.evidence.relative <= 1e-11
    module = expected.module()
    for ours, theirs in zip(_flat(result.module()(*expected.inputs)), _flat(module(*expected.inputs)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


def test_the_written_program_is_exact_too(trap: tuple[Trap, normfuse.Result]) -> None:
    """In float64 nothing is lost by rounding, so the module that is written must be exact: not its formulas alone."""
    expected, _ = trap
    module = expected.module().double()
    inputs = tuple(value.double() if value.is_floating_point() else value for value in expected.inputs)
    # a copy: a traced program shares its tensors with the module, so a state that both update would be updated twice
    written = normfuse.rewrite(copy.deepcopy(module), ["pre_rmsnorm"], inputs=inputs, verify="structure").module()
    for _ in range(2):  # some models keep state
        for ours, theirs in zip(_flat(written(*inputs)), _flat(module(*inputs)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_refusals_say_why(trap: tuple[Trap, normfuse.Result]) -> None:
    _, result = trap
    for refusal in result.report.to_dict()["refusals"]:
        assert refusal["reason"]
        assert refusal["site"]
        assert refusal["source"]


def _flat(outputs: object) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)  # type: ignore[call-overload]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = TRAPS["tied head"].module().to(dtype)
    result = normfuse.rewrite(model, "pre_rmsnorm", inputs=IDS)
    assert result.report.evidence.ok
    assert result.report.evidence.relative <= 1e-11
    assert all(value.dtype == dtype for value in result.program.exported.state_dict.values())
    if dtype != torch.float64:
        # rounding once: the rewritten half-precision model is about as far from the truth as the original
        assert result.report.evidence.ratio < 4.0


def test_gains_of_zero() -> None:
    model = TRAPS["plain"].module()
    with torch.no_grad():
        model.norms[0].weight[::2] = 0.0
        model.final.weight.zero_()
    result = normfuse.rewrite(model, "pre_rmsnorm", inputs=IDS)
    assert result.report.norms_after == {"rms_norm": 3}
    assert result.report.evidence.relative <= 1e-11


@pytest.mark.parametrize("eps", [1e-12, 1e-3])
def test_eps_is_the_norms_own(eps: float) -> None:
    """On an input whose variance is as small as eps, a wrong eps would show."""
    model = nn.Sequential(nn.Linear(D, D, bias=False), nn.LayerNorm(D, eps=eps), nn.Linear(D, D)).double()
    x = noise(4, D).double() * eps**0.5
    result = normfuse.rewrite(model, "pre_rmsnorm", inputs=(x,))
    assert result.report.norms_after == {"rms_norm": 1}
    torch.testing.assert_close(result.module()(x), model(x), rtol=1e-11, atol=1e-13)


def test_dynamic_batch_and_sequence() -> None:
    class Any(Stream):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids) + self.positions[:1]
            for norm, mlp in zip(self.norms, self.mlps, strict=True):
                x = self.block(x, norm, mlp)
            return self.head(self.final(x))

    model = Trap(Any, IDS, 3).module()
    shapes = ({0: Dim("batch", max=9), 1: Dim("length", max=32)},)
    result = normfuse.rewrite(model, "pre_rmsnorm", inputs=IDS, dynamic_shapes=shapes)
    assert {"smallest dynamic dims", "largest dynamic dims"} <= {row.case for row in result.report.evidence.algebra}
    for ids in (tokens(1, 1), tokens(7, 31)):
        torch.testing.assert_close(result.module()(ids), model(ids), rtol=1e-4, atol=1e-4)


def test_a_tied_table_is_not_copied() -> None:
    model = TRAPS["tied head"].module()
    result = normfuse.rewrite(model, "pre_rmsnorm", inputs=IDS)
    state = result.program.exported.state_dict
    assert state["embed.weight"].data_ptr() == state["head.weight"].data_ptr() == model.embed.weight.data_ptr()


def test_layer_scale_is_folded() -> None:
    model = TRAPS["layer scale"].module()
    assert isinstance(model, LayerScaled)
    result = normfuse.rewrite(model, "pre_rmsnorm", inputs=IDS, keep_unread=True)
    readers = {name: len(result.program.reader_of(name).users) for name in ("gammas.0", "gammas.1")}
    assert readers == {"gammas.0": 0, "gammas.1": 0}


def test_weights_are_folded_in_float64_and_rounded_once() -> None:
    model = TRAPS["plain"].module()
    result = normfuse.rewrite(model, "pre_rmsnorm", inputs=IDS)
    before = model.mlps[0].down.weight.double()
    expected = (before - before.mean(0, keepdim=True)).float()
    assert torch.equal(result.program.exported.state_dict["mlps.0.down.weight"], expected)


def test_what_is_not_changed_is_shared() -> None:
    model = TRAPS["plain"].module()
    result = normfuse.rewrite(model, "pre_rmsnorm", inputs=IDS)
    assert result.program.exported.state_dict["head.weight"].data_ptr() == model.head.weight.data_ptr()


def test_two_names_of_one_tensor_both_get_the_new_value() -> None:
    class Twice(Stream):
        def __init__(self) -> None:
            super().__init__()
            self.mlps[1].down = self.mlps[0].down  # type: ignore[union-attr]

    model = Trap(Twice, IDS, 3).module()
    result = normfuse.rewrite(model, "pre_rmsnorm", inputs=IDS)
    state = result.program.exported.state_dict
    assert result.report.evidence.ok
    assert state["mlps.0.down.weight"].data_ptr() == state["mlps.1.down.weight"].data_ptr()


def test_mixed_precision_norm_keeps_the_dtype() -> None:
    """Half-precision stream, float32 norm parameters: the output dtype must not change."""

    class Mixed(Stream):
        def finish(self, x: torch.Tensor) -> torch.Tensor:
            return self.final(x)

    model = Trap(Mixed, IDS, 3).module().bfloat16()
    model.final.float()
    result = normfuse.rewrite(model, "pre_rmsnorm", inputs=IDS)
    assert result.report.norms_after == {"rms_norm": 3}
    assert result.report.evidence.ok
    assert result.module()(*IDS).dtype == model(*IDS).dtype == torch.bfloat16


def test_training_mode_is_put_back_and_not_baked_in() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5), nn.LayerNorm(D), nn.Linear(D, 2)).train()
    result = normfuse.rewrite(model, "pre_rmsnorm", inputs=(noise(3, D),))
    assert model.training
    assert model[1].training
    assert result.report.norms_after == {"rms_norm": 1}


def test_keyword_inputs() -> None:
    class Keyword(Stream):
        def forward(self, ids: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * more["scale"]

    model = Trap(Keyword, IDS, 3).module()
    result = normfuse.rewrite(model, "pre_rmsnorm", inputs=IDS, kwargs={"scale": torch.tensor(2.0)})
    torch.testing.assert_close(
        result.module()(*IDS, scale=torch.tensor(3.0)), model(*IDS, scale=torch.tensor(3.0)), rtol=1e-4, atol=1e-4
    )


def test_wrong_inputs_are_said(tmp_path: object) -> None:
    with pytest.raises(InputError, match="no example inputs"):
        normfuse.rewrite(TRAPS["plain"].module(), "pre_rmsnorm")


def test_saved_program_opens_without_normfuse(tmp_path: object) -> None:
    import subprocess
    import sys
    from pathlib import Path

    path = Path(str(tmp_path)) / "out.pt2"
    model = Trap(Tied, IDS, 3).module()
    normfuse.rewrite(model, "pre_rmsnorm", inputs=IDS).save(path)
    code = (
        "import sys, torch\n"
        "y = torch.export.load(sys.argv[1]).module()(torch.zeros(2, 5, dtype=torch.long))\n"
        "assert 'normfuse' not in sys.modules\n"
        "print(y.double().sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(model(torch.zeros(2, 5, dtype=torch.long)).double().sum().item(), rel=1e-4)


def test_a_rewritten_program_is_what_its_formulas_say() -> None:
    """The baked program and the formulas agree to one rounding of each weight."""
    trap = TRAPS["mix-ln"]
    program = Program.trace(trap.module().double(), trap.inputs)
    rewritten = normfuse.plan(program, ["pre_rmsnorm"]).apply(program)
    flat = flat_inputs(program, trap.inputs)
    for exact, baked in zip(run(rewritten, flat, wide=True), run(rewritten.baked(), flat), strict=True):
        torch.testing.assert_close(exact, baked, rtol=1e-12, atol=1e-13)
