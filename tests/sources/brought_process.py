"""Runs by itself, where normfuse cannot be imported: what was brought and what came back, opened strictly by its class.

A line of JSON in is a pair to compare, a line out what there is to tell of it. As a process that goes on it imports the
libraries once.
"""

from __future__ import annotations

import json
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.modules["normfuse"] = None  # type: ignore[assignment]
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

runpy.run_path(str(Path(__file__).parents[1] / "zoo" / "torchvision_shim.py"))["install"]()
NEW_TOKENS = 8


def of_transformers(name: str, path: str) -> nn.Module:
    """A folder in its stock class, which misses nothing and has nothing left."""
    import transformers

    transformers.logging.disable_progress_bar()
    model, told = getattr(transformers, name).from_pretrained(path, output_loading_info=True)
    unfit = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs") for key in told[kind]]
    assert not unfit, unfit
    return model  # type: ignore[no-any-return]


def of_timm(name: str, path: str, **settings: Any) -> nn.Module:
    """A folder as timm opens it, or a file in the architecture."""
    import timm

    if Path(path).is_dir():
        return timm.create_model(f"local-dir:{path}", pretrained=True)  # type: ignore[no-any-return]
    return _loaded(timm.create_model(name, **settings), path)


def of_torchvision(name: str, path: str, **settings: Any) -> nn.Module:
    """A file in the architecture."""
    import torchvision

    return _loaded(torchvision.models.get_model(name, **settings), path)


def of_a_file(name: str, path: str, file: str) -> nn.Module:
    """A file in what a function of its owner makes."""
    return _loaded(runpy.run_path(file)[name](), path)


OPEN: dict[str, Callable[..., nn.Module]] = {
    "transformers": of_transformers,
    "timm": of_timm,
    "torchvision": of_torchvision,
    "file": of_a_file,
}


def _loaded(model: nn.Module, path: str) -> nn.Module:
    from safetensors.torch import load_file

    content = load_file(path) if path.endswith(".safetensors") else torch.load(path, weights_only=True)
    state: Any = content.get("state_dict", content.get("model_state_dict", content))
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()}, strict=True)
    return model


def tensors(outputs: Any) -> Iterator[Tensor]:
    """All numbers that a model gives, caches left out."""
    if isinstance(outputs, Tensor):
        yield outputs.double()
    elif isinstance(outputs, Mapping):
        yield from (each.double() for each in outputs.values() if isinstance(each, Tensor))
    elif isinstance(outputs, tuple | list):
        for each in outputs:
            yield from tensors(each)


def apart(found: Any, expected: Any) -> float:
    """The largest difference, on the scale of the largest number of its tensor."""
    pairs = list(zip(tensors(found), tensors(expected), strict=True))
    assert pairs
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def generated(model: Any, inputs: dict[str, Tensor]) -> list[list[int]] | None:
    """What a model says, greedily and with its cache."""
    if not hasattr(model, "can_generate") or not model.can_generate():
        return None
    prompt = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    said: Tensor = model.generate(**prompt, **options)
    return said.tolist()


def compared(package: str, name: str, settings: dict[str, Any], original: str, rewritten: str, inputs: str) -> dict[str, Any]:
    """What there is to tell of a pair."""
    args, kwargs = torch.load(inputs, weights_only=True)
    before, after = (OPEN[package](name, path, **settings).eval() for path in (original, rewritten))
    with torch.no_grad():
        given = [model(*args, **kwargs) for model in (before, after)]
        return {
            "apart": apart(given[1], given[0]),
            "classes": [next(tensors(each)).flatten(1).argmax(1).tolist() for each in given],
            "tokens": [generated(each, kwargs) for each in (before, after)],
            "dtypes": [sorted({str(each.dtype) for each in model.parameters()}) for model in (before, after)],
        }


def main() -> None:
    """A line out for each line in."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        try:
            told = compared(**json.loads(line))
        except BaseException:
            told = {"error": traceback.format_exc()}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
