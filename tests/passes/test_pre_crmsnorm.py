"""Streams in one entry less: what is narrowed and what is not, exactly, in both bases, alone and beside pre_rmsnorm."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import normfuse
from normfuse.errors import CannotApply, InvalidPlan
from normfuse.graph.edits import Reroute, Resize, apply
from normfuse.graph.expressions import Read, evaluate
from normfuse.graph.findings import Rewrite
from normfuse.graph.program import Program
from normfuse.graph.views import shape
from normfuse.nn import CRMSNorm
from normfuse.planning.planner import plan
from normfuse.transforms.basis import Basis, Compressed, Rotated
from tests.models import IDS, TRAPS, FreeStream, Mlp, Tied, Trap, noise, tokens
from tests.zoo.models import ZOO, ZooModel
from tests.zoo.spread import spread

FORMS = ("pre_crmsnorm", "pre_crmsnorm_compressed")
BASES = {"rotated": Rotated(), "compressed": Compressed()}

# (norms narrowed, codes of the others, explicit changes of basis); where nothing is said: all of them, no code, none
WANTED: dict[str, tuple[int, tuple[str, ...], int]] = {
    "tied head": (0, ("NF403", "NF405", "NF405"), 0),
    "tied head, one norm": (0, ("NF401",), 0),
    "shared writer, both inside": (0, ("NF403", "NF403", "NF405"), 0),
    "shared writer, one outside": (0, ("NF401", "NF403", "NF405"), 0),
    "returned hidden state": (0, ("NF401", "NF401", "NF401"), 0),
    "raw-stream reader": (0, ("NF401", "NF401", "NF401"), 0),
    "raw reader before, one centring behind": (2, (), 1),
    "data-dependent gate": (0, ("NF401", "NF401", "NF405"), 0),
    "scalar gate": (0, ("NF403", "NF403", "NF405"), 0),
    "layer scale read twice": (0, ("NF401", "NF401", "NF405"), 0),
    "layer scale of a square": (0, ("NF401", "NF401", "NF403"), 0),
    "layer scale that is updated": (0, ("NF401", "NF401", "NF405"), 0),
    "tied by data": (0, ("NF403", "NF405", "NF405"), 0),
    "tied buffer": (0, ("NF403", "NF405", "NF405"), 0),
    "squares": (0, ("NF403", "NF403"), 0),
    "concatenated tokens": (1, ("NF401", "NF401"), 0),
    "post-norm": (0, ("NF401", "NF403", "NF403"), 0),
    "output norms": (0, ("NF401", "NF403", "NF403"), 0),
    "mix-ln": (4, ("NF403",), 1),
    "norm before the stream": (3, ("NF403",), 1),
    "square, norm over the other axis": (0, ("NF401",), 0),
    "square, transposed and reshaped": (0, ("NF401",), 0),
    "grouped conv stem": (0, ("NF401",), 0),
    "grouped transposed conv stem": (0, ("NF401",), 0),
    "two axes": (0, ("NF402",), 0),
    "padding with ones": (2, ("NF401",), 1),
    "updated buffer": (0, ("NF401",), 0),
    "depthwise conv": (0, ("NF401",), 0),
    "rms norms": (0, (), 0),
}


def _narrowed(result: normfuse.Result) -> int:
    return sum(len(each.sites) for each in result.report.plan.rewrites if each.pass_name in FORMS)


def _explicit(result: normfuse.Result) -> int:
    """Rerouted values that are neither norms nor layers nor gone: what is computed at every call to change the basis."""
    rewrites = [each for each in result.report.plan.rewrites if each.pass_name in FORMS]
    return sum(isinstance(edit, Reroute) and edit.readers is not None for each in rewrites for edit in each.edits)


# -- the traps ---------------------------------------------------------------------------------------------------------


def in_dtype(inputs: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(value.to(dtype) if value.is_floating_point() else value for value in inputs)


@cache
def traced(name: str, dtype: torch.dtype = torch.float32) -> Program:
    """Both forms rewrite one trace."""
    return Program.trace(TRAPS[name].module().to(dtype), in_dtype(TRAPS[name].inputs, dtype))


def original(name: str, dtype: torch.dtype = torch.float32) -> Program | nn.Module:
    """A trap as it is rewritten; one that keeps state anew each time, because a program shares its tensors with its results."""
    return TRAPS[name].module().to(dtype) if traced(name, dtype).written else traced(name, dtype)


@cache
def rewritten(form: str, name: str) -> normfuse.Result:
    return normfuse.rewrite(original(name), [form], inputs=TRAPS[name].inputs)


@pytest.fixture(
    params=[
        pytest.param((form, name), marks=pytest.mark.xdist_group(name), id=f"{form} {name}") for form in FORMS for name in TRAPS
    ]
)
def trap(request: pytest.FixtureRequest) -> tuple[str, str, normfuse.Result]:
    form, name = request.param
    return form, name, rewritten(form, name)


def test_narrows_what_it_should(trap: tuple[str, str, normfuse.Result]) -> None:
    form, name, result = trap
    before = result.report.to_dict()["norms"]["before"].get("layer_norm", 0)
    narrowed, codes, explicit = WANTED.get(name, (before, (), 0))
    assert _narrowed(result) == narrowed
    assert tuple(sorted(refusal["code"] for refusal in result.report.to_dict()["refusals"])) == codes
    assert _explicit(result) == explicit
    after = result.report.to_dict()["norms"]["after"]
    assert after.get("layer_norm", 0) == before - narrowed
    if form == "pre_crmsnorm":
        assert after.get("rms_norm", 0) == narrowed + result.report.to_dict()["norms"]["before"].get("rms_norm", 0)


def test_result_is_exact(trap: tuple[str, str, normfuse.Result]) -> None:
    _, name, result = trap
    assert result.report.evidence.ok
    assert result.report.evidence.relative <= 1e-11
    module = TRAPS[name].module()
    inputs = TRAPS[name].inputs
    for ours, theirs in zip(_flat(result.module()(*inputs)), _flat(module(*inputs)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


def test_the_written_program_is_exact_too(trap: tuple[str, str, normfuse.Result]) -> None:
    """In float64 nothing is lost by rounding, so the module that is written must be exact: not its formulas alone."""
    form, name, _ = trap
    module = TRAPS[name].module().double()
    inputs = in_dtype(TRAPS[name].inputs, torch.float64)
    written = normfuse.rewrite(original(name, torch.float64), [form], inputs=inputs, verify="structure").module()
    for _ in range(2):  # some models keep state
        for ours, theirs in zip(_flat(written(*inputs)), _flat(module(*inputs)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_refusals_say_where(trap: tuple[str, str, normfuse.Result]) -> None:
    for refusal in trap[2].report.to_dict()["refusals"]:
        assert refusal["reason"]
        assert refusal["source"]
        assert refusal["code"] == "NF402" or refusal["at"]


def _flat(outputs: object) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "passes", [("pre_rmsnorm", form) for form in FORMS] + [(form, "pre_rmsnorm") for form in FORMS], ids="+".join
)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xdist_group(name))
        for name in ("plain", "layer scale", "mix-ln", "norm before the stream", "experts", "by hand", "zero padding")
    ],
)
def test_beside_pre_rmsnorm(name: str, passes: tuple[str, str]) -> None:
    """In one plan the passes may come in any order, and leave the same norms."""
    (form,) = (each for each in passes if each in FORMS)
    alone, both = rewritten(form, name), normfuse.rewrite(original(name), passes, inputs=TRAPS[name].inputs)
    assert _narrowed(both) == _narrowed(alone) > 0
    assert both.report.evidence.ok
    assert both.report.evidence.relative <= 1e-11


# -- after pre_rmsnorm -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_rounded_mean_is_not_trusted(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The weights that pre_rmsnorm has written have no mean by chance: nobody says that they must not, so none is taken out."""
    first = normfuse.rewrite(TRAPS["plain"].module().to(dtype), "pre_rmsnorm", inputs=IDS)
    first.save(tmp_path / "model.pt2")
    for saved in (first.program, tmp_path / "model.pt2"):
        again = normfuse.rewrite(saved, form, inputs=IDS)
        assert _narrowed(again) == 0
        assert [refusal.code for refusal in again.report.plan.refusals] == ["NF406"] * 3
        assert all("on the original model" in refusal.hint for refusal in again.report.plan.refusals)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["plain", "layer scale", "mix-ln", "experts", "by hand", "zero padding", "conv stem"])
