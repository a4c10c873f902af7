"""What is in the way of an optional package is told by its own name, with what to do about it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from normfuse.errors import LoadError, MissingExtra
from normfuse.sources.packages import package
from tests.sources.test_brought_back import GPT2, asked, saved

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def transformers(tmp_path: Path) -> Any:
    """As it is once a folder of it was saved: it puts another module in its place meanwhile."""
    saved(tmp_path / "m", "GPT2LMHeadModel", GPT2)
    return sys.modules["transformers"]


@pytest.fixture(autouse=True)
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that cannot be imported, or need others that cannot."""
    for name, text in {
        "torchbroken": "raise RuntimeError('operator torchbroken::nms does not exist')",
        "broken": "1 / 0",
        "outer_of_torch": "import torchbroken",
        "outer": "try:\n    import broken\nexcept Exception as error:\n    raise ImportError('look elsewhere') from error",
        "outermost": "import outer",
        "lacks": "import nowhere_to_be_found.part",
        "too_old": "from outer_of_nothing import what_is_new",
        "outer_of_nothing": "",
    }.items():
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "said", "hint"),
    [
        ("torchbroken", "the package 'torchbroken' is installed but cannot be imported here (operator", "that fits torch 2"),
        ("outer_of_torch", "outer_of_torch needs the package 'torchbroken', which is installed but", "that fits torch 2"),
        ("outer", "needs the package 'broken', which is installed but", "pip install --force-reinstall broken"),
        ("outermost", "needs the package 'broken', which is installed but", "pip install --force-reinstall broken"),
        ("lacks", "lacks needs 'nowhere_to_be_found', a package not installed here", "pip install nowhere_to_be_found"),
        ("too_old", "the package 'too_old' is installed but", "pip install --force-reinstall too_old"),
    ],
)  # fmt: skip
def test_what_is_in_the_way_is_named(name: str, said: str, hint: str) -> None:
    with pytest.raises(LoadError) as told:
        package(name)
    assert said in str(told.value)
    assert hint in (told.value.hint or "")


def test_a_package_that_is_not_there_is_an_extra() -> None:
    with pytest.raises(MissingExtra, match="needs the package 'not_there_at_all'"):
        package("not_there_at_all")


def test_nothing_is_to_be_installed_that_is_called_like_a_file_here(tmp_path: Path) -> None:
    (tmp_path / "nowhere_to_be_found.py").touch()
    with pytest.raises(LoadError) as told:
        package("lacks")
    assert "pip" not in (told.value.hint or "")
    assert "start normfuse from another folder" in (told.value.hint or "")


def test_a_class_of_transformers_names_the_package_that_it_needs(
    transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where torchvision was built for another torch: transformers itself names its class only."""
    monkeypatch.delattr(transformers, "GPT2LMHeadModel", raising=False)
    monkeypatch.setattr(transformers, "_get_module", lambda name: importlib.import_module("outer_of_torch"))
    answer = asked("rewrite", tmp_path / "m", "--pass", "pre_rmsnorm", "-o", tmp_path / "out")
    assert answer.exit_code == 2
    assert "GPT2LMHeadModel of transformers needs the package 'torchbroken', which is installed but cannot" in answer.output
    assert "pip install --force-reinstall torchbroken" in answer.output
    assert "bug" not in answer.output


def test_a_placeholder_names_the_package_that_it_needs(
    transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    class Placeholder(metaclass=transformers.utils.DummyObject):  # type: ignore[metaclass]
        _backends = ("timm",)

    monkeypatch.setattr(transformers, "GPT2LMHeadModel", Placeholder)
    answer = asked("rewrite", tmp_path / "m", "--pass", "pre_rmsnorm", "-o", tmp_path / "out")
    assert answer.exit_code == 2
    assert "GPT2LMHeadModel of transformers needs 'timm', a package not installed here" in answer.output
    assert "pip install timm" in answer.output


def test_a_package_that_a_model_turns_out_to_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anywhere at all: the command line names it, unless a file here is called so."""

    def lacks(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError("No module named 'sentencepiece'", name="sentencepiece")

    monkeypatch.setattr("normfuse.sources.opened.open", lacks)
    assert "hint: pip install sentencepiece" in asked("inspect", "model.pt").output
    (tmp_path / "sentencepiece.py").touch()
    assert "pip install" not in asked("inspect", "model.pt").output
