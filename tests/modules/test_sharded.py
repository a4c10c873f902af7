"""Models whose parameters lie in shards on two processes: rewritten in place they are what the unsharded ones become."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import normfuse
from tests.models import noise
from tests.modules import live_models
from tests.modules.live_models import cross_entropy, gpt, text
from tests.modules.models import Net
from tests.modules.processes import on_processes
from tests.zoo.spread import spread

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Odd(nn.Module):
    """Widths that two processes cannot share evenly, and a parameter with fewer rows than there are processes."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.first = nn.Linear(5, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(width, 9) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(9, width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(F.gelu(up(norm(x))))
        return self.head(self.norm(x))


class Images(nn.Module):
    """Convolutions of odd widths with their BatchNorms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.conv2, self.bn2, self.head = nn.Conv2d(5, 7, 1), nn.BatchNorm2d(7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        return self.head(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))


class Encoder(nn.Module):
    """torch's own blocks, as a ViT has them."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.patches = nn.Linear(6, 8)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patches(x))).mean(1))


def transformer(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    gpt2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    settings: dict[str, Any] = gpt2 if name == "GPT2" else sizes
    config = getattr(transformers, f"{name}Config")(**settings, vocab_size=31, bos_token_id=0, eos_token_id=0)
    kind = f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    return getattr(transformers, kind)(config)


IDS = torch.randint(0, 31, (2, 6), generator=torch.Generator().manual_seed(3))
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "gpt": (live_models.Gpt, (text(1)[0][:, :-1],)),
    "tied gpt": (lambda: live_models.Gpt(tied=True), (text(1)[0][:, :-1],)),
    "odd": (Odd, (noise(3, 5),)),
    "images": (Images, (noise(2, 3, 6, 6),)),
    "net": (Net, (noise(2, 3, 12, 12),)),
    "encoder": (Encoder, (noise(2, 4, 6),)),
    **{name: (lambda name=name: transformer(name), (IDS,)) for name in ("GPT2", "GPTNeoX", "Llama")},  # type: ignore[misc]
}


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, tuple[Any, ...]]:
    """A model in evaluation mode with weights that hide nothing, and its inputs."""
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = spread(make()).to(dtype).eval()
    return model, tuple(each.to(dtype) if each.is_floating_point() else each for each in inputs)


def shard(model: nn.Module, by: str, **options: Any) -> Any:
    """``blocks``: the parts of a model's lists of modules, then the rest; ``layers``: each leaf by itself."""
    kinds = (nn.Linear, nn.LayerNorm, nn.Conv2d, nn.BatchNorm2d)
    lists: list[Any] = [part for each in model.modules() if isinstance(each, nn.ModuleList | nn.Sequential) for part in each]
    shared = getattr(getattr(model, "bytes", None), "weight", None)
    leaves = [each for each in model.modules() if isinstance(each, kinds) and each.weight is not shared]
    parts: dict[str, list[Any]] = {"blocks": lists, "layers": leaves, "whole": []}
    for part in parts[by]:
        fully_shard(part, **options)
    return fully_shard(model, **options)


