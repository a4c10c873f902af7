"""What can go wrong where several processes hold one model: it is refused or undone on all of them, or right."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable import checkpoint  # type: ignore[attr-defined]
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import normfuse
from normfuse.errors import CannotApply, NormfuseError
from normfuse.modules.reference import Reference
from tests.modules.live_models import cross_entropy, gpt, text
from tests.modules.models import loss
from tests.modules.processes import on_processes
from tests.modules.test_sharded import apart, build, outputs, shard, states, trained

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]

IDS = (text(1)[0][:, :-1],)


def told(act: Callable[[], Any]) -> str:
    """The first line of what an act is refused with; nothing where it is done."""
    try:
        act()
    except NormfuseError as error:
        return str(error)
    return ""


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Those of a model's parameters, gathered."""
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in found.items()}


# -- processes that differ -----------------------------------------------------------------------------------------------


def with_other_statistics() -> tuple[str, bool]:
    model, inputs = build("images")
    shard(model, "blocks")
    if dist.get_rank() == 1:
        model.bn.running_mean.add_(1.0)
    before = states(model)
    return told(lambda: normfuse.deploy(model, "conv_bn", inputs)), apart(states(model), before) == 0.0


def test_statistics_that_differ_are_noticed() -> None:
    for why, as_before in on_processes(with_other_statistics):
        assert "different values of 'bn.running_mean'" in why
        assert as_before


def with_a_failure(where: str) -> tuple[str, bool, float]:
    model, inputs = build("odd")
    shard(model, "blocks")
    before, first = states(model), outputs(model, inputs)

    def fail(*_: Any) -> None:
        raise ValueError("this process is out of order")

    here = dist.get_rank() == 1
    if here and where == "forward":
        model.register_forward_pre_hook(fail, prepend=True)
    if here and where == "proof":
        Reference.prove_saved = fail  # type: ignore[method-assign, assignment]
    begun = time.monotonic()
    try:
        why = told(lambda: normfuse.deploy(model, "pre_rmsnorm", inputs))
    except ValueError as error:
        why = str(error)
    took = time.monotonic() - begun
    model._forward_pre_hooks.popitem(last=False) if here and where == "forward" else None
    as_before = apart(states(model), before) == 0.0 and torch.equal(outputs(model, inputs), first)
    return why, as_before, took


@pytest.mark.parametrize("where", ["forward", "proof"])
def test_a_process_that_fails_makes_all_fail(where: str) -> None:
    first, second = on_processes(with_a_failure, where)
    assert "out of order" in second[0]
    assert "has failed" in first[0]
    for _, as_before, took in (first, second):
        assert as_before
        assert took < 40


def with_inputs_of_its_own() -> float:
    model, inputs = build("odd")
    plain = copy.deepcopy(model)
    shard(model, "blocks")
    own = tuple(each + dist.get_rank() for each in inputs)
    normfuse.deploy(model, "pre_rmsnorm", own)
    normfuse.deploy(plain, "pre_rmsnorm", inputs)
    return apart(states(model), plain.state_dict())


def test_inputs_may_differ() -> None:
    """With interpreters of their own, which order their sets differently."""
    assert max(on_processes(with_inputs_of_its_own, start="spawn")) <= 1e-14


def with_arguments_of_its_own() -> tuple[str, bool]:
    model, inputs = build("odd")
    shard(model, "blocks")
    before = states(model)
    skipped = ["norms.0"] if dist.get_rank() else ["norms.1"]
    why = told(lambda: normfuse.deploy(model, "fold_affine", inputs, skip=skipped))
    return why, apart(states(model), before) == 0.0


def test_plans_that_differ_are_noticed() -> None:
    for why, as_before in on_processes(with_arguments_of_its_own):
        assert "different plans" in why
        assert as_before


def flattened() -> str:
    model, inputs = build("odd")
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    return told(lambda: normfuse.deploy(wrapped, "fold_affine", inputs))


def test_the_older_fsdp_is_refused() -> None:
    assert all("FullyShardedDataParallel" in why for why in on_processes(flattened))


# -- other kinds of shards -----------------------------------------------------------------------------------------------


def tensor_parallel() -> tuple[float, float, float]:
    """Deployed, and the gradients of one that is tuned."""
    model, inputs = build("gpt")
    plain, tuned, original = (copy.deepcopy(model) for _ in range(3))
    normfuse.deploy(plain, "pre_rmsnorm", inputs)
    mesh = init_device_mesh("cpu", (2,))
    for each in (model, tuned):
        for block in each.blocks:
            parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    first = outputs(model, inputs)
    normfuse.deploy(model, "pre_rmsnorm", inputs)
    normfuse.tune(tuned, "fold_affine", inputs)
    loss(tuned(*inputs)).backward(), loss(original(*inputs)).backward()
    of_tuned = apart(gradients(tuned), gradients(original))
    return apart(states(model), plain.state_dict()), (outputs(model, inputs) - first).abs().max().item(), of_tuned


