"""What the facts say of a program is true of its numbers: on traps that a guess falls into, and on random programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Node

from normfuse.analysis.facts import Facts, analyze
from normfuse.graph.interpreter import call
from normfuse.graph.ops import lookup
from normfuse.graph.ops.lookup import rank
from normfuse.graph.ops.row import TABLE
from normfuse.graph.program import Program
from normfuse.graph.views import aten, shape
from tests.graph.ops.properties import answered

D = 4


class Net(nn.Module):
    """A forward with the parts that it needs."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self._forward = forward

    def forward(self, *xs: Tensor) -> Any:
        return self._forward(self, *xs)


def facts_of(forward: Callable[..., Any], *inputs: Tensor, dynamic: Any = None, **parts: Any) -> Facts:
    return analyze(Program.trace(Net(forward, **parts), inputs or (cube(),), dynamic_shapes=dynamic))


def cube() -> Tensor:
    """Batch, tokens and features of one size: nothing can be told from a size."""
    return torch.randn(D, D, D)


def given_to(facts: Facts, place: int = 0) -> Node:
    """An input of the program."""
    stored_too = [node for node in facts.program.graph.nodes if node.op == "placeholder"]
    inputs: list[Node] = [node for node in stored_too if node.name not in facts.program.stored]
    return inputs[place]


def stored(facts: Facts, name: str) -> Node:
    return facts.program.reader_of(name)


