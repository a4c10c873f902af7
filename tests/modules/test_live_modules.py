"""A tuned model is still the user's model: training modes, hooks, copies, files, compilers, processes."""

from __future__ import annotations

import copy
import io
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import normfuse
from tests.modules.models import IMAGES, Net, distance, gradients, loss, net
from tests.zoo.spread import spread

WIDE = (IMAGES[0].double(),)


@pytest.fixture(scope="module")
def tuned_once() -> Any:
    return normfuse.tune(net().double(), "conv_bn", inputs=WIDE)


@pytest.fixture
def tuned(tuned_once: Any) -> Any:
    """A tuned network of its own for every test: copying is one of the things that must work."""
    return copy.deepcopy(tuned_once)


@pytest.fixture
def original() -> Any:
    return net().double()


def same(model: nn.Module, other: nn.Module) -> bool:
    return distance(gradients(model, WIDE), gradients(other, WIDE)) <= 1e-12


def test_class_names_and_tensors_are_the_users(tuned: Any, original: Any) -> None:
    assert type(tuned) is Net
    assert isinstance(tuned.stem, nn.Conv2d)
    assert type(tuned.stem).__name__ == "Conv2d"
    assert repr(tuned) == re.sub(r"(Conv2d.*), bias=False", r"\1", repr(original))  # a live convolution has a bias
    state, expected = tuned.state_dict(), original.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in state)
    assert [name for name, _ in tuned.named_parameters()] == [name for name, _ in original.named_parameters()]


def test_the_norms_do_nothing(tuned: Any) -> None:
    seen: list[bool] = []
    tuned.blocks[0].bn1.register_forward_hook(lambda module, args, output: seen.append(output is args[0]))
    tuned(*WIDE)
    assert seen == [True]


def test_a_norm_that_trains_is_itself_again_and_back(tuned: Any, original: Any) -> None:
    for training in (True, False, True, False):
        for each in (tuned, original):
            each.norm.train(training)
            each.blocks[1].bn2.train(training)
        assert same(tuned, original)
        assert torch.equal(tuned.norm.running_mean, original.norm.running_mean)
        assert torch.equal(tuned.norm.num_batches_tracked, original.norm.num_batches_tracked)
    tuned.train(), original.train()
    assert same(tuned, original)


def test_only_its_own_rewrite_is_turned_off(tuned: Any) -> None:
    tuned.norm.train()
    seen: dict[str, bool] = {}
    for name in ("norm", "blocks.0.bn1"):
        module = tuned.get_submodule(name)
        module.register_forward_hook(lambda m, args, output, name=name: seen.__setitem__(name, output is args[0]))
    tuned(*WIDE)
    assert seen == {"norm": False, "blocks.0.bn1": True}


def test_training_with_two_optimizers_and_weight_decay(tuned: Any, original: Any) -> None:
    """Toggled in mid-training; decay and momentum act on the original weights."""
    losses: list[list[float]] = []
    for model in (tuned, original):
        slow = torch.optim.SGD([p for n, p in model.named_parameters() if "conv" in n], 1e-3, momentum=0.9, weight_decay=0.1)
        fast = torch.optim.AdamW([p for n, p in model.named_parameters() if "conv" not in n], 1e-3, weight_decay=0.1)
        losses.append([])
        for step in range(8):
            model.norm.train(step in (3, 4))
            value = loss(model(*WIDE)).tanh()
            losses[-1].append(value.item())
            slow.zero_grad(), fast.zero_grad()
            value.backward()
            slow.step(), fast.step()
    assert torch.allclose(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-11, atol=0)
    assert len(set(losses[0])) == 8
    for (name, mine), theirs in zip(tuned.state_dict().items(), original.state_dict().values(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12), name


def test_hooks_go_on(tuned: Any, original: Any) -> None:
    for model in (tuned, original):
        model.stem.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        model.norm.register_forward_hook(lambda module, args, output: output + 1)
        dict(model.named_parameters())["blocks.0.conv2.weight"].register_hook(lambda grad: grad * 3)
    assert same(tuned, original)


def test_writing_to_a_live_weight_is_an_error(tuned: Any) -> None:
    with pytest.raises(normfuse.NormfuseError, match="no effect"):
        nn.init.zeros_(tuned.stem.weight)
    with pytest.raises(normfuse.NormfuseError, match="no effect"), torch.no_grad():
        tuned.stem.weight.mul_(2)
    with pytest.raises(normfuse.NormfuseError, match="no effect"):
        tuned.stem.weight.data = torch.zeros(())
    with pytest.raises(normfuse.NormfuseError, match="no effect"), torch.no_grad():
        tuned.stem.weight[0] = 0.0


def test_writing_to_the_parameter_is_seen(tuned: Any, original: Any) -> None:
    for model in (tuned, original):
        with torch.no_grad():
            dict(model.named_parameters())["stem.weight"].mul_(1.5)
        model.blocks[0].conv1.weight = nn.Parameter(dict(model.named_parameters())["blocks.0.conv1.weight"] * 0.5)
        model.blocks[1].bn1.running_var.add_(0.3)
    assert same(tuned, original)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_and_files_are_tuned_and_their_own(tuned: Any, original: Any, how: str) -> None:
    if how == "deepcopy":
        again = copy.deepcopy(tuned)
    elif how == "pickle":
        again = pickle.loads(pickle.dumps(tuned))
    else:
        file = io.BytesIO()
        torch.save(tuned, file)
        again = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert again.stem._normfuse.home["norm.weight"][0] is again.norm
    with torch.no_grad():
        tuned.norm.weight.zero_()
    assert same(again, original)
    again.norm.train(), original.norm.train()
    assert same(again, original)
    assert type(normfuse.restore(again).stem) is nn.Conv2d


def test_restore_is_the_untouched_original(tuned: Any, original: Any) -> None:
    parameters = dict(tuned.named_parameters())
    assert normfuse.restore(tuned) is tuned
    assert all(type(a) is type(b) for a, b in zip(tuned.modules(), original.modules(), strict=True))
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(tuned.modules(), original.modules(), strict=True))
    assert all(parameters[name] is parameter for name, parameter in tuned.named_parameters())
    assert torch.equal(tuned(*WIDE), original(*WIDE))
    assert normfuse.restore(tuned) is tuned


