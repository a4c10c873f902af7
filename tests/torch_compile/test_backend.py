"""The torch.compile backend: the same outputs, never stale, never in the way of training, and reasons where it does nothing."""

from __future__ import annotations

import copy
import gc
import shutil
import tomllib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from normfuse.errors import NormfuseWarning
from normfuse.graph.edits import SetTensor
from normfuse.planning.planner import plan
from normfuse.torch_compile.backend import normfuse as backend
from tests.batch_norms import FOLDS
from tests.models import IDS, TRAPS, Stream, Tied, noise
from tests.zoo.spread import spread

X = noise(2, 4, 9, 9)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def counts() -> Counter[str]:
    return Counter(counters["normfuse"])


class Recorder:
    """An inner backend that runs a graph as it is and keeps it."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph_module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs.append(graph_module)
        return graph_module.forward

    def calls(self, word: str) -> int:
        nodes = (node for graph in self.graphs for node in graph.graph.nodes if node.op == "call_function")
        return sum(word in str(node.target) for node in nodes)


def compiled(model: Any, *passes: str, inner: Any = "eager", verify: str = "structure", **options: Any) -> Any:
    asked = {"inner": inner, "verify": verify, **({"passes": passes} if passes else {})}
    return torch.compile(model, backend=backend, options=asked, **options)


class Net(nn.Module):
    """Two folds, one of them across a flatten, and a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6, eps=1e-3)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, groups=2, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = x + torch.relu(self.bn2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


def net() -> Any:
    return spread(Net()).eval()


def same(model: Any, fast: Any, *inputs: Any) -> None:
    torch.testing.assert_close(fast(*inputs), model(*inputs), rtol=2e-5, atol=2e-5)


# -- what it does ------------------------------------------------------------------------------------------------------


def test_batch_norms_are_gone_before_the_inner_backend() -> None:
    model, seen = net(), Recorder()
    with torch.no_grad():
        same(model, compiled(model, inner=seen, verify="full"), X)
    assert seen.calls("norm") == 0
    assert seen.calls("conv") == 2
    assert counts() == {"graphs rewritten": 1, "norms rewritten": 2, "weights computed": 1}


def test_it_is_found_by_its_name() -> None:
    from importlib.metadata import EntryPoint, entry_points

    told = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())
    value = told["project"]["entry-points"]["torch_dynamo_backends"]["normfuse"]
    assert EntryPoint("normfuse", value, "torch_dynamo_backends").load() is backend
    if not entry_points(group="torch_dynamo_backends", name="normfuse"):
        pytest.skip("this environment was installed before the entry point was there: pip install -e . again")
    model = net()
    with torch.no_grad():
        same(model, torch.compile(model, backend="normfuse", options={"inner": "eager"}), X)
    assert counts()["graphs rewritten"] == 1


def test_layer_norms_become_rms_norms_on_demand() -> None:
    model, seen = spread(Tied()).eval(), Recorder()
    with torch.no_grad():
        same(model, compiled(model, "pre_rmsnorm", inner=seen, verify="full"), *IDS)
    assert (seen.calls("layer_norm"), seen.calls("rms_norm")) == (0, 3)


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_compiles_what_comes_out() -> None:
    model = net()
    fast = torch.compile(model, backend=backend)
    with torch.no_grad():
        same(model, fast, X)
        model.conv1.weight.mul_(1.5)
        same(model, fast, X)
    assert counts() == {"graphs rewritten": 1, "norms rewritten": 2, "weights computed": 2}


def test_half_precision_rounds_a_folded_weight_once() -> None:
    model = net().bfloat16()
    x = X.bfloat16()
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
        errors = [float((each(x).double() - truth).abs().max()) for each in (model, compiled(model))]
    assert counts()["graphs rewritten"] == 1
    assert errors[1] < 2 * errors[0]


@pytest.mark.parametrize("name", ["a shared conv", "registration order", "functional"])
def test_hostile_folds(name: str) -> None:
    trap = FOLDS[name]
    model = trap.module()
    with torch.no_grad():
        same(model, compiled(model, verify="full"), *trap.inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDS)
def test_every_fold(name: str) -> None:
    model = FOLDS[name].module()
    with torch.no_grad():
        same(model, compiled(model, inner="aot_eager", verify="full"), *FOLDS[name].inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAPS)
def test_every_trap(name: str) -> None:
    model = TRAPS[name].module()
    twin = copy.deepcopy(model)  # some update themselves
    with torch.no_grad():
        same(twin, compiled(model, "pre_rmsnorm", inner="aot_eager", verify="full"), *TRAPS[name].inputs)


# -- never stale -------------------------------------------------------------------------------------------------------


