"""Trained weights and the zoo, every pass, every target: what is written computes what the rewritten model does."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from normfuse.api.exporting import compared
from normfuse.api.opening import to_program
from normfuse.errors import ExportError
from normfuse.graph.program import Program
from normfuse.planning import registry
from normfuse.planning.planner import plan
from normfuse.proof.cases import Case, cases_for
from normfuse.sources.inputs import Inputs
from tests.zoo import trained, trained_conv
from tests.zoo.conv_models import CONV_ZOO, ConvModel
from tests.zoo.models import ZOO, ZooModel

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

EXAMPLES = Path(__file__).parents[2] / "examples"
OPSETS = range(18, 25)

pytestmark = [pytest.mark.trained, pytest.mark.slow, pytest.mark.xdist_group("trained")]  # one worker: some are large


def tiny_gpt() -> tuple[Any, Any]:
    return EXAMPLES / "tiny_gpt.pt2", None


def small_vit(norm: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    spec = importlib.util.spec_from_file_location("small_vit", EXAMPLES / "small_vit" / "small_vit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["small_vit"] = module  # dataclasses ask for it
    spec.loader.exec_module(module)
    with safe_open(EXAMPLES / "small_vit" / f"{norm}.safetensors", framework="pt") as file:
        model = module.make_twin(norm, int(file.metadata()["steps"]))
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - it is not a dict
    return model.eval(), (torch.randn(2, 3, 32, 32),)


def mobilenet_v2() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return trained_conv.mobilenet_v2(), (trained_conv.for_mobilenet_v2(trained_conv.photograph("coffee"))[None],)


def resnet50() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return trained_conv.resnet50(), (trained_conv.for_resnet50(trained_conv.photograph("chelsea"))[None],)


def whisper() -> tuple[nn.Module, dict[str, Tensor]]:
    features = trained.log_mel(trained.recording("beckett"))
    prompt = torch.tensor([[trained.START, trained.NO_TIMESTAMPS, 23921, 3088]])
    return trained.whisper_tiny_en(), {"input_features": features, "decoder_input_ids": prompt}


def of_zoo(entry: ZooModel) -> tuple[nn.Module, Inputs]:
    model = entry.build()
    return model, Inputs(*entry.inputs(model))


def of_conv_zoo(entry: ConvModel) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return entry.build(), entry.inputs()


TRAINED: dict[str, Callable[[], tuple[Any, Any]]] = {
    "tiny_gpt": tiny_gpt,
    "small_vit with LayerNorm": lambda: small_vit("layer_norm"),
    "small_vit with PRepBN": lambda: small_vit("prepbn"),
    "small_vit with Unified Norm": lambda: small_vit("unified_norm"),
    "MobileNetV2": mobilenet_v2,
    "ResNet-50": resnet50,
    "Whisper tiny.en": whisper,
}
MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    **TRAINED,
    **{name: partial(of_zoo, entry) for name, entry in ZOO.items()},
    **{name: partial(of_conv_zoo, entry) for name, entry in CONV_ZOO.items()},
}
LARGE = ("Whisper tiny.en", "ResNet-50")
"""On these a comparison on all inputs takes minutes: it is done on the real ones only."""


@lru_cache(maxsize=1)
def loaded(name: str) -> tuple[Program, list[Case]]:
    try:
        model, inputs = MODELS[name]()
    except trained.FetchFailed as reason:
        pytest.skip(str(reason))
    _, program, given = to_program(model, inputs, None, None, False)
    tried = list(cases_for(program, given))
    return program, tried[:1] if name in LARGE else tried


def rewrites(name: str) -> Iterator[tuple[str, Program]]:
    """The model as it is, and what every pass makes of it."""
    program, _ = loaded(name)
    yield "as it is", program
    for each in registry.passes():
        chosen = plan(program, [each])
        if chosen.rounds:
            yield each, chosen.apply(program).baked()


@pytest.mark.parametrize("name", MODELS)
def test_in_onnx_runtime(tmp_path: Path, name: str, record_property: Any) -> None:
    from normfuse.exporters import onnx

    pytest.importorskip("onnxruntime")
    _, tried = loaded(name)
    done, refused = [], {}
    for each, program in rewrites(name):
        for opset in OPSETS:
            try:
                onnx.export(program, tmp_path / "m.onnx", opset=opset)
            except ExportError as error:
                refused[f"{each}, opset {opset}"] = str(error)
                continue
            given = tried if opset == 20 else tried[:1]
            evidence = compared(program, tmp_path / "m.onnx", "onnx", given, opset=opset, progress=None)
            assert evidence.ok, f"{each}, opset {opset}: {evidence.complaint()}"
        done.append(each)
    assert name not in TRAINED or len(done) > 1, "no pass rewrote it"
    record_property("passes", done)
    record_property("refused", refused)
    if len(refused) == len(done) * len(OPSETS):
        pytest.skip(f"refused: {next(iter(refused.values()))}")


@pytest.mark.parametrize("name", MODELS)
def test_builds_with_tensorrt(tmp_path: Path, name: str) -> None:
    from normfuse.exporters import tensorrt

    pytest.importorskip("tensorrt_rtx")
    for each, program in rewrites(name):
        info = tensorrt.export(program, tmp_path / "m.engine", capabilities=("8.6",))
        assert info.kernels, each
        assert info.norms is not None, each


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", TRAINED)  # each takes a minute per pass; tests/exporters/test_every_target.py has more models
def test_with_aoti(tmp_path: Path, name: str) -> None:
    from normfuse.exporters import aoti

    _, tried = loaded(name)
    for each, program in rewrites(name):
        aoti.export(program, tmp_path / "m.pt2")
        evidence = compared(program, tmp_path / "m.pt2", "aoti", tried, opset=20, progress=None)
        assert evidence.ok, f"{each}: {evidence.complaint()}"
