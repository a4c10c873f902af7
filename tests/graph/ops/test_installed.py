"""Rows of other packages that are no rows, or of operators that have one (one that is in order: tests/test_plugins.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from normfuse.errors import NormfuseWarning
from normfuse.graph.ops.installed import GROUP, installed
from normfuse.graph.ops.row import COMPUTED, NO_WEIGHT, PLAIN, SCALES, SEEN, Operator

ROW = Operator(
    carries=lambda node, a, axis: ((a["self"], axis),),
    hides=SEEN, shift=SCALES, keeps=COMPUTED, computes=PLAIN, role=NO_WEIGHT, width=True,
)  # fmt: skip
SIGMOID = "torch.ops.aten.sigmoid.default"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    installed.cache_clear()
    yield tmp_path
    installed.cache_clear()


def bring(site: Path, name: str, rows: str) -> None:
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {name}\n")
    (site / f"{name}.py").write_text(f"import torch\nfrom tests.graph.ops.test_installed import ROW\nOPERATORS = {rows}\n")


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ("{torch.ops.aten.add.Tensor: ROW}", "there is a row of aten.add.Tensor already"),
        (f"{{{SIGMOID}: None}}", "is no normfuse.graph.ops.row.Operator"),
        ("1 / 0", "division by zero"),
    ],
)
def test_what_is_no_row_is_left_out_with_a_warning(site: Path, rows: str, why: str) -> None:
    name = f"tiny_rows_{len(rows)}"
    bring(site, name, rows)
    with pytest.warns(NormfuseWarning, match=f"(?s)'{name}'.*left out: .*{why}"):
        assert not installed()


def test_two_packages_with_a_row_of_one_operator(site: Path) -> None:
    for name in ("tiny_rows_x", "tiny_rows_y"):
        bring(site, name, f"{{{SIGMOID}: ROW}}")
    with pytest.warns(NormfuseWarning, match="'tiny_rows_y'.*already"):
        assert list(installed()) == [torch.ops.aten.sigmoid.default]
