"""Torch's other names of operators: a network spelled with them is rewritten like the one spelled as we know it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse.graph.program import Program
from normfuse.graph.views import aten

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


class Spelled(nn.Module):
    """A pre-norm network whose stream goes through an operator of choice, with a stored row and a stored matrix at hand."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.row, self.matrix = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(8, 8))
        for name, parameter in self.norms.named_parameters():
            nn.init.normal_(parameter, float(name.endswith("weight")), 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.blocks[0](self.norms[0](x))
        x = self.way(x, self.row.expand(x.shape[0], 1, 8), self.matrix)
        x = x + self.blocks[1](self.norms[1](x))
        out: Tensor = self.head(self.norms[2](x))
        return out


def rows(x: Tensor) -> Tensor:
    """A mask that is the same all along the last axis."""
    return (torch.arange(x.shape[1]) == 1)[None, :, None].expand(x.shape)


PASSING: dict[str, Way] = {
    "concat": lambda x, c, w: torch.concat([c, x], 1),
    "concatenate": lambda x, c, w: torch.concatenate([c, x], 1),
    "vstack": lambda x, c, w: torch.vstack([x, c.expand(x.shape)]),
    "hstack": lambda x, c, w: torch.hstack([c, x]),
    "column_stack": lambda x, c, w: torch.column_stack([c, x]),
    "multiply": lambda x, c, w: torch.multiply(x, 2.0),
    "multiply a gate": lambda x, c, w: torch.multiply(torch.sigmoid(c[..., :1]), x),
    "subtract": lambda x, c, w: torch.subtract(x, c, alpha=2),
    "divide": lambda x, c, w: torch.divide(x, 2.0),
    "true_divide": lambda x, c, w: torch.true_divide(x, 2.0),
    "negative": lambda x, c, w: torch.negative(x),
    "rsub": lambda x, c, w: torch.rsub(x, c),
    "movedim": lambda x, c, w: torch.movedim(x, 1, 0).movedim(0, 1),
    "moveaxis": lambda x, c, w: torch.moveaxis(x, 1, 0).moveaxis(0, 1),
    "swapaxes": lambda x, c, w: torch.swapaxes(x, 0, 1).swapdims(0, 1),
    "diff": lambda x, c, w: torch.diff(x, dim=1),
    "diff behind": lambda x, c, w: torch.diff(x, dim=1, prepend=c),
    "gradient": lambda x, c, w: torch.gradient(x, dim=1)[0],
    "trapezoid": lambda x, c, w: torch.trapezoid(x, dim=1)[:, None],
    "flipud": lambda x, c, w: torch.flipud(x),
    "fliplr": lambda x, c, w: torch.fliplr(x),
    "rot90": lambda x, c, w: torch.rot90(x, 1, [0, 1]),
    "take_along_dim": lambda x, c, w: torch.take_along_dim(x, torch.zeros(x.shape[0], 1, 1, dtype=torch.long), 1),
    "take_along_dim, whole": lambda x, c, w: torch.take_along_dim(
        x, torch.ones(1, 1, 1, dtype=torch.long).expand(x.shape[0], 2, 8), 1
    ),
    "broadcast_tensors": lambda x, c, w: sum(torch.broadcast_tensors(x, c)),  # type: ignore[arg-type, return-value]
    "scatter": lambda x, c, w: x.scatter(1, torch.zeros(x.shape[0], 1, 8, dtype=torch.long), c),
    "scatter_add": lambda x, c, w: x.scatter_add(1, torch.ones(1, 1, 1, dtype=torch.long).expand(x.shape[0], 1, 8), c),
    "masked_scatter": lambda x, c, w: x.masked_scatter(rows(x), c.expand(x.shape).contiguous()),
    "index_fill": lambda x, c, w: x.index_fill(1, torch.tensor([1]), 0.0),
    "unfold": lambda x, c, w: x.unfold(1, 2, 1)[..., 0],
    "diagonal": lambda x, c, w: torch.diagonal(x, 0, 0, 1).transpose(0, 1)[:, None],
    "narrow_copy": lambda x, c, w: torch.narrow_copy(x, 1, 1, 2),
    "addcdiv": lambda x, c, w: torch.addcdiv(x, c, torch.full((1, 1, 1), 2.0)),
    "grid_sample": lambda x, c, w: F.grid_sample(
        x.transpose(1, 2)[..., None], torch.zeros(x.shape[0], 3, 1, 2), align_corners=False
    )[..., 0].transpose(1, 2),
}  # fmt: skip

SEEING: dict[str, Way] = {
    "tensordot": lambda x, c, w: torch.tensordot(x, w, ([2], [0])),
    "inner": lambda x, c, w: torch.inner(x, w),
    "nan_to_num": lambda x, c, w: torch.nan_to_num(x),
    "scatter of single entries": lambda x, c, w: x.scatter(1, torch.arange(8).remainder(2).expand(x.shape[0], 1, 8), c),
    "scatter of a number": lambda x, c, w: x.scatter(1, torch.zeros(x.shape[0], 1, 8, dtype=torch.long), 1.5),
    "masked_scatter of single entries": lambda x, c, w: x.masked_scatter(
        (torch.arange(8) > 3).expand(x.shape), c.expand(x.shape).contiguous()
    ),
    "index_fill with a number": lambda x, c, w: x.index_fill(1, torch.tensor([1]), 0.5),
    "unfold of the features": lambda x, c, w: x.unfold(2, 8, 1)[:, :, 0],
    "diff of the features": lambda x, c, w: F.pad(torch.diff(x, dim=2), (0, 1)),
    "subtract a number": lambda x, c, w: torch.subtract(x, 1.5),
}  # fmt: skip


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", PASSING)
def test_other_names_pass(name: str, size: int) -> None:
    x = torch.randn(size, 4, 4, generator=torch.Generator().manual_seed(1))
    result = normfuse.rewrite(Spelled(PASSING[name]).eval(), ["pre_rmsnorm"], inputs=(x,))
    assert result.report.norms_after == {"rms_norm": 3}, result.report.plan.refusals


@pytest.mark.parametrize("name", SEEING)
def test_what_sees_the_mean_or_has_one_is_not_passed(name: str) -> None:
    x = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1))
    result = normfuse.rewrite(Spelled(SEEING[name]).eval(), ["pre_rmsnorm"], inputs=(x,))  # proven, whatever was done
    before = [rewrite for rewrite in result.report.plan.rewrites if {"norms.0", "norms.1"} <= {str(s) for s in rewrite.sites}]
    assert not before or any("explicit" in rewrite.because for rewrite in before)


