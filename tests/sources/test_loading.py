"""Loading: what is a model is read, what is not is named, and nothing in a file is executed.

Every hostile file creates a sentinel if anything of it runs. That the attack is real is checked first, with
`trust_pickle=True`; then that it is refused, by name, with the sentinel absent.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize

from normfuse.errors import InputError, LoadError
from normfuse.sources import allowlist
from normfuse.sources.atomic import write_atomically
from normfuse.sources.loading import load, load_data


def tiny() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2))


class Call:
    """Pickles as a call: the heart of every pickle attack."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def refused(path: Path) -> LoadError:
    with pytest.raises(LoadError) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert message.isprintable()
    assert caught.value.hint
    return caught.value


# ---- what loads


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True), 2)


def with_settings() -> Any:
    model: Any = tiny()
    model.activation = partial(F.gelu, approximate="tanh")
    model.norm_layer = partial(nn.LayerNorm, eps=1e-6)
    model.kind = nn.BatchNorm2d
    model.options = OrderedDict(size=torch.Size((1, 2)), dtype=torch.float16, device=torch.device("cpu"), cut=slice(1, 3))
    return model


@pytest.mark.parametrize("build", [tiny, encoder, with_settings, lambda: nn.LSTM(3, 4), lambda: nn.Conv2d(3, 4, 1)])
def test_a_pickled_module_loads_as_it_was_saved(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = build().train()
    torch.save(model, tmp_path / "model.any")
    loaded = load(tmp_path / "model.any")
    assert isinstance(loaded, nn.Module)
    assert type(loaded) is type(model)
    assert loaded.training
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    torch.save(loaded, tmp_path / "again.pt")
    load(tmp_path / "again.pt")


@pytest.fixture(scope="module")
def zoo() -> dict[str, Callable[[], nn.Module]]:
    timm, torchvision, transformers = map(pytest.importorskip, ("timm", "torchvision", "transformers"))
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    gpt2 = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=40, bos_token_id=1, eos_token_id=1)
    bert = transformers.BertConfig(**small, vocab_size=40)
    return {
        "timm-vit": lambda: timm.create_model("vit_tiny_patch16_224", depth=1),
        "timm-swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24),
        "resnet18": lambda: torchvision.models.resnet18(),
        "tv-vit": lambda: torchvision.models.VisionTransformer(32, 16, 1, 2, 16, 32),
        "gpt2": lambda: transformers.GPT2LMHeadModel(gpt2),
        "bert": lambda: transformers.BertModel(bert),
    }


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["timm-vit", "timm-swin", "resnet18", "tv-vit", "gpt2", "bert"])
def test_models_of_the_usual_libraries_load(name: str, zoo: dict[str, Callable[[], nn.Module]], tmp_path: Path) -> None:
    model = zoo[name]()
    torch.save(model, tmp_path / "model.pt")
    loaded = load(tmp_path / "model.pt")
    assert isinstance(loaded, nn.Module)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    assert not [part for part in loaded.modules() for v in vars(part).values() if isinstance(v, allowlist.Inert)]


