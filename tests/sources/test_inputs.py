"""Example inputs: the grammar of a spec, what is drawn, the tables that integers index, files, and models that tell."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normfuse
from normfuse.api.opening import inputs_for
from normfuse.errors import InputError, TraceError
from normfuse.graph.program import Program
from normfuse.proof import cases
from normfuse.sources.found_inputs import found_on
from normfuse.sources.index_limits import integer_limits
from normfuse.sources.input_files import from_file, from_script
from normfuse.sources.inputs import EXAMPLES, Inputs, as_inputs, from_loader
from normfuse.sources.specs import DynamicDim, Plain, Spec, from_specs, parse_spec

# ---- specs


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("float32[2,3]", Spec(None, torch.float32, (2, 3))),
        ("float32[]", Spec(None, torch.float32, ())),
        ("bool[ ]", Spec(None, torch.bool, ())),
        ("bfloat16[batch,3]", Spec(None, torch.bfloat16, (DynamicDim("batch"), 3))),
        ("ids:int64[batch=4]", Spec("ids", torch.int64, (DynamicDim("batch", 4),))),
        ("int64[seq=16:1-512]", Spec(None, torch.int64, (DynamicDim("seq", 16, 1, 512),))),
        ("int64[seq:4-]", Spec(None, torch.int64, (DynamicDim("seq", None, 4, None),))),
        (" x : float16 [ n , 3 ] ", Spec("x", torch.float16, (DynamicDim("n"), 3))),
        ("float32[32*k]", Spec(None, torch.float32, (DynamicDim("k", factor=32),))),
        ("float32[h=32*k=7:1-16]", Spec(None, torch.float32, (DynamicDim("k", 7, 1, 16, 32, "h"),))),
        ("batch.ids:int64[2]", Spec("batch.ids", torch.int64, (2,))),
        ("use_cache=false", Plain("use_cache", False)),
        (" a = None ", Plain("a", None)),
        ("n=3", Plain("n", 3)),
        ("n=-1.5e-3", Plain("n", -1.5e-3)),
        ("mode=train", Plain("mode", "train")),
    ],
)
def test_a_spec_is_read(text: str, spec: Spec | Plain) -> None:
    assert parse_spec(text) == spec


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("", 1),
        ("float32", 8),
        ("[2]", 1),
        ("float32[2", 10),
        ("float32[2,]", 11),
        ("float32[,2]", 9),
        ("float32[2,,3]", 11),
        ("float32[-1]", 9),
        ("float32[2.5]", 10),
        ("float32[2]x", 10),
        ("float32[2]]", 10),
        ("float32[2 3]", 10),
        ("float32[b=]", 10),
        ("float32[b:3]", 10),
        ("float32[b:3-2x]", 14),
        ("float33[2]", 1),
        ("x:load[2]", 3),
        ("x:quint8[2]", 3),
        ("a:b:float32[2]", 12),
        ("fl\noat32[2]", 9),
        ("float32[é]", 9),
        ("float32[32*]", 11),
        ("float32[h=32*3]", 13),
        ("x=float32[2]", 2),
        ("x=", 2),
        (f"float32[{'9' * 5000}]", 27),
    ],
)
def test_a_bad_spec_says_where(text: str, position: int) -> None:
    with pytest.raises(InputError, match=f"position {position}\\b") as caught:
        parse_spec(text)
    assert "float32[batch,3,224,224]" in (caught.value.hint or "")


@given(st.text(alphabet="float32int64:[]=,-ab 0é\n", max_size=30))
def test_any_text_is_a_spec_or_an_input_error(text: str) -> None:
    with contextlib.suppress(InputError):
        assert isinstance(parse_spec(text), Spec | Plain)


SIZES = st.one_of(st.integers(0, 9), st.builds(DynamicDim, st.sampled_from(["batch", "s", "n_1"])))


@given(st.lists(SIZES, max_size=5), st.sampled_from(["float32", "int64", "bool"]), st.sampled_from([None, "x", "ids"]))
def test_a_spec_is_read_back(dims: list[int | DynamicDim], dtype: str, name: str | None) -> None:
    sizes = ",".join(dim.name if isinstance(dim, DynamicDim) else str(dim) for dim in dims)
    text = f"{name + ':' if name else ''}{dtype}[{sizes}]"
    assert parse_spec(text) == Spec(name, getattr(torch, dtype), tuple(dims))


def test_specs_become_positional_and_keyword_inputs() -> None:
    inputs = from_specs(["float32[2,3]", "mask:bool[2]", "int32[]"])
    assert [(tuple(arg.shape), arg.dtype) for arg in inputs.args] == [((2, 3), torch.float32), ((), torch.int32)]
    assert [(name, value.dtype) for name, value in inputs.kwargs.items()] == [("mask", torch.bool)]
    assert inputs.dynamic_shapes is None


def test_one_name_is_one_dim_of_one_size() -> None:
    inputs = from_specs(["float32[batch,4]", "int64[batch=6,seq:3-9]"])
    shapes: Any = inputs.dynamic_shapes
    first, second = shapes
    assert first[0] is second[0]
    assert (second[1].__name__, second[1].min, second[1].max) == ("seq", 3, 9)
    assert [tuple(arg.shape) for arg in inputs.args] == [(6, 4), (6, 3)]


@pytest.mark.parametrize(("dim", "size"), [("b", 2), ("b:5-", 5), ("b:0-1", 1), ("b=7", 7), ("b=7:1-7", 7)])
def test_the_size_of_a_dim_in_the_example(dim: str, size: int) -> None:
    assert from_specs([f"float32[{dim}]"]).args[0].shape == (size,)


@pytest.mark.parametrize(
    "specs",
    [
        ["float32[b=2,3]", "float32[b=4]"],
        ["float32[b:1-2]", "float32[b:1-4]"],
        ["float32[b=9:1-4]"],
        ["float32[b=0:1-4]"],
        ["float32[b:4-1]"],
        ["float32[b=3]", "float32[b:4-]"],
        ["x:float32[2]", "x:float32[3]"],
        ["x:float32[2]", "x=3"],
        ["x=2", "x=3"],
        ["b:float32[2]", "b.x:float32[2]"],
        ["b.x:float32[2]", "b=3"],
        ["b.x.y=1", "b.x:float32[2]"],
        ["float32[h=32*k,h=16*k]"],
        ["float32[h=32*k,h=64]"],
        ["float32[0*k]"],
        ["float32[32*k=999999999999999999]"],
        ["float32[999999999999,999999999]"],
    ],
)
def test_specs_that_contradict_each_other_are_input_errors(specs: list[str]) -> None:
    with pytest.raises(InputError):
        from_specs(specs)


def test_drawing_is_repeatable_and_private() -> None:
    before = torch.random.get_rng_state()
    one, again, other = (from_specs(["float32[64]"], seed=seed).args[0] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_floats_are_normal_in_every_dtype() -> None:
    for dtype in ("float64", "float32", "bfloat16", "float16", "complex64"):
        drawn = from_specs([f"{dtype}[4000]"]).args[0]
        assert abs(drawn.to(torch.complex128).mean()) < 0.1
        assert 0.9 < drawn.to(torch.complex128).std() < 1.1
    half, single = (from_specs([f"{dtype}[100]"]).args[0] for dtype in ("float16", "float32"))
    assert torch.equal(half, single.half())


def test_integers_stay_below_their_limit() -> None:
    specs = ["int64[1000]", "int8[1000]", "ids:int32[1000]"]
    inputs = from_specs(specs, index_limits={0: 5, 1: 50_000, "ids": 1})
    assert set(inputs.args[0].tolist()) == set(range(5))
    assert inputs.args[1].min() >= 0
    assert inputs.kwargs["ids"].max() == 0
    assert set(from_specs(["int64[100]"]).args[0].tolist()) == {0, 1}
    with pytest.raises(InputError, match="'other'"):
        from_specs(specs, index_limits={"other": 3})


class Adds(nn.Module):
    def forward(self, x: Tensor, ids: Tensor, *, scale: Tensor) -> Tensor:
        return (x + ids[:, :1]) * scale


@pytest.mark.parametrize(
    "specs",
    [
        ["float32[batch=3,4]", "int64[batch,seq=5:2-9]", "scale:float32[batch,1]"],
        ["ids:int64[batch,seq=5:2-9]", "x:float32[batch=3,4]", "scale:float32[batch,1]"],
    ],
)
def test_torch_export_takes_the_dynamic_shapes(specs: list[str]) -> None:
    inputs = from_specs(specs)
    program = torch.export.export(Adds(), inputs.args, inputs.kwargs, dynamic_shapes=inputs.dynamic_shapes)
    bigger = from_specs([spec.replace("batch=3", "batch=7") for spec in specs])
    assert program.module()(*bigger.args, **bigger.kwargs).shape == (7, 4)
    assert sorted((r.lower, r.upper) for r in program.range_constraints.values())[-1] == (2, 9)


class Nested(nn.Module):
    """Takes a dict, a switch, and pictures whose sides are multiples."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.patches = nn.Embedding(50, 4), nn.Conv2d(3, 4, 8, 8)

    def forward(self, x: Tensor, *, batch: dict[str, Any], double: bool = False) -> Tensor:
        pictures = self.patches(x).flatten(2).mean(-1)
        return pictures * (2.0 if double else 1.0) + self.table(batch["words"]["ids"]).mean(1)


