"""The ONNX exporter: its numbers against float64 truth, what ONNX Runtime makes of a file, and what a file holds."""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from normfuse.errors import ExportError, InputError, MissingExtra, NormfuseWarning
from normfuse.exporters import onnx as exporter
from normfuse.exporters import onnxruntime as runtime
from normfuse.graph.program import Program
from normfuse.planning.planner import plan
from tests.exporters.test_lowering import Gemma
from tests.models import TRAPS

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def compare(path: Path, reference: Sequence[Tensor], inputs: Any) -> list[dict[str, Any]]:
    """How far each output is from the reference, with ONNX Runtime's own optimisation and without it."""
    got = {mode: runtime.run(path, inputs, optimized=mode == "optimized") for mode in ("optimized", "unoptimized")}
    assert all(len(arrays) == len(reference) for arrays in got.values())
    expected = [runtime.as_array(each) for each in reference]
    return [{mode: _error(arrays[i], expected[i]) for mode, arrays in got.items()} for i in range(len(reference))]


def _error(actual: Any, expected: Any) -> dict[str, float]:
    got, want = actual.astype(np.float64), expected.astype(np.float64)
    assert got.shape == want.shape
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    with np.errstate(invalid="ignore"):
        distance = np.abs(got - want)[~same]
    worst = float(np.where(np.isnan(distance), np.inf, distance).max(initial=0.0))
    scale = float(np.abs(want[np.isfinite(want)]).max(initial=0.0))
    return {"max_abs": worst, "max_rel": worst / scale if scale else (np.inf if worst else 0.0)}


@torch.library.custom_op("normfuse_test::untranslated", mutates_args=())
def untranslated(x: Tensor) -> Tensor:
    return x * 2


