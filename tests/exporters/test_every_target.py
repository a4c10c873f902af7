"""Every pass on every model, in every runtime that is here: it computes what the rewritten program does, or at least builds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normfuse.api.exporting import compared
from normfuse.graph.interpreter import flat_inputs
from normfuse.graph.program import Program
from normfuse.planning import registry
from normfuse.planning.planner import plan
from normfuse.proof.cases import Case, cases
from tests.every_model import MODELS, REWRITTEN
from tests.exporters.agreement import excess

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

OPSETS = range(18, 25)


@cache
def traced(model: str) -> Program:
    return Program.trace(MODELS[model].module(), MODELS[model].inputs)


def rewritten(model: str, name: str) -> Program | None:
    chosen = plan(traced(model), [name])
    return chosen.apply(traced(model)) if chosen.rounds else None


def every_rewrite(model: str) -> Iterator[tuple[str, Program]]:
    """What the passes make of a model, each program once, and the model itself; those that keep state are left out."""
    seen = set()
    if traced(model).written:
        return
    for name in ("", *sorted(registry.passes())):
        program = rewritten(model, name) if name else traced(model)
        key = program and (str(program.graph), tuple(f"{key} {each}" for key, each in sorted(program.formulas.items())))
        if program is not None and key not in seen:
            seen.add(key)
            yield name, program


def given(model: str) -> list[Case]:
    program = traced(model)
    return list(cases(program, flat_inputs(program, MODELS[model].inputs)))


def check_onnx(path: Path, model: str, name: str, program: Program, opset: int) -> None:
    from normfuse.exporters import onnx

    onnx.export(program, path, opset=opset)
    tried = given(model) if opset == 20 else given(model)[:1]
    evidence = compared(program, path, "onnx", tried, opset=opset, progress=None)
    assert evidence.ok, f"{name} on {model}, opset {opset}: {evidence.complaint()}"


# -- ONNX Runtime ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REWRITTEN)
def test_each_pass_in_onnx_runtime(tmp_path: Path, name: str) -> None:
    pytest.importorskip("onnxruntime")
    program = rewritten(REWRITTEN[name], name)
    assert program is not None
    for opset in (20, 23):
        check_onnx(tmp_path / "m.onnx", REWRITTEN[name], name, program, opset)


def test_the_sample_has_every_pass() -> None:
    assert set(REWRITTEN) == set(registry.passes())


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_pass_and_opset_in_onnx_runtime(tmp_path: Path, model: str) -> None:
    pytest.importorskip("onnxruntime")
    for name, program in every_rewrite(model):
        for opset in OPSETS:
            check_onnx(tmp_path / "m.onnx", model, name, program, opset)


# -- TensorRT, ahead of time -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REWRITTEN)
def test_each_pass_builds_with_tensorrt(tmp_path: Path, name: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    program = rewritten(REWRITTEN[name], name)
    assert program is not None
    check_tensorrt(tmp_path / "m.engine", program, 20)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_pass_builds_with_tensorrt(tmp_path: Path, model: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    for _, program in every_rewrite(model):
        for opset in (20, 23):
            check_tensorrt(tmp_path / "m.engine", program, opset)


def check_tensorrt(path: Path, program: Program, opset: int) -> None:
    """Built, with every norm accounted for. Running it needs a GPU."""
    from normfuse.exporters import tensorrt

    info = tensorrt.export(program, path, opset=opset)
    assert info.kernels
    assert info.norms is not None


# -- AOTInductor -------------------------------------------------------------------------------------------------------


class Together(nn.Module):
    """Many models as one, since compiling takes most of a minute each time."""

    def __init__(self, programs: list[Program]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(program.module() for program in programs)

    def forward(self, *inputs: tuple[torch.Tensor, ...]) -> list[Any]:
        return [part(*each) for part, each in zip(self.parts, inputs, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("name", REWRITTEN)
def test_every_rewrite_of_a_pass_with_aoti(tmp_path: Path, name: str) -> None:
    from normfuse.exporters import aoti

    found = [(model, each) for model in MODELS if not traced(model).written and (each := rewritten(model, name)) is not None]
    inputs = tuple(MODELS[model].inputs for model, _ in found)
    program = Program.trace(Together([each for _, each in found]), inputs)
    aoti.export(program, tmp_path / "m.pt2", options={"aot_inductor.compile_wrapper_opt_level": "O0"})
    run = aoti.open_artifact(tmp_path / "m.pt2", trust=True).runs[""]
    flat = flat_inputs(program, inputs)
    assert excess(program, flat, run(flat)) < 1
