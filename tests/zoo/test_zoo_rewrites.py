"""pre_rmsnorm on every architecture of the zoo: all convertible norms are converted, exactly, and no other."""

from __future__ import annotations

import pytest

import normfuse
from tests.zoo.models import ZOO, ZooModel

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]


REASONS = {
    "hf_bert": {"NF202", "NF205", "NF206"},
    "hf_bert_model": {"NF205"},
    "timm_swin": {"NF201", "NF204"},
    "torchvision_swin": {"NF201", "NF204"},
    "timm_convnext": {"NF201", "NF202", "NF205"},
    "torch_encoder_bare": {"NF201"},
    "torch_encoder_postnorm": {"NF201", "NF205"},
}


@pytest.mark.parametrize("zoo_model", ZOO.values(), ids=list(ZOO))
def test_rewrites(zoo_model: ZooModel) -> None:
    model = zoo_model.build()
    args, kwargs = zoo_model.inputs(model)
    result = normfuse.rewrite(model, ["pre_rmsnorm"], inputs=args, kwargs=kwargs)
    report = result.report.to_dict()
    before, after = report["norms"]["before"], report["norms"]["after"]
    assert before.get("layer_norm", 0) == zoo_model.layer_norms
    assert before.get("layer_norm", 0) - after.get("layer_norm", 0) == zoo_model.convertible, zoo_model.note
    assert after.get("rms_norm", 0) - before.get("rms_norm", 0) == zoo_model.convertible
    assert len(report["refusals"]) == zoo_model.layer_norms - len(report["rewrites"])
    if zoo_model.name in REASONS:
        assert {refusal["code"] for refusal in report["refusals"]} == REASONS[zoo_model.name]
    evidence = result.report.evidence
    assert evidence.ok
    assert evidence.relative <= 1e-11
