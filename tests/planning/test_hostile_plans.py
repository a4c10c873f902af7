"""Plans, lock files and calibrations are data that may come from anybody: what they ask for is checked, or refused plainly."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normfuse.errors import InputError, InvalidPlan, LoadError, NormfuseError
from normfuse.graph.arithmetic import only_computes, operator_named
from normfuse.graph.ops.row import TABLE
from normfuse.graph.program import Program
from normfuse.planning.lockfile import drift, read_lock
from normfuse.planning.planner import Plan, plan
from normfuse.sources.archive import _is_operator
from normfuse.stripping.calibration import Calibration
from tests.zoo.spread import spread

READ = {"read": "0.weight"}


@pytest.fixture(scope="module")
def program() -> Program:
    return Program.trace(spread(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))).eval(), (torch.randn(2, 4),))


@pytest.fixture(scope="module")
def honest(program: Program) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(plan(program, ["pre_rmsnorm", "fold_affine"]).to_json())
    return found


def with_edits(honest: dict[str, Any], *edits: Any) -> str:
    data = copy.deepcopy(honest)
    data["rounds"] = [[{**data["rounds"][0][0], "edits": list(edits)}]]
    return json.dumps(data)


def applied(op: str, *args: Any, **more: Any) -> dict[str, Any]:
    return {"set": "0.weight", "to": {"apply": op, "args": list(args), **more}}


def called(op: str, *args: Any, **more: Any) -> dict[str, Any]:
    return {"reroute": "linear", "by": {"call": op, "args": list(args), **more}, "readers": None, "name": None}


ACTING = (
    "save.default", "_print.default", "warn.default", "from_file.default", "add_.Tensor", "mul_.Tensor", "rand_like.default",
    "randn.default", "bernoulli.p", "dropout.default", "native_dropout.default", "normal.float_float", "set_.default",
    "set_.source_Tensor", "resize_.default", "resize.default", "empty.memory_format", "empty_like.default",
    "new_empty.default", "empty_strided.default", "as_strided.default", "_assert_async.msg", "copy_.default", "fill_.Scalar",
    "record_stream.default", "item.default", "_local_scalar_dense.default", "sym_size.int", "is_nonzero.default",
    "_cudnn_rnn.default", "mkldnn_linear.default", "quantized_lstm.data", "lstm.input", "to_sparse.default", "add.out",
    "_foreach_add.Scalar", "__class__", "__init__.default", "add", "add.", ".Tensor", "add.Tensor.x", "no_such.default",
    "mylib.op.default", "torch.ops.aten.add.Tensor", "os.system", "", "a" * 100_000,
)  # fmt: skip


@pytest.mark.parametrize("op", ACTING, ids=lambda op: op[:40] or "nothing")
def test_an_operator_that_does_more_than_compute_is_in_no_plan(op: str, honest: dict[str, Any]) -> None:
    for edit in (applied(op, READ), called(op, {"ref": "linear"})):
        with pytest.raises(InvalidPlan, match="only computes"):
            Plan.from_json(with_edits(honest, edit))


def test_what_passes_write_is_allowed() -> None:
    random = {torch.ops.aten.scaled_dot_product_attention.default, torch.ops.aten.native_dropout.default}  # they can drop
    rows = {each for each, row in TABLE.items() if row.carries and isinstance(each, torch._ops.OpOverload)} - random
    assert [str(each) for each in rows if each.namespace == "aten" and not only_computes(each)] == []
    for name in (
        "rms_norm.default",
        "layer_norm.default",
        "group_norm.default",
        "linalg_qr.default",
        "_weight_norm_interface.default",
    ):
        assert operator_named(name)
    assert operator_named("batch_norm.default", in_graph=True)


EXA = 1 << 52
MISFITS: dict[str, Any] = {
    "exabytes of ones": applied("ones.default", [EXA]),
    "exabytes of nothing": applied("full.default", [EXA, 8], 0.0),
    "a value expanded": applied("sum.default", {"apply": "expand.default", "args": [{"number": 1.0}, [EXA]]}),
    "a value repeated": applied("sum.default", {"apply": "repeat.default", "args": [READ, [1 << 20, 1 << 20]]}),
    "a long range": applied("arange.default", EXA),
    "a large matrix": applied("eye.default", 1 << 40),
    "exabytes in an expression": called("add.Tensor", {"ref": "linear"}, {"call": "ones.default", "args": [[EXA]]}),
    "another shape": applied("sum.default", READ),
    "no such tensor": {"set": "no", "to": READ},
    "no such tensor to read": {"set": "0.weight", "to": {"read": "no"}},
    "no such tensor to be like": {"new": "made", "to": READ, "like": "no"},
    "a tensor that is there": {"new": "0.bias", "to": READ, "like": "0.bias"},
    "no such node": called("neg.default", {"ref": "no"}),
    "a node that comes later": called("neg.default", {"ref": "layer_norm"}),
    "no such reader": {**called("neg.default", {"ref": "linear"}), "readers": ["no"]},
    "too few arguments": called("add.Tensor"),
    "arguments of other types": called("add.Tensor", "x", None),
    "no such axis": {"set": "0.weight", "to": {"center": READ, "dim": 7}},
    "no such result": applied("neg.default", READ, output=5),
    "unknown keywords": applied("neg.default", READ, kwargs={"colour": 1}),
    "a negative size": {"resize": "linear", "axis": 1, "size": -3},
    "another dtype": called("_to_copy.default", {"ref": "linear"}, dtype="float16"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_a_line(name: str, honest: dict[str, Any], program: Program) -> None:
    with pytest.raises(InvalidPlan) as caught:
        Plan.from_json(with_edits(honest, MISFITS[name])).apply(program)
    assert "\n" not in str(caught.value)


def test_a_formula_that_doubles_each_round_is_not_computed(honest: dict[str, Any], program: Program) -> None:
    data = json.loads(
        with_edits(honest, {"set": "0.weight", "to": {"shift": READ, "by": applied("mean.dim", READ, [1])["to"], "dim": 0}})
    )
    data["rounds"] *= 60
    with pytest.raises(InvalidPlan, match="too many parts"):
        Plan.from_json(json.dumps(data)).apply(program)


WRONG: tuple[Any, ...] = (
    None,
    True,
    3,
    -1,
    1e400,
    float("nan"),
    1 << 70,
    "",
    "x\x1b[2J",
    "\ud800",
    [],
    [[]],
    {},
    {"ref": 1},
    {"apply": "x"},
)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(each for key, value in inner for each in places(value, (*path, key)))]


def put(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    data = copy.copy(data)
    data[path[0]] = put(data[path[0]], path[1:], value)
    return data


def test_any_value_in_any_place_is_read_or_refused(honest: dict[str, Any], program: Program, tmp_path: Path) -> None:
    spots, draw, kept = places(honest), random.Random(0), 0
    now = plan(program, ["pre_rmsnorm", "fold_affine"])
    for _ in range(600):
        path = draw.choice(spots)
        (tmp_path / "lock.json").write_text(json.dumps(put(honest, path, draw.choice(WRONG))))
        try:
            lock = read_lock(tmp_path / "lock.json")
            drift(lock, now)
            Plan.from_json(lock.to_json())
            kept += 1
            lock.apply(program)
        except (InputError, InvalidPlan) as error:
            assert str(error).isprintable()  # noqa: PT017
    assert 0 < kept < 600


@pytest.mark.parametrize(
    "content",
    ["", "[]", '"x"', "3", "null", "{}", "[" * 100_000, '{"a":' * 100_000, "1" * 10_000, '{"normfuse_plan": 2}', "\xff"],
    ids=range(11),
)
def test_a_file_of_another_kind_is_no_lock_and_no_calibration(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match="is no lock file"):
        read_lock(tmp_path / "x.json")
    with pytest.raises(LoadError, match="is no calibration"):
        Calibration.load(tmp_path / "x.json")


@pytest.mark.parametrize("path", ["/dev/zero", "/", "/no/such/file", "a\0b"])
@pytest.mark.parametrize("read", [read_lock, Calibration.load])
def test_what_is_no_file_is_not_read(path: str, read: Callable[[str], Any]) -> None:
    with pytest.raises(NormfuseError, match=r"is no (lock file|calibration)"):
        read(path)


def test_a_plan_with_numbers_that_json_does_not_have_survives(honest: dict[str, Any]) -> None:
    edits = [
        {"set": "0.weight", "to": {"scale": READ, "by": {"number": "inf"}, "dim": 0}},
        called("mul.Tensor", {"ref": "linear"}, {"float": "-inf"}),
    ]
    chosen = Plan.from_json(with_edits(honest, *edits))
    text = chosen.to_json()
    assert Plan.from_json(text) == chosen
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert next(chosen.rewrites).edits[1].by.args[1] == -float("inf")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "wrong",
    [{"mean": "x"}, {"mean": None}, {"sigma": float("nan")}, {"least": -1.0}, {"tokens": 1.5}, {"outliers": {}}, {"site": 3}],
)
def test_a_calibration_holds_figures(wrong: dict[str, Any], tmp_path: Path) -> None:
    norm = {"site": "n", "node": "n", "tokens": 4, "mean": 1.0, "spread": 0.1, "least": 0.9, "most": 1.1, "sigma": 1.0,
            "first": 1.0, "rest_spread": 0.1, "outliers": []}  # fmt: skip
    for given, fits in ((norm, True), ({**norm, **wrong}, False)):
        (tmp_path / "c.json").write_text(json.dumps({"normfuse_calibration": 1, "model": "m", "batches": 1, "norms": [given]}))
        if fits:
            assert Calibration.load(tmp_path / "c.json").norms[0].mean == 1.0
        else:
            with pytest.raises(LoadError, match="is no calibration"):
                Calibration.load(tmp_path / "c.json")


def test_a_traced_operator_with_effects_is_no_constant() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.weight = nn.Linear(4, 4), nn.Parameter(torch.rand(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(x) * torch.empty_like(self.weight).copy_(self.weight)

    program = Program.trace(spread(Draws()).eval(), (torch.randn(2, 4),))
    for edit in (edit for each in plan(program, ["fold_affine"]).rewrites for edit in each.edits):
        assert "empty" not in str(edit)


def test_an_operator_that_prints_is_in_no_program() -> None:
    assert not _is_operator("torch.ops.aten._print.default")
    assert not _is_operator("torch.ops.aten.from_file.default")
    assert _is_operator("torch.ops.aten.add.Tensor")
