"""All passes on real architectures: each alone, in every order, and by ``passes="all"``, which orders by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import normfuse
from tests.zoo.models import ZOO, ZooModel

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]

PASSES = ("pre_rmsnorm", "pre_crmsnorm", "fold_affine", "offline_norm")
QUICK = ("timm_vit_layerscale", "hf_gpt_neox")
ALONE = ("timm_cait", "hf_gpt2", "hf_whisper_encoder", "hf_llama")
NORMS = [each for each in ZOO.values() if each.layer_norms or "llama" in each.name or "gemma" in each.name]


def few(names: tuple[str, ...]) -> list[Any]:
    """These models, and all others where there is time."""
    return [pytest.param(each, id=each.name, marks=() if each.name in names else pytest.mark.slow) for each in NORMS]


def exact(result: normfuse.Result) -> normfuse.Result:
    assert result.report.evidence.ok
    assert result.report.evidence.error <= 1e-11
    return result


def every_order(start: Any, given: dict[str, Any], left: tuple[str, ...] = PASSES) -> Iterator[normfuse.Result]:
    for name in left:
        result = exact(normfuse.rewrite(start, name, **given))
        others = tuple(each for each in left if each != name)
        yield from every_order(result, given, others) if others else (result,)


@pytest.mark.parametrize("zoo_model", few((*QUICK, *ALONE)))
def test_all_is_exact(zoo_model: ZooModel) -> None:
    model = zoo_model.build()
    args, kwargs = zoo_model.inputs(model)
    result = exact(normfuse.rewrite(model, "all", inputs=args, kwargs=kwargs))
    norms = result.report.to_dict()["norms"]
    assert norms["before"].get("layer_norm", 0) - norms["after"].get("layer_norm", 0) == zoo_model.convertible, zoo_model.note


@pytest.mark.slow
@pytest.mark.parametrize("zoo_model", few(QUICK))
def test_every_order_is_exact(zoo_model: ZooModel) -> None:
    """Each step is proven against the one before; the same LayerNorms are gone at the end of each order."""
    model = zoo_model.build()
    args, kwargs = zoo_model.inputs(model)
    for result in every_order(model, {"inputs": args, "kwargs": kwargs}):
        assert result.report.norms_after.get("layer_norm", 0) == zoo_model.layer_norms - (zoo_model.convertible or 0)
