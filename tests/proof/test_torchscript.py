"""TorchScript: refused unasked, as its code runs while it is loaded; trusted, it becomes a program that is compared with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import normfuse
from normfuse.cli import main
from normfuse.errors import LoadError, TraceError
from tests.zoo.spread import spread

pytestmark = pytest.mark.filterwarnings("ignore")
SPEC = "float32[batch=2,5,8]"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.last = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(self.norm(x))))


class Counts(Net):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[0]):
            x = x + self.norm(x)
        return x


class Acts(nn.Module):
    """Its code runs when it is loaded, before anything is asked of it."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.place, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.place, self.training = state
        torch.save(torch.ones(1), self.place)

    def forward(self, x: Tensor) -> Tensor:
        return x


def saved(path: Path, model: nn.Module, how: str = "script") -> nn.Module:
    x = torch.randn(2, 5, 8)
    script: Any = torch.jit.trace(model, x) if how == "trace" else torch.jit.script(model)
    torch.jit.save(torch.jit.freeze(script) if how == "frozen" else script, path)  # type: ignore[no-untyped-call]
    return model


def ask(*words: Any) -> Any:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_it_is_not_loaded_unasked(tmp_path: Path) -> None:
    saved(tmp_path / "acts.pt", Acts(str(tmp_path / "canary")))
    (tmp_path / "canary").unlink(missing_ok=True)
    for words in (["inspect"], ["rewrite", "--pass", "all"]):
        answer = ask(words[0], tmp_path / "acts.pt", *words[1:])
        assert answer.exit_code == 2
        assert "is a TorchScript archive: code, which is not run unasked" in answer.output
        assert "--trust-pickle" in answer.output
    assert not (tmp_path / "canary").exists()
    torch.jit.load(tmp_path / "acts.pt")  # type: ignore[no-untyped-call]
    assert (tmp_path / "canary").exists(), "or there would be no reason to refuse it"


@pytest.mark.parametrize("how", ["trace", "script", "frozen"])
def test_a_trusted_one_becomes_a_program(how: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "net.pt", spread(Net()).eval(), how)
    words = ("--trust-pickle", "--input", SPEC)
    answer = ask("rewrite", tmp_path / "net.pt", "--pass", "fold_affine", *words)
    assert answer.exit_code == 0, answer.output
    again = torch.export.load(tmp_path / "net.rewritten.pt2").module()
    x = torch.randn(4, 5, 8)
    with torch.no_grad():
        assert torch.allclose(again(x), model(x), atol=1e-5)
    answer = ask("verify", tmp_path / "net.pt", tmp_path / "net.rewritten.pt2", *words)
    assert answer.exit_code == 0, answer.output


def test_what_torch_does_not_convert_is_one_line(tmp_path: Path) -> None:
    saved(tmp_path / "net.pt", spread(Counts()).eval())
    answer = ask("rewrite", tmp_path / "net.pt", "--pass", "all", "--trust-pickle", "--input", SPEC)
    assert answer.exit_code == 2
    assert [line.partition(": ")[0] for line in answer.output.splitlines()] == ["error", "hint"]
    assert "torch's converter cannot read this TorchScript program" in answer.output
    assert {each.name for each in tmp_path.iterdir()} == {"net.pt"}


def test_what_torch_converts_wrongly_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "net.pt", spread(Net()).eval())
    other = torch.export.export(spread(Net()).eval(), (torch.randn(2, 5, 8),))

    class Wrong:
        def __init__(self, *_: Any) -> None: ...

        def convert(self) -> Any:
            return other

    other.state_dict["norm.weight"].data.mul_(1.5)
    monkeypatch.setattr("torch._export.converter.TS2EPConverter", Wrong)
    script = normfuse.load(tmp_path / "net.pt", trust_pickle=True)
    with pytest.raises(TraceError, match="makes another function of this TorchScript program"):
        normfuse.rewrite(script, "fold_affine", (torch.randn(2, 5, 8),))


def test_a_damaged_one_is_one_line(tmp_path: Path) -> None:
    saved(tmp_path / "net.pt", spread(Net()).eval())
    (tmp_path / "cut.pt").write_bytes((tmp_path / "net.pt").read_bytes()[:-200])
    with pytest.raises(LoadError, match="damaged or cut short"):
        normfuse.load(tmp_path / "cut.pt", trust_pickle=True)