def test_every_way_to_change_a_weight_is_noticed() -> None:
    model = net()
    fast = compiled(model)
    other = {name: value * 1.5 if value.is_floating_point() else value for name, value in net().state_dict().items()}

    def replaced() -> None:
        model.conv1.weight = nn.Parameter(model.conv1.weight * 2)

    def new_data() -> None:
        model.conv2.bias.data = model.conv2.bias.data + 1

    def averaged() -> None:
        for value, new in zip(model.state_dict().values(), other.values(), strict=True):
            value.copy_(value.lerp(new, 0.25)) if value.is_floating_point() else None

    changes: dict[str, Callable[[], Any]] = {
        "in place": lambda: model.conv1.weight.mul_(2),
        "one entry": lambda: model.bn1.weight[3].fill_(0.25),
        "a running statistic": lambda: model.bn2.running_var.add_(1),
        "another parameter": replaced,
        "other data": new_data,
        "a moving average": averaged,
        "a checkpoint": lambda: model.load_state_dict(other),
        "an assigned checkpoint": lambda: model.load_state_dict(net().state_dict(), assign=True),
    }
    with torch.no_grad():
        same(model, fast, X)
        for done, change in enumerate(changes.values(), 1):
            before = model(X)
            change()
            assert not torch.equal(model(X), before)
            same(model, fast, X)
            same(model, fast, X)
            assert counts()["weights computed"] == 1 + done, "computed again once, and only once"


def test_training_between_evaluations_is_as_ever_and_is_seen() -> None:
    model = net()
    twin, seen = copy.deepcopy(model), Recorder()
    fast = compiled(model, inner=seen)
    optimizers = [torch.optim.AdamW(each.parameters(), 1e-2) for each in (model, twin)]
    for _ in range(2):
        for each, run, optimizer in ((model, fast, optimizers[0]), (twin, twin, optimizers[1])):
            each.train()
            F.mse_loss(run(X), torch.zeros(2, 5)).backward()
            optimizer.step()
            optimizer.zero_grad()
            each.eval()
        with torch.no_grad():
            same(twin, fast, X)
    for one, other in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, other), "training went another way"
    assert counts() == {
        "graphs left to training": 1, "graphs rewritten": 1, "norms rewritten": 2, "weights computed": 2,
    }  # fmt: skip
    assert [any("batch_norm" in str(node.target) for node in graph.graph.nodes) for graph in seen.graphs] == [True, False]


def test_gradients_of_the_input_alone_are_training_too() -> None:
    model = net().requires_grad_(False)
    fast = compiled(model)
    same(model, fast, X)
    assert counts()["graphs rewritten"] == 1, "nothing wants a gradient"
    inputs = [X.clone().requires_grad_() for _ in range(2)]
    for run, x in zip((model, fast), inputs, strict=True):
        run(x).square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    model.requires_grad_(True)
    fast(X).sum().backward()
    assert model.conv1.weight.grad is not None
    assert counts()["graphs left to training"] == 2


def test_gradients_that_the_graph_turns_on() -> None:
    model = net()

    def guided(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return model(x)

    with torch.no_grad():
        y = compiled(guided)(X)
    y.sum().backward()
    assert model.conv1.weight.grad is not None
    assert counts() == {"graphs left to training": 1}


def test_layers_that_share_a_graph_keep_their_own_weights() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x))

    layers = nn.ModuleList(spread(Layer()).eval() for _ in range(3))
    fast = copy.deepcopy(layers)
    for layer in fast:
        layer.compile(backend=backend, options={"inner": "eager"})
    with torch.no_grad():
        for _ in range(3):
            x = y = X
            for one, other in zip(layers, fast, strict=True):
                x, y = one(x), other(y)
            torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-5)
    assert counts() == {"graphs rewritten": 1, "norms rewritten": 1, "weights computed": 3}


def test_no_model_is_kept_alive() -> None:
    model = net()
    weight, folded = weakref.ref(model.conv1.weight), Recorder()
    fast = compiled(model, inner=folded)
    with torch.no_grad():
        fast(X)
    del model, fast
    torch._dynamo.reset()
    gc.collect()
    assert weight() is None


# -- what graphs may look like -----------------------------------------------------------------------------------------


def test_sizes_stay_open() -> None:
    class Sized(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) * x.shape[0] + x.shape[2], x.shape[3]

    model = spread(Sized()).eval()
    fast = compiled(model, verify="full", dynamic=True)
    with torch.no_grad():
        for sizes in ((2, 4, 9, 8), (3, 4, 7, 8), (5, 4, 12, 6)):
            same(model, fast, noise(*sizes))
    assert counts()["graphs rewritten"] == 1


