"""Pickles that want more than to be data: refused by name, nothing of theirs runs, and nothing takes long.

The files here pass every check of names: all that they name is allowed. What is tried is to make allowed things act.
"""

from __future__ import annotations

import argparse
import collections
import copyreg
import functools
import io
import pickletools
import time
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfuse import limits
from normfuse.errors import LoadError, NormfuseWarning
from normfuse.sources.loading import load, load_data
from tests.sources.test_loading import Call, legacy, pickled, write_pickle

transformers = pytest.importorskip("transformers")


def config(**attributes: Any) -> Any:
    """A config that renames its attributes: `config.softmax` is then its method that writes a file."""
    made = transformers.BertConfig.__new__(transformers.BertConfig)
    made.__dict__.update(attributes)
    return made


def renamed(**attributes: Any) -> Any:
    return config(attribute_map={"softmax": "to_json_file"}, **attributes)


def filled(cls: Any, **attributes: Any) -> Any:
    """An instance as a forger makes it."""
    made = cls.__new__(cls)
    if issubclass(cls, nn.Module):
        nn.Module.__init__(made)
    made.__dict__.update(attributes)
    return made


def holding(value: Any) -> nn.Module:
    return filled(nn.Identity, note=value)


def saved(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


def refusal(path: Path) -> str:
    begin = time.monotonic()
    with pytest.raises(LoadError) as caught:
        load(path)
    assert time.monotonic() - begin < 10
    assert "bug" not in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
    assert caught.value.hint
    return str(caught.value)


def parameter(hooks: Any = (), **attributes: Any) -> Call:
    return Call(torch._utils._rebuild_parameter_with_state, torch.ones(1), True, OrderedDict(hooks), attributes)


X = torch.linspace(-2, 2, 12).reshape(3, 4)
VARIABLE_FUNCTIONS = torch._C._VariableFunctionsClass  # type: ignore[attr-defined]


def normed() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and in many files
        return nn.utils.weight_norm(nn.Linear(4, 4))


def hooked(name: Any, **attributes: Any) -> Any:
    layer = normed()
    (hook,) = layer._forward_pre_hooks.values()
    vars(hook).update(name=name, **attributes)
    return layer


def moved_hook(table: str) -> Any:
    layer = normed()
    getattr(layer, table).update(layer._forward_pre_hooks)
    layer._forward_pre_hooks.clear()
    return layer


partial: Any = functools.partial  # holds what no honest one does
TARGET = "/nonexistent/target"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a function that is called": (
        lambda: holding(Call(F.softmax, renamed(x=1), TARGET)),
        "a call of torch.nn.functional.softmax",
    ),
    "a builtin that is called": (lambda: holding(Call(torch._C._nn.gelu, torch.ones(2))), "a call of torch._C._nn.gelu()"),
    "a class that is called": (lambda: holding(Call(nn.Linear, 2, 2)), "a call of torch.nn.modules.linear.Linear()"),
    "a config that is called": (lambda: holding(Call(transformers.BertConfig)), "a call of transformers"),
    "a config that renames": (lambda: holding(renamed()), "to replace attribute_map"),
    "a config with a method": (lambda: holding(config(to_dict=F.gelu)), "to replace to_dict"),
    "a config with a property": (lambda: holding(config(num_labels=3)), "to replace num_labels"),
    "a config with a dunder": (lambda: holding(config(__class__=1)), "to replace __class__"),
    "a partial as forward": (
        lambda: filled(nn.Identity, forward=partial(F.softmax, torch.ones(2))),
        "replace forward",
    ),
    "a partial of a config": (
        lambda: holding(partial(F.softmax, config(), TARGET)),
        "a functools.partial that holds",
    ),
    "a partial of a module": (lambda: holding(partial(F.softmax, nn.Identity())), "a functools.partial that holds"),
    "a partial in a partial": (lambda: holding(partial(F.gelu, [partial(F.gelu)])), "partial that holds"),
    "a function as forward": (lambda: filled(nn.Identity, forward=F.gelu), "replace forward"),
    "a module as forward": (lambda: filled(nn.Sequential, _modules={"forward": nn.ReLU()}), "replace forward"),
    "a function as __call__": (lambda: filled(nn.Identity, __call__=F.gelu), "replace __call__"),
    "a function as _call_impl": (lambda: filled(nn.Identity, _call_impl=F.gelu), "replace _call_impl"),
    "a compiled call": (lambda: Raw(nn.Identity, {"_compiled_call_impl": F.gelu}), "replace _compiled_call_impl"),
    "a lookup": (lambda: filled(nn.Identity, __getattr__=F.gelu), "replace __getattr__"),
    "a class": (lambda: filled(nn.Identity, __class__=nn.ReLU), "replace __class__"),
    "a hook": (lambda: filled(nn.Identity, _forward_pre_hooks=OrderedDict({0: F.gelu})), "_forward_pre_hooks"),
    "a hook of the state dict": (lambda: filled(nn.Identity, _state_dict_hooks=OrderedDict({0: F.gelu})), "_state_dict_hooks"),
    "hooks that are no dict": (lambda: filled(nn.Identity, _forward_hooks=[F.gelu]), "_forward_hooks"),
    "modules that are none": (lambda: filled(nn.Sequential, _modules={"0": F.gelu}), "the entry '0' in _modules"),
    "modules that are a list": (lambda: filled(nn.Sequential, _modules=[nn.ReLU()]), "another _modules"),
    "a name with a dot": (lambda: filled(nn.Sequential, _modules={"a.b": nn.ReLU()}), "the entry 'a.b'"),
    "a name that is a number": (lambda: filled(nn.Sequential, _modules={0: nn.ReLU()}), "the entry 0"),
    "a parameter that is none": (lambda: filled(nn.Identity, _parameters={"weight": 3}), "the entry 'weight' in _parameters"),
    "a buffer that is none": (lambda: filled(nn.Identity, _buffers={"mean": "text"}), "the entry 'mean' in _buffers"),
    "a buffer in a method's place": (lambda: filled(nn.Identity, _buffers={"train": torch.ones(1)}), "replace train"),
    "keys that are methods": (lambda: filled(nn.ParameterDict, _keys={"apply": None}), "the key 'apply'"),
    "a state that is no dict": (lambda: Raw(nn.Identity, ["text"]), "otherwise than from its attributes"),
    "slots": (lambda: Raw(nn.Identity, ({}, {"training": True})), "otherwise than from its attributes"),
    "items": (lambda: Listed(nn.Identity, {}), "otherwise than from its attributes"),
    "attributes on a dict": (lambda: {"x": Ordered(items=F.gelu)}, "attributes on a OrderedDict"),
    "a default factory": (lambda: holding(collections.defaultdict(nn.Identity)), "no builtin"),
    "a namespace that renames": (lambda: holding(argparse.Namespace(_get_kwargs=F.gelu)), "replace _get_kwargs"),
    "an enum that is filled": (lambda: holding(Raw(transformers.utils.PaddingStrategy, {})), "an empty transformers"),
    "another __setstate__": (lambda: holding(Call(nn.parallel.DistributedDataParallel)), "a call of"),
    "hooks on a tensor": (lambda: parameter(hooks={0: 1}), "hooks on a tensor"),
    "a hook of a name that is no weight": (lambda: hooked("bias"), "hooks: remove them"),
    "a hook of a method": (lambda: hooked("forward"), "hooks: remove them"),
    "a hook of a text": (lambda: hooked(["weight"]), "hooks: remove them"),
    "a hook in another place": (lambda: moved_hook("_forward_hooks"), "_forward_hooks"),
    "a hook that is replaced": (lambda: hooked("weight", compute_weight=F.gelu), "to replace compute_weight"),
    "a training flag that is none": (lambda: filled(nn.ReLU, training=config()), "another training"),
    "a flag of hooks": (lambda: filled(nn.ReLU, _is_full_backward_hook=F.gelu), "another _is_full_backward_hook"),
    "a function of torch that acts": (lambda: holding(Call(getattr, VARIABLE_FUNCTIONS, "from_file")), "torch.from_file"),
    "an attribute of anything": (lambda: holding(Call(getattr, nn.Identity(), "train")), "getattr() for 'train'"),
    "a method on a tensor": (lambda: parameter(dim=3), "replace its own"),
}


