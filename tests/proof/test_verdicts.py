"""No yes without evidence: what was not compared is neither proven nor disproven, and everybody is told."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import normfuse
from normfuse.cli import main
from normfuse.errors import InputError, NotCompared, VerificationFailed
from normfuse.proof.evidence import Evidence, Verdict
from normfuse.report.html import html
from normfuse.report.junit import junit
from tests.models import noise

X = noise(2, 3, 9, 9)


class Headed(nn.Module):
    """A convolutional net, and what becomes of its output."""

    def __init__(self, head: Callable[[Tensor], Any], *, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        self.head = head
        with torch.no_grad():
            self.net[0].weight.mul_(scale)  # type: ignore[operator]

    def forward(self, x: Tensor) -> Any:
        return self.head(self.net(x))


VACUOUS: dict[str, Callable[[Tensor], Any]] = {
    "NaN": lambda y: y * torch.nan,
    "infinite": lambda y: y.abs() * torch.inf,
    "no rows": lambda y: y[:0],
    "no columns": lambda y: y[..., :0],
    "no output": lambda y: None,
    "a number of Python": lambda y: 3,
    "zeros": lambda y: y * 0,
    "ones": lambda y: torch.ones_like(y),
    "a constant mask": lambda y: torch.zeros_like(y, dtype=torch.bool),
    "NaN beside numbers": lambda y: (y, y * torch.nan),
    "NaN and nothing": lambda y: (y[:0], y * torch.nan, None),
}


@pytest.mark.parametrize("head", VACUOUS)
def test_what_shows_nothing_is_not_compared(head: str) -> None:
    right, wrong = (Headed(VACUOUS[head], scale=scale).eval() for scale in (1.0, 1.0 if "beside" in head else 3.0))
    evidence = normfuse.verify(right, wrong, (X,))
    assert evidence.verdict is Verdict.NOT_COMPARED
    assert not evidence.ok
    with pytest.raises(NotCompared, match="nothing was compared") as caught:
        evidence.require()
    assert caught.value.exit_code == 2
    assert caught.value.hint
    with pytest.raises(AssertionError, match="not proven to be"):
        normfuse.assert_equivalent(right, wrong, (X,))


def test_a_batchnorm_that_diverged_is_not_compared() -> None:
    right = Headed(lambda y: y).eval()
    right.net[1].running_var[2] = torch.nan  # type: ignore[index, operator]
    wrong = copy.deepcopy(right)
    with torch.no_grad():
        wrong.net[0].weight.mul_(3)  # type: ignore[operator]
    assert normfuse.verify(right, wrong, (X,)).verdict is Verdict.NOT_COMPARED


@pytest.mark.parametrize("head", VACUOUS)
def test_a_rewrite_that_nothing_shows_is_not_written(head: str) -> None:
    model = Headed(VACUOUS[head]).eval()
    if not any(normfuse.rewrite(model, "conv_bn", (X,), verify="none").report.plan.rewrites):
        return  # nobody reads the norm any more
    with pytest.raises(NotCompared, match="nothing was compared") as caught:
        normfuse.rewrite(model, "conv_bn", (X,))
    assert "structure" in (caught.value.hint or "")
    assert caught.value.report.evidence.verdict is Verdict.NOT_COMPARED
    evidence = normfuse.rewrite(model, "conv_bn", (X,), verify="structure").report.evidence
    assert not any(evidence.algebra)


class Logged(nn.Module):
    """NaN in part: the logarithm of numbers of both signs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(self.down(self.norm(self.up(x))))


def test_what_is_NaN_in_part_is_judged_by_the_rest() -> None:
    right, x = Logged().eval(), noise(4, 6)
    assert 0 < int(right(x).isnan().sum()) < 20
    evidence = normfuse.verify(right, copy.deepcopy(right), (x,))
    assert evidence.ok
    assert any("entries are finite" in note for note in evidence.notes)
    assert 0 < evidence.algebra[0].compared < evidence.algebra[0].entries == 20
    assert normfuse.rewrite(right, "pre_rmsnorm", (x,)).report.evidence.ok
    wrong = copy.deepcopy(right)
    with torch.no_grad():
        wrong.down.weight[0] *= 1.001
    assert normfuse.verify(right, wrong, (x,)).verdict is Verdict.DISPROVEN
    moved = copy.deepcopy(right)
    with torch.no_grad():
        moved.down.bias.add_(0.5)  # other entries are NaN
    assert normfuse.verify(right, moved, (x,)).verdict is Verdict.DISPROVEN


def test_levels_that_were_not_asked_for_prove_nothing() -> None:
    model = Headed(lambda y: y).eval()
    for level in ("structure", "none"):
        evidence = normfuse.rewrite(model, "conv_bn", (X,), verify=level).report.evidence
        assert (evidence.verdict, evidence.ok) == (Verdict.NOT_COMPARED, False)
        with pytest.raises(NotCompared, match=f"level is '{level}'"):
            evidence.require()
    assert normfuse.rewrite(model, "conv_bn", (X,)).report.evidence.require().ok
    nothing = normfuse.rewrite(model, "pre_rmsnorm", (X,)).report
    assert not any(nothing.plan.rewrites)
    assert nothing.evidence.ok, "what was not changed is the same"


