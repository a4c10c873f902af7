"""The byte-level GPT of the examples, as LayerNorm-free checkpoints are published."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPT = b"The history of the game "


def test_saved_in_the_published_layout_it_writes_the_same_text_without_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained weights; σ is the one that each norm measured on the prompt, so that the text is still one."""
    monkeypatch.syspath_prepend(EXAMPLES)
    gpt, continued = importlib.import_module("tiny_gpt"), importlib.import_module("sample_text").continued
    model = gpt.TinyGPT(gpt.Config()).eval()
    model.load_state_dict(torch.export.load(EXAMPLES / "tiny_gpt.pt2").state_dict)
    ids, seen = torch.tensor([list(PROMPT)]), dict[nn.Module, Tensor]()
    norms_of = [each for each in model.modules() if isinstance(each, nn.LayerNorm)]
    hooks = [
        each.register_forward_pre_hook(lambda norm, given: seen.update({norm: given[0].std(-1).mean()})) for each in norms_of
    ]
    with torch.no_grad():
        model(ids)
        for hook in hooks:
            hook.remove()
        for norm in norms_of:
            norm.eps = 1e12
            norm.weight.mul_(1e6 / seen[norm])
    result = normfuse.rewrite(model, "strip_layernorm", inputs=(ids,))
    assert result.report.norms_before == {"layer_norm": 9}
    assert sum(result.report.norms_after.values()) == 0
    assert [each.code for each in result.report.plan.refusals] == ["NF604"]  # the head shares the table
    got, expected = result.module()(ids), model(ids)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5 * float(expected.detach().abs().max()))
    assert continued(as_read(result.module(), ids), PROMPT, 12) == continued(as_read(model, ids), PROMPT, 12)


def as_read(model: Any, ids: Tensor) -> Any:
    """A model of one length of text: it reads the last bytes."""
    return lambda tokens: model(tokens[:, -ids.shape[1] :])