class Raw:
    """Pickles as an instance of a class with this state, whatever the class says."""

    def __init__(self, cls: type, state: Any) -> None:
        self.cls, self.state = cls, state

    __class__ = property(lambda self: self.cls)  # type: ignore[assignment]  # the pickler compares it

    def __reduce__(self) -> tuple[Any, ...]:
        return copyreg.__newobj__, (self.cls,), self.state  # type: ignore[attr-defined]


class Listed(Raw):
    """An instance that has items as well, as a subclass of list would."""

    def __reduce__(self) -> tuple[Any, ...]:
        return *super().__reduce__(), iter([1])


class Ordered(OrderedDict):  # type: ignore[type-arg]
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.__dict__.update(attributes)

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), self.__dict__


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_would_act_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make, told = REFUSED[name]
    assert told in refusal(saved(tmp_path / "evil.pt", make()))


def pruned(times: int) -> Any:
    layer = nn.Linear(4, 4)
    for _ in range(times):
        nn.utils.prune.l1_unstructured(layer, "weight", 0.25)
    return layer


@pytest.mark.parametrize("make", [normed, lambda: pruned(1), lambda: pruned(2)], ids=["weight norm", "pruned", "twice"])
def test_hooks_of_torch_that_compute_weights_load(make: Callable[[], Any], tmp_path: Path) -> None:
    model = nn.Sequential(make(), nn.LayerNorm(4)).eval()
    loaded: Any = load(saved(tmp_path / "model.pt", model))
    with torch.no_grad():
        for weight in (*model.parameters(), *loaded.parameters()):
            weight.mul_(1.5)  # so that a weight which is not computed again is seen
    assert torch.equal(loaded(X), model(X))
    program = torch.export.export(loaded, (X,))
    assert torch.equal(program.module()(X), model(X))