NESTED = ["float32[n=3,3,h=8*k,w=8*m=3:1-9]", "batch.words.ids:int64[n,seq=5]", "double=true"]


def test_specs_of_dicts_and_of_what_is_no_tensor() -> None:
    inputs = from_specs(NESTED)
    assert inputs.args[0].shape == (3, 3, 16, 24)
    assert inputs.kwargs["batch"]["words"]["ids"].shape == (3, 5)
    assert inputs.kwargs["double"] is True
    model = Nested().eval()
    limits = integer_limits(model, inputs)
    assert limits == {"batch.words.ids": 50}
    drawn = from_specs(NESTED, index_limits=limits)
    assert drawn.kwargs["batch"]["words"]["ids"].max() > 2
    program = torch.export.export(model, drawn.args, drawn.kwargs, dynamic_shapes=drawn.dynamic_shapes)
    other = from_specs([spec.replace("8*m=3", "8*m=5").replace("n=3", "n=4") for spec in NESTED], index_limits=limits)
    torch.testing.assert_close(program.module()(*other.args, **other.kwargs), model(*other.args, **other.kwargs))


def test_a_proof_is_made_at_other_multiples() -> None:
    program = Program.trace(nn.Conv2d(3, 4, 8, 8), *_call(from_specs(["float32[2,3,8*k,8*m=3:1-9]"])))
    shapes = {case.name: tuple(case.flat[0].shape) for case in cases.other_sizes(program, [torch.randn(2, 3, 16, 24)])}
    assert shapes["other sizes"] == (2, 3, 24, 32)
    ends = {case.name: tuple(case.flat[0].shape) for case in cases.sizes_of_ranges(program, [torch.randn(2, 3, 16, 24)])}
    assert ends["largest dynamic dims"] == (2, 3, 40, 72)


