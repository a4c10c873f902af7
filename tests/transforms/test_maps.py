"""What a map makes of stored tensors, against numbers."""

from __future__ import annotations

from typing import TypeAlias

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from normfuse.graph.expressions import Formula, Read, evaluate
from normfuse.transforms.maps import Centring, ChangeOfBasis, Map
from tests.transforms.orthogonal import Orthogonal

MAPS = st.tuples(
    st.sampled_from([None, Read("scale")]), st.sampled_from([None, Read("shift")]),
    st.sampled_from([None, Centring(), Orthogonal("rotation")]),
)  # fmt: skip


Drawn: TypeAlias = tuple[Formula | None, Formula | None, ChangeOfBasis | None]


class Numbers:
    """Tensors by name, and vectors along ``dim`` of a value: t as it is stored, v as it is meant."""

    def __init__(self, drawn: Drawn, d: int, entries: int) -> None:
        torch.manual_seed(d)
        self.map = Map(*drawn)
        self.tensors = {
            "scale": torch.rand(entries).double() + 0.5, "shift": torch.randn(entries).double(),
            "rotation": torch.linalg.qr(torch.randn(d, d).double())[0],
        }  # fmt: skip
        self.t = torch.randn(d, 3).double()
        if isinstance(self.map.basis, Centring):
            self.t -= self.t.mean(0)
        elif self.map.basis:
            self.tensors["meant"] = self.tensors["rotation"] @ self.t
        meant = self.tensors.get("meant", self.t)
        v = meant * (self.tensors["scale"][:, None] if self.map.scale else 1.0)
        self.v = v + (self.tensors["shift"][:, None] if self.map.shift else 0.0)

    def of(self, formula: Formula, **more: Tensor) -> Tensor:
        return evaluate(formula, {**self.tensors, **more}.__getitem__)


SIZES = st.integers(2, 6).flatmap(lambda d: st.tuples(st.just(d), st.sampled_from([1, d])))


@settings(max_examples=40, deadline=None)
@given(MAPS, SIZES, st.integers(1, 6))
def test_a_weight_that_reads(drawn: Drawn, sizes: tuple[int, int], rows: int) -> None:
    """W v is what the changed weight makes of what is stored, and what the shift adds."""
    own, d = Numbers(drawn, *sizes), sizes[0]
    weight = torch.randn(rows, d).double()
    shift = own.tensors["shift"].expand(d) if own.map.shift else torch.zeros(d).double()
    read = own.of(own.map.read(Read("w"), 1, d), w=weight) @ own.t
    torch.testing.assert_close(read + (weight @ shift)[:, None], weight @ own.v)
    across = own.of(own.map.read(Read("w"), 0, d), w=weight.mT).mT @ own.t
    torch.testing.assert_close(across, read)


@settings(max_examples=40, deadline=None)
@given(MAPS, SIZES)
def test_what_writes(drawn: Drawn, sizes: tuple[int, int]) -> None:
    """The inverse of what is pending on a value makes what is stored of what is meant, along any axis."""
    own, d = Numbers(drawn, *sizes), sizes[0]
    torch.testing.assert_close(own.of(own.map.inverse.written(Read("v"), 0, d), v=own.v), own.t)
    torch.testing.assert_close(own.of(own.map.inverse.written(Read("v"), 1, d), v=own.v.mT), own.t.mT)


@settings(max_examples=40, deadline=None)
@given(MAPS, SIZES, st.sampled_from([None, Read("s")]), st.sampled_from([None, Read("c")]))
def test_another_affine_behind_it(drawn: Drawn, sizes: tuple[int, int], scale: Read | None, shift: Read | None) -> None:
    own, d = Numbers(drawn, *sizes), sizes[0]
    more = {"s": torch.rand(d).double() + 0.5, "c": torch.randn(d).double()}
    behind = own.v * (more["s"][:, None] if scale else 1.0) + (more["c"][:, None] if shift else 0.0)
    both = own.map.then(scale, shift)
    torch.testing.assert_close(own.of(both.inverse.written(Read("v"), 0, d), v=behind, **more), own.t)
    if scale is None:
        assert both == own.map.plus(shift)