def exported(path: Path) -> Path:
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(tiny(), (torch.ones(3, 4),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path.with_suffix(".pt2"))
    return path.with_suffix(".pt2").rename(path)


@pytest.mark.parametrize("name", ["model.pt2", "model.pt", "model"])
def test_an_exported_program_loads_whatever_its_ending(name: str, tmp_path: Path) -> None:
    program = load(exported(tmp_path / name))
    assert isinstance(program, torch.export.ExportedProgram)
    assert program.module()(torch.ones(5, 4)).shape == (5, 2)


class Branches(nn.Module):
    """Control flow, guards, symbolic sizes, strings and nested containers: text of every kind in the archive."""

    def forward(self, x: torch.Tensor, *, y: dict[str, torch.Tensor], mode: str = "plain") -> dict[str, Any]:
        n, m = x.shape
        kept = x.nonzero()
        torch._check(kept.shape[0] >= 2)
        with torch.no_grad():
            wide = torch.einsum("b i, b j -> b i j", x, x).reshape(n * m, -1)[: (3 * n) // 2]
        chosen = torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t - 1, (x,))
        return {"wide out": wide, "rest": [kept, (chosen, F.gelu(y["mask"], approximate="tanh"))]}


def test_all_that_an_honest_program_says_is_understood(tmp_path: Path) -> None:
    auto = torch.export.Dim.AUTO
    example = (torch.rand(4, 6) + 1,), {"y": {"mask": torch.ones(4, 2)}}
    shapes = {"x": {0: auto, 1: auto}, "y": {"mask": {0: auto}}}
    torch.export.save(torch.export.export(Branches(), *example, dynamic_shapes=shapes), tmp_path / "model.pt2")
    program = load(tmp_path / "model.pt2")
    assert isinstance(program, torch.export.ExportedProgram)
    assert program.module()(*example[0], **example[1])["wide out"].shape == (6, 6)


# ---- hostile pickles


def touch(path: Path) -> str:
    return f"open({str(path)!r}, 'w').close()"


ATTACKS: dict[str, Callable[[Path], object]] = {
    "posix.system": lambda s: Call(os.system, f"touch {s}"),
    "builtins.eval": lambda s: Call(eval, touch(s)),
    "builtins.exec": lambda s: Call(exec, touch(s)),
    "shutil.copyfile": lambda s: Call(shutil.copyfile, __file__, str(s)),
    "torch.utils.collect_env.run": lambda s: Call(importlib.import_module("torch.utils.collect_env").run, f"touch {s}"),
    "pickle.loads": lambda s: Call(pickle.loads, pickle.dumps(Call(os.system, f"touch {s}"))),
    "torch.serialization.load": lambda s: Call(torch.load, nested(s)),
}


def nested(sentinel: Path) -> str:
    path = sentinel.with_name("nested.pt")
    torch.save(Call(os.system, f"touch {sentinel}"), path)
    return str(path)


@pytest.mark.parametrize("name", list(ATTACKS))
@pytest.mark.parametrize("hidden", [False, True])
def test_a_call_in_a_pickle_is_refused_by_name(name: str, hidden: bool, sentinel: Path, tmp_path: Path) -> None:
    payload: object = ATTACKS[name](sentinel)
    model: Any = tiny()
    model[0].extra = [{"deep": (payload,)}]
    torch.save(model if hidden else payload, tmp_path / "evil.pt")
    error = refused(tmp_path / "evil.pt")
    assert f"wants {name}; refused" in str(error)
    assert "--trust-pickle" in (error.hint or "")
    assert not sentinel.exists()


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "torch.serialization.load"])
def test_trust_pickle_is_what_runs_it(name: str, sentinel: Path, tmp_path: Path) -> None:
    torch.save(ATTACKS[name](sentinel), tmp_path / "evil.pt")
    with pytest.raises(LoadError):
        load(tmp_path / "evil.pt", trust_pickle=True)  # it ran, and was not a model
    assert sentinel.exists()


def test_all_names_are_told_at_once(sentinel: Path, tmp_path: Path) -> None:
    torch.save([Call(os.system, "true"), Call(eval, "1"), torch.optim.SGD, tiny()], tmp_path / "evil.pt")
    assert "wants builtins.eval, posix.system, torch.optim.sgd.SGD; refused" in str(refused(tmp_path / "evil.pt"))


@pytest.mark.parametrize(
    "value",
    [
        torch.optim.SGD,
        torch.utils.data.DataLoader,
        torch.hub.load,
        torch.load,
        torch.from_file,
        torch.jit.load,
        torch.fx.GraphModule,
        torch.jit.ScriptModule,
        F.triplet_margin_with_distance_loss,
        getattr,
        type,
        np.load,
        np.lib.npyio.NpzFile,
        pytest.main,
        partial(os.system, "true"),
        importlib.import_module,
    ],
    ids=lambda value: getattr(value, "__name__", "partial"),
)
def test_names_of_installed_things_that_are_no_model_are_refused(value: object, tmp_path: Path) -> None:
    torch.save({"value": value}, tmp_path / "evil.pt")
    assert "refused" in str(refused(tmp_path / "evil.pt"))


