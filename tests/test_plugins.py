"""Passes, exporters and rows of other packages: the example of docs/plugins.md installed, and packages that are broken."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import normfuse
from normfuse.cli import main
from normfuse.errors import NormfuseError, NormfuseWarning
from normfuse.exporters.targets import targets
from normfuse.graph.ops import installed as rows
from normfuse.planning.registry import codes, passes

DOCS = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text()
BLOCKS = dict(re.findall(r"```\w+\n# (\S+)\n(.*?)```", DOCS, flags=re.DOTALL))
"""Name of a file -> what docs/plugins.md has in it."""
COUNT = itertools.count()
PASS, EXPORTER, ROWS = (BLOCKS[f"tiny/{name}.py"] for name in ("zero_shift", "exporter", "rows"))


def installed(site: Path, name: str, entries: dict[str, dict[str, str]], modules: dict[str, str]) -> None:
    """A package as pip would leave it in a folder of packages."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    groups = (f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in each.items()) for group, each in entries.items())
    (info / "entry_points.txt").write_text("\n".join(groups))
    for path, source in modules.items():
        (site / path).parent.mkdir(exist_ok=True)
        (site / path).write_text(source)


def tiny(site: Path) -> None:
    """The example of the page."""
    told = re.findall(r'\[project\.entry-points\."(.+?)"\]\n((?:\w+ = ".+"\n)+)', BLOCKS["pyproject.toml"])
    entries = {group: dict(re.findall(r'(\w+) = "(.+)"', lines)) for group, lines in told}
    # torch forgets an operator when the library that defined it is collected, be it defined once more by then
    rows_ = ROWS.replace("tiny::", f"tiny{(again := next(COUNT))}::").replace("ops.tiny.", f"ops.tiny{again}.")
    modules = {"tiny/__init__.py": "", "tiny/zero_shift.py": PASS, "tiny/exporter.py": EXPORTER, "tiny/rows.py": rows_}
    installed(site, "tiny", entries, modules)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages on the path, whose modules are forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]
    forget()


def forget() -> None:
    for known in (passes, codes, targets, rows.installed):
        known.cache_clear()


def model(shift: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 3)).eval()
    nn.init.constant_(made.get_parameter("3.bias"), shift)
    return made


INPUTS = (torch.randn(5, 4),)


def test_a_pass_of_another_package_is_one_of_ours(site: Path) -> None:
    tiny(site)
    forget()
    assert list(passes())[-1] == "zero_shift"
    assert passes()["zero_shift"].package == "tiny 1.0"
    assert codes()["TINY001"] == "The shift is not zero, so the norm adds something."
    result = normfuse.rewrite(model(shift=0.5), "zero_shift", INPUTS)
    assert [str(each.sites[0]) for each in result.report.plan.rewrites] == ["1"]
    assert [(str(each.site), each.code) for each in result.report.plan.refusals] == [("3", "TINY001")]
    assert result.report.evidence.ok
    assert "1.bias" not in result.program.exported.state_dict


def test_a_row_of_another_package_is_one_of_ours(site: Path) -> None:
    tiny(site)
    forget()
    (operator,) = rows.installed()
    assert re.fullmatch(r"tiny\d+\.twice\.default", str(operator))

    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(operator(self.first(x)))

    result = normfuse.rewrite(Doubled().eval(), "pre_rmsnorm", INPUTS)
    assert [str(each.sites[0]) for each in result.report.plan.rewrites] == ["norm"], result.report.plan.refusals


def test_an_exporter_of_another_package_is_one_of_ours(site: Path, tmp_path: Path) -> None:
    tiny(site)
    forget()
    for to in ("tiny", None):
        evidence = normfuse.export(model(), tmp_path / "model.tiny", to=to, inputs=INPUTS, note="x")
        assert evidence.ok
        assert "the tiny runtime" in evidence.runtimes
    assert normfuse.verify(model(), tmp_path / "model.tiny", INPUTS).ok
    assert not normfuse.verify(model(shift=0.5), tmp_path / "model.tiny", INPUTS).ok
    with pytest.raises(NormfuseError, match="option of tiny"):
        normfuse.export(model(), tmp_path / "model.tiny", inputs=INPUTS, colour="red")
    with pytest.raises(NormfuseError, match=r"a \.tiny file, not model\.bin"):
        normfuse.export(model(), tmp_path / "model.bin", to="tiny", inputs=INPUTS)


