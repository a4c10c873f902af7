"""Rows must not be timid either: what a person can see to be carried, the table must say."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor

from normfuse.graph.ops.lookup import carries
from normfuse.graph.views import aten
from tests.graph.ops.calls import Built, Call
from tests.graph.ops.properties import check_carries


def noise(*sizes: int) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64)


X, SQUARE, PICTURE, IDS = noise(2, 5, 4), noise(4, 4, 4), noise(2, 4, 6, 6), torch.tensor([[0, 1, 1], [2, 0, 1]])
W, B, KERNEL, TABLE, GATE = noise(8, 4), noise(8), noise(8, 4, 3, 3), noise(7, 4), noise(2, 5, 1)
KEEP, TOP = torch.ones(2, 5, 1, dtype=torch.bool), torch.zeros(2, 3, 1, dtype=torch.int64)
SPLIT = Call(aten.split.Tensor, {"self": X, "split_size": 2, "dim": 1})

MUST: dict[str, tuple[Any, dict[str, Any], int, tuple[tuple[Any, int], ...]]] = {
    "linear, features": (aten.linear.default, {"input": X, "weight": W, "bias": B}, 2, ((W, 0), (B, 0))),
    "linear without bias, features": (aten.linear.default, {"input": X, "weight": W}, 2, ((W, 0),)),
    "linear without bias, tokens": (aten.linear.default, {"input": X, "weight": W}, 1, ((X, 1),)),
    "addmm, features": (aten.addmm.default, {"self": B, "mat1": noise(5, 3), "mat2": (M := noise(3, 8))}, 1, ((M, 1), (B, 0))),
    "matmul, features": (aten.matmul.default, {"self": X, "other": (M := noise(4, 8))}, 2, ((M, 1),)),
    "matmul of two activations": (aten.matmul.default, {"self": SQUARE, "other": (Y := noise(4, 4, 4))}, 2, ((Y, 2),)),
    "matmul, rows": (aten.matmul.default, {"self": SQUARE, "other": noise(4, 4, 4)}, 1, ((SQUARE, 1),)),
    "mm, features": (aten.mm.default, {"self": noise(3, 4), "mat2": (M := noise(4, 8))}, 1, ((M, 1),)),
    "conv, channels": (aten.conv2d.default, {"input": PICTURE, "weight": KERNEL, "bias": B}, 1, ((KERNEL, 0), (B, 0))),
    "conv, channels, unbatched": (aten.conv2d.default, {"input": PICTURE[0], "weight": KERNEL}, 0, ((KERNEL, 0),)),
    "transposed conv, channels": (
        aten.conv_transpose2d.input, {"input": noise(2, 8, 3, 3), "weight": KERNEL}, 1, ((KERNEL, 1),),
    ),
    "embedding, features": (aten.embedding.default, {"weight": TABLE, "indices": IDS}, 2, ((TABLE, 1),)),
    "index into a table, features": (aten.index.Tensor, {"self": TABLE, "indices": [IDS]}, 2, ((TABLE, 1),)),
    "index of a batch and a token": (aten.index.Tensor, {"self": X, "indices": [IDS[0], IDS[1]]}, 1, ((X, 2),)),
    "index of tokens": (aten.index.Tensor, {"self": X, "indices": [None, IDS[0]]}, 2, ((X, 2),)),
    "gather of whole tokens": (
        aten.gather.default,
        {"self": X, "dim": 1, "index": Call(aten.expand.default, {"self": TOP, "size": [-1, -1, 4]})}, 2, ((X, 2),),
    ),
    "residual": (aten.add.Tensor, {"self": X, "other": (Y := noise(2, 5, 4))}, 2, ((X, 2), (Y, 2))),
    "positions": (aten.add.Tensor, {"self": X, "other": (Y := noise(5, 4))}, 2, ((X, 2), (Y, 1))),
    "a stored vector": (aten.add.Tensor, {"self": X, "other": (Y := noise(4))}, 2, ((X, 2), (Y, 0))),
    "zero": (aten.add.Tensor, {"self": X, "other": 0}, 2, ((X, 2),)),
    "difference": (aten.sub.Tensor, {"self": X, "other": (Y := noise(2, 5, 4))}, 2, ((X, 2), (Y, 2))),
    "explicit centring": (
        aten.sub.Tensor, {"self": X, "other": Call(aten.mean.dim, {"self": X, "dim": [-1], "keepdim": True})}, 2, (),
    ),
    "number": (aten.mul.Tensor, {"self": X, "other": 2.0}, 2, ((X, 2),)),
    "gate per token": (aten.mul.Tensor, {"self": X, "other": GATE}, 2, ((X, 2),)),
    "gate per token, on the left": (aten.mul.Tensor, {"self": GATE, "other": X}, 2, ((X, 2),)),
    "expanded gate": (
        aten.mul.Tensor, {"self": X, "other": Call(aten.expand.default, {"self": GATE, "size": [2, 5, 4]})}, 2, ((X, 2),),
    ),
    "division per token": (aten.div.Tensor, {"self": X, "other": GATE}, 2, ((X, 2),)),
    "masked tokens": (aten.masked_fill.Scalar, {"self": X, "mask": KEEP, "value": 0}, 2, ((X, 2),)),
    "chosen tokens": (aten.where.self, {"condition": KEEP, "self": X, "other": (Y := noise(4))}, 2, ((X, 2), (Y, 0))),
    "chosen or zero": (aten.where.ScalarOther, {"condition": KEEP, "self": X, "other": 0.0}, 2, ((X, 2),)),
    "cast": (aten._to_copy.default, {"self": X, "dtype": torch.float32}, 2, ((X, 2),)),
    "copy": (aten.clone.default, {"self": X}, 2, ((X, 2),)),
    "minus": (aten.neg.default, {"self": X}, 2, ((X, 2),)),
    "merged batch": (aten.view.default, {"self": X, "size": [10, 4]}, 1, ((X, 2),)),
    "split batch": (aten.view.default, {"self": (Y := noise(10, 4)), "size": [2, 5, 4]}, 2, ((Y, 1),)),
    "flattened picture": (aten.view.default, {"self": PICTURE, "size": [2, 4, 36]}, 1, ((PICTURE, 1),)),
    "merged batch of a cube": (aten.view.default, {"self": SQUARE, "size": [16, 4]}, 1, ((SQUARE, 2),)),
    "windows": (aten.view.default, {"self": (Y := noise(2, 4, 4, 4)), "size": [2, 2, 2, 2, 2, 4]}, 5, ((Y, 3),)),
    "permute": (aten.permute.default, {"self": PICTURE, "dims": [0, 2, 3, 1]}, 3, ((PICTURE, 1),)),
    "transpose": (aten.transpose.int, {"self": X, "dim0": 1, "dim1": 2}, 1, ((X, 2),)),
    "transpose of others": (aten.transpose.int, {"self": X, "dim0": 0, "dim1": 1}, 2, ((X, 2),)),
    "transposed matrix": (aten.t.default, {"self": W}, 0, ((W, 1),)),
    "unsqueeze": (aten.unsqueeze.default, {"self": X, "dim": 1}, 3, ((X, 2),)),
    "squeeze": (aten.squeeze.dim, {"self": (Y := noise(2, 1, 4)), "dim": 1}, 1, ((Y, 2),)),
    "expand": (aten.expand.default, {"self": (Y := noise(1, 1, 4)), "size": [2, -1, -1]}, 2, ((Y, 2),)),
    "repeat": (aten.repeat.default, {"self": X, "repeats": [1, 2, 1]}, 2, ((X, 2),)),
    "class token": (aten.cat.default, {"tensors": [(Y := noise(2, 1, 4)), X], "dim": 1}, 2, ((Y, 2), (X, 2))),
    "stack": (aten.stack.default, {"tensors": [X, X], "dim": 1}, 3, ((X, 2), (X, 2))),
    "split": (aten.split.Tensor, {"self": X, "split_size": 2, "dim": 1}, 2, ((X, 2),)),
    "first part": (operator.getitem, {"source": SPLIT, "index": 0}, 2, ((SPLIT, 2),)),
    "unbind": (aten.unbind.int, {"self": X, "dim": 0}, 1, ((X, 2),)),
    "first token": (aten.select.int, {"self": X, "dim": 1, "index": 0}, 1, ((X, 2),)),
    "some tokens": (aten.slice.Tensor, {"self": X, "dim": 1, "start": 1}, 2, ((X, 2),)),
    "all of a slice": (aten.slice.Tensor, {"self": X, "dim": 2, "end": 2**63 - 1}, 2, ((X, 2),)),
    "selected tokens": (aten.index_select.default, {"self": X, "dim": 1, "index": IDS[0]}, 2, ((X, 2),)),
    "padded tokens": (aten.pad.default, {"self": X, "pad": [0, 0, 0, 3]}, 2, ((X, 2),)),
    "padded pictures": (aten.constant_pad_nd.default, {"self": PICTURE, "pad": [1, 1, 1, 1]}, 1, ((PICTURE, 1),)),
    "shifted windows": (aten.roll.default, {"self": PICTURE, "shifts": [-1, -1], "dims": [2, 3]}, 1, ((PICTURE, 1),)),
    "flip": (aten.flip.default, {"self": X, "dims": [1]}, 2, ((X, 2),)),
    "mean over tokens": (aten.mean.dim, {"self": X, "dim": [1]}, 1, ((X, 2),)),
    "mean over pixels": (aten.mean.dim, {"self": PICTURE, "dim": [-1, -2], "keepdim": True}, 1, ((PICTURE, 1),)),
    "cumsum over tokens": (aten.cumsum.default, {"self": X, "dim": 1}, 2, ((X, 2),)),
    "pool": (aten.avg_pool2d.default, {"self": PICTURE, "kernel_size": [2, 2]}, 1, ((PICTURE, 1),)),
    "global pool": (aten.adaptive_avg_pool2d.default, {"self": PICTURE, "output_size": [1, 1]}, 1, ((PICTURE, 1),)),
    "resized positions": (
        aten.upsample_bicubic2d.vec,
        {"input": PICTURE, "output_size": [9, 9], "align_corners": False, "scale_factors": None}, 1, ((PICTURE, 1),),
    ),
    "norm without gain and shift": (aten.layer_norm.default, {"input": X, "normalized_shape": [4]}, 2, ()),
    "copy into a buffer": (aten.copy.default, {"self": noise(2, 5, 4), "src": (Y := noise(5, 4))}, 2, ((Y, 1),)),
    "zero minus": (aten.rsub.Scalar, {"self": X, "other": 0}, 2, ((X, 2),)),
    "gated residual": (
        aten.addcmul.default, {"self": X, "tensor1": GATE, "tensor2": (Y := noise(2, 5, 4))}, 2, ((X, 2), (Y, 2)),
    ),
    "blend": (aten.lerp.Scalar, {"self": X, "end": (Y := noise(4)), "weight": 0.3}, 2, ((X, 2), (Y, 0))),
    "blend per token": (
        aten.lerp.Tensor, {"self": X, "end": (Y := noise(2, 5, 4)), "weight": GATE}, 2, ((X, 2), (Y, 2)),
    ),
    "true division per token": (aten.true_divide.Tensor, {"self": X, "other": GATE}, 2, ((X, 2),)),
    "true division": (aten.true_divide.Scalar, {"self": X, "other": 2}, 2, ((X, 2),)),
    "tile": (aten.tile.default, {"self": X, "dims": [2, 1]}, 2, ((X, 2),)),
    "tile, batch": (aten.tile.default, {"self": X, "dims": [2, 1]}, 0, ((X, 0),)),
    "repeated heads": (aten.repeat_interleave.self_int, {"self": X, "repeats": 2, "dim": 1}, 2, ((X, 2),)),
    "picked pixels": (aten._unsafe_index.Tensor, {"self": PICTURE, "indices": [None, None, IDS, IDS[0]]}, 1, ((PICTURE, 1),)),
    "written tokens": (
        aten.slice_scatter.default, {"self": X, "src": (Y := noise(2, 2, 4)), "dim": 1, "start": -2}, 2, ((X, 2), (Y, 2)),
    ),
    "a written token": (
        aten.select_scatter.default, {"self": X, "src": (Y := noise(2, 4)), "dim": 1, "index": 0}, 2, ((X, 2), (Y, 1)),
    ),
    "tokens put in place": (
        aten.index_put.default, {"self": X, "indices": [None, IDS[0]], "values": (Y := noise(3, 4))}, 2, ((X, 2), (Y, 1)),
    ),
    "tokens added in place": (
        aten.index_put.default, {"self": TABLE, "indices": [IDS], "values": (Y := noise(2, 3, 4)), "accumulate": True}, 1,
        ((TABLE, 1), (Y, 2)),
    ),
    "experts' tokens": (
        aten.index_add.default, {"self": TABLE, "dim": 0, "index": IDS[0], "source": (Y := noise(3, 4))}, 1,
        ((TABLE, 1), (Y, 1)),
    ),
    "cached tokens": (
        aten.index_copy.default, {"self": X, "dim": 1, "index": IDS[1], "source": (Y := noise(2, 3, 4))}, 2, ((X, 2), (Y, 2)),
    ),
    "einsum, features": (aten.einsum.default, {"equation": "bti,oi->bto", "tensors": [X, W]}, 2, ((W, 0),)),
    "einsum, tokens": (aten.einsum.default, {"equation": "bti,oi->bto", "tensors": [X, W]}, 1, ((X, 1),)),
    "einsum of any rank": (aten.einsum.default, {"equation": "...i, oi -> ...o", "tensors": [X, W]}, 2, ((W, 0),)),
    "einsum of any rank, tokens": (aten.einsum.default, {"equation": "...i, oi -> ...o", "tensors": [X, W]}, 1, ((X, 1),)),
    "einsum with an implicit result": (aten.einsum.default, {"equation": "bti,oi", "tensors": [X, W]}, 1, ((W, 0),)),
    "attention": (
        aten.scaled_dot_product_attention.default, {"query": SQUARE, "key": SQUARE, "value": (Y := noise(4, 4, 4))}, 2,
        ((Y, 2),),
    ),
    "baddbmm, features": (
        aten.baddbmm.default, {"self": B, "batch1": X, "batch2": (M := noise(2, 4, 8))}, 2, ((M, 2), (B, 0)),
    ),
    "baddbmm, rows": (
        aten.baddbmm.default, {"self": (Y := noise(5, 1)), "batch1": X, "batch2": noise(2, 4, 8)}, 1, ((X, 1), (Y, 0)),
    ),
    "resized signal": (
        aten.upsample_linear1d.vec,
        {"input": X, "output_size": [9], "align_corners": False, "scale_factors": None}, 1, ((X, 1),),
    ),
    "resized signal, nearest": (
        aten.upsample_nearest1d.vec, {"input": X, "output_size": [9], "scale_factors": None}, 1, ((X, 1),),
    ),
    "resized picture, nearest": (
        aten._upsample_nearest_exact2d.vec, {"input": PICTURE, "output_size": [9, 9], "scale_factors": None}, 1,
        ((PICTURE, 1),),
    ),
    "resized volume": (
        aten.upsample_trilinear3d.vec,
        {"input": (Y := noise(1, 4, 2, 2, 2)), "output_size": [3, 3, 3], "align_corners": False, "scale_factors": None}, 1,
        ((Y, 1),),
    ),
    "zeros of that shape": (aten.full_like.default, {"self": X, "fill_value": 0}, 2, ()),
    "zeros of that dtype": (aten.new_full.default, {"self": X, "size": [2, 1, 4], "fill_value": 0.0}, 2, ()),
    "zeros": (aten.new_zeros.default, {"self": X, "size": [2, 1, 4]}, 2, ()),
}  # fmt: skip


@pytest.mark.parametrize("name", MUST)
def test_what_must_be_carried(name: str) -> None:
    op, named, axis, expected = MUST[name]
    built = Built(Call(op, named))
    assert carries(built.node, axis) == tuple((built.of(operand), own) for operand, own in expected)
    check_carries(built)