def pickled(*opcodes: bytes) -> bytes:
    return b"\x80\x02" + b"".join(opcodes) + b"."


def write_pickle(path: Path, data: bytes) -> Path:
    """A file of torch.save, with this as its pickle."""
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data.pkl", data, len(data))
    writer.write_record("byteorder", b"little", 6)
    writer.write_end_of_file()
    return path


def test_an_allowed_class_can_be_filled_but_not_called(tmp_path: Path) -> None:
    torch.save(Call(parametrize.ParametrizationList, [], torch.ones(1)), tmp_path / "evil.pt")
    name = "torch.nn.utils.parametrize.ParametrizationList()"
    assert f"a call of {name}; refused" in str(refused(tmp_path / "evil.pt"))


def test_not_even_by_way_of_a_tensor_subclass(tmp_path: Path) -> None:
    # torch allows _rebuild_from_type_v2(function, type, arguments, state), which calls the function.
    call = Call(torch._tensor._rebuild_from_type_v2, parametrize.ParametrizationList, torch.Tensor, ([], 1), {})
    torch.save(call, tmp_path / "evil.pt")
    assert "a call of" in str(refused(tmp_path / "evil.pt"))


def test_a_partial_of_an_allowed_class_is_inert(tmp_path: Path) -> None:
    model: Any = tiny()
    model.later = partial(parametrize.ParametrizationList, [], torch.ones(1))
    torch.save(model, tmp_path / "model.pt")
    loaded: Any = load(tmp_path / "model.pt")
    with pytest.raises(allowlist.NotAllowed):
        loaded.later()


@pytest.mark.parametrize(
    "name",
    ["torch.nn.\x1b[31mLinear", "torch..nn", "os\npath", "torch.nn.modules.linear", "pip.__main__", "nothing", ".", "é.é"],
)
def test_strange_names_are_refused_in_print(name: str, tmp_path: Path) -> None:
    module, _, attribute = name.rpartition(".")
    path = write_pickle(tmp_path / "evil.pt", pickled(b"c", module.encode(), b"\n", attribute.encode(), b"\n"))
    refused(path)