def _call(inputs: Inputs) -> tuple[Any, ...]:
    return inputs.args, inputs.kwargs, inputs.dynamic_shapes


def test_one_label_is_one_multiple_everywhere() -> None:
    inputs = from_specs(["float32[h=4*k]", "float32[h,k]"])
    assert [tuple(arg.shape) for arg in inputs.args] == [(8,), (8, 2)]


def test_dicts_alone_have_dynamic_dims_too() -> None:
    inputs = from_specs(["b.x:float32[n,3]", "b.flag=true", "scale=2"])
    shapes: Any = inputs.dynamic_shapes
    assert inputs.kwargs["b"]["flag"] is True
    assert (set(shapes["b"]["x"]), shapes["b"]["flag"], shapes["scale"]) == ({0}, None, None)


# ---- what a forward takes


@pytest.mark.parametrize("specs", [["float32[2,4]"], ["y:float32[2,4]"], ["float32[2,4]"] * 3])
def test_inputs_without_a_place_say_what_the_forward_takes(specs: list[str]) -> None:
    given = from_specs(specs)
    with pytest.raises(InputError, match="do not fit Adds") as caught:
        normfuse.inspect(Adds(), given)
    assert caught.value.hint == "its forward takes x, ids, scale (required)"


def test_inputs_of_another_size_say_what_the_forward_takes() -> None:
    with pytest.raises(TraceError) as caught:
        normfuse.inspect(nn.Linear(3, 3), (torch.randn(2, 4),))
    assert "its forward takes input (required)" in str(caught.value.hint)


def test_a_model_that_tells_nothing_says_what_its_forward_takes() -> None:
    with pytest.raises(InputError, match=r"no example inputs are known for Adds, which takes x, ids, scale \(required\)"):
        normfuse.inspect(Adds())


# ---- integer limits