def test_a_checkpoint_loads_strictly_both_ways(tuned: Any) -> None:
    stock = Net().double().eval()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1)
    assert not stock.load_state_dict(tuned.state_dict(), strict=True).missing_keys
    assert same(tuned, stock)
    fresh = Net().double().eval()
    tuned.load_state_dict(fresh.state_dict(), strict=True)
    assert same(tuned, fresh)


def test_moving_and_casting(tuned: Any, original: Any) -> None:
    tuned.float(), original.float()
    assert torch.allclose(tuned(*IMAGES), original(*IMAGES), atol=1e-5)
    tuned.double(), original.double()
    assert same(tuned, original)
    assert tuned.to("meta").stem.weight.shape == original.stem.weight.shape


def test_activation_checkpointing(tuned: Any, original: Any) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, model: Any, reentrant: bool) -> None:
            super().__init__()
            self.model, self.reentrant = model, reentrant

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.model.norm(self.model.stem(x)))
            for block in self.model.blocks:
                y = checkpoint(block, y, use_reentrant=self.reentrant)
            return self.model.head(y.mean((2, 3)))

    for reentrant in (False, True):
        assert same(Checkpointed(tuned, reentrant), Checkpointed(original, reentrant))


def test_compiled(tuned: Any, original: Any) -> None:
    torch._dynamo.reset()
    compiled: Any = torch.compile(nn.Sequential(tuned.stem, tuned.norm), backend="aot_eager", fullgraph=True)
    eager = nn.Sequential(original.stem, original.norm)
    for training in (False, True, False):
        tuned.norm.train(training), original.norm.train(training)
        eager.zero_grad()
        compiled.zero_grad()
        loss(compiled(*WIDE)).backward(), loss(eager(*WIDE)).backward()
        mine = {name: p.grad for name, p in compiled._orig_mod.named_parameters()}
        assert distance(mine, {name: p.grad for name, p in eager.named_parameters()}) <= 1e-12


def test_a_replica_of_data_parallel_computes_the_same(tuned: Any, original: Any) -> None:
    """A replica holds copies that its neighbours do not know, so it runs the original."""
    conv, norm = tuned.stem._replicate_for_data_parallel(), tuned.norm._replicate_for_data_parallel()
    for copied, source in ((conv, tuned.stem), (norm, tuned.norm)):
        for key, parameter in source._parameters.items():
            if parameter is None:
                copied._parameters[key] = None
            else:
                setattr(copied, key, parameter.detach().clone())
    assert torch.allclose(norm(conv(*WIDE)), original.norm(original.stem(*WIDE)), rtol=1e-12)


