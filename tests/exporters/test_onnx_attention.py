"""Masked attention in an ONNX file: a query that may see no key, as before a text that is padded, gives zeros as in torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normfuse.exporters import onnx as exporter
from normfuse.exporters import onnxruntime as runtime
from normfuse.graph.program import Program

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


class Causal(nn.Module):
    """Causal attention over texts of which some positions are padding."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.qkv, self.rank = nn.Linear(8, 24), rank

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        mask = causal & kept[:, None, None, :] if self.rank == 4 else causal & kept[0]
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(-2)


@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize("opset", [18, 20, 23])
def test_a_query_without_keys_gives_zeros(opset: int, rank: int, tmp_path: Path) -> None:
    model = Causal(rank).eval()
    x, kept = torch.randn(2, 5, 8), torch.tensor([[False, False, True, True, True], [True, True, True, True, False]])
    expected = model(x, kept)
    assert expected[0, :2].eq(0).all()
    assert expected[0, 2:].ne(0).all()
    exporter.export(Program.trace(model, (x, kept)), tmp_path / "m.onnx", opset=opset)
    for optimized in (True, False):
        found, *_ = runtime.run(tmp_path / "m.onnx", [x.numpy(), kept.numpy()], optimized=optimized)
        assert torch.allclose(torch.from_numpy(found), expected, atol=1e-6)
