"""The house itself: the two links at the top, what is linted, what a wheel holds, one version."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

import normfuse

ROOT = Path(__file__).parents[1]
LINKS = {"passes": "normfuse/passes", "exporters": "normfuse/exporters"}


def test_the_links_at_the_top_lead_into_the_package() -> None:
    assert {path.name: str(path.readlink()) for path in ROOT.iterdir() if path.is_symlink()} == LINKS
    assert all((ROOT / link / "__init__.py").is_file() for link in LINKS)


def test_nobody_imports_through_the_links() -> None:
    through = re.compile(r"^\s*(?:from|import) (?:passes|exporters)\b", re.MULTILINE)
    sources = (path for folder in ("normfuse", "tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))
    assert not [path for path in sources if through.search(path.read_text())]


ROOMS = (
    "", "sources", "graph", "analysis", "transforms", "passes", "planning", "proof", "modules", "torch_compile", "exporters",
    "report", "api", "stripping", "cli",
)  # fmt: skip
"""In the order of the flow; what stands beside the rooms comes first."""
DOORS = {"__init__", "__main__", "backend", "pytest_plugin"}
"""Modules beside the rooms through which people come in: they may import anything."""


def _imports() -> Iterator[tuple[str, str, str]]:
    """Every import of normfuse by itself: the module that imports, the module, the name."""
    package = ROOT / "normfuse"
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("normfuse"):
                importer = ".".join(path.relative_to(package).with_suffix("").parts)
                for alias in node.names:
                    inner = package / (node.module or "").removeprefix("normfuse").replace(".", "/").strip("/") / alias.name
                    is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                    module = f"{node.module}.{alias.name}" if is_module else str(node.module)
                    yield importer, module.removeprefix("normfuse").strip("."), "" if is_module else alias.name


def _room(module: str) -> str:
    first = module.partition(".")[0]
    return first if first in ROOMS else ""


def test_every_folder_is_a_room() -> None:
    folders = {path.name for path in (ROOT / "normfuse").iterdir() if (path / "__init__.py").is_file()}
    assert folders == {*ROOMS, "nn"} - {""}


def test_imports_follow_the_order_of_the_rooms() -> None:
    against = [
        (importer, imported)
        for importer, imported, _ in _imports()
        if importer not in DOORS and not importer.startswith("nn.") and not imported.startswith("nn")
        if ROOMS.index(_room(imported)) > ROOMS.index(_room(importer))
    ]
    assert not against


def test_no_private_name_leaves_its_room() -> None:
    private = re.compile(r"_(?!_)")
    assert not [each for each in _imports() if private.match(each[2]) and _room(each[0]) != _room(each[1])]


def test_there_are_no_circles_of_modules() -> None:
    pairs = ((importer.removesuffix(".__init__"), imported) for importer, imported, _ in _imports() if importer not in DOORS)
    links = nx.DiGraph(pairs)
    assert not list(nx.simple_cycles(links))


def test_every_file_is_linted() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--show-files", "."], cwd=ROOT, capture_output=True, text=True, check=True
    )
    linted = {Path(line) for line in shown.stdout.splitlines()}
    assert {path.resolve() for path in (ROOT / "normfuse").rglob("*.py")} <= linted


def test_only_the_package_is_installed() -> None:
    from setuptools import find_packages

    assert {name.partition(".")[0] for name in find_packages(str(ROOT), include=["normfuse*"])} == {"normfuse"}
    assert (ROOT / "normfuse" / "py.typed").is_file()


def test_the_version_stands_in_one_place() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", normfuse.__version__)
    assert not re.search(r'^version = "', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def test_everything_that_is_installed_is_pinned() -> None:
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in pinned if not line.startswith("#"))
    chosen = [line for line in (ROOT / "constraints.in").read_text().splitlines() if not line.startswith("#")]
    assert {line for line in chosen if "==" in line} <= set(pinned)


def test_make_quick_has_something_of_every_room() -> None:
    asked = ["make", "--dry-run", "--always-make", "quick"]
    quick = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    named = {Path(name.partition("::")[0]) for name in re.findall(r"\btests/\S+", quick)}
    assert all((ROOT / path).is_file() for path in named)
    rooms = {path.name for path in (ROOT / "normfuse").iterdir()} & {path.name for path in (ROOT / "tests").iterdir()}
    assert {"sources", "cli"} <= rooms - {"__init__.py", "__pycache__"} <= {path.parts[1] for path in named}


@pytest.mark.xdist_group("together")
def test_groups_of_tests_stay_together(request: pytest.FixtureRequest) -> None:
    """Models are traced and proven once per group; torn apart, the suite takes several times as long."""
    grouped = getattr(request.config.option, "loadgroup", False)  # of a worker
    assert not grouped or request.node.nodeid.endswith("@together")
