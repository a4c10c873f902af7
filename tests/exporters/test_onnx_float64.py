"""What ONNX Runtime cannot run in float64, torch does between the pieces that it can: every operator, and the joints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normfuse.exporters import onnx_float64
from normfuse.exporters import onnxruntime as runtime
from normfuse.graph.interpreter import NARROW, run
from normfuse.graph.program import Program
from tests.exporters.agreement import distance

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

IMAGE = (2, 4, 9, 8)


class Attention(nn.Module):
    """Attention in one piece, from three parts of one input along its heads."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.chunk(3, 1)
        options: dict[str, dict[str, Any]] = {
            "causal": {"is_causal": True},
            "scaled": {"scale": 0.3},
            "masked": {"attn_mask": (x[0, 0, :, :1] > 0) | torch.eye(x.shape[2], dtype=torch.bool)},
        }
        return F.scaled_dot_product_attention(q, k, v, **options[self.kind])


class OfLargeMean(nn.Module):
    """A LayerNorm whose variance is lost where it is taken for a difference of two means of squares."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=2.0**-10)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + 4096.0)


HEADS = (2, 6, 5, 3)
MODULES: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "conv 1d": (nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2), (2, 4, 9), "Conv"),
    "conv 2d": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1)), IMAGE, "Conv"),
    "conv 2d, same": (nn.Conv2d(4, 4, (4, 2), padding="same"), IMAGE, "Conv"),
    "conv 2d, groups": (nn.Conv2d(4, 8, 3, groups=2, bias=False), IMAGE, "Conv"),
    "conv 3d": (nn.Conv3d(2, 3, 2, padding=1), (1, 2, 4, 5, 3), "Conv"),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5), "ConvTranspose"),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, (3, 2), stride=3, dilation=2, groups=2), IMAGE, "ConvTranspose"),
    "attention, causal": (Attention("causal"), HEADS, "Attention"),
    "attention, scaled": (Attention("scaled"), HEADS, "Attention"),
    "attention, masked": (Attention("masked"), HEADS, "Attention"),
    "average": (nn.AvgPool2d((3, 2), stride=2, padding=1), IMAGE, "AveragePool"),
    "average without padding": (nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False), IMAGE, "AveragePool"),
    "average, rounded up": (nn.AvgPool1d(3, stride=2, ceil_mode=True), (2, 4, 8), "AveragePool"),
    "global average": (nn.AdaptiveAvgPool2d(1), IMAGE, "GlobalAveragePool"),
    "instance norm": (nn.InstanceNorm2d(4, affine=True), IMAGE, "InstanceNormalization"),
    "layer norm": (OfLargeMean(8), IMAGE, "LayerNormalization"),
    "layer norm over three axes": (nn.LayerNorm((4, 9, 8), eps=1e-3), IMAGE, "LayerNormalization"),
    "gelu": (nn.GELU(), IMAGE, "Gelu"),
    "elu": (nn.ELU(0.7), IMAGE, "Elu"),
    "leaky": (nn.LeakyReLU(0.3), IMAGE, "LeakyRelu"),
    "hard swish": (nn.Hardswish(), IMAGE, "HardSwish"),
    "mish": (nn.Mish(), IMAGE, "Mish"),
    "slopes": (nn.PReLU(4, 0.2), IMAGE, "PRelu"),
    "softplus": (nn.Softplus(), IMAGE, "Softplus"),
    "softsign": (nn.Softsign(), IMAGE, "Softsign"),
}
"""Modules, the size of an input, the operator that they become; where torch.onnx spells one otherwise, ONNX is asked itself."""


def in_double(path: Path, *inputs: Tensor) -> list[Tensor]:
    widened = runtime.open_artifact(path).widened
    assert widened is not None
    outputs = widened(inputs)
    assert all(output.dtype is torch.float64 for output in outputs if output.is_floating_point())
    return outputs


def exported(module: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> list[Tensor]:
    """The outputs of a program in float64, with numbers as short as a file has them."""
    from normfuse.exporters import onnx as exporter

    program = Program.trace(module.eval(), inputs)
    exporter.export(program, path, opset=23)  # the first with Attention
    return run(program, list(inputs), wide=True, short=NARROW)


@pytest.mark.parametrize("name", MODULES)
def test_an_operator_in_double(tmp_path: Path, name: str) -> None:
    module, size, _ = MODULES[name]
    x = 3.0 * torch.randn(size)
    expected = exported(module, (x,), tmp_path / "m.onnx")
    assert distance(expected[0], in_double(tmp_path / "m.onnx", x)[0]) < 1e-14


ALONE: dict[str, tuple[str, Any]] = {
    "Atan": ("", torch.atan),
    "Celu": ("<alpha = 0.5>", lambda x: F.celu(x, 0.5)),
    "Erf": ("", torch.erf),
    "Gelu": ('<approximate = "tanh">', lambda x: F.gelu(x, approximate="tanh")),
    "Elu": ("<alpha = 0.5>", lambda x: F.elu(x, 0.5)),
    "GlobalAveragePool": ("", lambda x: x.mean((2, 3), keepdim=True)),
    "HardSigmoid": ("<alpha = 0.25, beta = 0.75>", lambda x: torch.clamp(0.25 * x + 0.75, 0.0, 1.0)),
    "HardSwish": ("", F.hardswish),
    "LeakyRelu": ("<alpha = 0.25>", lambda x: F.leaky_relu(x, 0.25)),
    "Mish": ("", F.mish),
    "Selu": ("<alpha = 1.5, gamma = 2.0>", lambda x: 2.0 * F.elu(x, 1.5)),
    "Softplus": ("", F.softplus),
    "Softsign": ("", F.softsign),
}


@pytest.mark.parametrize("opset", [18, 20])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_numbers_of_a_gelu_are_exact(tmp_path: Path, opset: int, approximate: str) -> None:
    from normfuse.exporters import onnx as exporter

    x = 3.0 * torch.randn(IMAGE)
    program = Program.trace(nn.GELU(approximate), (x,))
    exporter.export(program, tmp_path / "m.onnx", opset=opset)
    (expected,) = run(program, [x], wide=True)
    assert distance(expected, in_double(tmp_path / "m.onnx", x)[0]) < 1e-14
    if opset < 20:
        ops = runtime.fused_ops(tmp_path / "m.onnx")
        assert "Sqrt" not in ops, "ONNX Runtime computes the numbers once"


@pytest.mark.parametrize("op", ALONE)
def test_an_operator_of_a_file(tmp_path: Path, op: str) -> None:
    attributes, expected = ALONE[op]
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[2,3,4,5] x) => (float[a,b,c,d] y) { y = %s %s (x) }'
    onnx.save(onnx.parser.parse_model(text % (op, attributes)), tmp_path / "m.onnx")
    x = 3.0 * torch.randn(2, 3, 4, 5)
    assert distance(expected(x.double()), in_double(tmp_path / "m.onnx", x)[0]) < 1e-15


def test_every_kernel_is_tried() -> None:
    assert set(onnx_float64.KERNELS) == {*ALONE, *(op for _, _, op in MODULES.values())}


JOINED = """
<ir_version: 10, opset_import: ["" : 20]>
main (float[2,3] x, bool flag) => (float[2,3] early, float[2,3] y, float[2,3] late)
<float[3,3] m = {0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9}>
{
    early = Erf(x)
    a = MatMul(early, m)
    both = Add(a, x)
    deep = Erf(both)
    y = If (flag) <
        then_branch = yes () => (float[2,3] t) { t = Add(deep, early) },
        else_branch = no () => (float[2,3] e) { e = Sub(deep, x) }
    >
    stored = Erf(m)
    b = MatMul(y, stored)
    late = Erf(b)
}
"""


@pytest.mark.parametrize("flag", [True, False])
def test_values_pass_from_piece_to_piece(tmp_path: Path, flag: bool) -> None:
    """Outputs of torch's operators, stages that are skipped, subgraphs that read what was made before, stored tensors."""
    onnx.save(onnx.parser.parse_model(JOINED), tmp_path / "m.onnx")
    x = torch.randn(2, 3)
    wide, m = x.double(), torch.arange(1, 10).div(10).reshape(3, 3).double()  # of float32's tenths
    early = torch.erf(wide)
    deep = torch.erf(early @ m + wide)
    y = deep + early if flag else deep - wide
    expected = [early, y, torch.erf(y @ torch.erf(m))]
    got = in_double(tmp_path / "m.onnx", x, torch.tensor(flag))
    assert all(distance(each, other) < 1e-15 for each, other in zip(expected, got, strict=True))


def test_what_neither_has_is_left_alone(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[2,3,4,5] x) => (float[a,b,c,d] y)
              <float[4] scales = {1.0, 1.0, 2.0, 2.0}> { e = Erf(x) y = Resize(e, , scales) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    artifact = runtime.open_artifact(tmp_path / "m.onnx")
    assert artifact.widened is None
    assert artifact.nudged is not None
    assert artifact.nudged((torch.randn(2, 3, 4, 5),))[0].dtype is torch.float32