def test_a_spectral_norm_is_told_what_to_do(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pt", nn.utils.spectral_norm(nn.Linear(4, 4)))
    with pytest.raises(LoadError, match="SpectralNorm") as caught:
        load(path)
    assert "remove_spectral_norm" in (caught.value.hint or "")


@pytest.mark.parametrize("function", [torch.relu, torch.tanh, torch.sigmoid])
def test_functions_of_torch_that_only_compute_load(function: Any, tmp_path: Path) -> None:
    loaded: Any = load(saved(tmp_path / "model.pt", nn.TransformerEncoderLayer(4, 2, 4, activation=function)))
    assert loaded.activation is function


class Setter(nn.Module):
    """A class that would run code of its own on the file's data."""

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("was called")


class Dropper(nn.Module):
    def __del__(self) -> None:
        raise AssertionError("was called")


@pytest.mark.parametrize(("cls", "told"), [(Setter, "Setter.__setstate__()"), (Dropper, "Dropper")])
def test_classes_that_act_when_they_are_filled_are_refused(
    cls: type, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("normfuse.sources.allowlist.is_installed", lambda module: True)
    path = saved(tmp_path / "evil.pt", Raw(cls, {}))
    assert told in refusal(path)


def test_settings_keep_what_honest_ones_replace(tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2))
    model.config = transformers.GPT2Config(n_layer=1, id2label={0: "a", 1: "b"})
    model.space = argparse.Namespace(rate=0.1, sizes=[1, 2])
    model.names = types.SimpleNamespace(a=1)
    model.table = collections.defaultdict(list, {"a": [1]})
    model.last = collections.deque([1, 2], 3)
    loaded: Any = load(saved(tmp_path / "model.pt", model))
    assert loaded.config.to_dict() == model.config.to_dict()
    assert loaded.config.hidden_size == model.config.n_embd  # through the class's own attribute_map
    assert (loaded.space, loaded.names, loaded.table, loaded.last) == (model.space, model.names, model.table, model.last)
    assert loaded.last.maxlen == 3
    assert loaded.table["new"] == []


# ---- wrappers


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()


@pytest.mark.parametrize(
    ("wrap", "named"),
    [
        (torch.optim.swa_utils.AveragedModel, "AveragedModel"),
        (nn.DataParallel, "DataParallel"),
        (torch.compile, "OptimizedModule"),
        (lambda model: torch.compile(nn.DataParallel(model)), "OptimizedModule"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_the_model_is_taken_out_of_its_wrapper_and_said(wrap: Any, named: str, inside: bool, tmp_path: Path) -> None:
    model = net()
    whole = nn.Sequential(wrap(model), nn.ReLU()) if inside else wrap(model)
    path = saved(tmp_path / "model.pt", whole)
    with pytest.warns(NormfuseWarning, match=named):
        loaded: Any = load(path)
    taken = loaded[0] if inside else loaded
    assert type(taken) is nn.Sequential
    assert all(torch.equal(taken.state_dict()[name], value) for name, value in model.state_dict().items())


def own_average(averaged: Any, model: Any, count: Any) -> Any:
    return averaged + (model - averaged) / (count + 1)


def test_what_only_the_wrapper_names_is_not_needed(tmp_path: Path) -> None:
    # The averaging function is one of the user's own script, and the model's weights are all that is wanted.
    averaged = torch.optim.swa_utils.AveragedModel(net(), avg_fn=own_average)
    with pytest.warns(NormfuseWarning, match="AveragedModel"):
        assert isinstance(load(saved(tmp_path / "model.pt", averaged)), nn.Sequential)


def test_wrappers_around_wrappers_end(tmp_path: Path) -> None:
    wrapped: Any = filled(nn.DataParallel)
    wrapped._modules["module"] = wrapped
    refusal(saved(tmp_path / "evil.pt", wrapped))


# ---- bounds


def doubled(depth: int, make: Callable[[Any], Any], value: Any) -> Any:
    for _ in range(depth):
        value = make(value)
    return value


BOUNDED: dict[str, tuple[Callable[[], Any], str]] = {
    "lists of one list": (lambda: doubled(40, lambda v: [v, v], [1]), "OCCURRENCES"),
    "tuples of one tuple": (lambda: doubled(40, lambda v: (v, v), (1,)), "OCCURRENCES"),
    "dicts of one dict": (lambda: doubled(40, lambda v: {"a": v, "b": v}, {}), "OCCURRENCES"),
    "ordered dicts of one": (lambda: doubled(40, lambda v: OrderedDict(a=v, b=v), OrderedDict()), "OCCURRENCES"),
    "modules of one module": (lambda: doubled(40, lambda v: nn.Sequential(v, v), nn.ReLU()), "MODULES"),
    "modules that few bytes repeat": (lambda: doubled(12, lambda v: nn.Sequential(v, v), nn.ReLU()), "MODULES"),
    "deep modules": (lambda: doubled(75, nn.Sequential, nn.ReLU()), "NESTING"),
}


@pytest.mark.parametrize("name", list(BOUNDED))
def test_what_a_few_bytes_make_endless_is_refused(name: str, tmp_path: Path) -> None:
    make, limit = BOUNDED[name]
    path = saved(tmp_path / "evil.pt", make())
    assert f"the limit {limit} is" in refusal(path)
    with pytest.raises(LoadError, match=f"the limit {limit} is") as caught:
        load_data(path) if "module" not in name else load(path)
    assert f"NORMFUSE_LIMIT_{limit}=" in (caught.value.hint or "")


def test_a_bound_can_be_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "deep.pt", doubled(40, nn.Sequential, nn.ReLU()))
    load(path)
    monkeypatch.setattr(limits, "NESTING", 50)
    refusal(path)


@pytest.mark.parametrize(("given", "read"), [("77", 77), ("", 5), ("-3", 5), ("many", 5), ("9" * 40, 5)])
def test_bounds_come_from_the_environment(given: str, read: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMFUSE_LIMIT_NESTING", given)
    assert limits._limit("NESTING", 5) == read


def test_bounds_are_published() -> None:
    text = (Path(__file__).parents[2] / "SECURITY.md").read_text()
    named = [name for name in vars(limits) if name.isupper() and name != "MIB"]
    assert len(named) >= 8
    for name in named:
        assert f"`{name}`" in text
        assert f"{getattr(limits, name):,}" in text or f"{getattr(limits, name) // limits.MIB:,} MiB" in text


def in_pickle(path: Path, change: Callable[[bytes], bytes]) -> Path:
    """The file with another pickle, and its tensors as they were."""
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, content in records.items():
        name = name.partition("/")[2]
        content = change(content) if name == "data.pkl" else content
        if name not in ("version", ".data/serialization_id"):
            writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return path


def test_a_tensor_reaches_no_further_than_its_storage(tmp_path: Path) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    small, large = x[:1], torch.as_strided(x, (10**6, 10**6), (0, 0))
    assert torch.equal(load_data(saved(tmp_path / "x.pt", small)), small)
    with pytest.raises(LoadError, match="VIEW_BYTES"):
        load_data(saved(tmp_path / "x.pt", large))

    def longer(data: bytes) -> bytes:
        assert data.count(b"K\x02K\x03\x86") == 1  # the sizes
        return data.replace(b"K\x02K\x03\x86", b"K\xffK\x03\x86")

    for change in (longer, lambda data: data.replace(b"K\x06t", b"J\xff\xff\xff\x7ft")):
        with pytest.raises(LoadError, match=r"beyond its storage|larger than what is stored"):
            load_data(in_pickle(saved(tmp_path / "x.pt", x), change))


def test_an_archive_may_be_compressed_but_not_a_bomb(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)

    def compressed(value: object) -> Path:
        saved(tmp_path / "x.pt", value)
        with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        return tmp_path / "y.pt"

    loaded: Any = load(compressed(model))
    assert torch.equal(loaded.weight, model.weight)
    with pytest.raises(LoadError, match="INFLATION"):
        load_data(compressed(torch.zeros(40 * limits.MIB)))


@pytest.mark.parametrize(
    "opcodes",
    [
        (b"]\x94",),
        (b"cos\nsystem\n", b"\x8c\x04true\x85R"),
        (b"]q\x00h\x00a",),  # a list that holds itself
        (b"}q\x00h\x00h\x00s",),  # a dict for a key
        (b"K\x01K\x02b",),  # a number that is filled
        (b"}K\x01b",),
        (b"(K\x01K\x02u",),
        (b"h\x07",),
        (b"\x86",),
        (b"K\x01\x85R",),  # a call of a tuple
        (b"NN\x81",),
        (b"X\xff\xff\xff\x7f",),
        (b"\x8b\xff\xff\xff\x7f",),
        (b"I" + b"9" * 10_000 + b"\n",),
        (b"(" * 100_000,),
        (b"]" * 100_000 + b"a" * 99_999,),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R",),
        (b"ctorch\nSize\n(J\xff\xff\xff\xffl\x85R",),
        (b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R",),
        (b"cfunctools\npartial\n)R",),
        (b"cfunctools\npartial\n)\x81",),
        (b"ccollections\ndeque\n(lI1\n\x86R(K\x01K\x02e",),
        (b"ccollections\nOrderedDict\nK\x05\x85R",),
        (b"X\x00\x00\x00\x00Q",),
        (b"",),
    ],
)
def test_odd_pickles_are_a_line(opcodes: tuple[bytes, ...], tmp_path: Path) -> None:
    refusal(write_pickle(tmp_path / "evil.pt", pickled(*opcodes)))


def test_every_opcode_is_answered(tmp_path: Path) -> None:
    for opcode in pickletools.opcodes:
        for before in (b"", b"K\x01", b"]", b"}K\x01K\x02", b"(", b"ctorch\nSize\n)"):
            code = opcode.code.encode("latin1") + b"\x01\x00\x00\x00\x00\x00\x00\x00a\n\n"
            refusal(write_pickle(tmp_path / "evil.pt", pickled(before, code)))


def test_old_files_are_judged_by_the_same_rules(tmp_path: Path) -> None:
    for value, told in ((Call(exec, "1"), "builtins.exec"), (filled(nn.Identity, forward=F.gelu), "replace forward")):
        assert told in refusal(legacy(tmp_path / "old.pt", value))
    path = legacy(tmp_path / "old.pt", nn.Linear(3, 3))
    whole = path.read_bytes()
    for length in range(20, len(whole), 97):
        path.write_bytes(whole[:length])
        refusal(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_files_of_any_protocol_load(protocol: int, tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    model.options = {"a": (1, 2.5, None, True, "é", b"bytes", {1, 2}, frozenset((3,)), complex(1, 2), 1 << 70, bytearray(b"x"))}
    torch.save(model, tmp_path / "model.pt", pickle_protocol=protocol)
    loaded: Any = load(tmp_path / "model.pt")
    assert loaded.options == model.options
    assert torch.equal(loaded[0].weight, model[0].weight)


def test_what_is_shared_stays_shared(tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model.whole = [model]  # through a list, as parents are kept
    loaded: Any = load(saved(tmp_path / "model.pt", model))
    assert loaded[1].weight is loaded[0].weight
    assert loaded.whole[0] is loaded


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: nn.Linear(3, 3, device="meta"), "no values"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "run the model once"),
        (lambda: nn.Sequential(nn.LazyBatchNorm2d()), "run the model once"),
    ],
)
def test_a_model_without_weights_is_told(build: Callable[[], nn.Module], told: str, tmp_path: Path) -> None:
    assert told in refusal(saved(tmp_path / "model.pt", build()))


def test_a_quantized_model_loads(tmp_path: Path) -> None:
    conv = torch.ao.nn.quantized.Conv2d(3, 4, 3)
    loaded: Any = load(saved(tmp_path / "model.pt", conv))
    assert torch.equal(loaded.weight().dequantize(), conv.weight().dequantize())
    x = torch.quantize_per_tensor(torch.randn(1, 3, 5, 5), 0.1, 0, torch.quint8)
    assert torch.equal(loaded(x).dequantize(), conv(x).dequantize())


def test_control_characters_of_a_file_reach_no_message(tmp_path: Path) -> None:
    escape = "\x1b]0;title\x07\x1b[2J\u202e"
    for content in ({escape: 1}, {escape: nn.ReLU()}, filled(nn.Sequential, _modules={f"{escape}.x": nn.ReLU()})):
        refusal(saved(tmp_path / "x.pt", content))
    strange = tmp_path / "a\x1bb.pt"
    strange.write_bytes(b"hello")
    refusal(strange)
    buffer = io.BytesIO()
    torch.save({escape: 1}, buffer)
    strange.write_bytes(buffer.getvalue())
    refusal(strange)
