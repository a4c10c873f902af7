"""The house itself: the two links at the top, what is linted, what a wheel holds, one version."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import normfuse

ROOT = Path(__file__).parents[2]
LINKS = {"passes": "normfuse/passes", "exporters": "normfuse/exporters"}


def test_the_links_at_the_top_lead_into_the_package() -> None:
    assert {path.name: str(path.readlink()) for path in ROOT.iterdir() if path.is_symlink()} == LINKS
    assert all((ROOT / link / "__init__.py").is_file() for link in LINKS)


def test_nobody_imports_through_the_links() -> None:
    through = re.compile(r"^\s*(?:from|import) (?:passes|exporters)\b", re.MULTILINE)
    sources = (path for folder in ("normfuse", "tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))
    assert not [path for path in sources if through.search(path.read_text())]


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


@pytest.mark.xdist_group("together")
def test_groups_of_tests_stay_together(request: pytest.FixtureRequest) -> None:
    """Models are traced and proven once per group; torn apart, the suite takes several times as long."""
    grouped = getattr(request.config.option, "loadgroup", False)  # of a worker
    assert not grouped or request.node.nodeid.endswith("@together")