def test_tensor_parallel() -> None:
    for distance, seen, of_tuned in on_processes(tensor_parallel):
        assert distance <= 1e-14
        assert seen <= 1e-12
        assert of_tuned <= 1e-10


def spread_by_hand(placement: Any) -> tuple[float, float]:
    """Every parameter a DTensor, and a forward on DTensors."""
    model, inputs = build("odd")
    plain = copy.deepcopy(model)
    normfuse.deploy(plain, "pre_rmsnorm", inputs)
    mesh = init_device_mesh("cpu", (2,))

    def lay_out(_: str, module: nn.Module, mesh: Any) -> None:
        for name, each in list(module._parameters.items()):
            if each is not None:
                how = placement if isinstance(placement, Shard) and placement.dim < each.dim() else Replicate()
                module._parameters[name] = nn.Parameter(distribute_tensor(each, mesh, [how]))

    def taken(_: nn.Module, given: Any, mesh: Any) -> Any:
        return tuple(DTensor.from_local(each, mesh, [Replicate()]) for each in given)

    distribute_module(model, mesh, lay_out, taken, lambda _, given, mesh: given.full_tensor())
    first = outputs(model, inputs)
    normfuse.deploy(model, "pre_rmsnorm", inputs)
    return apart(states(model), plain.state_dict()), (outputs(model, inputs) - first).abs().max().item()


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()], ids=str)
def test_dtensors(placement: Any) -> None:
    for distance, seen in on_processes(spread_by_hand, placement):
        assert distance <= 1e-14
        assert seen <= 1e-12