# -- inputs that the original cannot run -------------------------------------------------------------------------------


class Narrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y: Tensor = self.down(self.norm(self.up(x)))
        return y if scale is None else y * scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_inputs_of_another_dtype_are_told(dtype: torch.dtype) -> None:
    model, x = Narrow().eval(), torch.ones(2, 4, dtype=dtype)
    asked: list[Callable[[], Any]] = [lambda: normfuse.rewrite(model, "pre_rmsnorm", (x,))]
    if x.is_floating_point():
        assert normfuse.verify(model, model, (noise(2, 4).to(dtype),)).ok, "each side gets what it takes"
    else:
        asked.append(lambda: normfuse.verify(model, model, (x,)))
    for ask in asked:
        with pytest.raises(InputError, match="does not run on these inputs") as caught:
            ask()
        hint = caught.value.hint or ""
        assert str(dtype).removeprefix("torch.") in hint
        assert "float32[2,4]" in hint


def test_a_level_that_cannot_be_run_is_not_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    from normfuse.graph.interpreter import run as real

    def without_kernels(*args: Any, wide: bool = False, **options: Any) -> Any:
        if not wide:
            raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")
        return real(*args, wide=wide, **options)

    monkeypatch.setattr("normfuse.proof.trials.run", without_kernels)
    monkeypatch.setattr("normfuse.proof.trial_run.run", without_kernels)
    with pytest.raises(NotCompared, match="rounding level was not compared") as caught:
        normfuse.rewrite(Narrow().eval(), "pre_rmsnorm", (noise(2, 4),))
    evidence: Evidence = caught.value.report.evidence
    assert all(row.ok for row in evidence.algebra)
    assert {row.verdict for row in evidence.rounding} == {Verdict.NOT_COMPARED}


# -- what people and programs read -------------------------------------------------------------------------------------


@pytest.fixture
def vacuous() -> Evidence:
    return normfuse.verify(Headed(VACUOUS["zeros"]).eval(), Headed(VACUOUS["zeros"]).eval(), (X,))


def test_every_form_of_a_report_says_not_compared(vacuous: Evidence) -> None:
    data = vacuous.to_dict()
    assert (data["ok"], data["verdict"]) == (False, "not compared")
    assert "the same whatever" in data["missing"]
    suite = ElementTree.fromstring(junit(vacuous, "a"))
    assert suite.get("errors") == "1"
    assert "the same whatever" in (suite.find(".//error").get("message") or "")  # type: ignore[union-attr]
    from normfuse.report.evidence_text import evidence_lines

    assert "not proven: nothing was compared" in html(evidence_lines(vacuous), "a")


def test_cases_that_show_nothing_are_skipped_not_passed() -> None:
    nothing = normfuse.verify(Headed(VACUOUS["NaN"]).eval(), Headed(VACUOUS["NaN"]).eval(), (X,))
    suite = ElementTree.fromstring(junit(nothing, "a"))
    assert int(suite.get("skipped") or 0) == int(suite.get("tests") or 0) - 1 > 0
    assert nothing.to_dict()["algebra"][0]["verdict"] == "not compared"


def test_the_command_line_says_it_and_exits_with_2(tmp_path: Path) -> None:
    for name, scale in (("a.pt2", 1.0), ("b.pt2", 3.0)):
        torch.export.save(torch.export.export(Headed(VACUOUS["no rows"], scale=scale).eval(), (X,)), tmp_path / name)
    words = ["verify", str(tmp_path / "a.pt2"), str(tmp_path / "b.pt2")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "NOT COMPARED: nothing was compared: the outputs have no entries" in result.stdout
    assert "hint: " in result.stdout
    files = ["--junit", str(tmp_path / "j.xml"), "--html", str(tmp_path / "h.html")]
    result = CliRunner().invoke(main, [*words, "--json", *files])
    assert result.exit_code == 2
    data = json.loads(result.stdout)
    assert (data["equivalent"], data["verdict"]) == (False, "not compared")
    assert "<error" in (tmp_path / "j.xml").read_text()
    assert "NOT COMPARED" in (tmp_path / "h.html").read_text()
    result = CliRunner().invoke(
        main, ["rewrite", str(tmp_path / "a.pt2"), "--pass", "conv_bn", "--report", str(tmp_path / "r.json")]
    )
    assert result.exit_code == 2
    assert not (tmp_path / "a.rewritten.pt2").exists()
    assert json.loads((tmp_path / "r.json").read_text())["evidence"]["verdict"] == "not compared"
    result = CliRunner().invoke(main, ["rewrite", str(tmp_path / "a.pt2"), "--pass", "conv_bn", "--verify", "structure"])
    assert (result.exit_code, (tmp_path / "a.rewritten.pt2").exists()) == (0, True)


def test_not_compared_is_a_failed_verification() -> None:
    """Whoever catches the one catches the other."""
    assert issubclass(NotCompared, VerificationFailed)
