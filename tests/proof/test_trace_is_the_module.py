"""The trace is compared with the module itself, which is left as it was; what is random or in training is kept, and told."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse.errors import InputError, NormfuseError, TraceError
from normfuse.graph.program import Program
from normfuse.proof.fidelity import traced
from normfuse.sources.inputs import Inputs
from tests.zoo.spread import spread

X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def notes_of(result: normfuse.Result) -> str:
    return " ".join(result.report.to_dict()["notes"])


# -- training flags ----------------------------------------------------------------------------------------------------


def blocks() -> nn.Sequential:
    return spread(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Conv2d(8, 4, 1))).eval()


def test_dropout_that_is_left_on_stays_on_and_is_told() -> None:
    model = blocks()
    model[2].train()
    result = normfuse.rewrite(model, "conv_bn", inputs=(X,))
    f = result.module()
    assert not torch.equal(f(X), f(X))
    assert "'2' in training mode" in notes_of(result)
    assert "random" in notes_of(result)
    assert result.report.to_dict()["norms"]["after"] == {}
    assert normfuse.verify(model, f, inputs=(X,)).ok
    assert [child.training for child in model] == [False, False, True, False]
    torch.manual_seed(3)
    ours = f(X)
    torch.manual_seed(3)
    assert torch.allclose(ours, model(X), atol=1e-5)


def test_a_batch_norm_that_adapts_is_refused_as_the_manual_says() -> None:
    model = blocks()
    model[1].train()
    result = normfuse.rewrite(model, "conv_bn", inputs=(X,))
    assert [each.code for each in result.report.plan.refusals] == ["NF301"]
    assert not list(result.report.plan.rewrites)
    assert torch.equal(model[1].running_mean, blocks()[1].running_mean)  # type: ignore[arg-type]
    twin = copy.deepcopy(model)
    assert torch.allclose(result.module()(X), twin(X), atol=1e-5)


def test_only_what_is_outermost_is_named() -> None:
    inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(0.1), nn.Dropout(0.1))
    model = nn.Sequential(OrderedDict(front=nn.Conv2d(3, 3, 1), inside=inner)).eval()
    inner.train()
    (note,) = [each for each in Program.trace(model, (X,)).notes if "training" in each]
    assert "'inside'" in note
    assert "inside.1" not in note


def test_a_model_in_training_mode_is_evaluated_whatever_its_parts_are() -> None:
    model = blocks().train()
    model[1].eval()
    result = normfuse.rewrite(model, "conv_bn", inputs=(X,))
    assert "traced in evaluation mode" in notes_of(result)
    assert torch.equal(result.module()(X), result.module()(X))
    assert [child.training for child in model] == [True, False, True, True]


def test_what_a_tuned_model_is_rewritten_for_does_not_hang_on_what_trains_now() -> None:
    model = blocks()
    model[1].train()
    normfuse.tune(model, "conv_bn", inputs=(X,))
    twin = blocks()
    assert torch.allclose(model.eval()(X), twin(X), atol=1e-5)


# -- random outputs ----------------------------------------------------------------------------------------------------


class Random(nn.Module):
    """A linear layer and its BatchNorm, and numbers drawn in every way behind it."""

    def __init__(self, drawn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.norm, self.drawn = nn.Linear(8, 8), nn.BatchNorm1d(8), drawn

    def forward(self, x: Tensor) -> Tensor:
        return self.drawn(self.norm(self.layer(x)))


def _unread(x: Tensor) -> Tensor:
    torch.rand(3)
    return F.dropout(x, 0.5, training=True)


def _unread_before(x: Tensor) -> Tensor:
    torch.rand(3)
    return x * torch.bernoulli(x.sigmoid())


DRAWN: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.5, training=True),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.5, training=True),
    "feature dropout": lambda x: F.dropout1d(x[None], 0.5, training=True)[0],
    "noise": lambda x: x + torch.randn_like(x) * torch.rand(8),
    "bernoulli": lambda x: x * torch.bernoulli(x.sigmoid()),
    "drawn and not read": _unread,
    "drawn and not read, all of it aten": _unread_before,
    "attention": lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], dropout_p=0.5)[0, 0],
}


@pytest.mark.parametrize("name", DRAWN)
def test_random_outputs_are_compared_on_the_same_random_numbers(name: str) -> None:
    model = spread(Random(DRAWN[name])).eval()
    result = normfuse.rewrite(model, "conv_bn", inputs=(ROWS,))
    assert "random" in notes_of(result)
    assert result.report.to_dict()["norms"]["after"] == {}
    assert normfuse.verify(model, result.module(), inputs=(ROWS,)).ok
    other = copy.deepcopy(model)
    other.norm.weight.data[3] *= 1.01
    assert not normfuse.verify(model, other, inputs=(ROWS,)).ok


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_dropout_of_nothing_or_all_is_not_random(share: float) -> None:
    model = spread(Random(lambda x: torch.cat([x, F.dropout(x, share, training=True)]))).eval()
    result = normfuse.rewrite(model, "conv_bn", inputs=(ROWS,))
    assert "random" not in notes_of(result)
    assert torch.allclose(result.module()(ROWS), model(ROWS), atol=1e-5)


def test_models_that_draw_in_other_orders_are_not_compared() -> None:
    one, other = (Random(draw).eval() for draw in (lambda x: F.dropout(x, 0.5, True), lambda x: x + torch.randn_like(x)))
    evidence = normfuse.verify(one, other, inputs=(ROWS,))
    assert evidence.verdict == "not compared"
    assert evidence.missing is not None
    assert "random" in evidence.missing.reason
    assert normfuse.verify(one, Random(lambda x: x).eval(), inputs=(ROWS,)).verdict == "disproven", "one of them is not random"
    assert normfuse.verify(Random(lambda x: x).eval(), one, inputs=(ROWS,)).verdict == "disproven"


def test_a_random_model_is_not_compared_with_a_file_of_another_runtime(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    still, random_ = (Random(draw).eval() for draw in (lambda x: x, lambda x: F.dropout(x, 0.5, True)))
    random_.load_state_dict(still.state_dict())
    normfuse.export(still, tmp_path / "still.onnx", inputs=(ROWS,))
    assert normfuse.verify(random_, tmp_path / "still.onnx", inputs=(ROWS,)).verdict == "not compared"


# -- a trace that is not the module ------------------------------------------------------------------------------------


class Exporting(nn.Linear):
    """Does something else while it is exported."""

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return y if torch.compiler.is_compiling() else y * 1.5


class Counting(nn.Linear):
    """Does something else from the second call on."""

    calls = 0

    def forward(self, input: Tensor) -> Tensor:
        Counting.calls += 1
        return super().forward(input) * (1.0 if Counting.calls == 1 else 2.0)


class Skipping(nn.Linear):
    """Multiplies by a random number of Python's."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * random.random()


