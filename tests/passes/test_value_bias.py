"""The bias of a value projection goes through attention into the output projection, where its rows of weights sum to one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse.graph.interpreter import flat_inputs
from normfuse.graph.program import Program
from normfuse.graph.views import arguments, aten
from normfuse.planning.planner import plan
from normfuse.proof.cases import cases
from normfuse.proof.proving import prove
from tests.models import noise
from tests.zoo.spread import spread

D, HEADS = 12, 3
HIDDEN = (noise(2, 5, D),)
Attend = Callable[..., Tensor]


def fused(q: Tensor, k: Tensor, v: Tensor, **named: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, **named)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / 2, dim=-1) @ v


def by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(torch.softmax(torch.bmm(q, k.mT).float(), -1).type_as(q), v)


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.dropout(torch.softmax(q @ k.mT, -1), 0.5, training=False)
    return weights.to(v.dtype).contiguous() @ v


def closed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last query's keys are all masked by a large number, which leaves it their mean."""
    scores = (q @ k.mT).masked_fill(torch.ones(q.shape[-2], k.shape[-2]).tril(-1).bool().flip(1), -1e9)
    return torch.softmax(scores, -1) @ v


def masked(build: Callable[[Tensor], Tensor], **named: Any) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fused(q, k, v, attn_mask=build(torch.ones(q.shape[-2], k.shape[-2])), **named)

    return attend


def unnormalized(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.relu(q @ k.mT) @ v


def other_axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each key's weights sum to one, not each query's; there are as many of both."""
    return torch.softmax(q @ k.mT, dim=-2) @ v


def doubled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return 2 * torch.softmax(q @ k.mT, -1) @ v


def sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One more entry takes its share of the softmax and is dropped."""
    scores = q @ k.mT
    return torch.softmax(torch.cat([scores, torch.zeros_like(scores[..., :1])], -1), -1)[..., :-1] @ v


def read_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fused(q, v, v)


class Attention(nn.Module):
    """Separate projections, heads by view and transpose, and a norm in front."""

    def __init__(
        self, attend: Attend = fused, heads: int = HEADS, bias: bool = True, out: bool = True, values: int | None = None
    ) -> None:
        super().__init__()
        self.attend, self.heads, self.values = attend, heads, values or heads
        own = D // heads * self.values
        self.norm = nn.LayerNorm(D)
        self.q, self.k, self.v = nn.Linear(D, D), nn.Linear(D, own, bias=False), nn.Linear(D, own, bias=bias)
        self.out = nn.Linear(D, D, bias=out)

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:2], heads, -1).transpose(1, 2)

    def merge(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], D)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = self.split(self.q(y), self.heads), self.split(self.k(y), self.values), self.split(self.v(y), self.values)
        return x + torch.tanh(self.out(self.merge(self.attend(q, k, v))))


class OneHead(Attention):
    """No heads at all: the channels stay one axis."""

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x

    def merge(self, x: Tensor) -> Tensor:
        return x


class HeadsInBatch(Attention):
    """fairseq: heads are a part of the batch, so that one axis has both."""

    def split(self, x: Tensor, heads: int) -> Tensor:
        return super().split(x, heads).reshape(x.shape[0] * heads, x.shape[1], -1)

    def merge(self, x: Tensor) -> Tensor:
        return super().merge(x.view(-1, HEADS, *x.shape[1:]))


class Mixed(Attention):
    """The heads' channels come out in another order: a merge of the wrong axes, of right sizes."""

    def merge(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).reshape(x.shape[0], x.shape[2], D)


class Raw(Attention):
    """The attention's result is returned as well."""

    def forward(self, x: Tensor) -> Any:
        merged = self.merge(self.attend(*(self.split(each(x), HEADS) for each in (self.q, self.k, self.v))))
        return self.out(merged), merged


class Shared(Attention):
    """One output projection for two attentions, of which each would add another bias to it."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = super().forward(x)
        return x


class Packed(Attention):
    """One projection for queries, keys and values: its bias is needed by the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(each, HEADS) for each in self.qkv(x).chunk(3, -1))
        return self.out(self.merge(self.attend(q, k, v)))


def rewritten(model: nn.Module, *inputs: Any, **named: Any) -> normfuse.Result:
    result = normfuse.rewrite(spread(model).eval(), "fold_affine", inputs=inputs or HIDDEN, **named)
    assert result.report.evidence.relative <= 1e-11
    return result


def biases(result: normfuse.Result) -> list[bool]:
    """Whether q, k, v and out have a bias afterwards, in the order of their calls."""
    linear = result.program.graph.find_nodes(op="call_function", target=aten.linear.default)
    return [arguments(node)["bias"] is not None for node in linear]


def moved(result: normfuse.Result) -> int:
    return sum(each["was"] == "value bias" for each in result.report.to_dict()["rewrites"])