@pytest.fixture
def cwd_package(tmp_path: Path, sentinel: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where a model was downloaded to: the interpreter imports from it, and so must we not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


SOURCE = "from torch import nn\nclass Net(nn.Module): pass\n"


@pytest.mark.parametrize("name", ["downloaded", "iniconfig"])
def test_a_class_of_the_working_directory_is_not_imported(
    name: str, cwd_package: Path, sentinel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The second name is that of an installed package, which the folder shadows.
    monkeypatch.delitem(sys.modules, name, raising=False)
    (cwd_package / name).mkdir()
    (cwd_package / name / "__init__.py").write_text(f"{touch(sentinel)}\n{SOURCE}")
    path = write_pickle(cwd_package / "evil.pt", pickled(b"c", name.encode(), b"\nNet\n)\x81"))
    error = refused(path)
    assert f"wants {name}.Net; refused" in str(error)
    assert f"{name} is a folder here" in (error.hint or "")
    assert "pip install" not in (error.hint or "")
    assert not sentinel.exists()
    assert name not in sys.modules


def test_nor_with_metadata_beside_it(cwd_package: Path, sentinel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cwd_package / "downloaded.py").write_text(f"{touch(sentinel)}\n{SOURCE}")
    metadata = cwd_package / "downloaded-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: downloaded\nVersion: 1.0\n")
    (metadata / "top_level.txt").write_text("downloaded\n")
    link = {"url": cwd_package.as_uri(), "dir_info": {"editable": True}}
    (metadata / "direct_url.json").write_text(json.dumps(link))
    allowlist._distributions.cache_clear()
    try:
        assert "downloaded" in allowlist._distributions()
        path = write_pickle(cwd_package / "evil.pt", pickled(b"cdownloaded\nNet\n)\x81"))
        assert "wants downloaded.Net; refused" in str(refused(path))
    finally:
        allowlist._distributions.cache_clear()
    assert not sentinel.exists()


def test_a_class_of_a_script_is_refused_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = type("Net", (nn.Module,), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "Net", net, raising=False)
    torch.save(net(), tmp_path / "model.pt")
    error = refused(tmp_path / "model.pt")
    assert "__main__.Net" in str(error)
    assert "torch.export" in (error.hint or "")
    assert isinstance(load(tmp_path / "model.pt", trust_pickle=True), net)


def test_a_file_that_names_pip_leaves_setuptools_importable(tmp_path: Path) -> None:
    path = write_pickle(tmp_path / "evil.pt", pickled(b"cpip.exceptions\nPipError\n)\x81"))
    code = (
        "import sys, normfuse\n"
        "try: normfuse.load(sys.argv[1])\n"
        "except normfuse.errors.LoadError as error: assert 'pip.exceptions' in str(error)\n"
        "import torch.utils.cpp_extension\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(path)], check=True)


def test_no_package_is_imported_for_a_file_that_is_refused_anyway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torchgen.gen", raising=False)  # comes with torch, and has no modules of ours
    assert allowlist.is_installed("torchgen.gen")
    both = write_pickle(tmp_path / "evil.pt", pickled(b"ctorchgen.gen\nX\n", b"cposix\nsystem\n\x86"))
    assert "wants posix.system; refused" in str(refused(both))
    assert "torchgen.gen" not in sys.modules


def test_our_own_modules_are_installed_ones() -> None:
    assert allowlist.is_installed("normfuse.sources.loading")
    assert allowlist.is_installed("torch.nn")
    assert not allowlist.is_installed("os")
    assert not allowlist.is_installed("tests.sources")


def test_the_allowances_end_with_the_load(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    torch.save(encoder(), tmp_path / "model.pt")
    load(tmp_path / "model.pt")
    assert set(torch.serialization.get_safe_globals()) == before


# ---- hostile exported programs


def tampered(path: Path, edit: Callable[[dict[str, bytes]], None]) -> Path:
    """An exported program with other records."""
    reader = torch._C.PyTorchFileReader(str(exported(path.with_name("honest.pt2"))))
    records = {name: reader.get_record(name) for name in reader.get_all_records() if not name.startswith(".data/")}
    edit(records)
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, record in records.items():
        writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    return path


def in_program(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, bytes]], None]:
    return in_record("models/model.json", change)


def in_record(record: str, change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, bytes]], None]:
    def edit(records: dict[str, bytes]) -> None:
        content = json.loads(records[record])
        change(content)
        records[record] = json.dumps(content).encode()

    return edit


def with_record(name: str, content: bytes) -> Callable[[dict[str, bytes]], None]:
    return lambda records: records.update({name: content})


def evil_pickle(sentinel: Path) -> bytes:
    return pickle.dumps(Call(os.system, f"touch {sentinel}"))


def evil_torch_file(sentinel: Path) -> bytes:
    path = sentinel.with_name("inner.pt")
    torch.save((Call(os.system, f"touch {sentinel}"),), path)
    return path.read_bytes()


def graph_of(program: dict[str, Any]) -> dict[str, Any]:
    graph: dict[str, Any] = program["graph_module"]["graph"]
    return graph


def evil_inputs(sentinel: Path) -> Callable[[dict[str, bytes]], None]:
    return with_record("data/sample_inputs/model.pt", evil_torch_file(sentinel))


def evil_weight(sentinel: Path) -> Callable[[dict[str, bytes]], None]:
    def change(config: dict[str, Any]) -> None:
        config["config"]["0.weight"]["use_pickle"] = True

    def edit(records: dict[str, bytes]) -> None:
        in_record("data/weights/model_weights_config.json", change)(records)
        records["data/weights/weight_0"] = evil_torch_file(sentinel)

    return edit


def evil_constant(sentinel: Path) -> Callable[[dict[str, bytes]], None]:
    def change(config: dict[str, Any]) -> None:
        config["config"]["c"] = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}

    def edit(records: dict[str, bytes]) -> None:
        in_record("data/constants/model_constants_config.json", change)(records)
        records["data/constants/opaque_obj_0"] = evil_pickle(sentinel)

    return edit


