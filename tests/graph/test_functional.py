"""A traced program is made functional by hand where it is simple: it must be what torch makes of it, name for name."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from normfuse.graph import functional as module
from normfuse.graph.composites import composites
from normfuse.graph.functional import functional, functional_in_place
from tests.every_model import MODELS


def written(exported: ExportedProgram) -> list[Any]:
    nodes = [(node.op, node.name, node.target, str(node.args), str(node.kwargs)) for node in exported.graph.nodes]
    values = [str(node.meta.get("val")) for node in exported.graph.nodes]
    tree = str(exported.module_call_graph)
    return [nodes, values, exported._guards_code, str(exported.graph_signature), exported.dialect, tree]


def sites(exported: ExportedProgram) -> list[Any]:
    return [(node.meta.get("stack_trace"), str(node.meta.get("nn_module_stack"))) for node in exported.graph.nodes]


class Forward(nn.Module):
    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.norm, self.free = nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False)
        self.batch = nn.BatchNorm1d(4, track_running_stats=False)
        self.call = forward
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("view", torch.ones(()))

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
    "cast to what it is, and given": lambda m, x: (m.norm(x).float(), x.float(), m.norm(x)),
    "cast to what it is not, and back": lambda m, x: m.norm(x.double().float()),
    "a view of what is not contiguous": lambda m, x: m.norm(x).t().reshape(2, 6).contiguous(),
    "contiguous as it is": lambda m, x: m.norm(x.contiguous()).reshape(-1),
    "an alias that is given": lambda m, x: torch.ops.aten.alias(m.norm(x)),
    "named like an operator": lambda m, x: m.norm(x).reshape(4, 3) + m.view,
    "in parts": lambda m, x: torch.chunk(x, 2, -1)[1] + x.unflatten(1, (2, 2)).flatten(1)[:, :2],
    "parts that nobody reads": lambda m, x: m.norm(x).split(1, 0)[1].expand_as(x),
    "several results of one name": lambda m, x: torch.var_mean(x, -1)[1] + torch.topk(x, 2)[0].diff().flatten().sum(),
    "logical": lambda m, x: x * ((x > 0) & (x < 1)).to(x.dtype),
    "a transpose that numpy names": lambda m, x: m.norm(x).T.reshape(3, 4) @ x.mT,
    "attention": lambda m, x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]).flatten(2),
    "drawn": lambda m, x: F.dropout(m.norm(x), 0.5, True).flatten(),
    "one operand twice": lambda m, x: torch.hstack([x, m.norm(x), x]) - torch.hstack([x, m.norm(x), m.norm(x)]),
    "the same twice, with other operands": lambda m, x: torch.hstack([x, x.relu(), x]) - torch.hstack([x, x.relu(), x.relu()]),
    "zeros of either sign": lambda m, x: 1 / F.pad(x, (1, 1), value=0.0) - 1 / F.pad(x, (1, 1), value=-0.0),
    "numbers": lambda m, x: torch.full_like(x, 2.0).reshape(-1) * torch.arange(12).reshape(-1).float(),
    "the input": lambda m, x: x,
    "chosen by a branch": lambda m, x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (m.norm(x),)),
}


def traced(model: nn.Module, inputs: Any, dynamic: Any = None) -> ExportedProgram:
    return torch.export.export(model.eval(), tuple(inputs), dynamic_shapes=dynamic)


def assert_the_same(model: nn.Module, inputs: Any, dynamic: Any = None) -> tuple[ExportedProgram, ExportedProgram]:
    ours, theirs = (traced(model, inputs, dynamic) for _ in range(2))
    before = str(ours.graph)
    also, said = functional(ours), str(ours.graph)
    ours, theirs = functional_in_place(ours), by_torch(theirs)
    assert said == before
    assert written(ours) == written(also) == written(theirs)
    return ours, theirs


def by_torch(exported: ExportedProgram) -> ExportedProgram:
    """What ``run_decompositions`` alone makes of it."""
    made = exported.run_decompositions(composites(exported))
    while further := composites(made):
        made = made.run_decompositions(further)
    made._guards_code = list(dict.fromkeys((*exported._guards_code, *made._guards_code)))
    return made


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


@pytest.mark.parametrize(
    "name",
    ["dropped and flattened", "cast to what it is not, and back", "a view of what is not contiguous", "in parts", "attention"],
)
def test_other_names_do_not_have_a_program_traced_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = traced(Forward(HARD[name]), (torch.randn(3, 4),))
    monkeypatch.setattr(ExportedProgram, "run_decompositions", lambda *given: pytest.fail("traced again"))
    functional(exported)
    functional_in_place(exported)


def test_a_torch_with_another_inside_takes_the_longer_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch renames inside is no fault of a model: its public function gives the same."""
    monkeypatch.setitem(sys.modules, "normfuse.graph.retraced", None)
    spec = importlib.util.find_spec("normfuse.graph.functional")
    assert spec is not None
    assert spec.loader is not None
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    model = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.Flatten()).eval()
    exported = torch.export.export(model, (torch.randn(2, 4),))
    assert written(other.functional(exported)) == written(functional(exported))