FREE = {
    "fused": fused,
    "causal": lambda q, k, v: fused(q, k, v, is_causal=True),
    "by hand": by_hand,
    "dropout at inference": dropped,
    "a softmax that closes rows by large numbers": closed,
    "a mask that is the same for all inputs": masked(lambda ones: ones.tril().bool()),
    "an added mask that is the same for all inputs": masked(lambda ones: ones.triu(1) * -1e9),
}


@pytest.mark.parametrize("name", FREE)
def test_it_goes_into_the_output_projection(name: str) -> None:
    result = rewritten(Attention(FREE[name]))
    assert moved(result) == 1
    assert biases(result) == [True, True, False, True], "keys have got one of the norm's shift"


KEPT = {
    "weights that do not sum to one": unnormalized,
    "a softmax along the other axis": other_axis,
    "weights that sum to two": doubled,
    "a sink": sink,
    "keys that are the values": read_twice,
    "a mask without keys for a query": masked(lambda ones: ones.tril(-1).bool()),
    "an added mask without keys for a query": masked(lambda ones: torch.where(ones.tril(-1).bool(), 0.0, -torch.inf)),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_no_mean_of_the_values_keeps_it(name: str) -> None:
    result = rewritten(Attention(KEPT[name]))
    assert moved(result) == 0
    assert all(biases(result)[2:])


def test_a_mask_from_the_input_is_refused_with_its_reason() -> None:
    class Masked(Attention):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            self.attend = lambda q, k, v: fused(q, k, v, attn_mask=mask[:, None, None, :])
            return super().forward(x)

    result = rewritten(Masked(), *HIDDEN, torch.tensor([[True] * 5, [True] * 3 + [False] * 2]))
    (refusal,) = result.report.to_dict()["refusals"]
    assert (refusal["code"], refusal["module"]) == ("NF503", "v")
    assert "from every key" in refusal["reason"]
    assert moved(result) == 0


@pytest.mark.parametrize("model", [OneHead(), OneHead(by_hand), OneHead(by_bmm), Attention(heads=1), Attention(heads=D)])
def test_one_head_and_heads_of_one_channel(model: nn.Module) -> None:
    assert moved(rewritten(model)) == 1


@pytest.mark.parametrize(
    "model", [HeadsInBatch(), HeadsInBatch(by_bmm), Mixed(), Raw(), Packed()], ids=lambda m: type(m).__name__
)
def test_axes_that_cannot_be_followed_keep_it(model: nn.Module) -> None:
    assert moved(rewritten(model)) == 0


@pytest.mark.parametrize("repeat", [True, False])
def test_shared_values_keep_it(repeat: bool) -> None:
    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if repeat:
            return fused(q, k.repeat_interleave(HEADS, 1), v.repeat_interleave(HEADS, 1))
        return fused(q, k, v, enable_gqa=True)

    assert moved(rewritten(Attention(grouped, values=1))) == 0


def test_an_addition_is_not_merely_moved() -> None:
    result = rewritten(Attention(out=False))
    assert moved(result) == 0
    assert biases(result) == [True, True, True, False]


def test_a_bias_that_a_norm_leaves_goes_on() -> None:
    result = rewritten(Attention(bias=False))
    assert moved(result) == 1
    assert biases(result) == [True, True, False, True]


def test_a_shared_output_projection_keeps_it() -> None:
    assert moved(rewritten(Shared())) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision(dtype: torch.dtype) -> None:
    result = rewritten(Attention().to(dtype), noise(2, 5, D).to(dtype))
    assert moved(result) == 1


def test_any_number_of_tokens() -> None:
    dynamic = ({0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("tokens", max=64)},)
    for attend in (fused, by_hand):
        model = spread(Attention(attend)).eval()
        exported = torch.export.export(model, HIDDEN, dynamic_shapes=dynamic)
        result = normfuse.rewrite(exported, "fold_affine")
        assert moved(result) == 1
        for sizes in ((2, 2), (3, 7), (1, 9)):
            x = noise(*sizes, D)
            torch.testing.assert_close(result.module()(x), model(x), rtol=1e-4, atol=1e-4)


def test_the_proof_needs_both_edits() -> None:
    program = Program.trace(spread(Attention()).eval(), HIDDEN)
    chosen = plan(program, ["fold_affine"])
    tried = list(cases(program, flat_inputs(program, HIDDEN)))[:1]
    (rewrite,) = (each for each in chosen.rewrites if each.was == ("value bias",))
    assert {type(edit).__name__ for edit in rewrite.edits} == {"SetTensor", "Reroute"}
    for edit in rewrite.edits:
        crippled = chosen.without(edit)
        assert not prove(program, crippled.apply(program), crippled, tried).ok
