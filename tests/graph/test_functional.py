"""A traced program is made functional by hand where it is simple: it must be what torch makes of it, name for name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from normfuse.graph import functional as module
from normfuse.graph.functional import functional, functional_in_place
from tests.every_model import MODELS


def written(exported: ExportedProgram) -> list[Any]:
    nodes = [(node.op, node.name, node.target, str(node.args), str(node.kwargs)) for node in exported.graph.nodes]
    values = [str(node.meta.get("val")) for node in exported.graph.nodes]
    return [nodes, values, exported._guards_code, str(exported.graph_signature), exported.dialect]


def sites(exported: ExportedProgram) -> list[Any]:
    return [(node.meta.get("stack_trace"), str(node.meta.get("nn_module_stack"))) for node in exported.graph.nodes]


class Forward(nn.Module):
    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.norm, self.free = nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False)
        self.batch = nn.BatchNorm1d(4, track_running_stats=False)
        self.call = forward
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


def nothing_read(m: Forward, x: Tensor) -> Tensor:
    m.norm(x)
    return x + 1


def updated(m: Forward, x: Tensor) -> Tensor:
    m.get_buffer("count").add_(1)
    return x * m.get_buffer("count")


def without_gradients(m: Forward, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.norm(x)
    return x + y


HARD: dict[str, Any] = {
    "BatchNorms in a row, one an output": lambda m, x: (m.free(m.norm(x)).relu(), m.norm(x)),
    "statistics of the batch": lambda m, x: m.norm(m.batch(x)),
    "nobody reads it": nothing_read,
    "an updated buffer": updated,
    "without gradients": without_gradients,
    "changed in place": lambda m, x: F.relu_(m.norm(x)),
    "detached": lambda m, x: m.norm(x.detach()) + 1,
    "a constant": lambda m, x: m.norm(x) * torch.tensor([1.0, 2.0, 3.0, 4.0]),
    "another name": lambda m, x: torch.concat([m.norm(x), x]),
    "dropped and flattened": lambda m, x: F.dropout(m.norm(x), 0.5, False).flatten(),
    "cast to what it is": lambda m, x: m.norm(x).float(),
    "the input": lambda m, x: x,
    "chosen by a branch": lambda m, x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (m.norm(x),)),
}


def traced(model: nn.Module, inputs: Any, dynamic: Any = None) -> ExportedProgram:
    return torch.export.export(model.eval(), tuple(inputs), dynamic_shapes=dynamic)


def assert_the_same(model: nn.Module, inputs: Any, dynamic: Any = None) -> tuple[ExportedProgram, ExportedProgram]:
    ours, theirs = (traced(model, inputs, dynamic) for _ in range(2))
    ours, theirs = functional_in_place(ours), functional(theirs)
    assert written(ours) == written(theirs)
    return ours, theirs


@pytest.mark.parametrize("name", HARD)
def test_it_is_what_torch_makes_of_it(name: str) -> None:
    assert_the_same(Forward(HARD[name]), (torch.randn(3, 4),))


def test_sizes_may_be_dynamic() -> None:
    assert_the_same(Forward(lambda m, x: m.norm(x) * x.shape[0]), (torch.randn(3, 4),), ({0: Dim("batch")},))


@pytest.mark.parametrize("name", list(MODELS)[::8])
def test_so_are_the_models_that_everything_is_tried_on(name: str) -> None:
    ours, theirs = assert_the_same(MODELS[name].module(), MODELS[name].inputs)
    assert sites(ours) == sites(theirs)


def test_simple_programs_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_taken_apart", lambda *given: pytest.fail("traced again"))
    for each in (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU()), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))):
        functional_in_place(traced(each, (torch.randn(3, 4),)))