def test_a_result_still_knows_its_means(name: str, form: str) -> None:
    """What is rewritten further is the plan and not its numbers, so it is what one plan of both passes makes, rounded once."""
    first = normfuse.rewrite(TRAPS[name].module(), "pre_rmsnorm", inputs=TRAPS[name].inputs)
    further = normfuse.rewrite(first, form)
    both = normfuse.rewrite(TRAPS[name].module(), ["pre_rmsnorm", form], inputs=TRAPS[name].inputs)
    assert _narrowed(further) == _narrowed(both) > 0
    assert further.report.evidence.relative <= 1e-11
    ours, theirs = (result.program.exported.state_dict for result in (further, both))
    assert all(torch.allclose(ours[key], theirs[key], rtol=0, atol=1e-6) for key in theirs)


def test_an_rms_norm_of_its_own_is_passed_over() -> None:
    """Nothing has centred what writes it, and nothing is said of it; nor of a writer that is all zeros."""
    model = TRAPS["rms norms"].module()
    for _ in range(2):
        assert normfuse.rewrite(model, "pre_crmsnorm", inputs=IDS).report.plan.refusals == ()
        torch.nn.init.zeros_(model.positions)


# -- hostile shapes ----------------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """A class token before the others, positions, literal sizes everywhere, norms of different eps, and a square writer."""

    def __init__(self, d: int, length: int) -> None:
        super().__init__()
        self.d, self.length = d, length
        self.embed, self.token = nn.Linear(3, d), nn.Parameter(torch.zeros(1, 1, d))
        self.positions = nn.Parameter(torch.zeros(1, length, d))
        self.one, self.two, self.final = (nn.LayerNorm(d, eps=eps) for eps in (1e-12, 1e-2, 1e-5))
        self.square, self.mlp, self.head = nn.Linear(d, d, bias=False), Mlp(d), nn.Linear(d, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        x = torch.cat((self.token.expand(batch, -1, -1), self.embed(x)), 1) + self.positions
        flat = self.one(x).reshape(batch * self.length, self.d)
        x = x + self.square(flat).view(batch, self.length, self.d)
        x = (x.transpose(0, 1) + self.mlp(self.two(x.transpose(0, 1)))).transpose(0, 1)
        return self.head(self.final(x[:, 0]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(3, 2, 4), (3, 3, 3), (8, 8, 8), (7, 8, 8), (64, 2, 3)], ids=str)
def test_hostile_sizes(form: str, sizes: tuple[int, int, int]) -> None:
    """Width, length and batch in all coincidences."""
    d, length, batch = sizes
    model = _spread(lambda: Tokens(d, length))
    result = normfuse.rewrite(model, form, inputs=(noise(batch, length - 1, 3),))
    assert _narrowed(result) == 3
    assert result.report.evidence.ok
    assert result.report.evidence.relative <= 1e-11
    assert [shape(each)[-1] for each in result.program.nodes.values() if "view" in each.name or "cat" in each.name] == [
        d - 1
    ] * 3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 2])