def made_by(facts: Facts, op: Any, place: int = 0) -> Node:
    made: list[Node] = [node for node in facts.program.graph.nodes if node.target is op]
    return made[place]


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def norm_by_hand(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()


# -- unseen ------------------------------------------------------------------------------------------------------------


def test_a_norm_hides_its_input_and_all_who_write_it() -> None:
    facts = facts_of(lambda m, x: m.ln(m.up(x) + m.at), up=nn.Linear(D, D), at=torch.randn(D, D), ln=nn.LayerNorm(D))
    assert facts.unseen[made_by(facts, aten.add.Tensor)] == {2}
    assert facts.unseen[made_by(facts, aten.linear.default)] == {2}
    assert facts.unseen[stored(facts, "up.weight")] == {0}
    assert facts.unseen[stored(facts, "up.bias")] == {0}
    assert facts.unseen[stored(facts, "at")] == {1}
    assert facts.unseen[given_to(facts)] == set()
    assert facts.unseen[stored(facts, "ln.weight")] == facts.unseen[stored(facts, "ln.bias")] == set()


def batch(forwards: dict[str, Callable[..., Any]], **parts: Any) -> Facts:
    """Many forwards in one program, each on an input of its own: tracing costs as much for one."""
    inputs = [cube() for _ in forwards]
    return facts_of(lambda m, *xs: [forward(m, x) for forward, x in zip(forwards.values(), xs, strict=True)], *inputs, **parts)


SEEN: dict[str, Callable[..., Any]] = {
    "matmul with itself": lambda m, x: norm(torch.matmul(x, x)),
    "product with itself": lambda m, x: norm(x * x),
    "its own gate": lambda m, x: norm(x * x.mean(-1, keepdim=True)),
    "its own gate, transposed": lambda m, x: norm(x * x.transpose(1, 2)),
    "its mean is read beside the norm": lambda m, x: norm(x) + x.mean(-1, keepdim=True),
    "its mean is put back": lambda m, x: norm(norm(x) + x.mean(-1, keepdim=True).expand(-1, -1, D)),
    "returned": lambda m, x: (norm(x), x),
    "returned as a view": lambda m, x: (norm(x), x.reshape(-1)),
    "returned in part": lambda m, x: (norm(x), x[:, :1]),
    "not linear": lambda m, x: norm(F.gelu(x)),
    "a norm over several axes": lambda m, x: F.layer_norm(x, (D, D)),
    "a decomposed norm over several axes": lambda m, x: torch.native_layer_norm(x, (D, D), None, None, 1e-5)[0],
    "a norm over the other axis": lambda m, x: norm(x.transpose(1, 2)),
    "a norm over half of the features": lambda m, x: norm(x.view(D, D, 2, 2)),
    "a norm over features and tokens": lambda m, x: norm(x.reshape(D, D * D)),
    "features moved to tokens": lambda m, x: norm(x.view(D, 2, 2, D).transpose(1, 3).reshape(D, D, D)),
    "a norm over joined features": lambda m, x: norm(torch.cat([x, x], -1)),
    "a norm over padded features": lambda m, x: norm(F.pad(x, (0, 1))),
    "a norm over some features": lambda m, x: norm(x[..., 1:]),
    "a norm without a mean": lambda m, x: F.rms_norm(x, (D,)),
    "a norm over groups": lambda m, x: F.group_norm(x, 2),
    "another matrix": lambda m, x: norm(m.up(x)),
    "softmax over tokens": lambda m, x: x.softmax(1),
    "a mask that differs along the axis": lambda m, x: norm(x.masked_fill(torch.eye(D) > 0, 0.0)),
    "the mean that a norm tells": lambda m, x: torch.native_layer_norm(x, (D,), None, None, 1e-5)[:2],
}


@cache
def _seen() -> Facts:
    return batch(SEEN, up=nn.Linear(D, D, bias=False))


@pytest.mark.parametrize("why", SEEN)
def test_a_mean_that_is_seen(why: str) -> None:
    facts = _seen()
    assert 2 not in facts.unseen[given_to(facts, list(SEEN).index(why))]


UNSEEN: dict[str, tuple[Callable[..., Any], int]] = {
    "norm": (lambda m, x: norm(x), 2),
    "norm without its mean told": (lambda m, x: torch.native_layer_norm(x, (D,), None, None, 1e-5)[0], 2),
    "norm by hand": (lambda m, x: norm_by_hand(x), 2),
    "softmax": (lambda m, x: x.softmax(-1), 2),
    "variance": (lambda m, x: x.var(-1), 2),
    "two norms": (lambda m, x: (norm(x), norm(2 * x)), 2),
    "transposed": (lambda m, x: norm(x.transpose(1, 2)), 1),
    "tokens on the left": (lambda m, x: norm(torch.matmul(x.transpose(1, 2), m.table).transpose(1, 2)), 2),
    "merged batch": (lambda m, x: norm(x.reshape(D * D, D)), 2),
    "merged tokens of a transpose": (lambda m, x: norm(x.transpose(0, 1).reshape(D * D, D)), 2),
    "windows": (lambda m, x: norm(x.view(D, 2, 2, D).transpose(1, 2).reshape(D, D, D)), 2),
    "class token": (lambda m, x: norm(torch.cat([m.table[None].expand(D, -1, -1), x], 1)), 2),
    "padded tokens": (lambda m, x: norm(F.pad(x, (0, 0, 1, 0))), 2),
    "rolled tokens": (lambda m, x: norm(x.roll(1, 1)), 2),
    "one token": (lambda m, x: norm(x[:, 0]), 2),
    "mean of the tokens": (lambda m, x: norm(x.mean(1)), 2),
    "gate from elsewhere": (lambda m, x: norm(x * m.table[:, :1].sigmoid()), 2),
    "both terms": (lambda m, x: norm(x + x.roll(1, 1)), 2),
    "split and joined": (lambda m, x: norm(torch.stack(x.unbind(1), 1)), 2),
    "chunks": (lambda m, x: [norm(each) for each in x.chunk(2, 1)], 2),
    "its size only": (lambda m, x: norm(x) + torch.zeros_like(x), 2),
}


@cache
def _unseen() -> Facts:
    return batch({how: forward for how, (forward, _) in UNSEEN.items()}, table=torch.randn(D, D))


@pytest.mark.parametrize("how", UNSEEN)
def test_a_mean_that_nobody_sees(how: str) -> None:
    facts = _unseen()
    assert facts.unseen[given_to(facts, list(UNSEEN).index(how))] == {UNSEEN[how][1]}


def test_one_weight_of_two_layers() -> None:
    def seen(m: Any, x: Tensor) -> Any:
        return norm(m.up(x)), F.linear(x, m.up.weight)

    def unseen(m: Any, x: Tensor) -> Any:
        return norm(m.up(x)), norm(F.linear(x, m.up.weight))

    facts = facts_of(seen, up=nn.Linear(D, D))
    assert facts.unseen[stored(facts, "up.weight")] == set()
    assert facts.unseen[stored(facts, "up.bias")] == {0}
    facts = facts_of(unseen, up=nn.Linear(D, D))
    assert facts.unseen[stored(facts, "up.weight")] == {0}


def test_a_tied_head_sees_its_embedding() -> None:
    tied = facts_of(lambda m, ids: norm(m.embed(ids)) @ m.embed.weight.T, torch.tensor([[0, 1]]), embed=nn.Embedding(D, D))
    assert tied.unseen[stored(tied, "embed.weight")] == set()
    alone = facts_of(lambda m, ids: norm(m.embed(ids)), torch.tensor([[0, 1]]), embed=nn.Embedding(D, D))
    assert alone.unseen[stored(alone, "embed.weight")] == {1}


def test_a_linear_wrote_channels_but_the_norm_is_over_tokens() -> None:
    facts = facts_of(lambda m, x: norm(m.up(x).transpose(1, 2)), up=nn.Linear(D, D))
    assert facts.unseen[stored(facts, "up.weight")] == facts.unseen[stored(facts, "up.bias")] == set()
    facts = facts_of(lambda m, x: norm(m.up(x).transpose(0, 1)), up=nn.Linear(D, D))
    assert facts.unseen[stored(facts, "up.weight")] == {0}


def test_a_linear_that_writes_several_heads() -> None:
    facts = facts_of(lambda m, x: norm(m.up(x).view(D, D, D, D)), up=nn.Linear(D, D * D))
    assert facts.unseen[stored(facts, "up.weight")] == set()


def test_a_norm_whose_gain_is_its_input() -> None:
    facts = facts_of(lambda m, x: F.layer_norm(x, (D,), x, None), torch.randn(D))
    assert facts.unseen[given_to(facts)] == set()
    facts = facts_of(lambda m, x: F.layer_norm(x, (D,), None, x), torch.randn(D))
    assert facts.unseen[given_to(facts)] == set()


def test_a_linear_whose_weight_is_its_input() -> None:
    facts = facts_of(lambda m, x: norm(F.linear(x, x)), torch.randn(D, D))
    assert facts.unseen[given_to(facts)] == set()


def test_scalars_have_no_axes() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        total = x.sum((0, 1, 2)) + 2 * x.mean((0, 1, 2))
        return norm(x) + torch.zeros_like(total)

    facts = facts_of(forward)
    assert facts.unseen[made_by(facts, aten.sum.dim_IntList)] == facts.unseen[given_to(facts)] - {2} == set()


def test_dynamic_batch_and_tokens() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        batch, tokens, _ = x.shape
        y = torch.cat([m.token.expand(batch, 1, D), m.up(x)], 1)
        return norm(F.pad(y, (0, 0, 0, 2)).roll(1, 1)), norm(m.up(x).reshape(batch * tokens, D)), norm(y.transpose(0, 1))

    dims = ({0: Dim("batch"), 1: Dim("tokens")},)
    facts = facts_of(forward, torch.randn(3, 5, D), dynamic=(dims,), up=nn.Linear(D, D), token=torch.randn(1, 1, D))
    assert facts.unseen[stored(facts, "up.weight")] == {0}
    assert facts.unseen[stored(facts, "token")] == {2}


# -- centered ----------------------------------------------------------------------------------------------------------


CENTERED: list[tuple[Callable[..., Any], set[int]]] = [
    (lambda m, x: norm(x), {2}),
    (lambda m, x: x - x.mean(-1, keepdim=True), {2}),
    (lambda m, x: x - x.mean(1, keepdim=True), {1}),
    (lambda m, x: norm(x).transpose(1, 2), {1}),
    (lambda m, x: norm(x) + norm(2 * x), {2}),
    (lambda m, x: norm(x) * x.mean(-1, keepdim=True), {2}),
    (lambda m, x: (norm(x) / 2).roll(1, 1).reshape(D * D, D), {1}),
    (lambda m, x: torch.cat([norm(x), torch.zeros(D, 1, D)], 1), {2}),
    (lambda m, x: norm(x.transpose(1, 2)).transpose(1, 2) @ m.table, {1}),
    (lambda m, x: norm_by_hand(x), {2}),
    (lambda m, x: norm(x) + x, set()),
    (lambda m, x: norm(x) + 1.0, set()),
    (lambda m, x: norm(x) * m.vector, set()),
    (lambda m, x: F.layer_norm(x, (D,), m.vector), set()),
    (lambda m, x: F.layer_norm(x, (D, D)), set()),
    (lambda m, x: F.gelu(norm(x)), set()),
    (lambda m, x: norm(x) @ m.table, set()),
    (lambda m, x: norm(x)[..., 1:], set()),
    (lambda m, x: norm(x).view(D, D, 2, 2), set()),
    (lambda m, x: torch.sub(x, x.mean(-1, keepdim=True), alpha=2), set()),
    (lambda m, x: x - x.mean((1, 2), keepdim=True), set()),
    (lambda m, x: x - x.mean(-1), set()),
    (lambda m, x: x - x.transpose(1, 2).mean(-1, keepdim=True), set()),
    (lambda m, x: F.rms_norm(x, (D,)), set()),
]


@cache
def _centered() -> Facts:
    forwards = {str(place): forward for place, (forward, _) in enumerate(CENTERED)}
    return batch(forwards, table=torch.randn(D, D), vector=torch.randn(D))


@pytest.mark.parametrize("place", range(len(CENTERED)))
def test_zero_mean_by_construction(place: int) -> None:
    facts = _centered()
    result = facts.program.graph.output_node().all_input_nodes[place]
    assert facts.centered[result] == CENTERED[place][1]


# -- constant and first sight ------------------------------------------------------------------------------------------


def test_what_depends_on_stored_tensors_alone() -> None:
    facts = facts_of(lambda m, x: x * (2 * m.vector).sigmoid() + m.table, vector=torch.randn(D), table=torch.randn(D, D))
    assert {stored(facts, "vector"), stored(facts, "table"), made_by(facts, aten.sigmoid.default)} <= facts.constant
    assert not {given_to(facts), made_by(facts, aten.add.Tensor), made_by(facts, aten.mul.Tensor, 1)} & facts.constant


@pytest.mark.parametrize(
    ("forward", "reader"),
    [
        (lambda m, x: norm(x) + F.gelu(x), aten.gelu.default),
        (lambda m, x: norm(x) + F.gelu(x.transpose(0, 1).transpose(0, 1)), aten.gelu.default),
        (lambda m, x: norm(x) * x.mean(-1, keepdim=True), aten.mean.dim),
        (lambda m, x: (norm(x), x.roll(1, 1)), "output"),
        (lambda m, x: F.layer_norm(x, (D, D)), aten.layer_norm.default),
        (lambda m, x: norm(x), None),
    ],
)
def test_the_first_reader_that_sees(forward: Callable[..., Any], reader: Any) -> None:
    facts = facts_of(forward)
    witness = facts.first_sight(given_to(facts), 2)
    assert (witness.target if witness else None) == reader


# -- random programs ---------------------------------------------------------------------------------------------------

Step = tuple[str, int, int]


class Chain(nn.Module):
    """A random program, one step after the other on one value; its parameters appear when it first runs."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self._steps = steps

    def stored(self, *sizes: int) -> Tensor:
        name = f"p{self._count}"
        self._count += 1
        if not hasattr(self, name):
            setattr(self, name, nn.Parameter(torch.randn(sizes)))
        parameter: Tensor = getattr(self, name)
        return parameter

    def forward(self, x: Tensor) -> Tensor:
        self._count = 0
        saved = x
        for name, a, b in self._steps:
            if name == "save":
                saved = x
            else:
                x = STEPS[name](self, x, saved, a % x.dim(), b)
        return x


STEPS: dict[str, Callable[[Chain, Tensor, Tensor, int, int], Tensor]] = {
    "linear": lambda m, x, saved, a, b: F.linear(x, m.stored(D, x.shape[-1]), m.stored(D) if b % 2 else None),
    "gelu": lambda m, x, saved, a, b: F.gelu(x),
    "number": lambda m, x, saved, a, b: x + (b % 2) if b > 2 else x * (b + 0.5),
    "vector": lambda m, x, saved, a, b: x * m.stored(x.shape[-1]) if b % 2 else x + m.stored(x.shape[-1]),
    "table": lambda m, x, saved, a, b: x + (2 * m.stored(*x.shape[1:]) if b % 2 else m.stored(*x.shape[1:])),
    "gate": lambda m, x, saved, a, b: x * (x.mean(a, keepdim=True) if b % 2 else saved.mean()).sigmoid(),
    "transpose": lambda m, x, saved, a, b: x.transpose(a, b % x.dim()),
    "merge": lambda m, x, saved, a, b: x.flatten(a, min(a + 1, x.dim() - 1)) if x.dim() > 2 else x,
    "split": lambda m, x, saved, a, b: x.unflatten(a, (2, -1)) if x.dim() < 4 and x.shape[a] % 2 == 0 else x,
    "cat": lambda m, x, saved, a, b: torch.cat([x, saved if saved.shape == x.shape else x.flip(a)], b % x.dim()),
    "pad": lambda m, x, saved, a, b: F.pad(x, [0, 0] * a + [1, 0], value=float(b == 3)),
    "roll": lambda m, x, saved, a, b: x.roll(1, a),
    "slice": lambda m, x, saved, a, b: x.narrow(a, 0, x.shape[a] - (x.shape[a] > 2)),
    "select": lambda m, x, saved, a, b: x.select(a, 0) if x.dim() > 2 else x,
    "index": lambda m, x, saved, a, b: x.index_select(a, torch.arange(x.shape[a]).flip(0)),
    "mask": lambda m, x, saved, a, b: x.masked_fill(torch.arange(x.shape[-1 - b % 2]).view([-1] + [1] * (b % 2)) > 1, 0.0),
    "mean": lambda m, x, saved, a, b: x.mean(a, keepdim=bool(b % 2)) if x.dim() > 2 else x,
    "centre": lambda m, x, saved, a, b: x - x.mean(a, keepdim=True),
    "halve": lambda m, x, saved, a, b: torch.stack(x.split(2, a)[:1], b % x.dim()).sum(b % x.dim()),
    "norm": lambda m, x, saved, a, b: F.layer_norm(
        x, x.shape[-1:], m.stored(x.shape[-1]) if b % 2 else None, m.stored(x.shape[-1]) if b > 1 else None, 0.1
    ),
    "wide norm": lambda m, x, saved, a, b: F.layer_norm(x, x.shape[-2:], eps=0.1),
    "hand norm": lambda m, x, saved, a, b: (
        (x - x.mean(a, keepdim=True)) / (x.var(a, correction=0, keepdim=True) + 0.1).sqrt() if x.shape[a] > 1 else x
    ),
    "softmax": lambda m, x, saved, a, b: x.softmax(a),
    "residual": lambda m, x, saved, a, b: x + saved if saved.shape == x.shape else x,
    "product": lambda m, x, saved, a, b: x * saved if saved.shape == x.shape else x,
    "matmul": lambda m, x, saved, a, b: x @ x.transpose(-1, -2),
    "square": lambda m, x, saved, a, b: x @ x if x.shape[-1] == x.shape[-2] else x,
    "times": lambda m, x, saved, a, b: x @ m.stored(x.shape[-1], D) if b % 2 else m.stored(D, x.shape[-2]) @ x,
}

step = st.tuples(st.sampled_from([*STEPS, "save", "norm", "residual", "linear"]), st.integers(0, 3), st.integers(0, 3))
ending = st.sampled_from([("norm", 0, 0), ("norm", 0, 3), ("hand norm", 1, 0), ("softmax", 2, 0), ("roll", 0, 0)])
chain = st.builds(lambda steps, end: [*steps, end], st.lists(step, min_size=4, max_size=8), ending)
chains = st.lists(chain, min_size=24, max_size=24)


def traced(steps: list[list[Step]], core: bool = False) -> Program:
    """The program of some chains; ``core`` decomposes it as far as torch does by itself, as some users' files are."""
    torch.manual_seed(0)
    modules = nn.ModuleList(Chain(each) for each in steps)
    inputs = tuple(torch.randn(2 if place % 2 else D, D, D) for place in range(len(modules)))
    for module, x in zip(modules, inputs, strict=True):
        module(x)  # makes the parameters
    net = Net(lambda m, *xs: [each(x) for each, x in zip(m.chains, xs, strict=True)], chains=modules)
    program = Program.trace(net, inputs)
    return Program.from_exported(program.exported.run_decompositions()) if core else program


class Replay:
    """All values of a program in float64, and what becomes of its outputs when one of them is changed."""

    def __init__(self, program: Program, seed: int, weights_of: Replay | None = None) -> None:
        self._nodes = [node for node in program.graph.nodes if node.op == "call_function"]
        self._outputs = program.graph.output_node().all_input_nodes
        self.generator = torch.Generator().manual_seed(seed)
        self.values: dict[Node, Any] = {}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._given(program, node, weights_of)
        for node in self._nodes:
            self.values[node] = call(node, self.values, wide=True)

    def _given(self, program: Program, node: Node, weights_of: Replay | None) -> Any:
        name = program.stored.get(node.name)
        if name is not None and weights_of is not None:
            return weights_of.values[node]
        if name is not None and not program.tensor(name).is_floating_point():
            return program.tensor(name)
        return self.random(node.meta["val"].shape)

    def random(self, sizes: Any) -> Tensor:
        return torch.randn(tuple(sizes), generator=self.generator, dtype=torch.float64)

    def shifted(self, value: Any, axis: int) -> Any:
        if isinstance(value, (tuple, list)):
            return [self.shifted(each, axis) for each in value]
        return value + 3 * self.random(1 if own == axis else size for own, size in enumerate(value.shape))

    def outputs_move(self, node: Node, value: Any) -> bool:
        changed = {node: value}
        for each in self._nodes:
            if each is not node and any(operand in changed for operand in each.all_input_nodes):
                changed[each] = call(each, {**self.values, **changed}, wide=True)
        return any(
            not torch.allclose(changed[output], self.values[output], rtol=1e-7, atol=1e-7)
            for output in self._outputs
            if output in changed
        )


def is_float(value: Any) -> bool:
    return (
        all(map(is_float, value))
        if isinstance(value, (tuple, list))
        else isinstance(value, Tensor) and value.is_floating_point()
    )


def check(program: Program, told: Counter[str]) -> None:
    """Every fact of a program, on random weights and inputs."""
    facts, replay = analyze(program), Replay(program, 1)
    again = Replay(program, 2, weights_of=replay)
    for node, value in replay.values.items():
        if not is_float(value):
            continue
        for axis in range(rank(node)):
            if axis in facts.unseen[node]:
                told["unseen"] += 1
                assert not replay.outputs_move(node, replay.shifted(value, axis)), f"{node} along {axis} is seen"
            if axis in facts.centered[node]:
                told["centered"] += 1
                for each in value if isinstance(value, (tuple, list)) else [value]:
                    assert each.mean(axis).abs().max() < 1e-9 * max(1.0, each.abs().max()), f"{node} along {axis} has a mean"
            assert (facts.first_sight(node, axis) is None) == (axis in facts.unseen[node]), f"{node} along {axis}: by whom?"
        if node in facts.constant and node.op != "placeholder":
            told["constant"] += 1
            assert torch.equal(value, again.values[node]), f"{node} is not constant"


def test_the_facts_of_random_programs() -> None:
    told: Counter[str] = Counter()

    # tracing many chains costs little more than one, but makes shrinking slow
    @settings(
        max_examples=6,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(chains, st.sampled_from((False, False, False, True)))
    def examples(steps: list[list[Step]], core: bool) -> None:
        try:
            check(traced(steps, core), told)
        except AssertionError:
            for each in steps:
                note(f"{each}")  # the last one printed is to blame
                check(traced([each], core), Counter())
            raise

    examples()
    assert told["unseen"] > 200
    assert told["centered"] > 100
    assert told["constant"] > 10


def _sees_nothing(node: Node, a: dict[str, Any], operand: Node) -> frozenset[int]:
    return frozenset(range(rank(operand)))


def _of_equal_size(node: Node, a: dict[str, Any], axis: int) -> Any:
    sizes = list(shape(a["self"]))
    return ((a["self"], sizes.index(size)),) if (size := shape(node)[axis]) in sizes else None


def _once(facts: Facts, reader: Node, value: Node, unseen: frozenset[int]) -> frozenset[int]:
    said = ((operand, axis) for out_axis in unseen for operand, axis in lookup.carries(reader, out_axis) or ())
    return frozenset(axis for operand, axis in said if operand is value)


@pytest.mark.parametrize(
    ("place", "name", "wrong", "steps"),
    [
        ("hides", aten.layer_norm.default, _sees_nothing, [("norm", 0, 0)]),
        ("carries", aten.view.default, _of_equal_size, [("split", 1, 0), ("norm", 0, 0)]),
        ("carries", aten.gelu.default, lambda node, a, axis: ((a["self"], axis),), [("gelu", 0, 0), ("norm", 0, 0)]),
        ("carries", aten.gelu.default, lambda node, a, axis: ((a["self"], axis),), [("norm", 0, 0), ("gelu", 0, 0)]),
        (Facts, "_passed_on", _once, [("square", 0, 0), ("norm", 0, 0)]),
    ],
)
def test_wrong_facts_are_found(place: Any, name: Any, wrong: Any, steps: list[Step], monkeypatch: pytest.MonkeyPatch) -> None:
    program = traced([steps])
    check(program, Counter())
    if isinstance(place, str):
        monkeypatch.setitem(TABLE, name, answered(name, **{place: wrong}))
    else:
        monkeypatch.setattr(place, name, wrong)
    with pytest.raises(AssertionError):
        check(program, Counter())
