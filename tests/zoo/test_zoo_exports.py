"""Every model of the zoo exports, to a graph that computes what the model does, with the norms that the table says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tests.zoo.models import ZOO, ZooModel
from tests.zoo.spread import spread

pytestmark = [
    pytest.mark.zoo,
    # torch's own copy of a tree specification, on every run_decompositions
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


# test_zoo_rewrites.py counts every model's norms and compares its trace with it: every fourth is enough here.
SOME = [pytest.param(each, id=each.name, marks=[pytest.mark.slow] if at % 4 else []) for at, each in enumerate(ZOO.values())]


@pytest.mark.parametrize("entry", SOME)
def test_exports_as_the_table_says(entry: ZooModel) -> None:
    model = entry.build()
    args, kwargs = entry.inputs(model)
    program = torch.export.export(model, args, kwargs, strict=False).run_decompositions({})

    calls = [node for node in program.graph.nodes if node.target is torch.ops.aten.layer_norm.default]
    assert len(calls) == entry.layer_norms

    with torch.no_grad():
        expected, actual = tensors(model(*args, **kwargs)), tensors(program.module()(*args, **kwargs))
    assert len(expected) == len(actual) > 0
    for e, a in zip(expected, actual, strict=True):
        assert e.isfinite().all()
        torch.testing.assert_close(a, e)


def test_the_table_is_possible() -> None:
    for name, entry in ZOO.items():
        assert name == entry.name
        assert entry.convertible is None or 0 <= entry.convertible <= entry.layer_norms
        assert entry.note


@pytest.mark.parametrize("name", ["hf_gpt2", "timm_cait", "torch_transformer_prenorm"])
def test_a_model_is_the_same_at_every_build(name: str) -> None:
    first, second = ZOO[name].build(), ZOO[name].build()
    for (key, one), (_, other) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(one, other), key


def test_ties_survive() -> None:
    model: Any = ZOO["hf_gpt2"].build()
    assert model.lm_head.weight is model.transformer.wte.weight


def named_weights() -> Iterator[tuple[str, str, Tensor]]:
    for entry in ZOO.values():
        for name, parameter in entry.build().named_parameters():
            yield entry.name, name, parameter


def test_nothing_is_left_at_its_initial_value() -> None:
    for model, name, parameter in named_weights():
        if parameter.numel() > 1 and "logit_scale" not in name:
            assert parameter.std() > 0.02, f"{model}: {name} is constant"
            assert parameter.abs().mean() > 0.02, f"{model}: {name} is nearly zero"


def test_statistics_are_spread_and_padding_and_scalars_kept() -> None:
    table, norm = nn.Embedding(5, 4, padding_idx=2), nn.BatchNorm2d(6)
    model = nn.Sequential(table, norm)
    model.register_parameter("scale", nn.Parameter(torch.tensor([3.0])))
    spread(model)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.running_mean.std() > 0.02
    assert norm.running_var.std() > 0.02
    assert (norm.running_var > 0).all()
    assert torch.equal(table.weight[2], torch.zeros(4))
    assert model.get_parameter("scale").item() == 3.0
