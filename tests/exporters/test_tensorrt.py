"""Engines by TensorRT for RTX, ahead of time: what is built, what became of the norms, and what is refused in whose words."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from normfuse.errors import ExportError, InputError, MissingExtra
from normfuse.exporters import engine_kernels, tensorrt
from normfuse.exporters.engine_kernels import Kernel, NormKernels
from normfuse.graph.program import Program, Site
from normfuse.planning.planner import plan
from tests.batch_norms import FOLDS
from tests.models import TRAPS

rtx = pytest.importorskip("tensorrt_rtx")
pytest.importorskip("onnxscript")


class Attention(nn.Module):
    """A block with a LayerNorm, attention, a GroupNorm and an RMSNorm."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.ln, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.groups, self.rms = nn.GroupNorm(4, 32), nn.RMSNorm(32)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (4, 8)).transpose(1, 2) for each in self.qkv(self.ln(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y: Tensor = self.rms(self.groups(x.transpose(1, 2)).transpose(1, 2))
        return y


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(self.norm(x)).real


def attention(dtype: torch.dtype, dynamic: bool = False) -> Program:
    dims = ({0: Dim("batch", min=1, max=64), 1: Dim("seq")},) if dynamic else None
    return Program.trace(Attention(dtype), (torch.randn(2, 16, 32).to(dtype),), dynamic_shapes=dims)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.engine"


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("passes", [[], ["pre_rmsnorm"]])
def test_each_norm_becomes_one_kernel(path: Path, opset: int, passes: list[str]) -> None:
    program = Program.trace(TRAPS["plain"].module(), TRAPS["plain"].inputs)
    info = tensorrt.export(plan(program, passes).apply(program), path, opset=opset)
    assert info.norms is not None
    assert [(norm.site.module, len(norm.kernels)) for norm in info.norms] == [("norms.0", 1), ("norms.1", 1), ("final", 1)]
    assert {norm.kind for norm in info.norms} == {"rms_norm" if passes else "layer_norm"}
    assert str(info).endswith("each of the 3 norms became one kernel")
    assert str(info).startswith("TensorRT-RTX 1.")
    assert path.stat().st_size > 10_000


def test_no_norm_kernel_is_left_behind_a_fold(path: Path) -> None:
    program = Program.trace(FOLDS["conv"].module(), FOLDS["conv"].inputs)
    info = tensorrt.export(plan(program, ["conv_bn"]).apply(program), path)
    assert info.norms == ()
    assert str(info).endswith("no norm kernel is left")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("opset", [20, 23])
def test_attention_builds_in_every_dtype(path: Path, dtype: torch.dtype, opset: int) -> None:
    info = tensorrt.export(attention(dtype), path, opset=opset, capabilities=("sm_89", "12.0"))
    assert info.capabilities == ("8.9", "12.0")
    assert info.norms is not None
    assert {norm.kind: bool(norm.kernels) for norm in info.norms} == {"layer_norm": True, "group_norm": True, "rms_norm": True}
    assert all(len(norm.kernels) == 1 for norm in info.norms if norm.kind != "group_norm")


def test_profiles_are_the_programs_ranges(path: Path) -> None:
    program = attention(torch.float32, dynamic=True)
    info = tensorrt.export(program, path)
    assert info.profiles == {"x": ((1, 1, 32), (2, 16, 32), (64, 16 * tensorrt.UNBOUNDED, 32))}
    info = tensorrt.export(program, path, sizes={"seq": (4, 32, 256)})
    assert info.profiles == {"x": ((1, 4, 32), (2, 32, 32), (64, 256, 32))}
    with pytest.raises(InputError, match="no dynamic dim 'length'") as raised:
        tensorrt.export(program, path, sizes={"length": (1, 2, 3)})
    assert "batch, seq" in (raised.value.hint or "")
    with pytest.raises(InputError, match="rise"):
        tensorrt.export(program, path, sizes={"seq": (4, 2, 8)})
    with pytest.raises(InputError, match="fixed"):
        tensorrt.export(attention(torch.float32), path, sizes={"seq": (1, 2, 3)})


@pytest.mark.parametrize("capability", ["90", "9.0", "sm_90", "SM100", "nonsense"])
def test_a_gpu_without_kernels_is_refused_with_the_reason(path: Path, capability: str) -> None:
    with pytest.raises(ExportError, match=r"no kernels for compute capability .*7\.5, 8\.0, 8\.6, 8\.9, 12\.0") as raised:
        tensorrt.export(attention(torch.float32), path, capabilities=(capability,))
    assert raised.value.hint
    assert not path.exists()


