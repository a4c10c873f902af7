"""`calibrate` and `strip`, in Python and on the command line."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

import normfuse
from normfuse.cli import main
from normfuse.errors import InputError, LoadError, NormfuseError
from normfuse.stripping.calibration import Calibration, batches_of
from normfuse.stripping.quality import measure
from normfuse.stripping.removal import Candidate, _largest
from tests.stripping.models import D, gpt, tokens

DATA = [tokens(seed) for seed in range(4)]


def ask(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return normfuse.calibrate(gpt().eval(), iter(DATA))


# -- calibration -------------------------------------------------------------------------------------------------------


def test_the_figures_are_those_of_all_data_together(calibration: Calibration) -> None:
    model, seen = gpt().eval(), []
    model.final.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        for each in DATA:
            model(each)
    sigma = (torch.cat(seen).double().var(-1, correction=0) + 1e-5).sqrt()
    found = calibration.norms[-1]
    assert (found.site, found.tokens) == ("final", sigma.numel())
    assert found.mean == pytest.approx(sigma.mean().item(), rel=1e-6)
    assert found.spread == pytest.approx(sigma.std(correction=0).item(), rel=1e-5)
    assert (found.least, found.most) == pytest.approx((sigma.min().item(), sigma.max().item()), rel=1e-6)
    assert found.sigma == pytest.approx(1 / sigma.reciprocal().mean().item(), rel=1e-6)
    rest = sigma[:, 1:]
    assert found.first == pytest.approx((sigma[:, 0].mean() / rest.mean()).item(), rel=1e-6)
    assert found.rest_spread == pytest.approx((rest.std(correction=0) / rest.mean()).item(), rel=1e-5)


class OneNorm(nn.Module):
    """A LayerNorm of its input, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


def test_outliers_and_the_first_token_are_told() -> None:
    x = torch.randn(64, 6, D)
    x = (x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True)
    x[:, 0] *= 30.0
    x[:, 4] *= 2.0
    (found,) = normfuse.calibrate(OneNorm(), [x[:32], x[32:]]).norms
    assert found.outliers == (0, 4)
    assert found.first == pytest.approx(30.0 / (6 / 5), rel=1e-3)
    assert not found.is_near_constant
    x[:, 0] /= 30.0
    x[:, 4] /= 2.0
    (found,) = normfuse.calibrate(OneNorm(), [x]).norms
    assert found.is_near_constant
    assert found.outliers == ()


def test_a_calibration_survives_its_file(calibration: Calibration, tmp_path: Path) -> None:
    assert Calibration.load(calibration.save(tmp_path / "cal.json")) == calibration
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(LoadError, match="no calibration"):
        Calibration.load(tmp_path / "bad.json")


def test_no_data_and_strange_data_are_told() -> None:
    with pytest.raises(InputError, match="no calibration data"):
        normfuse.calibrate(gpt(), [])
    with pytest.raises(InputError, match="does not fit"):
        normfuse.calibrate(gpt(), [tokens(), tokens(batch=3)])
    with pytest.raises(NormfuseError, match="no LayerNorm"):
        normfuse.calibrate(nn.Linear(2, 2), [torch.zeros(1, 2)])
    model = gpt()
    with torch.no_grad():
        model.table.weight[3] = float("nan")
    with pytest.raises(NormfuseError, match="inf or nan"):
        normfuse.calibrate(model, DATA)


# -- removal within a bound --------------------------------------------------------------------------------------------


def trained() -> Any:
    """A model that predicts something: token 2 t + 1 follows token t."""
    torch.manual_seed(0)
    model = gpt().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(150):
        ids = counting(step)
        loss = nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()


def counting(seed: int, batch: int = 4) -> Tensor:
    first = torch.randint(0, 23, (batch,), generator=torch.Generator().manual_seed(seed))
    rows = [first]
    for _ in range(7):
        rows.append((2 * rows[-1] + 1) % 23)
    return torch.stack(rows, 1)


@pytest.fixture(scope="module")
def model() -> Any:
    return trained()


REAL = [counting(1000 + seed) for seed in range(3)]


def loss_of(model: Any) -> float:
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten()).item() for x in REAL]
    return sum(losses) / len(losses)


def test_the_bound_is_kept_and_the_rest_stays(model: Any) -> None:
    everything = normfuse.strip(model, REAL, max_loss_increase=1e9)
    assert len(everything.report.removed) == 5
    costs = [each.cost for each in everything.report.candidates]
    assert costs == sorted(costs)  # type: ignore[type-var]
    bound = everything.report.quality.increase / 2
    some = normfuse.strip(model, REAL, max_loss_increase=bound)
    assert 0 < len(some.report.removed) < 5
    assert some.report.quality.increase <= bound
    assert loss_of(some.module()) - loss_of(model) == pytest.approx(some.report.quality.increase, abs=1e-5)
    assert some.report.quality.loss_before == pytest.approx(loss_of(model), rel=1e-5)
    assert sum(some.report.folding.norms_after.values()) == 5 - len(some.report.removed)
    assert some.report.folding.evidence.ok
    assert json.loads(some.report.to_json())["removed"] == len(some.report.removed)


