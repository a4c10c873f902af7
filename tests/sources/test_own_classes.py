"""Classes of the user's own file are read where the user names it, and no hint sends anybody to a stranger's package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import normfuse
from normfuse.errors import InputError, LoadError

CODE = """
import torch
from torch import nn, fx
from helper_of_mine import WIDTH
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
    def forward(self, x):
        return self.norm(x)
class Acts:
    def __reduce__(self):
        return (print, ("acted",))
"""


def written(folder: Path, name: str, made: str = "Net()") -> Path:
    """A model whose class is of a file in a folder, pickled in another process."""
    (folder / "helper_of_mine.py").write_text("WIDTH = 4\n")
    (folder / f"{name}.py").write_text(CODE)
    save = f"import torch, {name}; torch.save({name}.{made}, 'model.pt')"
    subprocess.run([sys.executable, "-c", save], cwd=folder, check=True)
    return folder / "model.pt"


@pytest.fixture(autouse=True)
def path_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])


def test_the_classes_of_a_named_file_are_read(tmp_path: Path) -> None:
    path = written(tmp_path, "net_of_mine")
    with pytest.raises(LoadError, match=r"net_of_mine\.Net") as told:
        normfuse.load(path)
    assert f"--model {tmp_path / 'net_of_mine.py'}" in (told.value.hint or "")
    assert "install" not in (told.value.hint or "")
    model = normfuse.load(path, code=tmp_path / "net_of_mine.py")
    assert isinstance(model, nn.Module)
    assert type(model).__name__ == "Net"
    assert model(torch.randn(2, 4)).shape == (2, 4)
    with pytest.raises(LoadError, match="refused"):  # what is not made there stays a name of no package
        normfuse.load(path)


def test_a_file_that_is_named_lets_nothing_else_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, "acts_of_mine", made="Acts()")
    with pytest.raises(LoadError):
        normfuse.load(path, code=tmp_path / "acts_of_mine.py")
    assert "acted" not in capfd.readouterr().out


def test_a_file_called_like_a_package_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "net_of_mine_too")
    (tmp_path / "torch.py").write_text("raise SystemExit\n")
    for name in ("torch.py", "missing.py", "model.pt"):
        with pytest.raises(InputError):
            normfuse.load(path, code=tmp_path / name)


@pytest.mark.parametrize(
    ("module", "hint"), [("ultralytics", "pip install ultralytics"), ("strange_net", "may be a stranger's")]
)
def test_only_well_known_packages_are_to_be_installed(module: str, hint: str, tmp_path: Path) -> None:
    from normfuse.sources.missing_packages import what_to_do

    assert hint in what_to_do([module], tmp_path)
    (tmp_path / f"{module}.py").touch()
    assert "install" not in what_to_do([module], tmp_path)
    assert f"--model {tmp_path / module}.py" in what_to_do([module], tmp_path)