def evil_legacy_weights(sentinel: Path) -> Callable[[dict[str, bytes]], None]:
    return with_record("data/weights/model.pt", evil_torch_file(sentinel))


def evil_size(sentinel: Path) -> Callable[[dict[str, bytes]], None]:
    size = {"as_expr": {"expr_str": f"exec({touch(sentinel)!r}) or 3", "hint": {"as_int": 3}}}
    return in_program(lambda program: graph_of(program)["tensor_values"]["input"]["sizes"].__setitem__(0, size))


def evil_size_under_a_free_name(sentinel: Path) -> Callable[[dict[str, bytes]], None]:
    # A tensor called "metadata" must not be taken for the free text of that name.
    def change(program: dict[str, Any]) -> None:
        expression = {"expr_str": f"exec({touch(sentinel)!r}) or 3"}
        graph_of(program)["sym_int_values"]["metadata"] = {"as_expr": expression}
        target = "_operator.add"
        used = [{"name": name, "arg": {"as_int": 1}, "kind": 1} for name in "ab"]
        output = {"as_sym_int": {"as_name": "metadata"}}
        node = {"target": target, "inputs": used, "outputs": [output], "metadata": {}, "name": "metadata"}
        graph_of(program)["nodes"].insert(0, node)

    return in_program(change)


def evil_guard(sentinel: Path) -> Callable[[dict[str, bytes]], None]:
    return in_program(lambda program: program.update(guards_code=[touch(sentinel)]))


def evil_guard_string(sentinel: Path) -> Callable[[dict[str, bytes]], None]:
    guard = f"""L['x'].size()[0] != "' + {touch(sentinel).replace(chr(39), chr(34))} + '" """
    return in_program(lambda program: program.update(guards_code=[guard]))


def evil_operator(sentinel: Path) -> Callable[[dict[str, bytes]], None]:
    # Not code, but a program that creates a file of its choice when it runs.
    path, shared, size = {"as_string": str(sentinel)}, {"as_bool": True}, {"as_int": 4}
    return extra_node("torch.ops.aten.from_file.default", filename=path, shared=shared, size=size)


def extra_node(target: str, **arguments: dict[str, Any]) -> Callable[[dict[str, bytes]], None]:
    """A program with one more call, whose result is one more output."""
    hop = "higher_order" in target
    result = {"as_tensor": {"name": "made"}}
    node: dict[str, Any] = {
        "target": target,
        "inputs": [{"name": "" if hop else name, "arg": arg, "kind": 1} for name, arg in arguments.items()],
        "outputs": [result],
        "metadata": {},
        "is_hop_single_tensor_return": hop or None,
    }

    def change(program: dict[str, Any]) -> None:
        graph, signature = graph_of(program), program["graph_module"]["signature"]
        graph["nodes"].insert(0, node)
        graph["tensor_values"]["made"] = graph["tensor_values"]["p_0_bias"]
        graph["outputs"].append(result)
        signature["output_specs"].append({"user_output": {"arg": result}})
        entry = program["graph_module"]["module_call_graph"][0]["signature"]
        entry["out_spec"] = json.dumps([1, tree("builtins.tuple", "null", LEAF, LEAF)])

    return in_program(change)


def evil_input_name(sentinel: Path) -> Callable[[dict[str, bytes]], None]:
    name = f"x={touch(sentinel)}"  # def forward(self, …, x=open(…)): a default is evaluated when the source is

    def change(program: dict[str, Any]) -> None:
        argument = {"as_tensor": {"name": name}}
        graph_of(program)["inputs"].append(argument)
        graph_of(program)["tensor_values"][name] = graph_of(program)["tensor_values"]["p_0_bias"]
        program["graph_module"]["signature"]["input_specs"].append({"user_input": {"arg": argument}})

    return in_program(change)


def evil_argument_name(sentinel: Path) -> Callable[[dict[str, bytes]], None]:
    # The name is pasted into the signature and again into the first statement; the quotes swallow what is between.
    name = f"x={touch(sentinel)}):\n    '''#"

    def change(program: dict[str, Any]) -> None:
        program["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = [name]

    return in_program(change)


LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}