def test_other_names_are_folded_through() -> None:
    """What is affine is so under every name."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.scale = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(torch.subtract(torch.divide(torch.multiply(self.norm(self.conv(x)), self.scale), 2.0), 0.25))

    x = torch.randn(2, 3, 6, 6)
    result = normfuse.rewrite(Net().eval(), "all", inputs=(x,))
    called = [node.target for node in result.program.graph.nodes if node.op == "call_function"]
    assert called == [aten.conv2d.default, aten.relu.default]


class Whole(nn.Module):
    """Composites that exporters and recognition know by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.norm = nn.GRU(4, 4, batch_first=True), nn.RMSNorm(4)
        self.group, self.slope = nn.GroupNorm(2, 4), nn.PReLU()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.rnn(x)[0] + self.norm(x) + self.slope(x) + F.selu(x) + F.relu6(x) + torch.square(x) + F.logsigmoid(x)
        z = torch.fake_quantize_per_tensor_affine(x, 0.1, 0, 0, 255)
        return y, z, self.group(x.transpose(1, 2)), F.max_pool2d(x, 2), F.cosine_similarity(x, y), torch.std(x, -1)


def test_composites_that_are_known_by_name_stay_whole() -> None:
    program = Program.trace(Whole().eval(), (torch.randn(2, 4, 4),))
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    kept = {
        aten.gru.input, aten.rms_norm.default, aten.prelu.default, aten.selu.default, aten.relu6.default,
        aten.square.default, aten.log_sigmoid.default, aten.fake_quantize_per_tensor_affine.default,
        aten.group_norm.default, aten.max_pool2d.default, aten.cosine_similarity.default, aten.std.dim,
    }  # fmt: skip
    assert kept <= called


def test_names_of_operators_without_a_row_become_the_usual_ones() -> None:
    class Names(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return torch.absolute(x), torch.clip(x, 0, 1), torch.greater(x, 0), torch.arctan(x), torch.special.expit(x)

    called = [node.target for node in Program.trace(Names(), (torch.randn(3),)).graph.nodes if node.op == "call_function"]
    assert called == [aten.abs.default, aten.clamp.default, aten.gt.Scalar, aten.atan.default, aten.sigmoid.default]


@pytest.mark.parametrize("name", ["concat", "hstack", "diff", "vstack", "subtract", "scatter"])
def test_a_dynamic_batch_stays_dynamic(name: str, tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    model = Spelled(PASSING[name]).eval()
    exported = torch.export.export(model, (torch.randn(4, 4, 4),), dynamic_shapes=({0: batch},), strict=False)
    program = Program.from_exported(exported)
    program.save(tmp_path / "whole.pt2")
    loaded: Any = torch.export.load(tmp_path / "whole.pt2").module()
    for size in (2, 5, 33):
        x = torch.randn(size, 4, 4, generator=torch.Generator().manual_seed(size))
        torch.testing.assert_close(loaded(x), model(x))