class Noisy(nn.Linear):
    """Adds random numbers of NumPy's."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + torch.tensor(np.random.rand(8).astype("float32"))


class Long(nn.Linear):
    """Does something else to a long batch, and hides it from torch.export."""

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        if torch.compiler.is_compiling():
            return y
        return y if len(input) <= 4 else y + 1


class Positive(nn.Linear):
    """Does something else to negative inputs, and hides it from torch.export."""

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        if torch.compiler.is_compiling():
            return y
        return y if input.sum() >= 0 else y + 1


UNFAITHFUL: dict[str, tuple[type[nn.Linear], str]] = {
    "exporting": (Exporting, "as given"),
    "counter": (Counting, "as given"),
    "python's random numbers": (Skipping, "as given"),
    "numpy's random numbers": (Noisy, "as given"),
    "sizes": (Long, "other sizes"),
    "values": (Positive, "other values"),
}


@pytest.mark.parametrize("name", UNFAITHFUL)
def test_a_trace_that_is_another_function_is_an_error(name: str) -> None:
    make, case = UNFAITHFUL[name]
    Counting.calls = 0
    given = Inputs((ROWS.abs(),), {}, ({0: torch.export.Dim("batch", min=2, max=64)},))
    with pytest.raises(TraceError, match=f"is not the model: on '{case}' output 0 differs by") as caught:
        traced(make(8, 8).eval(), given)
    assert "torch.export.export" in (caught.value.hint or "")
    Counting.calls = 0
    with pytest.raises(TraceError):
        normfuse.verify(make(8, 8).eval(), nn.Linear(8, 8), inputs=given)


class Experts(nn.Module):
    """A mixture whose forward loops over the experts that have tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(8), nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen, out = self.router(self.norm(x)).argmax(-1), torch.zeros_like(x)
        for expert in chosen.unique():
            out[chosen == expert] = self.experts[int(expert)](x[chosen == expert])
        return out


def test_a_forward_that_decides_by_values_is_said_to() -> None:
    with pytest.raises(TraceError, match="could not trace Experts") as caught:
        traced(Experts(), Inputs((ROWS,), {}))
    assert "a loop over the experts that have tokens" in str(caught.value.hint)


def test_nothing_is_run_where_nothing_is_to_be_run() -> None:
    normfuse.rewrite(Exporting(8, 8).eval(), "all", inputs=(ROWS,), verify="structure")