def test_nvidias_errors_name_the_place_in_the_model(path: Path) -> None:
    path.write_text("what was here")
    with pytest.raises(ExportError) as raised:  # while compiling
        tensorrt.export(attention(torch.float32), path, capabilities=("7.5",))
    text = str(raised.value)
    assert "FP32 GEMM is not supported" in text
    assert ", node node_MatMul" in text
    assert "of qkv (test_tensorrt.py:" in text
    assert "\n" not in text
    with pytest.raises(ExportError, match=r"refused: DFT, node \S+ of .*test_tensorrt\.py:\d+"):  # while parsing
        tensorrt.export(Program.trace(Spectral(), (torch.randn(2, 32),)), path)
    assert path.read_text() == "what was here"


def test_a_dry_run_tells_of_every_node() -> None:
    told = tensorrt.dry_run(Program.trace(Spectral(), (torch.randn(2, 32),)))
    assert {each.op: each.supported for each in told}["LayerNormalization"]
    assert [each.op for each in told if not each.supported] == ["DFT"]
    refused = next(each for each in told if not each.supported)
    assert refused.site is not None
    assert refused.site.source.startswith("test_tensorrt.py:")
    assert "Plugin not found" in str(refused)
    assert all(each.supported for each in tensorrt.dry_run(attention(torch.float16), opset=23))


def test_an_engine_wants_a_gpu(path: Path) -> None:
    if tensorrt._gpus():
        pytest.skip("there is one")
    path.write_bytes(b"any")
    with pytest.raises(ExportError, match=r"model\.engine is a TensorRT engine") as raised:
        tensorrt.open_artifact(path)
    assert "--to onnx" in (raised.value.hint or "")


def test_a_missing_package_names_its_extra(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingExtra) as raised:
        tensorrt.export(attention(torch.float32), path, capabilities=("8.9",))
    assert raised.value.hint == "pip install 'normfuse[tensorrt-rtx]'"


# -- the log -----------------------------------------------------------------------------------------------------------

LOG = (
    "Layers:\n"
    "Name: __myl_MulMean_0, LayerType: kgen, Inputs: [ { Name: x }], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: a]"
    "[ONNX Layer: b]\n"
    "Name: gemm_1, LayerType: gemm, Inputs: [], TacticName: , StreamId: 0, Metadata: [ONNX Layer: c]\n"
)


def test_kernels_are_read_off_the_log() -> None:
    expected = (Kernel("__myl_MulMean_0", "kgen", ("a", "b")), Kernel("gemm_1", "gemm", ("c",)))
    assert engine_kernels.from_log(["something else", LOG]) == expected
    inspector = '{"Layers": [{"Name": "gemm_1", "LayerType": "gemm", "Metadata": "[ONNX Layer: c]"}]}'
    assert engine_kernels.from_inspector(inspector) == expected[1:]


@pytest.mark.parametrize("text", ["", "Layers:", "Layers:\nName: k", LOG.replace("Metadata", "Origin"), "Layers: Name"])
def test_a_log_of_another_form_is_not_known(text: str) -> None:
    assert engine_kernels.from_log([text]) is None
    assert engine_kernels.from_inspector(text) is None
    assert "not known" in engine_kernels.in_words(None)


@pytest.mark.parametrize("text", ["[]", "{}", '{"Layers": ["a", "b"]}', '{"Layers": [{"Name": "a"}]}', "null"])
def test_an_inspector_of_another_form_is_not_known(text: str) -> None:
    assert engine_kernels.from_inspector(text) is None


def test_an_unreadable_log_is_no_failure(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_kernels, "from_log", lambda lines: None)
    info = tensorrt.export(Program.trace(nn.LayerNorm(8), (torch.randn(2, 8),)), path)
    assert info.kernels is None
    assert info.norms is None
    assert "not known" in str(info)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([], "no norm kernel is left"),
        ([0, 0], "no norm kernel is left"),
        ([1], "the norm became one kernel"),
        ([1, 1, 1], "each of the 3 norms became one kernel"),
        ([1, 2, 0, 3], "of 4 norms 1 became one kernel, 2 several, 1 none"),
    ],
)
def test_the_summary(counts: list[int], words: str) -> None:
    norms: list[Any] = [NormKernels(Site("n"), "rms_norm", tuple("k" * count)) for count in counts]
    assert engine_kernels.in_words(norms) == words