def test_a_norm_over_next_to_nothing_is_refused(form: str, size: int) -> None:
    model = nn.Sequential(nn.Linear(4, size), nn.LayerNorm(size), nn.Linear(size, 2))
    result = normfuse.rewrite(model, form, inputs=(noise(3, 4),))
    assert [refusal["code"] for refusal in result.report.to_dict()["refusals"]] == ["NF402"]


def _spread(build: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return spread(build()).eval()


@pytest.mark.parametrize("form", FORMS)
def test_a_tied_head_costs_two_changes_of_basis(form: str) -> None:
    """With norms enough they pay, and the table stays one."""
    model = Trap(lambda: Tied(4), IDS, 0).module()
    result = normfuse.rewrite(model, form, inputs=IDS)
    assert _narrowed(result) == 4
    assert _explicit(result) == 2
    assert result.report.evidence.relative <= 1e-11
    state = result.program.exported.state_dict
    assert state["embed.weight"].data_ptr() == state["head.weight"].data_ptr() == model.embed.weight.data_ptr()


@pytest.mark.parametrize("form", FORMS)
def test_dynamic_batch_and_sequence(form: str) -> None:
    model = Trap(FreeStream, IDS, 3).module()
    shapes = ({0: Dim("batch", max=9), 1: Dim("length", max=32)},)
    result = normfuse.rewrite(model, form, inputs=IDS, dynamic_shapes=shapes)
    assert _narrowed(result) == 3
    assert {"smallest dynamic dims", "largest dynamic dims"} <= {row.case for row in result.report.evidence.algebra}
    for ids in (tokens(1, 1), tokens(7, 31)):
        torch.testing.assert_close(result.module()(ids), model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions(form: str, dtype: torch.dtype) -> None:
    model = Trap(lambda: Tied(4), IDS, 0).module().to(dtype)
    result = normfuse.rewrite(model, form, inputs=IDS)
    assert _narrowed(result) == 4
    assert result.report.evidence.ok
    assert result.report.evidence.relative <= 1e-11
    assert result.module()(*IDS).dtype == dtype


@pytest.mark.parametrize("form", FORMS)
def test_saved_and_exported(form: str, tmp_path: Path) -> None:
    model = TRAPS["plain"].module()
    result = normfuse.rewrite(model, form, inputs=IDS)
    result.save(tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(again(*IDS), model(*IDS), rtol=1e-4, atol=1e-4)
    normfuse.verify(model, tmp_path / "model.pt2", inputs=IDS).require()
    assert result.program.exported.state_dict["head.weight"].shape == (11, 7)


@pytest.mark.parametrize("form", FORMS)
def test_runs_in_onnx_runtime(form: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    result = normfuse.rewrite(TRAPS["plain"].module(), form, inputs=IDS)
    normfuse.export(result, tmp_path / "model.onnx")  # compares


def test_live_modules_are_told_why() -> None:
    model = TRAPS["plain"].module()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = normfuse.rewrite(model, "pre_crmsnorm", inputs=IDS)
    with pytest.raises(CannotApply, match="another size"):
        result.apply_to(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- the bases ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", BASES.values(), ids=list(BASES))
@pytest.mark.parametrize("d", [2, 3, 8, 768])
def test_a_basis_keeps_zero_mean_vectors(basis: Basis, d: int) -> None:
    eye = torch.eye(d, dtype=torch.float64)
    down = evaluate(basis.written(Read("eye"), 0, d), lambda _: eye)  # P C₀
    up = evaluate(basis.read(Read("eye"), 1, d), lambda _: eye)  # L, for normalized vectors
    factor = (d / (d - 1)) ** 0.5 if isinstance(basis, Rotated) else 1.0
    centred = eye - 1.0 / d
    torch.testing.assert_close(up @ down, factor * centred, rtol=0, atol=1e-13)
    assert down.shape == (d - 1, d)
    if isinstance(basis, Rotated):
        torch.testing.assert_close(down @ down.T, torch.eye(d - 1, dtype=torch.float64), rtol=0, atol=1e-13)
        assert down.sum(1).abs().max() <= 1e-13


def test_the_compressed_norm_is_crms_norm() -> None:
    read = nn.Linear(8, 8, bias=False)
    nn.init.eye_(read.weight)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8, eps=1e-3, elementwise_affine=False), read).double()
    x = noise(5, 4).double()
    program = normfuse.rewrite(model, "pre_crmsnorm_compressed", inputs=(x,)).program
    weight = program.exported.state_dict["0.weight"]
    ours = CRMSNorm(7, eps=1e-3)(x @ weight.T + program.exported.state_dict["0.bias"])
    torch.testing.assert_close(ours, model(x)[:, :7], rtol=1e-12, atol=1e-12)


# -- the edits ---------------------------------------------------------------------------------------------------------


def test_every_change_of_size_is_declared() -> None:
    program = Program.trace(TRAPS["plain"].module(), IDS)
    (rewrite,) = plan(program, ["pre_crmsnorm"]).rewrites
    for left_out in [edit for edit in rewrite.edits if isinstance(edit, Resize)]:
        with pytest.raises(InvalidPlan):
            apply(program, [edit for edit in rewrite.edits if edit != left_out])


@pytest.mark.parametrize(
    "resize", [Resize("add", 2, 5), Resize("linear", 2, 15), Resize("p_head_weight", 1, 7), Resize("nobody", 0, 1)], ids=str
)
def test_a_size_that_nothing_has_is_no_plan(resize: Resize) -> None:
    with pytest.raises(InvalidPlan):
        apply(Program.trace(TRAPS["plain"].module(), IDS), [resize])


def test_a_reader_outside_is_noticed() -> None:
    """The planner does not take a pass's word for who reads a value."""
    import dataclasses

    from normfuse.analysis.facts import analyze
    from normfuse.planning.registry import Pass, find

    def blind(program: Program, facts: Any) -> Any:
        for each in find("pre_crmsnorm").propose(program, facts):
            assert isinstance(each, Rewrite)
            yield dataclasses.replace(each, region=each.region - {"add_1"})

    program = Program.trace(TRAPS["plain"].module(), IDS)
    assert list(blind(program, analyze(program)))
    chosen = plan(program, [Pass("blind", blind, "")])
    assert not chosen.rounds
    assert {refusal.code for refusal in chosen.refusals} == {"NF101"}


# -- architectures -----------------------------------------------------------------------------------------------------

NARROWED = {
    "timm_vit_clip": 5, "timm_mixer": 2, "timm_eva02": 5, "timm_eva_postnorm": 0, "timm_swin": 3, "timm_swin_padded": 3,
    "timm_swinv2": 0, "timm_convnext": 0, "torchvision_swin": 3, "torchvision_swinv2": 0, "torchvision_convnext": 0,
    "hf_gpt2": 4, "hf_opt": 4, "hf_opt_postnorm": 0, "hf_bloom": 4, "hf_bloom_untied": 5, "hf_falcon_7b": 0, "hf_falcon_40b": 4,
    "hf_falcon_rw": 4, "hf_mpt": 4, "hf_whisper": 10, "hf_whisper_encoder": 4, "hf_clip_text": 4, "hf_clip_text_projection": 4,
    "hf_clip_vision": 0, "hf_bert": 0, "hf_bert_model": 0, "hf_dinov2": 4, "torch_encoder_prenorm": 4, "torch_encoder_bare": 0,
    "torch_encoder_postnorm": 0, "torch_decoder_prenorm": 0, "torch_transformer_prenorm": 4, "torch_transformer_postnorm": 0,
}  # fmt: skip


ROTATED = {*list(ZOO)[::4], "timm_mixer", "timm_swin_padded", "torchvision_swin", "torch_transformer_prenorm", "hf_opt"}
"""Every fourth architecture, and those that the form narrows in part, as no other does."""
OTHER_FORMS = ("timm_vit_clip", "hf_gpt2", "hf_whisper_encoder", "torch_encoder_prenorm")


def _when(quick: bool) -> Any:
    return () if quick else pytest.mark.slow


def zoo_cases() -> list[Any]:
    """Some architectures in the rotated form, few in the others, and all of them in every form where there is time."""
    forms = (("pre_crmsnorm",), ("pre_crmsnorm_compressed",), ("pre_rmsnorm", "pre_crmsnorm"))
    return [
        pytest.param(
            each,
            form,
            id=f"{each.name}, {'+'.join(form)}",
            marks=_when(each.name in (*OTHER_FORMS, *(ROTATED if form == forms[0] else ()))),
        )
        for each in ZOO.values()
        if each.layer_norms
        for form in forms
    ]


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("zoo_model", "passes"), zoo_cases())
def test_zoo(zoo_model: ZooModel, passes: tuple[str, ...]) -> None:
    model = zoo_model.build()
    args, kwargs = zoo_model.inputs(model)
    result = normfuse.rewrite(model, passes, inputs=args, kwargs=kwargs)
    assert result.report.evidence.ok
    assert result.report.evidence.relative <= 1e-11
    if len(passes) == 1:
        assert _narrowed(result) == NARROWED.get(zoo_model.name, zoo_model.layer_norms)


class Expanded(nn.Module):
    """A second gain that is stretched over the tokens: equal along them, but not one row."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.gain, self.head = nn.Linear(5, 8), nn.Parameter(torch.ones(8)), nn.Linear(8, 3)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.reads = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Any) -> Any:
        x = self.write(x)
        for norm, read in zip(self.norms, self.reads, strict=True):
            x = x + read(norm(x) * self.gain.expand(4, 8))
        return self.head(x)


@pytest.mark.parametrize("form", FORMS)
def test_a_gain_that_is_stretched_is_refused(form: str) -> None:
    result = normfuse.rewrite(_spread(Expanded), form, inputs=(noise(4, 5),))
    codes = [refusal["code"] for refusal in result.report.to_dict()["refusals"]]
    assert codes == ["NF403"] * 3


class ReadTwice(nn.Module):
    """As many tokens as features: a value without a mean is multiplied with itself, and one side alone carries a basis."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.write = nn.Linear(4, 4)
        self.norms = nn.ModuleList(nn.RMSNorm(4, eps=1e-5) for _ in range(heads))
        self.heads = nn.ModuleList(nn.Linear(4, 3) for _ in range(heads))

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.write(x)
        y = y - y.mean(-1, keepdim=True)
        z = y @ y
        return [head(norm(z)) for norm, head in zip(self.norms, self.heads, strict=True)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", [1, 3])
def test_a_value_that_is_multiplied_with_itself_keeps_its_width(
    form: str, heads: int, capfd: pytest.CaptureFixture[str]
) -> None:
    model = spread(ReadTwice(heads)).eval()
    result = normfuse.rewrite(model, form, (noise(4, 4),))
    assert {each.code for each in result.report.plan.refusals} == ({"NF405"} if heads == 1 else set())
    assert sum(len(each.sites) for each in result.report.plan.rewrites) == (0 if heads == 1 else heads)
    assert result.report.evidence.ok
    assert "Traceback" not in capfd.readouterr().err