def test_a_model_that_does_not_run_is_said_so() -> None:
    class Refusing(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            if not torch.compiler.is_compiling():
                raise ValueError("not on a Tuesday")
            return super().forward(input)

    with pytest.raises(NormfuseError, match="not on a Tuesday"):
        normfuse.rewrite(Refusing(8, 8).eval(), "all", inputs=(ROWS,))


# -- traces that are the module ----------------------------------------------------------------------------------------


@dataclass
class Answer:
    """An output that pytree knows."""

    value: Tensor
    name: str
    nothing: None = None


torch.export.register_dataclass(Answer, serialized_type_name="normfuse_tests.Answer")


class Answering(nn.Module):
    """Returns whatever models return."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor, scale: float = 2.0, flag: bool = True) -> Any:
        y = self.norm(x) * scale
        return {"answer": Answer(y, "name"), "list": [y.argmax(-1), 3, None, flag], "rows": x.shape[0], "empty": ()}


class Updating(nn.Module):
    """Updates state of every kind."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.table = nn.Linear(8, 8), nn.Embedding(6, 8, max_norm=0.5)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(8))
        self.seen: list[int] = []
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)  # type: ignore[operator]
        self.seen.append(len(self.seen))
        return self.norm(self.layer(x)) + self.mean


class Writing(nn.Module):
    """Writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2.0)
        return x + 1


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


PADDED = (torch.randn(2, 5, 8), None, torch.tensor([[False] * 5, [False] * 3 + [True] * 2]))
FAITHFUL: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], Any]] = {
    "outputs": (Answering, (ROWS, 3.0, False), None),
    "state": (Updating, (ROWS,), None),
    "written input": (Writing, (ROWS,), None),
    "padding": (encoder, PADDED, None),
    "sizes": (lambda: nn.LSTM(8, 4, batch_first=True), (torch.randn(3, 5, 8),), ({0: torch.export.Dim("batch", max=9)},)),
    "images": (blocks, (X,), ({0: torch.export.Dim("batch")},)),
    "training inside": (lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), (ROWS,), None),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAITHFUL)
def test_models_of_every_kind_are_their_traces(name: str) -> None:
    make, args, dims = FAITHFUL[name]
    model = spread(make()).eval()
    if name == "training inside":
        model[1].train()  # type: ignore[index]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    traced(model, Inputs(args, {}, dims))
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert list(before) == list(after)


def test_what_torch_export_fixed_is_told() -> None:
    """A number or a flag of Python's is a constant of the trace: another one is another program."""
    program = torch.export.export(Answering().eval(), (ROWS, 3.0, False))
    assert normfuse.verify(program, program, inputs=(ROWS, 3.0, False)).ok
    for other in ((ROWS, 4.0, False), (ROWS, 3.0, True), (ROWS, torch.tensor(3.0), False)):
        with pytest.raises(InputError, match="was fixed at"):
            normfuse.verify(program, program, inputs=other)


# -- the module is left alone ------------------------------------------------------------------------------------------

SEEN: list[int] = []
CALLS = 0


class Watching:
    """A hook with state of its own."""

    def __init__(self) -> None:
        self.calls = 0
        self.kept: dict[str, list[Any]] = {"shapes": []}

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.calls += 1
        self.kept["shapes"].append(tuple(output.shape))


def test_hooks_leave_no_trace() -> None:
    model = Updating().eval()
    inner: list[Any] = []
    times = 0

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        global CALLS
        nonlocal times
        times, CALLS = times + 1, CALLS + 1
        inner.append(output)
        SEEN.append(1)

    watching = Watching()
    model.layer.register_forward_hook(hook)
    model.layer.register_forward_hook(watching)
    model.layer.register_forward_pre_hook(lambda module, args: inner.append(args))
    flags = [each.training for each in model.modules()]
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    normfuse.rewrite(model, "conv_bn", inputs=(ROWS,))
    assert (inner, times, SEEN, CALLS, watching.calls, watching.kept) == ([], 0, [], 0, 0, {"shapes": []})
    assert model.seen == []
    assert model.count == 0
    assert flags == [each.training for each in model.modules()]
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), str(np.random.get_state()))
    model(ROWS)
    assert (times, watching.calls, len(inner), model.seen) == (1, 1, 2, [0])


def test_a_cache_is_not_left_behind() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cache: Tensor | None = None
            self.norm = nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            if self.cache is None:
                self.cache = torch.arange(8.0)
            return self.norm(x) + self.cache

    model = Caching().eval()
    traced(model, Inputs((ROWS,), {}))
    assert model.cache is None
