"""conv_bn on every trap of tests/batch_norms.py: where each BatchNorm goes, and that the result is exact."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.transforms.constant_norms import HALF, LEFT, READERS, WRITERS
from tests.batch_norms import FOLDS
from tests.zoo.spread import spread

WAYS = (WRITERS, READERS, HALF, LEFT)


@pytest.mark.parametrize("name", FOLDS)
def test_every_batch_norm_goes_where_it_should(name: str) -> None:
    fold = FOLDS[name]
    result = normfuse.rewrite(fold.module(), "conv_bn", inputs=fold.inputs)
    report = result.report.to_dict()
    ways = Counter(way for each in report["rewrites"] for way in WAYS if each["because"].startswith(way))
    assert tuple(ways[way] for way in WAYS) == (fold.writers, fold.readers, fold.halves, fold.kept)
    assert tuple(refusal["code"] for refusal in report["refusals"]) == fold.codes
    assert report["norms"]["after"].get("batch_norm", 0) == len(fold.codes)
    assert result.report.evidence.ok
    assert result.report.evidence.relative <= 1e-11
    expected, got = fold.module()(*fold.inputs), result.module()(*fold.inputs)
    for ours, theirs in zip(_flat(got), _flat(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def _flat(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_folded_in_float64_and_rounded_once(dtype: torch.dtype) -> None:
    fold = FOLDS["conv"]
    model = fold.module()
    half = fold.module().to(dtype)
    result = normfuse.rewrite(half, "conv_bn", inputs=(fold.inputs[0].to(dtype),), verify="structure")
    conv, norm = half[0], half[1]
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    expected = (conv.weight.double() * scale.view(-1, 1, 1, 1)).to(dtype)
    assert torch.equal(result.program.exported.state_dict["0.weight"], expected)
    assert model[0].weight.dtype == torch.float32


def test_the_new_bias_has_the_name_that_torch_gives_it() -> None:
    fold = FOLDS["conv without bias"]
    result = normfuse.rewrite(fold.module(), "conv_bn", inputs=fold.inputs)
    assert result.program.exported.state_dict["0.bias"].shape == (6,)


def test_a_folded_model_saves_and_loads(tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "folded.pt2"
    fold = FOLDS["two in a row"]
    model = fold.module()
    normfuse.rewrite(model, "conv_bn", inputs=fold.inputs).save(path)
    loaded = torch.export.load(path).module()
    torch.testing.assert_close(loaded(*fold.inputs), model(*fold.inputs), rtol=1e-4, atol=1e-4)
    assert normfuse.verify(model, path, inputs=fold.inputs).ok


def test_new_tensors_have_names_that_python_takes(tmp_path: Path) -> None:
    """RegNet calls its blocks ``block4-5``; two new biases must not get one name either."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("block4-5", "block4_5"):
                self.add_module(name, nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)))

        def forward(self, x: Tensor) -> Tensor:
            first, second = (self.get_submodule(name)(x) for name in ("block4-5", "block4_5"))
            return first + torch.relu(second)

    model, x = spread(Named()).eval(), torch.randn(2, 3, 4, 4)
    result = normfuse.rewrite(model, "conv_bn", (x,))
    assert result.report.norms_after == {}
    torch.testing.assert_close(result.module()(x), model(x), rtol=1e-4, atol=1e-4)
    again = torch.export.load(result.save(tmp_path / "named.pt2"))
    torch.testing.assert_close(again.run_decompositions({}).module()(x), model(x), rtol=1e-4, atol=1e-4)