def _process(rank: int, rendezvous: str, model: Any, found: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    distributed = DistributedDataParallel(model)  # held until backward: its hooks average the gradients
    loss(distributed(WIDE[0].chunk(2)[rank])).backward()
    found.put({name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None})
    found.close()
    found.join_thread()
    os._exit(0)  # no destructors: gloo's thread may want the GIL, with which the main thread would wait for it


def test_two_processes(tuned: Any, original: Any, tmp_path: Path) -> None:
    """DistributedDataParallel over gloo: the averaged gradients are those of the whole batch, in both processes."""
    context = torch.multiprocessing.get_context("fork")
    found = context.Queue()
    for rank in range(2):
        context.Process(target=_process, args=(rank, f"file://{tmp_path / 'rendezvous'}", tuned, found), daemon=True).start()
    for part in WIDE[0].chunk(2):
        (loss(original(part)) / 2).backward()
    expected = {name: p.grad for name, p in original.named_parameters()}
    for _ in range(2):
        grads = {name: torch.from_numpy(each) for name, each in found.get(timeout=60).items()}
        assert distance(grads, expected) <= 1e-12


def test_a_linear_that_is_called_by_another_module() -> None:
    """MultiheadAttention reads out_proj.weight itself and never calls out_proj."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend, self.norm, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.attend(x, x, x, need_weights=False)[0]))

    model, x = Attending().eval().double(), torch.randn(2, 3, 8).double()
    original = copy.deepcopy(model)
    normfuse.tune(model, "pre_rmsnorm", inputs=(x,))
    assert distance(gradients(model, (x,)), gradients(original, (x,))) <= 1e-12
    with torch.no_grad():
        assert torch.allclose(model(x), original(x), rtol=1e-12)


def test_the_callers_tensor_is_not_handed_out() -> None:
    """Code may write into a norm's output; where others hold its input, a norm that gives way hands out a copy."""
    model, x = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)).eval(), IMAGES[0].clone()
    original = copy.deepcopy(model)
    normfuse.deploy(model, "conv_bn", inputs=(x,))
    model[0](x).zero_()
    assert torch.equal(x, IMAGES[0])
    assert torch.allclose(model(x), original(x), atol=1e-5)


class Stem(nn.Module):
    """A convolution that a BatchNorm's scale and a LayerNorm's centring both change."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.ln, self.head = nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.LayerNorm(8), nn.Linear(8, 2)
        self.final = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x)).flatten(2).transpose(1, 2)
        return self.final(y) * self.head(self.ln(y)).sum(-1, keepdim=True)


def test_rewrites_of_one_tensor_are_turned_off_together() -> None:
    """With the BatchNorm training the convolution is not centred, so the LayerNorms must be LayerNorms again."""
    model = spread(Stem()).double().eval()
    original = copy.deepcopy(model)
    normfuse.tune(model, ["conv_bn", "pre_rmsnorm"], inputs=WIDE)
    assert "rms_norm" in str(vars(model.ln)["_normfuse"].change)
    for training in (False, True, False):
        model.bn.train(training)
        original.bn.train(training)
        assert same(model, original)
    model.train()
    original.train()
    assert same(model, original)


class Frozen(nn.Module):
    """A BatchNorm that never trains, as detection networks have it."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        for name, value in (("weight", torch.rand(width) + 0.5), ("bias", torch.randn(width))):
            self.register_buffer(name, value)
        self.register_buffer("running_mean", torch.randn(width))
        self.register_buffer("running_var", torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


def test_a_frozen_norm_stays_folded_while_the_model_trains() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), Frozen(4), nn.ReLU()).double().eval()
    original = copy.deepcopy(model)
    normfuse.tune(model, "conv_bn", inputs=WIDE)
    model.train()
    assert model[1](WIDE[0]) is WIDE[0]
    assert distance(gradients(model, WIDE), gradients(original, WIDE)) <= 1e-12


def test_a_convolution_between_two_norms() -> None:
    """Both norms change its weight, so one that trains turns both off."""
    layers = (nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    model = spread(nn.Sequential(*layers)).double().eval()
    original = copy.deepcopy(model)
    normfuse.tune(model, "conv_bn", inputs=WIDE)
    for first, second in ((False, True), (True, False), (True, True), (False, False)):
        for each in (model, original):
            each[0].train(first)
            each[2].train(second)
        assert distance(gradients(model, WIDE), gradients(original, WIDE)) <= 1e-12


def test_the_fast_path_of_the_transformer_encoder() -> None:
    """In evaluation mode and without gradients torch's own encoder calls one kernel with its modules' weights."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True)
    model = spread(nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)).eval().double()
    original, x = copy.deepcopy(model), torch.randn(2, 3, 8).double()
    for rewrite in (normfuse.tune, normfuse.deploy):
        rewrite(model, "pre_rmsnorm", inputs=(x,))
        with torch.no_grad():
            assert torch.allclose(model(x), original(x), rtol=1e-11)
        assert distance({"y": model(x)}, {"y": original(x)}) <= 1e-11
