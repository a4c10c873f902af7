"""NVIDIA's Polygraphy on our files: it takes them, and its verdict on a pair is that of `normfuse.verify`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import normfuse
from tests.models import TRAPS

pytest.importorskip("polygraphy")
pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")


def polygraphy_agrees(a: Path, b: Path, feed: dict[str, np.ndarray]) -> bool:
    """Polygraphy's own comparison of two files in ONNX Runtime, with its default tolerances."""
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.comparator import Comparator

    runners = [OnnxrtRunner(SessionFromOnnx(str(path)), name=path.stem) for path in (a, b)]
    return bool(Comparator.compare_accuracy(Comparator.run(runners, data_loader=[feed])))


@pytest.mark.parametrize("name", ["plain", "missing biases", "conv stem"])
def test_the_same_verdict_on_the_same_pair(name: str, tmp_path: Path) -> None:
    trap = TRAPS[name]
    model = trap.module()
    normfuse.export(model, tmp_path / "before.onnx", inputs=trap.inputs)
    normfuse.export(normfuse.rewrite(model, "pre_rmsnorm", trap.inputs), tmp_path / "after.onnx")
    names = [each.name for each in onnx.load(tmp_path / "before.onnx").graph.input]
    feed = {key: value.numpy() for key, value in zip(names, trap.inputs, strict=True) if isinstance(value, torch.Tensor)}
    assert polygraphy_agrees(tmp_path / "before.onnx", tmp_path / "after.onnx", feed)
    assert normfuse.verify(tmp_path / "before.onnx", tmp_path / "after.onnx", trap.inputs).ok
    broken = onnx.load(tmp_path / "after.onnx")
    weight = next(each for each in broken.graph.initializer if len(each.dims) >= 2)
    wrong = onnx.numpy_helper.to_array(weight).copy()
    wrong[0] *= 1.5
    weight.CopyFrom(onnx.numpy_helper.from_array(wrong, weight.name))
    onnx.save(broken, tmp_path / "broken.onnx")
    assert not polygraphy_agrees(tmp_path / "before.onnx", tmp_path / "broken.onnx", feed)
    assert not normfuse.verify(tmp_path / "before.onnx", tmp_path / "broken.onnx", trap.inputs).ok