def test_graph_breaks_make_graphs_of_their_own() -> None:
    class Broken(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv1(x)
            torch._dynamo.graph_break()
            return self.head(torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(x))))).mean((2, 3)))

    model = spread(Broken()).eval()
    with torch.no_grad():
        same(model, compiled(model), X)
    assert counts() == {"graphs without a rewrite": 1, "graphs rewritten": 1, "norms rewritten": 2, "weights computed": 1}


def test_a_graph_without_norms_goes_through_untouched() -> None:
    seen, graphs = Recorder(), []

    def front(graph_module: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        graphs.append(graph_module)
        return backend(graph_module, inputs, options={"inner": seen})

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with torch.no_grad():
        same(model, torch.compile(model, backend=front), noise(2, 4))
        same(torch.sin, torch.compile(torch.sin, backend=front), X)
    assert seen.graphs == graphs
    assert counts() == {"graphs without a rewrite": 2}


class Counting(nn.Module):
    """Writes to a buffer, returns it, and reads a norm's input from another that it writes to."""

    seen: Tensor
    cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.write, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("cache", torch.zeros(4, 8))

    def forward(self, x: Tensor, at: Tensor) -> Any:
        self.seen += 1
        self.cache.index_copy_(0, at, self.norm(self.write(x)))
        return self.head(torch.relu(self.cache)), self.seen


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_written_buffer_is_written_and_stays_itself(inner: str) -> None:
    model = spread(Counting()).eval()
    model.seen.zero_()
    twin, buffer = copy.deepcopy(model), model.seen
    fast = compiled(model, inner=inner)
    with torch.no_grad():
        for turn in range(3):
            inputs = noise(2, 8) + turn, torch.tensor([turn, (turn + 1) % 4])
            same(twin, fast, *inputs)
            assert fast(*inputs)[1] is buffer is model.seen
            twin(*inputs)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-5)
    assert counts()["norms rewritten"] == counts()["weights computed"] == 1


@pytest.mark.filterwarnings("ignore::normfuse.errors.NormfuseWarning")
def test_autocast_is_kept() -> None:
    model = net()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = compiled(model)(X), model(X)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


def test_inference_mode() -> None:
    model = net()
    fast = compiled(model, verify="full")
    with torch.inference_mode():
        same(model, fast, X)
    with torch.no_grad():
        model.bn1.bias.add_(1)
    with torch.inference_mode():
        same(model, fast, X)
    assert counts() == {"graphs rewritten": 1, "norms rewritten": 2, "weights computed": 2}


# -- where it does nothing, and says why -------------------------------------------------------------------------------


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = net()
        with pytest.warns(NormfuseWarning, match="made in inference mode"):
            same(model, compiled(model), X)
        model.conv1.weight.mul_(2)
        same(model, compiled(model), X)


def test_a_view_of_a_written_buffer() -> None:
    class Views(Counting):
        def forward(self, x: Tensor, at: Tensor) -> Any:
            return super().forward(x, at)[0], self.cache[0]

    model = spread(Views()).eval()
    inputs = noise(2, 8), torch.tensor([0, 1])
    with torch.no_grad(), pytest.warns(NormfuseWarning, match="an output is a view"):
        row = compiled(model)(*inputs)[1]
    row.zero_()
    assert not model.cache[0].any(), "it is no view any more"


def test_tensor_subclasses() -> None:
    class Marked(Tensor):
        pass

    model = net()
    with torch.no_grad(), pytest.warns(NormfuseWarning, match="no plain tensor"):
        same(model, compiled(model), X.as_subclass(Marked))


def test_a_pass_that_is_wrong_does_not_reach_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def sloppy(program: Any, passes: Any) -> Any:
        made = plan(program, passes)
        lost = next(edit for each in made.rewrites for edit in each.edits if isinstance(edit, SetTensor))
        made = made.without(lost)
        return made, made.apply(program)

    monkeypatch.setattr("normfuse.torch_compile.backend.plan_and_apply", sloppy)
    model = net()
    with torch.no_grad(), pytest.warns(NormfuseWarning, match="without normfuse"):
        same(model, compiled(model, verify="full"), X)
    assert counts() == {"graphs not supported": 1}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"passes": "offline_norm"}, "must be a list"),
        ({"passes": ["no_such"]}, "there is no pass"),
        ({"verify": "hard"}, "no verification level"),
        ({"no_such_option": 1}, "Unexpected optimization option"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], says: str) -> None:
    with torch.no_grad(), pytest.raises(Exception, match=says):
        torch.compile(nn.Linear(4, 4), backend=backend, options=options)(noise(2, 4))


def test_a_stream_of_its_own() -> None:
    model = spread(Stream()).eval()
    with torch.no_grad():
        same(model, compiled(model), *IDS)
    assert counts() == {"graphs without a rewrite": 1}, "LayerNorms are no business of offline_norm"
