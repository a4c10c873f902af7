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
    assert result.report.evidence.relative <= 1e-11
    return result


def every_order(
    start: Any, given: dict[str, Any], done: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], normfuse.Result]]:
    for name in (each for each in PASSES if each not in done):
        result = exact(normfuse.rewrite(start, name, **given))
        order = (*done, name)
        yield from every_order(result, given, order) if len(order) < len(PASSES) else ((order, result),)


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
    """Each step is proven against the one before; no LayerNorm that can go stays where `pre_rmsnorm` is before `pre_crmsnorm`.

    A norm that `pre_crmsnorm` leaves reads the stream through a change of basis, behind which nothing is proven of its mean.
    """
    model = zoo_model.build()
    args, kwargs = zoo_model.inputs(model)
    for order, result in every_order(model, {"inputs": args, "kwargs": kwargs}):
        left = result.report.norms_after.get("layer_norm", 0) - (zoo_model.layer_norms - (zoo_model.convertible or 0))
        assert left >= 0
        assert left == 0 or order.index("pre_crmsnorm") < order.index("pre_rmsnorm"), order
