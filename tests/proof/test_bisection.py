"""The first node where two programs part is the one that was broken, and in right rewrites there is none."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse
from normfuse.graph.edits import SetTensor
from normfuse.graph.expressions import Call, Number
from normfuse.graph.interpreter import flat_inputs
from normfuse.graph.program import Program
from normfuse.planning.planner import plan
from normfuse.proof.bisection import bisect
from tests.batch_norms import FOLDS
from tests.models import TRAPS
from tests.streams import STREAMS

MODELS: dict[str, Any] = {**TRAPS, **FOLDS, **STREAMS}
PASSES = ("offline_norm", "pre_rmsnorm", "fold_affine")


def traced(name: str) -> tuple[Program, list[Any]]:
    program = Program.trace(MODELS[name].module(), MODELS[name].inputs)
    return program, flat_inputs(program, MODELS[name].inputs)


@pytest.mark.parametrize("name", list(MODELS))
def test_a_right_rewrite_parts_nowhere(name: str) -> None:
    program, flat = traced(name)
    for each in PASSES:
        rewritten = plan(program, [each]).apply(program).baked()
        assert bisect(program, rewritten, flat) is None, each


@pytest.mark.parametrize("name", ["plain", "shared norm", "conv stem", "missing biases"])
def test_the_broken_weight_is_found_behind_a_stream_that_differs_on_purpose(name: str) -> None:
    program, flat = traced(name)
    chosen = plan(program, ["pre_rmsnorm"])
    writers = [e for r in chosen.rewrites for e in r.edits if isinstance(e, SetTensor) and program.tensor(e.name).dim() >= 2]
    assert writers
    for edit in writers:
        first = Call("mul.Tensor", (Call("slice.Tensor", (edit.formula, 0, 0, 1)), Number(1.5)))
        rows = program.tensor(edit.name).shape[0]
        wrong = replace(edit, formula=Call("cat.default", ((first, Call("slice.Tensor", (edit.formula, 0, 1, rows))), 0)))
        rounds = tuple(
            tuple(replace(r, edits=tuple(wrong if e == edit else e for e in r.edits)) for r in some) for some in chosen.rounds
        )
        found = bisect(program, replace(chosen, rounds=rounds).apply(program).baked(), flat)
        readers = {node.name for node in program.nodes[program.reader_of(edit.name).name].users}
        assert found is not None
        assert found.node in readers, (edit.name, str(found))
        assert found.error > found.allowed
        assert found.site


def test_it_says_so_in_a_sentence() -> None:
    program, flat = traced(next(iter(TRAPS)))
    other = Program.trace(MODELS[next(iter(TRAPS))].module(), MODELS[next(iter(TRAPS))].inputs)
    for tensor in other.exported.state_dict.values():
        tensor.data.mul_(1.5)
    found = bisect(program, other, flat)
    assert found is not None
    assert str(found).startswith(f"they part at {found.node}, aten.")
    assert torch.isfinite(torch.tensor(found.error))


class Attending(nn.Module):
    """Attention behind a norm, whose bias is a mean along every axis but one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.qkv, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 5)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        q, k, v = self.qkv(self.norm(y)).unsqueeze(1).chunk(3, dim=-1)
        z: Tensor = self.head(y + F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return z


CHANGES = ["embed.weight", "embed.bias", "norm.weight", "norm.bias", "qkv.weight", "qkv.bias", "head.weight", "head.bias"]


@pytest.mark.parametrize("changed", CHANGES)
def test_the_first_differing_value_is_named_where_only_weights_differ(changed: str, tmp_path: Path) -> None:
    module, x = Attending().eval(), torch.randn(8, 8, 8)  # no axis is told from another by its length
    other = copy.deepcopy(module)
    other.get_parameter(changed).data[0] += 0.5
    found = normfuse.bisect(module, other, inputs=(x,))
    assert found is not None
    assert found.site == changed.partition(".")[0]
    assert found.tensors == (changed,)
    assert f"it reads other values of {changed}" in str(found)
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    normfuse.export(other, tmp_path / "m.onnx", inputs=(x,))
    file: Any = tmp_path / "m.onnx"
    for a, b in ((module, file), (file, module)):
        in_file = normfuse.bisect(a, b, inputs=(x,))
        assert in_file is not None
        assert in_file.site == found.site
    assert normfuse.bisect(other, tmp_path / "m.onnx", inputs=(x,)) is None