def in_two_dimensions(kind: str) -> tuple[float, float]:
    model, inputs = build("gpt")
    plain = copy.deepcopy(model)
    normfuse.deploy(plain, "pre_rmsnorm", inputs)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    if kind == "replicas":
        shard(model, "blocks", mesh=mesh)
    else:
        for block in model.blocks:
            parallelize_module(block, mesh["inner"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        shard(model, "blocks", mesh=mesh["outer"])
    first = outputs(model, inputs)
    normfuse.deploy(model, "pre_rmsnorm", inputs)
    return apart(states(model), plain.state_dict()), (outputs(model, inputs) - first).abs().max().item()


@pytest.mark.parametrize("kind", ["replicas", "tensor parallel"])
def test_two_dimensions(kind: str) -> None:
    for distance, seen in on_processes(in_two_dimensions, kind, size=4):
        assert distance <= 1e-14
        assert seen <= 1e-12


# -- what is done with it afterwards -------------------------------------------------------------------------------------


def saved_and_loaded() -> tuple[float, float, float, bool]:
    model, inputs = build("odd")
    plain, saved = copy.deepcopy(model), {name: each.clone() for name, each in model.state_dict().items()}
    shard(model, "blocks")
    first = outputs(model, inputs)
    normfuse.deploy(model, "pre_rmsnorm", inputs)
    whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    saved_now: Any = get_model_state_dict(model, options=whole)
    state = {name: each.clone() for name, each in saved_now.items()}
    if dist.get_rank() == 0:
        plain.load_state_dict(state)
    of_saved = (outputs(plain, inputs) - first).abs().max().item()
    set_model_state_dict(model, dict(saved) if dist.get_rank() == 0 else {}, options=whole)
    again = (outputs(model, inputs) - first).abs().max().item()
    normfuse.deploy(model, "pre_rmsnorm", inputs)
    return of_saved, again, (outputs(model, inputs) - first).abs().max().item(), type(model).__name__ == "FSDPOdd"


def test_what_is_saved_and_loaded() -> None:
    for of_saved, again, deployed, own_class in on_processes(saved_and_loaded):
        assert max(of_saved, again, deployed) <= 1e-12
        assert own_class


def tuned_then_changed(act: str) -> tuple[float, float]:
    """A tuned model in shards is moved, loaded or deployed, before its first call or after."""
    model: Any = gpt().eval()
    plain, other = copy.deepcopy(model), {name: each * 1.5 for name, each in model.state_dict().items()}
    normfuse.tune(model, "fold_affine", IDS)
    shard(model, "layers")
    if "later" in act:
        outputs(model, IDS)
        model.reshard()  # torch loads nothing into what it has gathered
    if "move" in act:
        model.to(torch.float32).to(torch.float64)
        plain.to(torch.float32).to(torch.float64)
    if "load" in act:
        whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, dict(other) if dist.get_rank() == 0 else {}, options=whole)
        plain.load_state_dict(other)
    if "deploy" in act:
        normfuse.deploy(model)
    seen = (outputs(model, IDS) - outputs(plain, IDS)).abs().max().item()
    return seen, 0.0 if "deploy" in act else apart(states(model), plain.state_dict())


@pytest.mark.parametrize("act", ["move", "move later", "load", "load later", "deploy", "deploy later"])
def test_a_tuned_model_in_shards_goes_on(act: str) -> None:
    for seen, distance in on_processes(tuned_then_changed, act):
        assert seen <= 1e-11
        assert distance == 0.0


def with_a_key_that_leaves() -> tuple[str, float]:
    made = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    model, inputs = made.double().eval(), (torch.randn(2, 3, 6, 6, dtype=torch.float64),)
    with torch.no_grad():
        for each in model.parameters():
            each.add_(0.3)
    dist.broadcast(inputs[0], 0)
    for each in model.parameters():
        dist.broadcast(each.data, 0)
    try:
        normfuse.tune(model, "conv_bn", inputs)
    except CannotApply as error:
        return f"tune: {error}", 0.0
    for part in model:
        fully_shard(part)
    fully_shard(model)
    first = outputs(model, inputs)
    why = told(lambda: normfuse.deploy(model))
    return why, (outputs(model, inputs) - first).abs().max().item()


def test_a_key_that_would_come_or_go() -> None:
    for why, seen in on_processes(with_a_key_that_leaves):
        assert "fully_shard" in why
        assert seen <= 1e-12


def as_a_program(path: str) -> tuple[float, ...]:
    """A rewrite of its trace, which is another model: called, saved, and made on the modules."""
    model, inputs = build("odd")
    shard(model, "blocks")
    first = outputs(model, inputs)
    result = normfuse.rewrite(model, "fold_affine", inputs)
    called = outputs(result.module(), inputs)
    result.save(f"{path}.{dist.get_rank()}.pt2")
    loaded = outputs(torch.export.load(f"{path}.{dist.get_rank()}.pt2").module(), inputs)
    result.apply_to(model)
    return tuple((each - first).abs().max().item() for each in (called, loaded, outputs(model, inputs)))


def test_a_rewrite_of_its_trace(tmp_path: Path) -> None:
    for differences in on_processes(as_a_program, str(tmp_path / "rewritten")):
        assert max(differences) <= 1e-12


# -- training ------------------------------------------------------------------------------------------------------------


def trained_images(before: bool, by: str, training: bool) -> float:
    """Gradients of convolutions in front of BatchNorms, which FSDP averages over two equal batches."""
    model, inputs = build("net")
    plain = copy.deepcopy(model)
    if before:
        normfuse.tune(model, "conv_bn", inputs)
    if by == "kept layers":  # a BatchNorm stays gathered, and its own backward is done before its convolution's
        shard(model, "layers", reshard_after_forward=False)
        outputs(model, inputs)
    else:
        shard(model, by)
    if not before:
        normfuse.tune(model, "conv_bn", inputs)
    model.train(training), plain.train(training)
    loss(plain(*inputs)).backward()
    loss(model(*inputs)).backward()
    return apart(gradients(model), gradients(plain))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("before", "by"), [(True, "layers"), (True, "kept layers"), (False, "layers"), (False, "whole")])
def test_gradients_of_convolutions(before: bool, by: str, training: bool) -> None:
    assert max(on_processes(trained_images, before, by, training)) <= 1e-9


def trained_as_set(how: str) -> float:
    """Frozen, tied, its activations computed again, and with gradients of two backwards that are reduced once."""
    make = partial(gpt, tied=how == "tied")
    plain = make()
    model: Any = make()
    if how == "frozen":
        for each in (model, plain):
            for name, parameter in each.named_parameters():
                parameter.requires_grad_("norm1" not in name and "qkv" not in name)
    normfuse.tune(model, "fold_affine", IDS)
    for block in model.blocks if how == "checkpointed" else ():
        checkpoint(block)
    if how == "tied":
        shard(model, "blocks")
    else:
        shard(model, "layers")
    rank = dist.get_rank()
    if how != "accumulated":
        trained(plain, "SGD", lambda window: window)
        trained(model, "SGD", lambda window: window.chunk(2)[rank])
        return apart(states(model), plain.state_dict())
    for last, window in enumerate(text(2)):
        cross_entropy(plain, window).backward()
        model.set_requires_gradient_sync(bool(last))
        cross_entropy(model, window.chunk(2)[rank]).backward()
    return apart(gradients(model), gradients(plain))


@pytest.mark.parametrize("how", ["frozen", "tied", "accumulated", "checkpointed"])
def test_training_as_it_is_set(how: str) -> None:
    assert max(on_processes(trained_as_set, how)) <= 1e-11