def test_a_larger_bound_never_removes_fewer(model: Any) -> None:
    sets = []
    for bound in (0.0, 0.01, 0.1, 0.5, 2.0):
        report = normfuse.strip(model, REAL, max_loss_increase=bound, verify="structure").report
        assert report.quality.increase <= bound
        sets.append({each.site.node for each in report.removed})
    assert all(small <= large for small, large in itertools.pairwise(sets))
    assert sets[0] < sets[-1]


def test_none_is_removed_where_none_may_be(model: Any) -> None:
    none = normfuse.strip(model, REAL, max_loss_increase=-1e9)
    assert not none.report.removed
    assert torch.equal(none.module()(REAL[0]), model(REAL[0]))


def test_a_norm_that_makes_nan_is_the_most_costly() -> None:
    from normfuse.graph.program import Program

    program = Program.trace(gpt().eval(), (tokens(),))
    bad = Candidate(program.site(next(iter(program.graph.nodes))), 1.0, "", cost=float("nan"))
    assert _largest(program, [], [bad], DATA, 1.0, 1e9, None) == []
    assert bad.to_dict()["cost"] is None


def test_a_calibration_of_another_model_removes_nothing(calibration: Calibration) -> None:
    data = [{"x": torch.randn(4, D), "targets": torch.tensor([0, 1, 2, -100])}]
    with pytest.raises(NormfuseError, match="no LayerNorm that could be removed"):
        normfuse.strip(OneNorm(), data, calibration, max_loss_increase=1.0)
    stripped = normfuse.strip(OneNorm(), data, max_loss_increase=10.0)
    assert stripped.report.quality.predictions == 3


def test_without_targets_it_says_so() -> None:
    with pytest.raises(InputError, match="nothing tells the targets"):
        normfuse.strip(nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 3)), [torch.randn(2, D)], max_loss_increase=1.0)


def test_the_quality_is_that_of_the_two_models(model: Any) -> None:
    from normfuse.graph.program import Program

    twin = trained()
    with torch.no_grad():
        twin.head.weight.add_(0.2 * torch.randn_like(twin.head.weight))
    a, b = (Program.trace(each, (REAL[0],)) for each in (model, twin))
    found = measure(a, b, REAL)
    with torch.no_grad():
        old, new = (torch.cat([each(x)[:, :-1].flatten(0, 1) for x in REAL]).double() for each in (model, twin))
    targets = torch.cat([x[:, 1:].flatten() for x in REAL])
    kl = nn.functional.kl_div(new.log_softmax(-1), old.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert found.kl == pytest.approx(kl.mean().item(), rel=1e-5)
    assert found.agreement == pytest.approx((old.argmax(-1) == new.argmax(-1)).double().mean().item())
    assert found.accuracy_after == pytest.approx((new.argmax(-1) == targets).double().mean().item())
    worst = found.worst[0]
    assert worst.kl == pytest.approx(kl.max().item(), rel=1e-5)
    assert REAL[worst.batch][worst.row, worst.position + 1].item() == worst.target


# -- the command line --------------------------------------------------------------------------------------------------


def test_rows_are_cut_into_batches() -> None:
    data = normfuse.Inputs((torch.arange(10).view(5, 2),), {"targets": torch.arange(5)})
    cut = batches_of(data, 2)
    assert [each.kwargs["targets"].tolist() for each in cut] == [[0, 1], [2, 3]]
    with pytest.raises(InputError, match="batches of 6"):
        batches_of(data, 6)


def test_calibrate_and_strip(model: Any, tmp_path: Path) -> None:
    torch.export.save(torch.export.export(model, (REAL[0],)), tmp_path / "model.pt2")
    torch.save(torch.cat(REAL), tmp_path / "data.pt")
    given = (tmp_path / "model.pt2", "--data", tmp_path / "data.pt", "--batch", 4)
    told = ask("calibrate", *given, "-o", tmp_path / "cal.json")
    assert told.exit_code == 0, told.output
    assert "of 5 norms are near-constant" in told.stdout
    bound = ("--calibration", tmp_path / "cal.json", "--max-loss-increase")
    told = ask("strip", *given, *bound, 100, "-o", tmp_path / "out.pt2", "--report", tmp_path / "report.json", "--json")
    assert told.exit_code == 0, told.output
    report = json.loads(told.stdout)
    assert (report["removed"], report["claim"], report["written"]) == (5, "approximate", str(tmp_path / "out.pt2"))
    assert json.loads((tmp_path / "report.json").read_text())["quality"] == report["quality"]
    assert torch.export.load(tmp_path / "out.pt2").module()(REAL[0]).shape == (4, 8, 23)
    told = ask("strip", *given, *bound, 0, "-o", tmp_path / "none.pt2")
    assert (told.exit_code, (tmp_path / "none.pt2").exists()) in ((1, False), (0, True))  # a removal may lower the loss
    assert ask("strip", *given, "--calibration", tmp_path / "data.pt", "--max-loss-increase", 1).exit_code == 2
    assert ask("strip", *given, "--max-loss-increase", -1).exit_code == 2
