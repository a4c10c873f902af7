"""The published step tables (arXiv 2507.02559 and its configurations), from layers, start and gaps."""

from __future__ import annotations

import pytest

from normfuse.errors import NormfuseError
from normfuse.stripping.schedule import Schedule

PUBLISHED = {  # layers, start, gaps; first and last step of ln_2, ln_1 QK, ln_1 V; ln_f, end of text, first token
    "small": (12, 20, (2, 2, 3), (20, 42), (44, 66), (68, 101), 104, 106, 116),
    "medium": (24, 20, (2, 2, 3), (20, 66), (68, 114), (116, 185), 188, 190, 200),
    "large": (36, 30, (4, 4, 6), (30, 170), (174, 314), (318, 528), 534, 536, 546),
    "XL": (48, 50, (4, 4, 6), (50, 238), (242, 430), (434, 716), 722, 724, 734),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_table(name: str) -> None:
    layers, start, gaps, mlp, main, values, final, end_of_text, first_token = PUBLISHED[name]
    schedule = Schedule(layers, start, gaps)
    for kind, (first, last), gap in zip(("mlp", "main", "values"), (mlp, main, values), gaps, strict=True):
        assert schedule.steps(kind) == list(range(first, last + 1, gap))  # type: ignore[arg-type]
        assert len(schedule.steps(kind)) == layers  # type: ignore[arg-type]
    assert (schedule.steps("final"), schedule.steps("end_of_text")) == ([final], [end_of_text])
    assert schedule.steps("first_token") == [first_token]
    assert schedule.last == final
    assert [event.layer for event in schedule if event.kind == "values"] == list(range(layers))


def test_the_order_is_the_order_of_the_steps() -> None:
    steps = [event.step for event in Schedule(5, 3, (1, 4, 2))]
    assert steps == sorted(steps)


def test_a_gap_of_zero_removes_all_layers_at_once() -> None:
    schedule = Schedule(4, 10, (0, 2, 0))
    assert schedule.steps("mlp") == [10] * 4
    assert schedule.steps("main") == [10, 12, 14, 16]
    assert schedule.steps("values") == [18] * 4
    assert schedule.last == 18


@pytest.mark.parametrize(
    ("layers", "start", "gaps"), [(0, 1, (1, 1, 1)), (2, 0, (1, 1, 1)), (2, 1, (1, -1, 1)), (2, 1, (1, 1))]
)
def test_impossible_schedules_are_refused(layers: int, start: int, gaps: tuple[int, int, int]) -> None:
    with pytest.raises(NormfuseError, match="no schedule begins"):
        Schedule(layers, start, gaps)
