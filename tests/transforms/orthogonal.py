"""A general change of basis of the same width, which no pass of ours makes."""

from __future__ import annotations

from dataclasses import dataclass

from normfuse.graph.expressions import Call, Formula, Read


@dataclass(frozen=True)
class Orthogonal:
    """t = Rᵀv is stored of v = Rt: what writes v becomes RᵀW, what reads it WR, which is one formula along the axis of v."""

    name: str
    resizes: bool = False

    def written(self, of: Formula, dim: int, d: int) -> Formula:
        turned = Call("matmul.default", (Call("transpose.int", (of, dim, -1)), Read(self.name)))
        return Call("transpose.int", (turned, dim, -1))

    read = written
