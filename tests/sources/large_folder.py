"""Runs by itself: plans for folders of one shape in two sizes, and tells by how much the larger one raised the memory's peak.

The large tensors are holes in their files, which take no room on the disk and as much as any others in memory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from normfuse import api
from normfuse.sources.opened import open as opened
from tests.zoo import torchvision_shim

torchvision_shim.install()


def write(folder: Path, layers: int, hidden: int, vocabulary: int) -> int:
    """A GPT-NeoX of these sizes in shards, a layer each; its bytes."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=8,
        intermediate_size=4 * hidden, architectures=["GPTNeoXForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        tensors = GPTNeoXForCausalLM(config).state_dict()
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        part = name.split(".")[2] if ".layers." in name else name
        shards.setdefault(f"{part}.safetensors", {})[name] = tensor
    for file, held in shards.items():
        _write(folder / file, held)
    places = {name: file for file, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return sum(each.numel() * 4 for each in tensors.values())


def _write(path: Path, held: dict[str, torch.Tensor]) -> None:
    header, begins, end = {}, {}, 0
    for name, tensor in held.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + 4 * tensor.numel()]}
        begins[name] = end
        end += 4 * tensor.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + end)
        for name, tensor in held.items():
            if tensor.dim() == 1:
                file.seek(start + begins[name])
                file.write((1 + 0.3 * torch.randn(tensor.shape)).numpy().tobytes())


def peak_of(folder: Path) -> int:
    """The peak of this process' memory after a plan was made."""
    result = api.rewrite(opened(folder), "pre_rmsnorm", verify="structure", same_class=True)
    assert any(result.report.plan.rewrites)
    told = Path("/proc/self/status").read_text()  # getrusage has the peak of who started this process
    return 1024 * int(told.partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    here = Path(sys.argv[1])
    write(here / "small", 2, 32, 100)
    size = write(here / "large", *map(int, sys.argv[2:]))
    before, after = peak_of(here / "small"), peak_of(here / "large")
    print(json.dumps({"size": size, "before": before, "growth": after - before}))
