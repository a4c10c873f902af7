"""The same model wider and nudged: every place that names a dtype, values that stay, and what ONNX Runtime makes of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from normfuse.exporters import onnx_precision
from normfuse.graph.program import Program

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

EVERYWHERE = """
<ir_version: 10, opset_import: ["" : 20, "local" : 1]>
main (float16[2,3] x, bool flag, int64[1] n) => (float16[2,3] y, float16[k] z, float16[2,3] w)
<float16[3] gain = {@0.1, @0.2, @0.3}, int64[1] one = {1}, float16 small = {@0.001}>
{
    a = Mul(x, gain)
    half = Constant <value: tensor = float16[1] {@0.7}> ()
    b = Add(a, half)
    y = If (flag) <
        then_branch = yes () => (float16[2,3] t) {
            c = Constant <value: tensor = float16[1] {@0.9}> ()
            t = Mul(b, c)
        },
        else_branch = no () => (float16[2,3] e) { e = Sub(b, small) }
    >
    wide = Cast <to = 1> (x)
    scaled = local.scale (wide)
    w = Cast <to = 10> (scaled)
    filled = ConstantOfShape <value: tensor = float16[1] {@0.3}> (n)
    z = Mul(filled, small)
}
<domain: "local", opset_import: ["" : 20]>
scale (v) => (r) {
    narrow = Cast <to = 10> (v)
    third = Constant <value: tensor = float16[1] {@0.3333}> ()
    r1 = Mul(narrow, third)
    r = Cast <to = 1> (r1)
}
"""

SINGLE = """
<ir_version: 10, opset_import: ["" : 20]>
main (float[2,3] x, int64[1] n) => (float[2,3] y, float[k] z)
<float[3,3] m = {0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9}, float[3] g = {1.1, 1.2, 1.3}>
{
    half = Constant <value_float: float = 0.1> ()
    several = Constant <value_floats: floats = [0.1, 0.2, 0.3]> ()
    a = MatMul(x, m)
    b = LayerNormalization <axis = -1, epsilon = 0.00001, stash_type = 1> (a, g)
    c = Add(b, half)
    y = Mul(c, several)
    zeros = ConstantOfShape (n)
    z = Add(zeros, half)
}
"""


def model(text: str) -> Any:
    """A model of ONNX's own notation, in which a float16 is written as its bits: here as @ and the number."""
    return ir.from_onnx_text(re.sub(r"@([0-9.]+)", lambda number: str(np.float16(number[1]).view(np.uint16)), text))


def runs(path: Path, built: Any, **feed: Any) -> list[Any]:
    ir.save(built, path)
    onnx.checker.check_model(str(path), full_check=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    outputs: list[Any] = ort.InferenceSession(str(path), options).run(None, feed)
    return outputs


@pytest.mark.parametrize("flag", [True, False])
def test_no_half_is_left_and_no_value_changes(tmp_path: Path, flag: bool) -> None:
    built = model(EVERYWHERE)
    assert onnx_precision.wider(built) == [ir.DataType.DOUBLE, ir.DataType.FLOAT]
    onnx_precision.widen(built, ir.DataType.FLOAT)
    assert ir.DataType.FLOAT16 not in onnx_precision.dtypes_of(built)
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    y, z, w = runs(tmp_path / "m.onnx", built, x=x, flag=np.array(flag), n=np.array([4]))
    exact = {number: float(np.float16(number)) for number in (0.1, 0.2, 0.3, 0.7, 0.9, 0.001, 0.3333)}
    b = x.astype(np.float64) * [exact[0.1], exact[0.2], exact[0.3]] + exact[0.7]
    np.testing.assert_allclose(y, b * exact[0.9] if flag else b - exact[0.001], rtol=4e-7)
    np.testing.assert_allclose(z, [exact[0.3] * exact[0.001]] * 4, rtol=4e-7)
    np.testing.assert_allclose(w, x * exact[0.3333], rtol=4e-7)
    assert {array.dtype for array in (y, z, w)} == {np.dtype(np.float32)}


def test_float32_becomes_float64(tmp_path: Path) -> None:
    built = model(SINGLE)
    assert onnx_precision.wider(built) == [ir.DataType.DOUBLE]
    onnx_precision.widen(built, ir.DataType.DOUBLE)
    assert ir.DataType.FLOAT not in onnx_precision.dtypes_of(built)
    x = np.random.default_rng(0).standard_normal((2, 3))
    y, z = runs(tmp_path / "m.onnx", built, x=x, n=np.array([2]))
    weights = {number: float(np.float32(number)) for number in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3)}
    numbers = list(weights.values())
    a = x @ np.array(numbers[:9]).reshape(3, 3)
    a = a - a.mean(-1, keepdims=True)
    b = a / np.sqrt((a * a).mean(-1, keepdims=True) + float(np.float32(1e-5))) * numbers[9:]
    np.testing.assert_allclose(y, (b + weights[0.1]) * numbers[:3], rtol=1e-13)
    np.testing.assert_allclose(z, [weights[0.1]] * 2, rtol=1e-15)