def tree(kind: str, context: object, *children: dict[str, Any]) -> dict[str, Any]:
    return {"type": kind, "context": context, "children_spec": list(children)}


def evil_tree(kind: str, context: object) -> Callable[[Path], Callable[[dict[str, bytes]], None]]:
    def make(sentinel: Path) -> Callable[[dict[str, bytes]], None]:
        module = sentinel.with_name("brought_along.py")
        module.write_text(f"import enum\n{touch(sentinel)}\nclass E(enum.Enum):\n  A = 1\n")

        def change(program: dict[str, Any]) -> None:
            packed = json.dumps(context) if kind == "builtins.dict" else context
            spec = [1, tree(kind, packed, LEAF)]
            program["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = json.dumps(spec)

        return in_program(change)

    return make


FACTORY = {"default_factory_module": "brought_along", "default_factory_name": "E", "dict_context": ["a"]}
ENUM = [{"__enum__": True, "fqn": "brought_along:E", "name": "A"}]

ARCHIVE_ATTACKS: dict[str, Callable[[Path], Callable[[dict[str, bytes]], None]]] = {
    "example inputs": evil_inputs,
    "a pickled weight": evil_weight,
    "an opaque constant": evil_constant,
    "weights in the old format": evil_legacy_weights,
    "a size": evil_size,
    "a size under a free name": evil_size_under_a_free_name,
    "a guard": evil_guard,
    "an operator that writes files": evil_operator,
    "an input's name": evil_input_name,
    "an argument's name": evil_argument_name,
    "a tree's default factory": evil_tree("collections.defaultdict", FACTORY),
    "a tree's enum": evil_tree("builtins.dict", ENUM),
}


@pytest.mark.parametrize("name", list(ARCHIVE_ATTACKS))
def test_an_exported_program_cannot_execute_either(name: str, sentinel: Path, cwd_package: Path) -> None:
    path = tampered(cwd_package / "evil.pt2", ARCHIVE_ATTACKS[name](sentinel))
    refused(path)
    assert not sentinel.exists()
    sys.modules.pop("brought_along", None)
    with contextlib.suppress(Exception):
        load(path, trust_pickle=True).module()(torch.ones(3, 4))  # type: ignore[operator]
    assert sentinel.exists(), "the attack does not work, so the refusal shows nothing"
    sys.modules.pop("brought_along", None)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (with_record("data/aotinductor/model/model.so", b"\x7fELF"), "compiled code"),
        (extra_node("torch.ops.higher_order.cond", f={"as_operator": "torch.os.system"}), "torch.os.system"),
        (extra_node("torch.ops.higher_order.strict_mode"), "strict_mode"),
        (extra_node("torch.os.system", a={"as_string": "true"}), "torch.os.system"),
        (in_program(lambda p: graph_of(p)["nodes"][0].update(target="torch.ops.load_library")), "load_library"),
        (in_program(lambda p: graph_of(p)["nodes"][0].update(target="_operator.methodcaller")), "methodcaller"),
        (in_program(lambda p: graph_of(p)["nodes"][0].update(target="#ns:op")), "#ns:op"),
        (in_program(lambda p: p.update(guards_code=["L['x'].__class__"])), "__class__"),
        (in_program(lambda p: p.update(guards_code=["1 < 2 # comment"])), "comment"),
        (in_program(lambda p: p.update(guards_code=["(1 <\n 2)"])), "1 <"),
        (in_program(lambda p: p.update(guards_code=['L["a\'b"].size()[0] > 1'])), "a'b"),
        (in_program(lambda p: p.update(guards_code=["math.__loader__"])), "__loader__"),
    ],
)
def test_what_a_program_wants_is_named(edit: Callable[[dict[str, bytes]], None], named: str, tmp_path: Path) -> None:
    assert named in str(refused(tampered(tmp_path / "evil.pt2", edit)))


