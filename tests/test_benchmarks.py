"""What benchmarks print is kept, and the next run says what has changed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.record import changes, read_tables, recorded

PRINTED = """torch 2.13.0+cpu, one thread; seconds

| layers | plan | apply |
|---|---|---|
| 12 | {} | 0.06 |

Eager, µs

| model | by | original | folded |
|---|---|---|---|
| resnet | eager | 3.1 | 2.0 (0.65, 0.66) |
| resnet | ort | 2.1 | {} |
"""


def test_tables_are_read() -> None:
    assert read_tables(PRINTED.format(0.13, "—")) == {
        "torch …, one thread; seconds": {"12, plan": "0.13", "12, apply": "0.06"},
        "Eager, µs": {
            "resnet eager, original": "3.1", "resnet eager, folded": "2.0 (0.65, 0.66)",
            "resnet ort, original": "2.1", "resnet ort, folded": "—",
        },
    }  # fmt: skip


def test_only_what_noise_does_not_explain_has_changed() -> None:
    before, after = read_tables(PRINTED.format(0.13, "—")), read_tables(PRINTED.format(0.131, "1.9"))
    assert changes(before, before) == []
    assert changes(before, after) == ["Eager, µs: resnet ort, folded: — → 1.9"]


def test_the_next_run_says_what_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["somewhere/fold_speed.py", "--rounds", "3"])
    for plan, code in ((0.1, None), (0.1, 1), (0.2, None)):
        with pytest.raises(SystemExit) as left:
            recorded(lambda: print(PRINTED.format(plan, "x")) or code, tmp_path / "results")  # noqa: B023
        assert left.value.code == code
    first, second, third = capsys.readouterr().out.split("torch 2.13.0+cpu, one thread")[1:]
    assert "Since" not in first
    assert "- no change" in second
    assert "- torch …, one thread; seconds: 12, plan: 0.1 → 0.2" in third
    kept = json.loads((tmp_path / "results" / "fold_speed.json").read_text())
    assert kept["--rounds 3"]["tables"]["Eager, µs"]["resnet ort, original"] == "2.1"
