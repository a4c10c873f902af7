"""A model whose tensors lie in a file is called without a copy of them, and is afterwards as it was; so is the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from normfuse.proof.undisturbed import undisturbed
from normfuse.sources.mapped import is_mapped, is_unwritten
from normfuse.sources.tensor_files import open_weights

SIZE = 700
"""Of a square weight of two megabytes, no multiple of a page."""


class _Writes(nn.Module):
    def __init__(self, held: dict[str, Tensor], write: Callable[[nn.Module], object]) -> None:
        super().__init__()
        self.first, self.weight = nn.Parameter(held["first"]), nn.Parameter(held["weight"])
        self.register_buffer("table", held["table"])
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.write(self)
        return x @ self.weight


def _given_other_memory(module: nn.Module) -> None:
    module.weight.data = module.weight * 2  # type: ignore[operator, assignment]


def _written_and_given_other_memory(module: nn.Module) -> None:
    module.weight.mul_(2)  # type: ignore[operator]
    _given_other_memory(module)


WRITES: dict[str, Callable[[nn.Module], object]] = {
    "nothing": lambda module: None,
    "all": lambda module: [each.mul_(2) for each in (*module.parameters(), *module.buffers())],
    "one": lambda module: module.weight.clamp_(min=0),  # type: ignore[operator]
    "an entry at the end": lambda module: module.weight[-1, -1].fill_(3),  # type: ignore[index]
    "other memory": _given_other_memory,
    "both": _written_and_given_other_memory,
    "another object": lambda module: setattr(module, "weight", nn.Parameter(torch.ones(SIZE, SIZE))),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_mapped_tensors_are_put_back(write: Callable[[nn.Module], object], tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({name: torch.randn(SIZE, SIZE) for name in ("first", "weight", "table")}, path)
    content, expected = path.read_bytes(), open_weights(path).tensors()
    module = _Writes(open_weights(path).tensors(), write)
    with torch.no_grad():
        module.first[0, 0] = 7  # the owner's own change, in a page of the next one's
    expected["first"][0, 0] = 7
    held, places = module.state_dict(keep_vars=True), [each.data_ptr() for each in module.state_dict().values()]
    for _ in range(2):
        with undisturbed(module):
            module(torch.ones(1, SIZE))
        now = module.state_dict(keep_vars=True)
        assert all(now[name] is held[name] for name in held)
        assert all(torch.equal(now[name], expected[name]) for name in held)
    assert [each.data_ptr() for name, each in module.state_dict().items() if name != "first"] == places[1:]
    assert path.read_bytes() == content


def test_nothing_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    save_file({name: torch.randn(SIZE, SIZE) for name in ("first", "weight", "table")}, path)
    module = _Writes(open_weights(path).tensors(), lambda module: None)
    if not is_unwritten(module.weight):
        pytest.skip("this system does not tell of pages")
    monkeypatch.setattr(Tensor, "clone", lambda tensor: pytest.fail("copied") if tensor.nbytes > 4096 else tensor)
    with undisturbed(module):
        module(torch.ones(1, SIZE))
    assert all(map(is_mapped, module.state_dict().values()))
    assert all(map(is_unwritten, module.state_dict().values()))