class Tables(nn.Module):
    """Two tables behind one input, one of them behind casts and views; one by indexing; a mask that indexes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Embedding(77, 4), nn.Embedding(20, 4)
        self.rows = nn.Parameter(torch.zeros(9, 4))
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(4)

    def forward(self, ids: Tensor, kinds: Tensor, mask: Tensor, *, places: Tensor) -> Tensor:
        folded = ids.int().view(-1).unsqueeze(0)
        x = self.wide(ids) + self.narrow(folded.long()).view(*ids.shape, 4)
        x = x + self.rows[kinds] + F.embedding(places + 3, torch.zeros(50, 4)) + self.rows.index_select(0, places[0])
        normed: Tensor = self.norm(self.drop(x).flatten(0, 1))
        return normed * mask.sum()


def table_inputs() -> Inputs:
    return from_specs(["int64[batch=3,seq=5]", "int64[batch,seq]", "int64[batch,seq]", "places:int64[batch,seq]"])


def test_limits_are_the_smallest_tables_that_an_input_reaches() -> None:
    # What reaches a table by arithmetic (places + 3) is not followed.
    assert integer_limits(Tables(), table_inputs()) == {0: 20, 1: 9, "places": 9}


def test_limits_of_an_exported_program() -> None:
    inputs = table_inputs()
    program = torch.export.export(Tables().eval(), inputs.args, inputs.kwargs)
    assert integer_limits(program, inputs) == {0: 20, 1: 9, "places": 9}


def test_finding_limits_leaves_no_trace() -> None:
    model = Tables().train()
    model.drop.eval()
    state, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.random.get_rng_state()
    integer_limits(model, table_inputs())
    assert model.training
    assert not model.drop.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_ids_drawn_below_their_limits_run() -> None:
    specs = ["int64[3,5]", "int64[3,5]", "int64[3,5]", "places:int64[3,5]"]
    inputs = from_specs(specs, index_limits=integer_limits(Tables(), from_specs(specs)))
    assert inputs.args[0].max() > 1
    Tables()(*inputs.args, **inputs.kwargs)


def test_inputs_that_do_not_fit_are_an_input_error() -> None:
    with pytest.raises(InputError, match="does not run on these inputs"):
        integer_limits(nn.Linear(3, 3), from_specs(["float32[2,4]"]))


# ---- files


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


X, Y = torch.arange(6.0).view(2, 3), torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("content", "args", "kwargs"),
    [
        (X, [X], {}),
        ((X, Y), [X, Y], {}),
        ([X, 3, None], [X, 3, None], {}),
        ({"ids": Y, "x": X}, [], {"ids": Y, "x": X}),
        (OrderedDict(arg1=Y, arg0=X, mask=Y), [X, Y], {"mask": Y}),
        ({"args": (X,), "kwargs": {"ids": Y}}, [X], {"ids": Y}),
        ({"args": [X]}, [X], {}),
        ({"cache": [(X, Y)]}, [], {"cache": [(X, Y)]}),
    ],
)
def test_a_torch_file_holds_inputs(content: Any, args: list[Any], kwargs: dict[str, Any], tmp_path: Path) -> None:
    inputs = from_file(saved(tmp_path / "inputs", content))
    torch.testing.assert_close(list(inputs.args), args)
    torch.testing.assert_close(inputs.kwargs, kwargs)
    assert inputs.dynamic_shapes is None


def test_a_loader_gives_examples() -> None:
    data = TensorDataset(torch.arange(50.0).view(10, 5), torch.arange(10))
    inputs = from_loader(DataLoader(data, batch_size=4))
    assert [len(each.args) for each in (inputs, *inputs.more)] == [2, 2, 2]
    assert torch.equal(inputs.args[0], data.tensors[0][:4])
    assert torch.equal(inputs.more[1].args[1], data.tensors[1][8:])


def test_of_an_endless_loader_the_first_are_taken() -> None:
    inputs = from_loader({"x": torch.full((2,), n)} for n in count())
    assert [float(each.kwargs["x"][0]) for each in (inputs, *inputs.more)] == list(range(EXAMPLES))


@pytest.mark.parametrize("loader", [[], ["text"], [3], [None]], ids=repr)
def test_a_loader_of_something_else_is_an_input_error(loader: Any) -> None:
    with pytest.raises(InputError, match="the loader gives"):
        from_loader(loader)


SCRIPT = """
import torch
from beside import SIZE

def inputs():
    return [torch.zeros(SIZE), (torch.ones(SIZE),)]

def mine():
    yield {"x": torch.full((SIZE,), 2.0)}

def broken():
    yield torch.zeros(2)
    raise KeyError("lost")