@pytest.mark.parametrize("wide", [False, True])
def test_a_nudge_is_one_rounding_and_the_same_every_time(wide: bool) -> None:
    before, first, second = model(EVERYWHERE), model(EVERYWHERE), model(EVERYWHERE)
    for built in (first, second):
        sizes = onnx_precision.roundings(built)
        if wide:
            onnx_precision.widen(built, ir.DataType.FLOAT)
        onnx_precision.nudge(built, sizes)
    old, new, again = (each.graph.initializers for each in (before, first, second))
    gains = [each["gain"].const_value.numpy() for each in (old, new, again)]
    assert np.array_equal(gains[1], gains[2])
    changes = np.abs(gains[1].astype(np.float64) / gains[0] - 1) / np.finfo(np.float16).eps
    assert changes.max() < 5
    assert changes.min() > 0.01 or not wide  # half precision may round the change away again
    assert gains[1].dtype == (np.float32 if wide else np.float16)
    for name in ("one", "small"):  # integers and single numbers, such as an eps, stay
        assert np.array_equal(new[name].const_value.numpy(), old[name].const_value.numpy())


class Mixed(nn.Module):
    """A half-precision linear layer, a norm that PyTorch computes in float32, and a mask of finfo.min."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed, self.first, self.norm = nn.Embedding(7, 16), nn.Linear(16, 16), nn.LayerNorm(16)
        self.last = nn.Linear(16, 5)
        self.to(dtype)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.first(x) + self.embed(ids))
        h = h * torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(h.dtype)
        return self.last(h).masked_fill(ids[..., None] == 3, torch.finfo(h.dtype).min)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_an_artifact_beside_its_wider_self(tmp_path: Path, dtype: torch.dtype) -> None:
    from normfuse.exporters import onnx as exporter
    from normfuse.exporters import onnxruntime as runtime
    from tests.exporters.agreement import distance, excess, outputs_of

    x, ids = torch.randn(2, 4, 16).to(dtype), torch.randint(0, 7, (2, 4))
    program = Program.trace(Mixed(dtype).eval(), (x, ids))
    exporter.export(program, tmp_path / "m.onnx", opset=22)
    artifact = runtime.open_artifact(tmp_path / "m.onnx")
    assert artifact.inputs is not None
    assert [(port.name, port.dtype, port.shape, port.limit) for port in artifact.inputs] == [
        ("x", dtype, (2, 4, 16), None),
        ("ids", torch.int64, (2, 4), 7),
    ]
    both = ["", "without graph optimizations"]
    assert list(artifact.runs) == (["in float32"] if dtype == torch.bfloat16 else both)
    for run in artifact.runs.values():
        assert excess(program, (x, ids), run((x, ids))) < 1
    assert artifact.nudged is not None
    assert artifact.widened is not None
    (wide,), (nudged,) = artifact.widened((x, ids)), artifact.nudged((x, ids))
    assert 0.1 * torch.finfo(dtype).eps < distance(wide, nudged) < 100 * torch.finfo(dtype).eps
    assert wide.dtype == torch.float64
    (truth,) = outputs_of(program, (x, ids), wide=True)
    assert distance(truth, wide) < 16 * torch.finfo(wide.dtype).eps