def test_a_broken_program_is_one_line(tmp_path: Path) -> None:
    for number, record in enumerate((b"", b"{}", b"[]", b"\xff\xfe", b'{"graph_module": {}}', b"[" * 100_000)):
        refused(tampered(tmp_path / f"{number}.pt2", with_record("models/model.json", record)))


# ---- what is not a model


def legacy(path: Path, content: object) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def zipped(path: Path, name: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"content")
    return path


def safetensors(path: Path) -> Path:
    save_file({"weight": torch.ones(2)}, path)
    return path


def npz(path: Path) -> Path:
    np.savez(path, x=np.ones(2))
    return path.with_name(path.name + ".npz")


def torchscript(path: Path) -> Path:
    torch.jit.save(torch.jit.trace(tiny(), torch.ones(1, 4)), path)
    return path


def folder(path: Path, *files: str) -> Path:
    path.mkdir()
    for file in files:
        (path / file).touch()
    return path


NOT_A_MODEL: dict[str, tuple[Callable[[Path], Path], str]] = {
    "state dict": (lambda p: saved(p, tiny().state_dict()), "state dict"),
    "old state dict": (lambda p: legacy(p, tiny().state_dict()), "state dict"),
    "checkpoint": (lambda p: saved(p, {"state_dict": tiny().state_dict(), "epoch": 3}), "checkpoint .*state_dict, epoch"),
    "module in a dict": (lambda p: saved(p, {"epoch": 3, "model": tiny()}), "entry 'model' holds a model"),
    "tensor": (lambda p: saved(p, torch.ones(2)), "holds a Tensor"),
    "list": (lambda p: saved(p, [tiny()]), "holds a list"),
    "empty dict": (lambda p: saved(p, {}), "nothing"),
    "torchscript": (torchscript, "TorchScript"),
    "safetensors": (safetensors, "safetensors"),
    "npz": (npz, "NumPy"),
    "npy": (lambda p: written(p, b"\x93NUMPY\x01\x00v\x00{'descr'"), "NumPy"),
    "zip": (lambda p: zipped(p, "folder/readme"), "zip file"),
    "flat zip": (lambda p: zipped(p, "readme"), "zip file"),
    "old exported program": (lambda p: zipped(p, "serialized_exported_program.json"), "before 2.8"),
    "onnx": (lambda p: written(p, b"\x08\x08\x12\x07pytorch\x1a\x032.0"), "ONNX"),
    "gguf": (lambda p: written(p, b"GGUF\x03\x00\x00\x00"), "GGUF"),
    "hdf5": (lambda p: written(p, b"\x89HDF\r\n\x1a\n"), "HDF5"),
    "tflite": (lambda p: written(p, struct.pack("<I", 28) + b"TFL3"), "TensorFlow Lite"),
    "pickle": (lambda p: written(p, pickle.dumps({"a": 1})), "plain pickle"),
    "html": (lambda p: written(p, b"\n<!DOCTYPE html><html>not found"), "web page"),
    "lfs": (lambda p: written(p, b"version https://git-lfs.github.com/spec/v1\noid sha256:0"), "Git LFS"),
    "text": (lambda p: written(p, "weights: here, été\n".encode()), "text file"),
    "noise": (lambda p: written(p, bytes(range(255, 0, -1))), "not a file of torch.save"),
    "empty": (lambda p: written(p, b""), "is empty"),
    "missing": (lambda p: p, "No such file"),
    "below a file": (lambda p: written(p, b"x") / "model.pt", "Not a directory"),
    "null byte": (lambda p: p.with_name("a\0b"), "null byte|embedded null"),
    "device": (lambda p: Path(os.devnull), "regular file"),
    "folder": (folder, "is a folder"),
    "saved model": (lambda p: folder(p, "saved_model.pb"), "TensorFlow SavedModel"),
    "save_pretrained": (lambda p: folder(p, "config.json", "model.safetensors"), "save_pretrained"),
}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", list(NOT_A_MODEL))
def test_what_is_not_a_model_is_recognised(name: str, tmp_path: Path) -> None:
    make, told = NOT_A_MODEL[name]
    path = make(tmp_path / "model")
    with pytest.raises(LoadError, match=told) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("kind", ["pickled", "exported"])
