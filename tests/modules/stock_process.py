"""Runs by itself, where normfuse cannot be imported: a folder with code beside its tensors against the one that it was made of.

python stock_process.py FOLDER REWRITTEN INPUTS AUTO_CLASS     prints what it measured as JSON
"""

from __future__ import annotations

import copy
import json
import runpy
import sys
from pathlib import Path
from typing import Any

sys.modules["normfuse"] = None  # type: ignore[assignment]
import torch  # noqa: E402
from torch import nn  # noqa: E402

runpy.run_path(str(Path(__file__).parents[1] / "zoo" / "torchvision_shim.py"))["install"]()
import transformers  # noqa: E402


def apart(found: Any, expected: Any) -> float:
    """The largest difference of the logits, on the scale of their largest."""
    return float((found.logits - expected.logits).abs().max() / expected.logits.abs().max())


def trained(model: Any, kwargs: dict[str, Any], target: dict[str, Any]) -> list[float]:
    """The losses of some steps without dropout, every parameter with a gradient."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.dropout = model.config.attention_dropout = 0.0
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = model(**kwargs, **target).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(each.grad is not None for name, each in model.named_parameters() if "ln_" in name or "norm" in name)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(folder: str, rewritten: str, inputs: str, auto: str) -> dict[str, Any]:
    """What there is to tell."""
    auto_class = getattr(transformers, auto)
    kwargs = torch.load(inputs, weights_only=True)
    stock = auto_class.from_pretrained(folder).eval()
    model, info = auto_class.from_pretrained(rewritten, trust_remote_code=True, output_loading_info=True)
    untrusted, other = type(stock).from_pretrained(rewritten, output_loading_info=True)
    again = Path(rewritten).parent / "again"
    model.eval().save_pretrained(again)
    reloaded = auto_class.from_pretrained(again, trust_remote_code=True).eval()
    target = {"labels": kwargs["input_ids"]} if "input_ids" in kwargs else {"labels": torch.tensor([1, 2])}
    with torch.no_grad():
        expected, found = stock(**kwargs), model(**kwargs)
        told = {
            "class": [type(model).__name__, type(model).__module__.split(".")[0], type(model).__mro__[1].__module__],
            "layer_norms": sum(isinstance(each, nn.LayerNorm) for each in model.modules()),
            "rms_norms": sum(isinstance(each, nn.RMSNorm) for each in model.modules()),
            "apart": apart(found, expected),
            "copied": apart(copy.deepcopy(model)(**kwargs), found),
            "reloaded": apart(reloaded(**kwargs), found),
            "untrusted": apart(untrusted.eval()(**kwargs), expected),
            "missing": [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]],
            "missing_untrusted": [*other["unexpected_keys"], *other["mismatched_keys"]],
            "without_bias": sorted(other["missing_keys"]),
            "files": sorted(each.name for each in again.iterdir()),
            "auto_map": json.loads((again / "config.json").read_text())["auto_map"],
        }
        if hasattr(model, "generate") and "input_ids" in kwargs:
            options = {"max_new_tokens": 8, "do_sample": False, "use_cache": True, "min_new_tokens": 8}
            told["tokens"] = [each.generate(**kwargs, **options).tolist() for each in (stock, model)]
    told["losses"] = [trained(stock, kwargs, target), trained(model, kwargs, target)]
    return told


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