def asked(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_command_line_knows_both(site: Path, tmp_path: Path) -> None:
    tiny(site)
    forget()
    torch.export.save(torch.export.export(model(), INPUTS), tmp_path / "model.pt2")
    assert "Drop a LayerNorm's shift where it is zero. (tiny 1.0)" in asked("passes").stdout
    assert json.loads(asked("passes", "--json").stdout)["passes"][-1]["package"] == "tiny 1.0"
    assert asked("explain", "TINY001").stdout.startswith("TINY001  (zero_shift)")
    assert asked("explain", "zero_shift").stdout.startswith("zero_shift\n\nDrop a LayerNorm's shift")
    assert asked("rewrite", tmp_path / "model.pt2", "--pass", "zero_shift", "-o", tmp_path / "out.pt2").exit_code == 0
    exported = asked("export", tmp_path / "out.pt2", "-o", tmp_path / "out.tiny", "--json")
    assert json.loads(exported.stdout)["to"] == "tiny", exported.stderr


BROKEN = {
    "an import that fails": ({"bad": "bad"}, "import no_such_package\n", "No module named 'no_such_package'"),
    "no module": ({"bad": "not_there"}, "", "No module named 'not_there'"),
    "an import that leaves": ({"bad": "bad"}, "raise SystemExit(3)\n", "3"),
    "no function": ({"bad": "bad"}, '"""A manual."""\n', "has no attribute 'bad'"),
    "no manual": ({"bad": "bad"}, "def bad(program, facts):\n    yield\n", "no docstring"),
    "a code of ours": (
        {"bad": "bad"},
        '"""A manual.\n\nRefuses\n    NF203  Mine.\n"""\ndef bad(program, facts):\n    yield\n',
        "NF203 is one of pre_rmsnorm",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_pass_is_left_out_and_told(name: str, site: Path) -> None:
    entries, source, reason = BROKEN[name]
    tiny(site)
    installed(site, "broken", {"normfuse.passes": entries}, {"bad.py": source})
    forget()
    with pytest.warns(NormfuseWarning, match="'bad' of broken 1.0 is left out: ") as told:
        assert "bad" not in passes()
    assert reason in str(told[0].message)
    assert {"zero_shift", "pre_rmsnorm"} <= set(passes())


@pytest.mark.parametrize("source", ["", "SUFFIXES = ()\nexport = open_artifact = print\n", "raise ValueError('no runtime')\n"])
def test_a_broken_exporter_is_left_out_and_told(source: str, site: Path) -> None:
    installed(site, "broken", {"normfuse.exporters": {"bad": "bad"}}, {"bad.py": source})
    forget()
    with pytest.warns(NormfuseWarning, match="'bad' of broken 1.0 is left out: "):
        assert list(targets()) == ["onnx", "tensorrt", "openvino", "executorch", "aoti"]


def test_a_broken_package_is_a_line_on_stderr(site: Path) -> None:
    installed(site, "broken", {"normfuse.passes": {"bad": "bad"}}, {"bad.py": "import no_such_package\n"})
    forget()
    done = asked("explain", "NF203")
    assert done.exit_code == 0
    assert done.stderr.startswith("warning: 'bad' of broken 1.0 is left out: No module named")
    assert done.stderr.count("warning:") == 1


def test_two_packages_of_one_name_are_both_named(site: Path) -> None:
    tiny(site)
    installed(site, "other", {"normfuse.passes": {"zero_shift": "other"}}, {"other.py": PASS})
    forget()
    with pytest.raises(
        NormfuseError, match=r"two packages have 'zero_shift' in normfuse\.passes: (other|tiny) 1\.0 and"
    ) as error:
        passes()
    assert {"other 1.0", "tiny 1.0"} <= set(re.findall(r"\w+ 1\.0", str(error.value)))


@pytest.mark.parametrize(("group", "name", "known"), [("passes", "conv_bn", passes), ("exporters", "onnx", targets)])
def test_no_package_takes_a_name_of_ours(group: str, name: str, known: Any, site: Path) -> None:
    installed(site, "other", {f"normfuse.{group}": {name: "other"}}, {"other.py": ""})
    forget()
    with pytest.raises(NormfuseError, match=rf"'{name}' in normfuse\.{group}: normfuse and other 1\.0"):
        known()


def test_two_exporters_whose_files_end_alike_are_both_named(site: Path) -> None:
    installed(site, "other", {"normfuse.exporters": {"another": "other"}}, {"other.py": EXPORTER.replace(".tiny", ".onnx")})
    forget()
    with pytest.raises(NormfuseError, match=r"two targets write \.onnx files: 'onnx' of normfuse and 'another' of other 1\.0"):
        targets()


def test_an_error_of_another_package_is_not_taken_for_ours(site: Path) -> None:
    source = '"""A manual."""\ndef bad(program, facts):\n    yield from ()\n    raise KeyError("no such thing")\n'
    installed(site, "broken", {"normfuse.passes": {"bad": "bad"}}, {"bad.py": source})
    forget()
    with pytest.raises(NormfuseError, match=r"the pass 'bad' of broken 1\.0 failed: KeyError: 'no such thing'"):
        normfuse.rewrite(model(), "bad", INPUTS)


def test_a_folder_of_models_brings_no_code(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(site, "hostile", {"normfuse.passes": {"bad": "bad"}}, {"bad.py": "raise SystemExit('was run')\n"})
    monkeypatch.chdir(site)
    monkeypatch.syspath_prepend("")
    forget()
    assert "bad" not in passes()
    assert "bad" not in sys.modules