def test_a_file_cut_short_anywhere_is_a_load_error(kind: str, trust: bool, tmp_path: Path) -> None:
    path = saved(tmp_path / "model", tiny()) if kind == "pickled" else exported(tmp_path / "model")
    whole = path.read_bytes()
    for length in {0, 1, 2, 3, 4, 5, 64, len(whole) - 1, *range(30, len(whole), len(whole) // 25)}:
        path.write_bytes(whole[:length])
        with pytest.raises(LoadError):
            load(path, trust_pickle=trust)


@pytest.mark.parametrize("kind", ["pickled", "exported"])
def test_a_file_with_other_bytes_is_a_load_error_or_a_model(kind: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "model", tiny()) if kind == "pickled" else exported(tmp_path / "model")
    whole = path.read_bytes()
    for position in range(5, len(whole), len(whole) // 60):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x15]) + whole[position + 1 :])
        with contextlib.suppress(LoadError):
            load(path)


def test_an_unreadable_file_is_a_load_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_permission(*_arguments: object) -> None:  # root reads everything, so a mode of 0 would not do
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    path = saved(tmp_path / "model", tiny())
    monkeypatch.setattr(Path, "open", no_permission)
    assert "Permission denied" in str(refused(path))


@pytest.mark.parametrize("trust", [False, True])
def test_files_from_before_torch_1_6_load(trust: bool, tmp_path: Path) -> None:
    model = tiny()
    model[3].bias = model[1].bias = nn.Parameter(torch.randn(2))  # tied: one storage
    loaded: Any = load(legacy(tmp_path / "model", model), trust_pickle=trust)
    assert isinstance(loaded, nn.Sequential)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    assert loaded[3].bias is loaded[1].bias


def test_load_data_allows_no_names(tmp_path: Path) -> None:
    assert torch.equal(load_data(saved(tmp_path / "x", {"a": torch.ones(2)}))["a"], torch.ones(2))
    with pytest.raises(LoadError):
        load_data(saved(tmp_path / "model", tiny()))


# ---- writing


def text(content: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(content)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out.txt"
    write_atomically(target, text("one"))
    target.chmod(0o640)

    def fails(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, fails)
    assert target.read_text() == "one"
    write_atomically(target, text("two"))
    assert target.read_text() == "two"
    assert target.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["out.txt"]


def test_the_temporary_file_keeps_the_ending(tmp_path: Path) -> None:
    program = torch.export.export(tiny(), (torch.ones(3, 4),))
    write_atomically(tmp_path / "out.pt2", lambda path: torch.export.save(program, path))
    assert isinstance(load(tmp_path / "out.pt2"), torch.export.ExportedProgram)


@pytest.mark.parametrize("link", ["same", "symlink", "hardlink", "dots"])
def test_the_input_is_never_overwritten(link: str, tmp_path: Path) -> None:
    source = written(tmp_path / "model.pt", b"precious")
    target = {"same": source, "dots": tmp_path / "x" / ".." / "model.pt"}.get(link, tmp_path / "out.pt")
    (tmp_path / "x").mkdir()
    if link == "symlink":
        target.symlink_to(source)
    if link == "hardlink":
        os.link(source, target)
    with pytest.raises(InputError, match="it is the input"):
        write_atomically(target, text("gone"), never_over=[tmp_path / "other", source])
    assert source.read_bytes() == b"precious"


def test_a_link_elsewhere_stays_a_link(tmp_path: Path) -> None:
    real, link = written(tmp_path / "real", b"old"), tmp_path / "link"
    link.symlink_to(real)
    write_atomically(link, text("new"), never_over=[tmp_path / "model.pt"])
    assert link.is_symlink()
    assert real.read_text() == "new"


@pytest.mark.parametrize("target", ["missing/out.pt", "folder", "file/out.pt"])
def test_where_nothing_can_be_written_is_an_input_error(target: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        write_atomically(tmp_path / target, text("x"))
    assert not list((tmp_path / "folder").iterdir())
