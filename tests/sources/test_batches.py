"""What a batch of a loader is: the same to everything that takes data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normfuse
from normfuse.errors import NormfuseWarning
from normfuse.sources.batches import as_batch, taken
from normfuse.sources.inputs import Inputs
from tests.zoo.spread import spread

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 3, 1, 4])


class Plain(nn.Module):
    """A BatchNorm and a LayerNorm behind linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 8),
            nn.BatchNorm1d(8),
            nn.Linear(8, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 5),
            nn.LayerNorm(5),
            nn.Linear(5, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Optional(Plain):
    """Has a second argument that a label would fit."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.layers(x)
        return y if scale is None else y * scale[:, None]


class AllOptional(Plain):
    """As the models of transformers: nothing is required."""

    def forward(self, x: Tensor | None = None, *, twice: Tensor | None = None) -> Tensor:
        assert x is not None
        return self.layers(x)


def _saved(model: nn.Module, folder: Path) -> Path:
    path = folder / "model.pt2"
    torch.export.save(torch.export.export(model, (X,)), path)
    return path


def _loader() -> Iterable[Any]:
    return DataLoader(TensorDataset(torch.cat([X, X + 1]), torch.cat([LABELS, LABELS])), batch_size=4)


ASKED: dict[str, Callable[[Any, Any], Any]] = {
    "rewrite": lambda model, data: normfuse.rewrite(model, "conv_bn", inputs=data).report.notes,
    "verify": lambda model, data: normfuse.verify(model, model, data).notes,
    "calibrate": lambda model, data: [normfuse.calibrate(model, data).left_out],
    "strip": lambda model, data: (
        normfuse.strip(
            model, [{"args": batch, "kwargs": {"targets": batch[1]}} for batch in data], max_loss_increase=9.0
        ).report.folding.notes
    ),
}


@pytest.mark.parametrize("ask", ASKED)
@pytest.mark.parametrize("model", [Plain, Optional, AllOptional, "file", "program"])
def test_labels_are_no_inputs_and_that_is_said(ask: str, model: Any, tmp_path: Path) -> None:
    made = spread(Plain() if isinstance(model, str) else model()).eval()
    given = {"file": lambda: _saved(made, tmp_path), "program": lambda: torch.export.export(made, (X,))}.get(
        model, lambda: made
    )()
    notes = ASKED[ask](given, _loader())
    assert any("labels are none" in note for note in notes)


def test_inspect_takes_them_too() -> None:
    assert normfuse.inspect(spread(Optional()).eval(), inputs=_loader()).counts == {"batch_norm": 1, "layer_norm": 2}


@pytest.mark.parametrize("model", [Optional, AllOptional])
@pytest.mark.parametrize("change", [normfuse.tune, normfuse.deploy])
def test_of_an_optional_argument_that_gets_none_is_told(model: type[Plain], change: Any) -> None:
    for data, tells in ((_loader(), model is Optional), ([{"x": X}, {"x": X + 1}], False)):
        made = spread(model()).eval()
        expected = made(X).detach().clone()
        if tells:
            with pytest.warns(NormfuseWarning, match="name optional inputs in mappings \\(scale\\)"):
                change(made, "conv_bn", iter(data))
        else:
            change(made, "conv_bn", iter(data))
        torch.testing.assert_close(made(X), expected, rtol=1e-4, atol=1e-5)


def test_recalibrate_takes_what_the_forward_requires() -> None:
    for model, tells in ((Plain, False), (AllOptional, False), (Optional, True)):
        one, other = spread(model()), spread(model())
        other.load_state_dict(one.state_dict())
        normfuse.recalibrate(one, [X, X + 1])
        if tells:
            with pytest.warns(NormfuseWarning, match="scale") as told:
                normfuse.recalibrate(other, _loader())
            assert len(told) == 1
        else:
            normfuse.recalibrate(other, _loader())
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_recalibrate_gives_two_required_arguments_both() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.norm(x + y)

    model = normfuse.recalibrate(nn.DataParallel(Two()), [(X, X, LABELS)])
    torch.testing.assert_close(model.module.norm.running_mean, (X + X).mean(0))


def test_which_of_a_tuple_are_taken() -> None:
    class Many(nn.Module):
        def forward(self, *each: Tensor) -> Tensor:
            return each[0]

    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor, z: Tensor | None = None) -> Tensor:
            return x + y

    def count(model: Any, *args: Any, **kwargs: Any) -> int:
        return len(taken(model, Inputs(args, kwargs)).args)

    assert count(Many(), X, X, X) == 3
    assert [count(Two(), *[X] * given) for given in (1, 2, 3, 4)] == [1, 2, 2, 2]
    assert count(Two(), X, X, y=X) == 1
    assert count(torch.compile(Two()), X, X, LABELS) == 2
    both = taken(Two(), Inputs((X, X, X), {}, more=(Inputs((X, X, X), {}),)))
    assert len(both.more[0].args) == 2
    program = torch.export.export(Two(), (X, X), {"z": X})
    for traced in (program, normfuse.Program.from_exported(program), program.module()):
        assert count(traced, X, X, LABELS, LABELS) == 2
        whole = taken(traced, Inputs((X, X, X), {}))
        assert len(whole.args) == 2
        assert list(whole.kwargs) == ["z"]
        assert whole.left_out is None


def test_the_forms_of_a_batch() -> None:
    pair = Inputs((X,), {"y": X})
    assert as_batch(pair) is pair
    assert as_batch(X).args == as_batch((X,)).args == as_batch([X]).args == (X,)
    assert as_batch({"x": X}).kwargs == {"x": X}
    assert as_batch("anything").args == ("anything",)
