"""SLAB's simplified linear attention.

Reference
    Guo et al., "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch
    Normalization", ICML 2024, arXiv 2405.11582. The formulas are those of its published code, and so are the names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SimplifiedLinearAttention(nn.Module):
    """Attention with the kernel ReLU, linear in the number of tokens, plus a depthwise convolution of the values.

    Per head: q ← ReLU(q), k ← ReLU(k + positional encoding), then q (kᵀ v) / (q · Σk + 1e-6) + DWConv5×5(v), then ``proj``.
    One depthwise kernel serves all heads. The tokens are the pixels of a grid, row by row: no class token.

    Args:
        dim: channels C.
        num_heads: divides C.
        grid: height and width of the grid, or one number for both.
        qkv_bias: whether ``qkv`` has a bias.
        proj_drop: dropout after ``proj``.
        eps: added to the denominator.
        device: where its tensors are.
        dtype: of its parameters.

    Shape:
        (B, H·W, C); the result is like the input. The sums of the attention are in float32 or better, also under autocast.

    State dict:
        qkv, proj, dwc and positional_encoding (1, H·W, C), which starts at 0.

    Raises:
        ValueError: heads do not divide C, or the input is not of this grid.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: int | tuple[int, int],
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {dim} channels")
        self.dim, self.num_heads, self.eps = dim, num_heads, eps
        self.grid = (grid, grid) if isinstance(grid, int) else grid
        head = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.dwc = nn.Conv2d(head, head, 5, padding=2, groups=head, device=device, dtype=dtype)
        self.positional_encoding = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        height, width = self.grid
        if x.ndim != 3 or x.shape[1:] != (height * width, self.dim):
            raise ValueError(f"expected (batch, {height}·{width}, {self.dim}), not {tuple(x.shape)}")
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (self._heads(part) for part in (q.relu(), (k + self.positional_encoding).relu(), v))
        attended = self._attended(q, k, v).to(v.dtype)
        image = v.transpose(1, 2).reshape(-1, self.dim // self.num_heads, height, width)
        y = attended + self.dwc(image).flatten(2).transpose(1, 2)
        y = y.reshape(-1, self.num_heads, *y.shape[1:]).transpose(1, 2).flatten(2)
        out: Tensor = self.proj_drop(self.proj(y))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B · heads, N, C / heads)."""
        return x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2).flatten(0, 1)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kind = q.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):  # products would be in half precision
            with torch.autocast(kind, enabled=False):
                return self._linear(q, k, v)
        return self._linear(q, k, v)

    def _linear(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.dtype in (torch.float16, torch.bfloat16):
            q, k, v = q.float(), k.float(), v.float()
        return q @ (k.transpose(1, 2) @ v) / (q @ k.sum(1).unsqueeze(-1) + self.eps)

    def extra_repr(self) -> str:
        """The hyper-parameters."""
        return f"{self.dim}, num_heads={self.num_heads}, grid={self.grid}, eps={self.eps}"
