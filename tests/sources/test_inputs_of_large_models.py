"""Inputs of a model that is larger than anybody wants to read for their sake: found on shapes, where it can be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from normfuse.errors import InputError
from normfuse.sources import index_limits
from normfuse.sources.index_limits import integer_limits
from normfuse.sources.inputs import Inputs
from normfuse.sources.tensor_files import open_weights


class _Tables(nn.Module):
    def __init__(self, path: Path, *, asks: bool = False) -> None:
        super().__init__()
        self.asks, self.ran = asks, False
        self.words, self.places = nn.Embedding(99, 4), nn.Embedding(7, 4)
        save_file(self.state_dict(), path)
        for name, tensor in open_weights(path).tensors().items():
            self.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(tensor)  # type: ignore[assignment]

    def forward(self, words: Tensor, places: Tensor | None = None, kinds: dict[str, Tensor] | None = None) -> Tensor:
        total = self.words.weight.sum()
        self.ran = not isinstance(total, FakeTensor)
        if self.asks and float(total) == 12345:
            raise AssertionError
        value = self.words(words.view(-1).clone().view(words.shape))
        if places is not None:
            value = value + self.places(places.long())
        return value if kinds is None else value + self.words.weight[kinds["of"]]


INPUTS = {
    "one": Inputs((torch.tensor([[1, 2]]),), {}),
    "names": Inputs((), {"words": torch.tensor([[1, 2]]), "places": torch.tensor([[0, 3]], dtype=torch.int32)}),
    "nested": Inputs((torch.tensor([[1, 2]]),), {"kinds": {"of": torch.tensor([[4, 5]])}}),
}


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("asks", [False, True])
def test_shapes_tell_what_a_run_tells(inputs: Inputs, asks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _Tables(tmp_path / "m.safetensors", asks=asks)
    usual = integer_limits(module, inputs)
    assert module.ran
    assert set(usual.values()) <= {99, 7}
    assert usual
    monkeypatch.setattr(index_limits, "LARGEST_RUN", 0)
    assert integer_limits(module, inputs) == usual
    assert module.ran == asks  # what asks for values is run


def test_a_model_that_does_not_run_says_so_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _Tables(tmp_path / "m.safetensors")
    monkeypatch.setattr(index_limits, "LARGEST_RUN", 0)
    with pytest.raises(InputError, match="does not run on these inputs"):
        integer_limits(module, Inputs((torch.tensor([[1, 2]]), torch.tensor([[1, 2, 3]])), {}))


def test_what_is_in_no_file_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = _Tables(tmp_path / "m.safetensors").double()
    monkeypatch.setattr(index_limits, "LARGEST_RUN", 0)
    integer_limits(module, INPUTS["one"])
    assert module.ran