def states(model: nn.Module) -> dict[str, Tensor]:
    """Its own tensors, gathered by hand: on every process."""
    for each in model.modules():
        if isinstance(each, torch.distributed.fsdp.FSDPModule):
            each.reshard()
    found = model.state_dict().items()
    return {name: (each.full_tensor() if isinstance(each, DTensor) else each).clone() for name, each in found}


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of two state dicts with the same keys, on the scale of each tensor."""
    assert found.keys() == expected.keys()
    pairs = [(found[name].double(), each.double()) for name, each in expected.items() if each.is_floating_point()]
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-300)).item() for a, b in pairs)


def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    with torch.no_grad():
        found = model(*inputs)
    return found if isinstance(found, Tensor) else found.logits


# -- deploy --------------------------------------------------------------------------------------------------------------


def deployed(
    name: str, passes: str, by: str, options: dict[str, Any], dtype: torch.dtype
) -> tuple[float, float, list[str], bool]:
    """How far a sharded model that is deployed is from the same without shards: its tensors, its outputs."""
    model, inputs = build(name, dtype)
    plain = copy.deepcopy(model)
    normfuse.deploy(plain, passes, inputs)
    shard(model, by, **options)
    own_type, before, parameters = type(model), states(model), list(model.parameters())
    first = outputs(model, inputs)
    normfuse.deploy(model, passes, inputs, keep=True)
    after = states(model)
    changed = sorted(name for name, each in after.items() if not torch.equal(each, before[name]))
    same_objects = all(mine is theirs for mine, theirs in zip(model.parameters(), parameters, strict=True))
    assert same_objects
    assert type(model).__name__ == own_type.__name__
    distance, loaded = apart(after, plain.state_dict()), build(name, dtype)[0]
    loaded.load_state_dict(after)
    seen = (outputs(model, inputs) - outputs(plain, inputs)).abs().max() / first.abs().max()
    as_saved = (outputs(loaded, inputs) - first).abs().max() / first.abs().max()
    normfuse.restore(model)
    restored = apart(states(model), before) == 0.0 and torch.equal(outputs(model, inputs), first) and type(model) is own_type
    return distance, max(seen.item(), as_saved.item()), changed, restored


def check_deployed(name: str, passes: str, by: str, dtype: torch.dtype = torch.float64, **options: Any) -> None:
    wide = dtype == torch.float64
    for distance, seen, changed, restored in on_processes(deployed, name, passes, by, options, dtype):
        assert changed
        assert restored
        assert distance <= (1e-14 if wide else 2 * torch.finfo(dtype).eps)
        assert seen <= (1e-12 if wide else 64 * torch.finfo(dtype).eps)


def test_deploy() -> None:
    check_deployed("odd", "pre_rmsnorm", "blocks")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "passes", "by"),
    [
        ("gpt", "pre_rmsnorm", "blocks"), ("gpt", "fold_affine", "layers"), ("tied gpt", "pre_rmsnorm", "blocks"),
        ("odd", "fold_affine", "layers"), ("odd", "pre_rmsnorm", "whole"), ("images", "conv_bn", "layers"),
        ("images", "conv_bn", "whole"), ("net", "conv_bn", "blocks"), ("encoder", "pre_rmsnorm", "blocks"),
        ("GPT2", "pre_rmsnorm", "blocks"), ("GPTNeoX", "pre_rmsnorm", "blocks"), ("Llama", "fold_affine", "blocks"),
    ],
)  # fmt: skip
def test_deploy_of_many(name: str, passes: str, by: str) -> None:
    check_deployed(name, passes, by)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deploy_in_the_stored_dtype(dtype: torch.dtype) -> None:
    check_deployed("odd", "pre_rmsnorm", "blocks", dtype)


@pytest.mark.slow
def test_deploy_under_mixed_precision() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for distance, _, changed, restored in on_processes(
        deployed, "odd", "pre_rmsnorm", "blocks", {"mp_policy": policy}, torch.float32
    ):
        assert changed
        assert restored
        assert distance <= 2 * torch.finfo(torch.float32).eps


# -- tune ----------------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3, weight_decay=0.1),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


def trained(model: Any, optimizer: str, part: Callable[[Tensor], Tensor], parameters: Any = None) -> Tensor:
    """The losses of five steps; an evaluation before them may leave other tensors in the place of the parameters."""
    losses, steps = [], OPTIMIZERS[optimizer](parameters or list(model.parameters()))
    for window in text(5):
        loss = cross_entropy(model, part(window))
        loss.backward()
        steps.step()
        steps.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def tuned(passes: str, by: str, optimizer: str, before: bool, options: dict[str, Any]) -> tuple[int, float, float, float]:
    """Tensors in live mode; then how far 5 steps on halves of the data, one on each process, are from all of it on one."""
    model, plain = gpt(), gpt()
    inputs, rank = (text(1)[0][:, :-1],), dist.get_rank()
    expected = trained(plain, optimizer, lambda window: window)
    if before:
        normfuse.tune(model, passes, inputs)
    shard(model, by, **options)
    if not before:
        normfuse.tune(model, passes, inputs)
    parameters = list(model.parameters())
    if options:
        outputs(model, inputs)  # leaves parameters gathered
    live = sum(type(getattr(each, "weight", None)).__name__ == "Formed" for each in model.modules())
    losses = trained(model, optimizer, lambda window: window.chunk(2)[rank], parameters)
    dist.all_reduce(losses)
    distance, state = apart(states(model), plain.state_dict()), states(model)
    normfuse.restore(model)
    return live, distance, (losses / 2 - expected).abs().max().item(), apart(states(model), state)


def check_tuned(passes: str, by: str, optimizer: str, *, before: bool, **options: Any) -> None:
    for live, distance, losses, restored in on_processes(tuned, passes, by, optimizer, before, options):
        assert live >= 4
        assert distance <= 1e-12
        assert losses <= 1e-12
        assert restored == 0.0


def test_tune_then_shard() -> None:
    check_tuned("fold_affine", "blocks", "SGD", before=True)


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("by", ["blocks", "layers"])
@pytest.mark.parametrize("passes", ["pre_rmsnorm", "fold_affine"])
def test_tune(passes: str, by: str, optimizer: str, before: bool) -> None:
    check_tuned(passes, by, optimizer, before=before)


@pytest.mark.slow
def test_what_stays_gathered_gets_its_gradients() -> None:
    """A layer reads the gain of a norm that FSDP has gathered and not let go of, in a group of its own."""
    check_tuned("fold_affine", "layers", "SGD", before=True, reshard_after_forward=False)
