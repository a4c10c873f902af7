"""AOTInductor packages: compiled, told apart from other .pt2 files, and run only when trusted."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

from normfuse.errors import ExportError, InputError
from normfuse.exporters import aoti
from normfuse.graph.program import Program
from normfuse.planning.planner import plan
from tests.exporters.agreement import excess
from tests.models import TRAPS

# One worker: inductor writes what two processes compile at once to the same files, and one of them reads half a file.
pytestmark = pytest.mark.xdist_group("aoti")
QUICK = {"aot_inductor.compile_wrapper_opt_level": "O0"}


@pytest.fixture(scope="module")
def program() -> Program:
    trap = TRAPS["plain"]
    dims = ({0: Dim("batch", max=64)},)
    program = Program.trace(trap.module(), trap.inputs, dynamic_shapes=dims)
    return plan(program, ["pre_rmsnorm"]).apply(program)


@pytest.fixture(scope="module")
def package(program: Program, tmp_path_factory: pytest.TempPathFactory) -> aoti.PackageInfo:
    return aoti.export(program, tmp_path_factory.mktemp("aoti") / "model.pt2", options=QUICK)


def test_it_computes_what_the_program_does(program: Program, package: aoti.PackageInfo) -> None:
    artifact = aoti.open_artifact(package.path, trust=True)
    assert artifact.runtime.startswith(f"AOTInductor {torch.__version__} (")
    assert artifact.inputs is None
    for batch in (2, 5, 64):
        ids = torch.randint(0, 11, (batch, 5))
        assert excess(program, (ids,), artifact.runs[""]((ids,))) < 1


def test_what_was_written(package: aoti.PackageInfo) -> None:
    assert package.bytes == package.path.stat().st_size > 100_000
    assert package.target["device_key"] == "cpu"
    assert [file.name for file in package.path.parent.iterdir()] == ["model.pt2"]


def test_inputs_that_do_not_fit_are_an_error_and_not_a_wrong_answer(package: aoti.PackageInfo) -> None:
    run = aoti.open_artifact(package.path, trust=True).runs[""]
    for wrong in (torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 5), torch.full((2, 5), 99)):
        with pytest.raises(InputError, match=r"model\.pt2 does not run on these inputs"):
            run((wrong,))


def test_native_code_wants_trust(package: aoti.PackageInfo) -> None:
    with pytest.raises(ExportError, match="native code") as raised:
        aoti.open_artifact(package.path)
    assert "--trust-pickle" in (raised.value.hint or "")


@pytest.mark.slow
def test_packages_and_programs_share_a_suffix(tmp_path: Path, package: aoti.PackageInfo) -> None:
    program = Program.trace(nn.ReLU(), (torch.randn(2),))
    program.save(tmp_path / "program.pt2")
    (tmp_path / "text.pt2").write_text("no zip file")
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as other:
        other.writestr("data.pkl", b"")
    assert aoti.is_aoti(package.path)
    for name in ("program.pt2", "text.pt2", "other.pt2", "missing.pt2"):
        assert not aoti.is_aoti(tmp_path / name)
        with pytest.raises(ExportError, match="no AOTInductor package"):
            aoti.open_artifact(tmp_path / name, trust=True)


def test_a_broken_package_is_one_line(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "broken.pt2", "w") as broken:
        broken.writestr("model/data/aotinductor/model/nothing.txt", b"")
    with pytest.raises(ExportError, match=r"broken\.pt2 cannot be loaded") as raised:
        aoti.open_artifact(tmp_path / "broken.pt2", trust=True)
    assert "\n" not in str(raised.value)


def test_the_name_must_be_that_of_a_package(tmp_path: Path, program: Program) -> None:
    with pytest.raises(InputError, match=r"\.pt2"):
        aoti.export(program, tmp_path / "model.so")


def test_what_inductor_cannot_compile_is_refused(tmp_path: Path, program: Program) -> None:
    with pytest.raises(ExportError, match="inductor cannot compile") as raised:
        aoti.export(program, tmp_path / "model.pt2", options={"no.such.setting": 1})
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())
