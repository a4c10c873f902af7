"""Folders of any size in the layout that is published: random weights, written without holding more than a block of them.

    python -m benchmarks.large_folders FOLDER [--gigabytes 14.5] [--shard-gigabytes 2]

The shape is GPT-NeoX's (Pythia 6.9B's widths; as many layers as the size asks for), in bfloat16. Gains, shifts and biases are
spread, so that a mistake would show.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

WIDTH, HEADS, VOCABULARY = 4096, 32, 50432
_BLOCK = 1 << 24

Named: TypeAlias = tuple[str, tuple[int, ...]]
"""The name and the shape of a tensor."""


def config(layers: int, *, width: int = WIDTH, vocabulary: int = VOCABULARY, heads: int = HEADS) -> dict[str, object]:
    """The configuration of a GPT-NeoX model of so many layers."""
    return {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_size": width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "intermediate_size": 4 * width, "vocab_size": vocabulary, "rotary_pct": 0.25,
        "max_position_embeddings": 2048, "use_parallel_residual": True, "tie_word_embeddings": False, "hidden_act": "gelu",
        "layer_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 0, "dtype": "bfloat16", "use_cache": False,
    }  # fmt: skip


def shapes(layers: int, width: int = WIDTH, vocabulary: int = VOCABULARY) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of the model, in its order."""
    yield "gpt_neox.embed_in.weight", (vocabulary, width)
    for layer in range(layers):
        at = f"gpt_neox.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}.{norm}.weight", (width,)
            yield f"{at}.{norm}.bias", (width,)
        for name, rows, columns in (
            ("attention.query_key_value", 3 * width, width), ("attention.dense", width, width),
            ("mlp.dense_h_to_4h", 4 * width, width), ("mlp.dense_4h_to_h", width, 4 * width),
        ):  # fmt: skip
            yield f"{at}.{name}.weight", (rows, columns)
            yield f"{at}.{name}.bias", (rows,)
    yield "gpt_neox.final_layer_norm.weight", (width,)
    yield "gpt_neox.final_layer_norm.bias", (width,)
    yield "embed_out.weight", (vocabulary, width)


def layers_for(gigabytes: float) -> int:
    """As many layers as make a folder of at least this size."""
    of = [sum(2 * math.prod(shape) for _, shape in shapes(layers)) for layers in (0, 1)]
    return max(1, math.ceil((gigabytes * 1e9 - of[0]) / (of[1] - of[0])))


def make(folder: Path, layers: int, shard_bytes: int) -> None:
    """Write the folder."""
    write(folder, config(layers), list(shapes(layers)), shard_bytes)


def write(
    folder: Path, settings: Mapping[str, object], tensors: Sequence[Named], shard_bytes: int, *, hollow: bool = False
) -> None:
    """Write a folder in the published layout.

    Args:
        folder: where; it must not be there yet.
        settings: what its config.json says.
        tensors: the names and the shapes of its tensors.
        shard_bytes: the most that a file holds, unless one tensor is larger.
        hollow: leave large tensors out: holes of a sparse file, which read as zeros and take no room on the disk.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    shards: list[list[Named]] = [[]]
    for name, shape in tensors:
        if shards[-1] and sum(map(_bytes, shards[-1])) + _bytes((name, shape)) > shard_bytes:
            shards.append([])
        shards[-1].append((name, shape))
    numbers = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0))
    places: dict[str, str] = {}
    for place, shard in enumerate(shards, 1):
        file = folder / f"model-{place:05}-of-{len(shards):05}.safetensors"
        _write(file, shard, numbers, hollow)
        places |= {name: file.name for name, _ in shard}
    index = {"metadata": {"total_size": sum(map(_bytes, tensors))}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _bytes(tensor: Named) -> int:
    return 2 * math.prod(tensor[1])


def _write(file: Path, shard: Sequence[Named], numbers: Tensor, hollow: bool) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shard:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + _bytes((name, shape))]}
        end += _bytes((name, shape))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shard:
            if hollow and len(shape) > 1:
                stream.seek(_bytes((name, shape)), os.SEEK_CUR)
                continue
            for block in _numbers(name, shape, numbers):
                stream.write(block.view(torch.int16).numpy().tobytes())
        stream.truncate(len(text) + 8 + end)


def _numbers(name: str, shape: tuple[int, ...], numbers: Tensor) -> Iterator[Tensor]:
    size, begin = math.prod(shape), hash_of(name) % (_BLOCK // 2)
    mean, spread = (1.0, 0.3) if "norm.weight" in name else (0.0, 0.2) if len(shape) == 1 else (0.0, 0.7 / shape[-1] ** 0.5)
    while size:
        block = numbers[begin : begin + min(size, _BLOCK - begin)]
        yield (mean + spread * block).to(torch.bfloat16)
        size, begin = size - len(block), 0


def hash_of(name: str) -> int:
    """A number of a name, the same in every run."""
    return int.from_bytes(name.encode()[-12:], "little")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=14.5)
    parser.add_argument("--shard-gigabytes", type=float, default=2.0)
    options = parser.parse_args()
    make(options.folder, layers_for(options.gigabytes), int(options.shard_gigabytes * 1e9))


if __name__ == "__main__":
    main()