@untranslated.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Norms(nn.Module):
    """Every kind of norm, each on values of its own: ONNX Runtime merges equal means, then sees no norm in them."""

    def __init__(self, dtype: torch.dtype = torch.float32, layer_norms: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.RMSNorm(16, eps) for eps in (None, 1e-12, 1e-3)]
        layers += [nn.RMSNorm(16, eps, elementwise_affine=False) for eps in (None, 1e-3)]
        layers += [nn.RMSNorm((5, 16), 1e-6), nn.RMSNorm((5, 16), elementwise_affine=False)]
        if layer_norms:
            layers += [nn.LayerNorm(16), nn.LayerNorm(16, 1e-12), nn.LayerNorm(16, 1e-3, bias=False)]
            layers += [nn.LayerNorm(16, elementwise_affine=False), nn.LayerNorm((5, 16), 1e-3)]
        self.layers = nn.ModuleList(layers).to(dtype)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x.roll(shift, -1)) for shift, layer in enumerate(self.layers)]

    @staticmethod
    def values(dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows of so little variance that every eps shows, and one of zeros."""
        x = 1e-3 * torch.randn(3, 5, 16)
        x[0, 0] = 0
        return x.to(dtype)

    def truth(self, x: Tensor) -> list[Tensor]:
        """The same function in float64, with the eps that torch takes when none is given."""
        exact: Norms = copy.deepcopy(self).double()
        for layer in exact.layers:
            if layer.eps is None:
                layer.eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
        with torch.no_grad():
            outputs: list[Tensor] = exact(x.double())
        return outputs


class Block(nn.Module):
    """Two linear maps around two norms, with an optional keyword input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.ln, self.rms, self.last = nn.Linear(16, 16), nn.LayerNorm(16), nn.RMSNorm(16), nn.Linear(16, 8)

    def forward(self, x: Tensor, extra: Tensor | None = None, *, masks: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x = self.rms(self.ln(self.first(x)) + x) * masks["keep"]
        return self.last(x + masks["add"]), x > 0


def traced(module: nn.Module, *args: Any, dynamic: Any = None, **kwargs: Any) -> ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(module.eval(), args, kwargs, dynamic_shapes=dynamic, strict=False)
        functional: ExportedProgram = exported.run_decompositions({})
        return functional


def block(batch: int = 2, seq: int = 3) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = torch.randn(batch, seq, 16)
    return (x, None), {"masks": {"keep": torch.rand(batch, seq, 1), "add": torch.randn(batch, seq, 16)}}


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    """A block with a dynamic batch and sequence, and its first linear and its RMSNorm marked as a pass marks them."""
    args, kwargs = block()
    dims = {0: Dim("batch"), 1: Dim("seq")}
    exported = traced(Block(), *args, **kwargs, dynamic={"x": dims, "extra": None, "masks": {"keep": dims, "add": dims}})
    for node in exported.graph.nodes:
        if node.name in ("linear", "rms_norm"):
            node.meta["normfuse"] = ("pre_rmsnorm", f"at {node.name}")
        if node.name == "linear":
            node.meta.pop("custom", None)  # as a node that a pass made
    return exported


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opset", "dtype"),
    [*((opset, torch.float32) for opset in (18, 20, 22, 23, 25)), (20, torch.float16), (23, torch.float16)],
)
def test_norms_are_as_exact_as_their_dtype(path: Path, opset: int, dtype: torch.dtype) -> None:
    module, x = Norms(dtype), Norms.values(dtype)
    exported = traced(module, x, dynamic=({0: Dim("batch")},))
    info = exporter.export(exported, path, opset=opset)
    assert info.opset == opset
    errors = compare(path, module.truth(x), exporter.onnx_inputs(exported, (x,)))
    for error in errors:
        for mode in ("optimized", "unoptimized"):
            assert error[mode]["max_rel"] <= 8 * torch.finfo(dtype).eps, error
    assert info.ops["LayerNormalization"] == 5
    fused = runtime.fused_ops(path)
    if opset < 23:
        assert fused["SimplifiedLayerNormalization"] == 5
        assert "RMSNormalization" not in info.ops
    else:
        assert info.ops["RMSNormalization"] == fused["RMSNormalization"] == 7


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize(("name", "fused"), [("pre_rmsnorm", 3), ("pre_crmsnorm", 3), ("pre_crmsnorm_compressed", 0)])
def test_formulas_are_evaluated_and_rms_norms_fuse(path: Path, opset: int, name: str, fused: int) -> None:
    trap = TRAPS["plain"]
    program = Program.trace(trap.module(), trap.inputs)
    promised = plan(program, [name]).apply(program)
    info = exporter.export(promised, path, opset=opset)
    runs = runtime.fused_ops(path)
    assert runs.get("SimplifiedLayerNormalization", 0) + runs.get("RMSNormalization", 0) == fused
    (error,) = compare(path, [program.module().double()(*trap.inputs)], [trap.inputs[0].numpy()])
    assert max(error["optimized"]["max_rel"], error["unoptimized"]["max_rel"]) < 1e-6, error
    places = {site.module: site.source for site in info.sites.values()}
    assert {"norms.0", "mlps.1.up", "head"} <= set(places)
    assert all(source.startswith("models.py:") for source in places.values() if source)
    assert b"models.py" not in path.read_bytes()


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_gain_of_one_plus_w_fuses(path: Path, opset: int, dtype: torch.dtype) -> None:
    model, x = Gemma().to(dtype), torch.randn(3, 16).to(dtype)
    info = exporter.export(Program.trace(model, (x,)), path, opset=opset)
    runs = runtime.fused_ops(path)
    assert runs.get("SimplifiedLayerNormalization", 0) + runs.get("RMSNormalization", 0) == 1
    assert not {"Reciprocal", "Sqrt"} & set(runs), info.ops
    (error,) = compare(path, [model.double()(x.double())], [x.numpy()])
    assert error["optimized"]["max_rel"] <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("opset", [20, 23])
def test_float64_keeps_its_eps(path: Path, opset: int) -> None:
    module, x = Norms(torch.float64, layer_norms=False), Norms.values(torch.float64)
    exporter.export(traced(module, x), path, opset=opset)
    for error in compare(path, module.truth(x), [x.numpy()]):
        assert max(error["optimized"]["max_rel"], error["unoptimized"]["max_rel"]) < 1e-14, error


@pytest.mark.parametrize(("value", "weight"), [(torch.float16, torch.float32), (torch.float32, torch.float16)])
@pytest.mark.parametrize("opset", [20, 23])
def test_a_weight_of_another_dtype(path: Path, opset: int, value: torch.dtype, weight: torch.dtype) -> None:
    module, x = nn.RMSNorm(16, 1e-3, dtype=weight), torch.randn(3, 16).to(value)
    info = exporter.export(traced(module, x), path, opset=opset)
    assert list(info.outputs.values()) == [f"{value}[3,16]".removeprefix("torch.")]
    (error,) = compare(path, [module.double()(x.double())], [x.numpy()])
    assert error["optimized"]["max_rel"] <= torch.finfo(value).eps


def test_bfloat16_goes_in_and_out(path: Path) -> None:
    module, x = nn.RMSNorm(16, 1e-3, dtype=torch.bfloat16), torch.randn(3, 16).bfloat16()
    exported = traced(module, x)
    exporter.export(exported, path)
    inputs = exporter.onnx_inputs(exported, (x,))
    (error,) = compare(path, [module(x)], inputs)
    assert error["optimized"]["max_rel"] <= torch.finfo(torch.bfloat16).eps
    assert [array.dtype.name for array in (*inputs.values(), *runtime.run(path, inputs))] == ["bfloat16"] * 2


@pytest.mark.parametrize("opset", [20, 23])
def test_a_tiny_eps_written_by_hand_is_kept(path: Path, opset: int) -> None:
    class ByHand(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            mean = x.pow(2).mean(-1, keepdim=True)
            return x / torch.sqrt(mean + 1e-12), x * torch.rsqrt(1e-9 + mean), x * 1.000005, x + 0.0

    x = Norms.values()
    info = exporter.export(traced(ByHand(), x), path, opset=opset)
    for error in compare(path, ByHand()(x.double()), [x.numpy()]):
        assert max(error["optimized"]["max_rel"], error["unoptimized"]["max_rel"]) < 1e-6, error
    assert info.ops["Add"] == 2  # a true zero may go


# -- inputs and outputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [18, 23])
def test_dynamic_dims_and_keyword_inputs(path: Path, program: ExportedProgram, opset: int) -> None:
    info = exporter.export(program, path, opset=opset)
    assert info.inputs["x"] == "float32[batch,seq,16]"
    assert list(info.outputs.values()) == ["float32[batch,seq,8]", "bool[batch,seq,16]"]
    for sizes in ((1, 1), (4, 7)):
        args, kwargs = block(*sizes)
        kwargs["masks"] = dict(reversed(kwargs["masks"].items()))  # by name, not by position
        inputs = exporter.onnx_inputs(program, args, kwargs)
        assert list(inputs) == list(info.inputs)
        number, _ = compare(path, program.module()(*args, **kwargs), inputs)
        assert number["optimized"]["max_rel"] < 1e-6
        assert runtime.run(path, list(inputs.values()), optimized=False)[1].dtype == np.bool_


def test_inputs_of_another_structure(program: ExportedProgram) -> None:
    with pytest.raises(InputError, match="do not fit"):
        exporter.onnx_inputs(program, block()[0])


def test_dynamic_numbers_and_complex_values(program: ExportedProgram) -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, times: int) -> Tensor:
            return torch.view_as_real(x) * times

    x = torch.randn(3, dtype=torch.complex64)
    exported = traced(Scaled(), x, 5, dynamic=(None, Dim.DYNAMIC))
    inputs = exporter.onnx_inputs(exported, (x.conj(), 7))
    assert inputs["times"] == 7
    assert inputs["times"].dtype == np.int64
    assert np.array_equal(inputs["x"], torch.view_as_real(x.conj().resolve_conj()).numpy())


def test_names_may_be_chosen_and_never_clash(path: Path) -> None:
    class Repeating(nn.Module):
        def forward(self, x: Tensor, unused: Tensor) -> tuple[Tensor | None, ...]:
            y = x * 2
            return y, None, x, y, x.float()

    x, unused = torch.randn(2, 3), torch.randn(1)
    exported = traced(Repeating(), x, unused)
    info = exporter.export(exported, path)
    assert list(info.inputs) == ["x", "unused"]
    assert len({*info.inputs, *info.outputs}) == 6
    names = ["one", "two", "three", "four"]
    info = exporter.export(exported, path, input_names=["mul", "x"], output_names=names)
    assert (list(info.inputs), list(info.outputs)) == (["mul", "x"], names)
    outputs = runtime.run(path, {"x": unused.numpy(), "mul": x.numpy()})
    for got, expected in zip(outputs, (2 * x, x, 2 * x, x), strict=True):
        assert np.array_equal(got, expected.numpy())
    for wrong in (["a"], ["a", "a"]):
        with pytest.raises(ExportError, match="2 distinct names"):
            exporter.export(exported, path, input_names=wrong)


def test_what_does_not_fit_the_file(path: Path, program: ExportedProgram) -> None:
    exporter.export(program, path)
    inputs = exporter.onnx_inputs(program, *block())
    wrong = {**inputs, "x": inputs["x"].astype(np.float64)}
    for bad in (wrong, list(inputs.values())[:-1], {**inputs, "more": inputs["x"]}, [*inputs.values(), inputs["x"]]):
        with pytest.raises(InputError):
            runtime.run(path, bad)
    with pytest.raises(ExportError, match=r"cannot load missing\.onnx"):
        runtime.run(path.with_name("missing.onnx"), [])


def test_same_bytes_and_no_trace_of_the_machine(path: Path, program: ExportedProgram) -> None:
    before = [(node.format_node(), dict(node.meta)) for node in program.graph.nodes]
    exporter.export(program, path)
    first = path.read_bytes()
    assert [(node.format_node(), dict(node.meta)) for node in program.graph.nodes] == before
    exporter.export(program, path)
    assert path.read_bytes() == first
    for trace in (
        str(Path(__file__).parent),
        str(Path(torch.__file__).parent),
        str(path.parent),
        os.sep + "tests",
        ".py",
    ):
        assert trace.encode() not in first
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(("opset", "spelled"), [(20, ["Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"]), (23, None)])
def test_nodes_say_which_pass_made_them(path: Path, program: ExportedProgram, opset: int, spelled: list[str]) -> None:
    exporter.export(program, path, opset=opset)
    made: dict[str, list[str]] = {}
    for node in onnx.load(path).graph.node:
        notes = {note.key: note.value for note in node.metadata_props}
        assert set(notes) <= {"namespace", "normfuse"}
        made.setdefault(notes.get("normfuse", ""), []).append(node.op_type)
    assert made["pre_rmsnorm: at linear"] == ["MatMul", "Add"]
    assert made["pre_rmsnorm: at rms_norm"] == (spelled or ["RMSNormalization"])
    assert "LayerNormalization" in made[""]


def test_a_tag_survives_torchs_own_fusions(path: Path) -> None:
    exported = traced(nn.Sequential(nn.Flatten(), nn.Linear(6, 4)), torch.randn(2, 2, 3))
    for node in exported.graph.nodes:
        node.meta["normfuse"] = ("fold_affine", node.name)
    exporter.export(exported, path)
    (gemm,) = [node for node in onnx.load(path).graph.node if node.op_type == "Gemm"]
    assert {note.value for note in gemm.metadata_props if note.key == "normfuse"} == {"fold_affine: linear"}


def test_large_weights_go_beside_the_file(path: Path, monkeypatch: pytest.MonkeyPatch, program: ExportedProgram) -> None:
    monkeypatch.setattr(exporter, "LARGEST_FILE", 100)
    info = exporter.export(program, path)
    assert info.data == path.with_name("model.onnx.data")
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    args, kwargs = block()
    inputs = exporter.onnx_inputs(program, args, kwargs)
    number, _ = compare(path, program.module()(*args, **kwargs), inputs)
    assert number["unoptimized"]["max_rel"] < 1e-6
    assert runtime.fused_ops(path)["SimplifiedLayerNormalization"] == 1


def test_branches_are_counted(path: Path) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.cond(x.sum() > 0, lambda x: self.norm(x) * 2, lambda x: x.relu(), (x,))
            return y

    info = exporter.export(traced(Branch(), torch.randn(2, 4)), path)
    assert info.ops["If"] == info.ops["Sqrt"] == 1
    assert runtime.fused_ops(path)["SimplifiedLayerNormalization"] == 1


# -- what cannot be done -----------------------------------------------------------------------------------------------


def test_an_operator_without_translation_is_named(path: Path) -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.ops.normfuse_test.untranslated(x + 1)
            return y

    path.write_text("what was here")
    with pytest.raises(ExportError) as raised:
        exporter.export(traced(nn.Sequential(nn.ReLU(), Inner()), torch.randn(2, 3)), path)
    text = str(raised.value)
    assert text.startswith("normfuse_test.untranslated.default, node untranslated of 1 (test_onnx.py:")
    assert text.endswith("has no ONNX counterpart")
    assert "\n" not in text
    assert raised.value.hint
    assert path.read_text() == "what was here"


@pytest.mark.parametrize("opset", [11, 17, 26, 99])
def test_an_opset_out_of_reach(path: Path, opset: int) -> None:
    with pytest.raises(ExportError, match=f"opset {opset}") as raised:
        exporter.export(traced(nn.ReLU(), torch.randn(2)), path, opset=opset)
    assert raised.value.hint
    assert not path.exists()


def test_an_invalid_file_is_not_written(path: Path) -> None:
    module = nn.LayerNorm(16)  # float32 weights on a float16 value: torch can, LayerNormalization cannot
    with pytest.raises(ExportError, match=r"invalid file: .*LayerNormalization"):
        exporter.export(traced(module, torch.randn(2, 16).half()), path)
    assert not list(path.parent.iterdir())


def test_results_that_are_no_tensors(path: Path) -> None:
    class Counting(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return x + 1, 3

    with pytest.raises(ExportError, match="returns 3"):
        exporter.export(traced(Counting(), torch.randn(2)), path)


def test_lost_state_is_said(path: Path) -> None:
    class Stateful(nn.Module):
        steps: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.steps.add_(1)
            return x + self.steps

    with pytest.warns(NormfuseWarning, match="updates of steps"):
        exporter.export(traced(Stateful(), torch.randn(2)), path)


@pytest.mark.parametrize(("package", "extra"), [("onnx", "onnx"), ("onnxscript", "onnx"), ("onnxruntime", "cpu")])
def test_a_missing_package_names_its_extra(
    path: Path, monkeypatch: pytest.MonkeyPatch, program: ExportedProgram, package: str, extra: str
) -> None:
    exporter.export(program, path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=f"'{package}'") as raised:
        runtime.run(path, []) if package == "onnxruntime" else exporter.export(program, path)
    assert raised.value.hint == f"pip install 'normfuse[{extra}]'"