number = 3
"""


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "batches.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("SIZE = 3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        yield tmp_path / "batches.py"
    sys.modules.pop("beside", None)


def test_a_script_gives_examples(script: Path) -> None:
    first = from_script(script)
    assert [each.args[0].tolist() for each in (first, *first.more)] == [[0.0] * 3, [1.0] * 3]
    assert from_script(script, "mine").kwargs["x"].tolist() == [2.0] * 3


@pytest.mark.parametrize(
    ("name", "told"), [("broken", "KeyError: 'lost'"), ("number", "no function"), ("missing", "no function")]
)
def test_what_is_wrong_with_a_script_is_told(script: Path, name: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        from_script(script, name)
    with pytest.raises(InputError, match="there is no file"):
        from_script(script.parent / "other.py", name)


def test_what_a_user_passes_as_inputs() -> None:
    assert as_inputs(None) is None
    assert as_inputs(X) == as_inputs((X,)) == as_inputs([X]) == Inputs((X,), {})
    assert as_inputs({"x": X}) == as_inputs(None, {"x": X}) == as_inputs(Inputs((), {}), {"x": X}) == Inputs((), {"x": X})
    assert as_inputs(iter([X])) == Inputs((X,), {})
    for wrong in ("text", 3, np.zeros(2)):
        with pytest.raises(InputError, match="tuple of tensors"):
            as_inputs(wrong)


def test_numpy_and_safetensors_files_hold_inputs(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X.numpy())
    np.savez(tmp_path / "x.npz", arg0=X.numpy(), ids=Y.numpy())
    save_file({"arg0": X, "ids": Y}, tmp_path / "x.safetensors")
    assert torch.equal(from_file(tmp_path / "x.npy").args[0], X)
    for name in ("x.npz", "x.safetensors"):
        (tmp_path / name).rename(tmp_path / "any")  # by content, not by ending
        inputs = from_file(tmp_path / "any")
        assert torch.equal(inputs.args[0], X)
        assert torch.equal(inputs.kwargs["ids"], Y)


class Call:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def object_array(path: Path, command: str) -> Path:
    array = np.array([Call(command)], dtype=object)
    np.save(path, array, allow_pickle=True)
    return path.with_suffix(".npy")


def object_arrays(path: Path, command: str) -> Path:
    np.savez(path, x=np.array([Call(command)], dtype=object))
    return path.with_suffix(".npz")


@pytest.mark.parametrize("make", [object_array, object_arrays, lambda p, c: saved(p, [X, Call(c)])])
def test_nothing_in_an_input_file_is_executed(make: Callable[[Path, str], Path], tmp_path: Path) -> None:
    sentinel = tmp_path / "executed"
    path = make(tmp_path / "evil", f"touch {sentinel}")
    with pytest.raises(InputError, match="evil"):
        from_file(path)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "content",
    [nn.Linear(2, 2), {}, [], "text", 3, {"x": "text"}, {"x": {1, 2}}, {"arg1": X}, {1: X}, {"args": X, "kwargs": [3]}],
    ids=repr,
)
def test_what_is_no_input_is_an_input_error(content: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="inputs") as caught:
        from_file(saved(tmp_path / "inputs", content))
    assert caught.value.hint


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x",
        b"\x93NUMPY",
        b"PK\x03\x04",
        b"PK\x05\x06" + b"\0" * 18,
        b"\x10" + b"\0" * 7 + b'{"x": 1',
        b"<html>",
        b"\x80\x02.",
    ],
)
def test_a_damaged_file_is_an_input_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "inputs").write_bytes(content)
    with pytest.raises(InputError, match="inputs"):
        from_file(tmp_path / "inputs")


@pytest.mark.parametrize("name", ["missing", "folder"])
def test_a_file_that_is_not_there_is_an_input_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=name):
        from_file(tmp_path / name)


# ---- found on the model


class Telling(nn.Module):
    """A model that tells of its inputs as timm and transformers do."""

    def __init__(self, **told: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        for name, value in told.items():
            setattr(self, name, value)

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(num_embeddings=1000)

    def forward(self, x: Any = None, pixel_values: Any = None, **words: Any) -> Tensor:
        return self.weight


def test_a_model_of_timm_tells_its_input_size() -> None:
    inputs = found_on(Telling(pretrained_cfg={"input_size": (3, 8, 8)}))
    assert inputs is not None
    assert [(tuple(x.shape), x.dtype) for x in inputs.args] == [((2, 3, 8, 8), torch.float64)]
    assert inputs.kwargs == {}


@pytest.mark.parametrize(("size", "pixels"), [(8, (3, 8, 8)), ((8, 4), (3, 8, 4))])
def test_a_vision_model_of_transformers_tells_its_image_size(size: Any, pixels: tuple[int, ...]) -> None:
    config = SimpleNamespace(image_size=size, num_channels=3)
    inputs = found_on(Telling(config=config, main_input_name="pixel_values", dummy_inputs={"input_ids": Y}))
    assert inputs is not None
    assert inputs.kwargs["pixel_values"].shape == (2, *pixels)


def test_a_text_model_of_transformers_has_dummy_inputs() -> None:
    dummies = {"input_ids": torch.zeros(3, 50, dtype=torch.long), "attention_mask": torch.ones(3, 50)}
    inputs = found_on(Telling(config=SimpleNamespace(), main_input_name="input_ids", dummy_inputs=dummies))
    assert inputs is not None
    assert inputs.kwargs["input_ids"].shape == (3, 50)
    assert 500 < inputs.kwargs["input_ids"].max() < 1000
    assert torch.equal(inputs.kwargs["attention_mask"], torch.ones(3, 50, dtype=torch.float64))


def test_an_exported_program_has_its_example_inputs() -> None:
    program = torch.export.export(Adds(), (X, X), {"scale": X})
    inputs = found_on(program)
    assert inputs is not None
    assert torch.equal(inputs.args[0], X)
    assert list(inputs.kwargs) == ["scale"]
    assert inputs.dynamic_shapes is None
    program._example_inputs = None
    assert found_on(program) is None


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2),
        3,
        Telling(example_input_array=None),
        Telling(example_input_array="x"),
        Telling(pretrained_cfg={}),
        Telling(pretrained_cfg=None, config=None),
        Telling(config=SimpleNamespace(image_size=8), main_input_name="input_values"),
    ],
    ids=["linear", "number", "no example", "example of text", "empty", "none", "sound"],
)
def test_most_models_tell_nothing(model: object) -> None:
    assert found_on(model) is None


PIXELS = {"main_input_name": "pixel_values"}
WORDS = {"config": SimpleNamespace(), "main_input_name": "input_ids"}


@pytest.mark.parametrize(
    "told",
    [
        *({"pretrained_cfg": {"input_size": sizes}} for sizes in (("a", "b"), (-1, 3), [[1], 2], (3, 0.5), (True, 3), "abc")),
        *(PIXELS | {"config": SimpleNamespace(image_size=size)} for size in ("x", {"height": 3}, 2.5, -3, [None])),
        PIXELS | {"config": SimpleNamespace(image_size=8, num_channels="x")},
        *(WORDS | {"dummy_inputs": dummies} for dummies in ("x", 3, {"input_ids": "x"}, {3: X}, {"input_ids": Y, "y": []})),
        WORDS | {"dummy_inputs": {"input_ids": Y}, "get_input_embeddings": "x"},
        {"config": SimpleNamespace(), "main_input_name": [1], "dummy_inputs": {"input_ids": Y}},
    ],
    ids=str,
)
def test_what_can_be_no_inputs_is_none(told: dict[str, Any]) -> None:
    assert found_on(Telling(**told)) is None


def test_a_name_that_is_no_text_names_nothing() -> None:
    inputs = found_on(Telling(pretrained_cfg={"input_size": (3, 4)}, main_input_name={"a": 1}))
    assert inputs is not None
    assert inputs.args[0].shape == (2, 3, 4)


def test_a_model_cannot_ask_for_endless_inputs() -> None:
    with pytest.raises(InputError, match="INPUT_BYTES"):
        found_on(Telling(pretrained_cfg={"input_size": (10**6, 10**6)}))


class Rescaled(nn.Module):
    """Its first call divides its weights, as RWKV's does."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.scaled = nn.Embedding(9, 4), False
        self.example_input_array = torch.tensor([[1, 2]])

    def forward(self, input_ids: Tensor) -> Tensor:
        if not self.scaled:
            with torch.no_grad():
                self.table.weight.div_(2.0)
            self.scaled = True
        return self.table(input_ids)


def test_a_model_is_called_to_find_its_inputs_and_is_as_it_was() -> None:
    model = Rescaled().eval()
    before = model.table.weight.clone()
    assert inputs_for(model, None, None, None).args[0].shape == (1, 2)
    assert torch.equal(model.table.weight, before)
    assert not model.scaled


class Depends(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(int(x.sum())) if int(x.sum()) > 3 else x


def test_torch_prints_no_graph_where_it_cannot_trace(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TraceError, match="data-dependent"):
        Program.trace(Depends(), (torch.ones(5),))
    assert capfd.readouterr() == ("", "")
