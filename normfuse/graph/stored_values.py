"""What a run reads of a program's stored tensors: as they are, of formulas, in float64, changed; large ones in blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from normfuse.graph.blocks import Blocks, laid_out, rounded
from normfuse.graph.expressions import Formula, Read, evaluate, reads
from normfuse.graph.large import Large, taken_in_blocks
from normfuse.graph.parts import Part, Weights
from normfuse.graph.program import Program
from normfuse.sources.mapped import let_go

LEAST = 1 << 21
"""Entries up to which a tensor is widened as a whole."""
BLOCK = 1_000_000
"""Entries of a block; no more than `normfuse.proof.noise.PERIOD`."""


@dataclass(frozen=True)
class StoredValues:
    """The values of stored tensors for one run; see `normfuse.graph.interpreter.run`."""

    program: Program
    wide: bool
    width: torch.dtype
    weights: Weights | None

    def of(self, node: Node) -> Tensor | Large:
        """The value that a placeholder stands for."""
        name = self.program.stored[node.name]
        formula = self.program.formulas.get(name)
        if not self.wide:
            return self._read(name) if formula is None else rounded(formula, self._read, self.program.tensor(name).dtype)
        if formula is None and not self.program.tensor(name).is_floating_point():
            return self.program.tensor(name)
        blocks = self._in_blocks(formula or Read(name))
        if blocks is None:
            return (self._read(name) if formula is None else evaluate(formula, self._read)).to(self.width)
        return Large(blocks, self.width) if taken_in_blocks(node) else blocks.whole(self.width)

    def let_go(self, node: Node) -> None:
        """Drop the pages of what was read for a placeholder, where they are a file's."""
        name = self.program.stored[node.name]
        formula = self.program.formulas.get(name)
        for each in {name} if formula is None else set(reads(formula)):
            let_go(self.program.tensor(each))

    def _read(self, name: str) -> Tensor:
        value = self.program.tensor(name)
        if not value.is_floating_point():
            return value
        part = Part(value)
        value = part.wide() if self.wide else value
        return value if self.weights is None else self.weights(name, value, part)

    def _in_blocks(self, formula: Formula) -> Blocks | None:
        """A formula of large tensors in blocks; else None."""
        return laid_out(formula, self.program.tensor, widened=self._widened, least=LEAST, size=BLOCK)

    def _widened(self, name: str, part: Part) -> Tensor:
        value = part.wide()
        return value if self.weights is None else self.weights(name, value, part)
