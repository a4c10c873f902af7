"""Exported programs and inputs files that would take endless time or memory, or that torch answers with a page."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from normfuse import limits
from normfuse.errors import InputError, TraceError
from normfuse.graph.program import Program
from normfuse.limits import OverLimit
from normfuse.sources import archive
from normfuse.sources.input_files import from_file
from normfuse.sources.loading import load
from normfuse.sources.specs import from_specs
from tests.sources.test_hostile_pickles import doubled, refusal, saved
from tests.sources.test_loading import LEAF, Call, graph_of, in_program, in_record, tampered, tree, with_record

Edit = Callable[[dict[str, bytes]], None]


def size(text: str) -> Edit:
    """A program whose input has a size of this text."""
    value = {"as_expr": {"expr_str": text, "hint": {"as_int": 3}}}
    return in_program(lambda program: graph_of(program)["tensor_values"]["input"]["sizes"].__setitem__(0, value))


def guard(text: str) -> Edit:
    return in_program(lambda program: program.update(guards_code=[text]))


ENDLESS = {
    "9**9**9": "EXPRESSION_BITS",
    "Integer(10)**(10**9)": "EXPRESSION_BITS",
    "Pow(Integer(10), Integer(1000000000))": "EXPRESSION_BITS",
    "Pow(Pow(Pow(Integer(9), Integer(99)), Integer(99)), Integer(99))": "EXPRESSION_BITS",
    "PowByNatural(9, Pow(9, 9))": "EXPRESSION_BITS",
    "FloatPow(9.0, 9e99)": "EXPRESSION_BITS",
    "Pow(2, Symbol('s77'))": "EXPRESSION_BITS",
    "2**s77": "EXPRESSION_BITS",
    "1 << (1 << 40)": "EXPRESSION_BITS",
    "LShift(1, 1000000000000)": "EXPRESSION_BITS",
    "Pow(Add(s77, s78, s79, s80, s81), 99)": "EXPRESSION_BITS",
    "*".join(["(s77 + 1)"] * 40): "EXPRESSION_BITS",
    "9" * 400: "EXPRESSION_BITS",
    "1e400 ** 2**99": "EXPRESSION_BITS",
    "s77" + " + s77" * 5_000: "EXPRESSION_CHARS",
    "Max(" * 155 + "s77" + ")" * 155: "EXPRESSION_DEPTH",
    "-" * 190 + "s77": "EXPRESSION_DEPTH",
}


@pytest.mark.parametrize("text", list(ENDLESS), ids=lambda text: text[:30])
@pytest.mark.parametrize("where", [size, guard])
def test_arithmetic_that_would_not_end_is_refused(where: Callable[[str], Edit], text: str, tmp_path: Path) -> None:
    told = refusal(tampered(tmp_path / "evil.pt2", where(text)))
    assert f"the limit {ENDLESS[text]} is" in told or "wants" in told  # a guard has no Pow at all


@pytest.mark.parametrize("text", ["factorial(10**9)", "(10**9)!", "9 .__pow__(9)", "9*" * 9_000 + "9", "(" * 9_000])
def test_what_is_no_arithmetic_is_refused(text: str, tmp_path: Path) -> None:
    refusal(tampered(tmp_path / "evil.pt2", size(text)))


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s77', integer=True, positive=True)",
        "Add(Mul(Integer(-1), Symbol('s77', integer=True)), Integer(9223372036854775806))",
        "Mul(Integer(3), Integer(224), Integer(224), Pow(Symbol('s77'), Integer(2)))",
        "FloorDiv(Add(Symbol('s1'), Integer(-1)), Integer(2))",
        "Pow(Integer(2), Integer(-1))",
        "Mul(Rational(1, 2), Symbol('s1'))",
        "s77**2 + 2*s78 - (s1//16)*16",
        "Mod(s1*s2*s3*s4, 8)",
        "Max(1, Min(s77, 9223372036854775807))",
        "L['x'].size()[0]",
    ],
)
def test_honest_sizes_are_far_from_the_bounds(text: str) -> None:
    names = archive._SIZE_NAMES | archive._GUARD_NAMES
    assert archive._is_expression(text, names, archive._GUARD_METHODS)


def test_bounds_of_sizes_can_be_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OverLimit):
        archive._is_expression("s77**40", archive._SIZE_NAMES, frozenset())
    monkeypatch.setattr(limits, "EXPRESSION_BITS", 2_000)
    assert archive._is_expression("s77**40", archive._SIZE_NAMES, frozenset())


def payload(change: Callable[[dict[str, Any]], None]) -> Edit:
    def inside(config: dict[str, Any]) -> None:
        change(config["config"]["0.weight"]["tensor_meta"])

    return in_record("data/weights/model_weights_config.json", inside)


WEIGHTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "sizes": lambda meta: meta.update(sizes=[{"as_int": 10**9}, {"as_int": 4}]),
    "offset": lambda meta: meta.update(storage_offset={"as_int": 10**9}),
    "strides": lambda meta: meta.update(strides=[{"as_int": 10**12}, {"as_int": 1}]),
    "expanded": lambda meta: meta.update(sizes=[{"as_int": 10**9}] * 2, strides=[{"as_int": 0}] * 2),
    "negative": lambda meta: meta.update(sizes=[{"as_int": -1}, {"as_int": 4}]),
    "symbolic": lambda meta: meta.update(sizes=[{"as_expr": {"expr_str": "s77"}}, {"as_int": 4}]),
}


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_a_weight_is_as_large_as_what_is_stored_of_it(name: str, tmp_path: Path) -> None:
    refusal(tampered(tmp_path / "evil.pt2", payload(WEIGHTS[name])))


def nothing_stored(records: dict[str, bytes]) -> None:
    payload(WEIGHTS["sizes"])(records)
    records["data/weights/weight_0"] = b""


ODD: dict[str, tuple[Edit, str]] = {
    "nothing stored": (nothing_stored, "beyond its storage"),
    "newer schema": (in_program(lambda p: p["schema_version"].update(major=9)), "schema 9"),
    "a schema of text": (in_program(lambda p: p["schema_version"].update(major="\x1b[2J")), "schema"),
    "no schema": (in_program(lambda p: p.pop("schema_version")), "cannot be read"),
    "newer archive": (with_record("archive_version", b"99"), "version 99"),
    "no nodes": (in_program(lambda p: graph_of(p).pop("nodes")), "cannot be read"),
    "unknown input": (in_program(lambda p: graph_of(p)["inputs"].pop()), "cannot be read"),
    "deep": (with_record("models/model.json", b"[" * 200_000 + b"]" * 200_000), "cannot be read"),
    "a program of text": (with_record("models/model.json", b'"text"'), "cannot be read"),
    "digits": (with_record("models/model.json", b"9" * 100_000), "cannot be read"),
    "not a number": (with_record("models/model.json", b"NaN"), "cannot be read"),
    "two programs": (with_record("models/second.json", b"{}"), "cannot be read"),
}


@pytest.mark.parametrize("name", list(ODD))
def test_what_torch_answers_with_a_page_is_a_line(name: str, tmp_path: Path) -> None:
    edit, told = ODD[name]
    assert told in refusal(tampered(tmp_path / "odd.pt2", edit))


def test_example_inputs_are_judged_as_a_model_is(tmp_path: Path) -> None:
    for value, told in ((Call(exec, "1"), "builtins.exec"), (doubled(40, lambda v: [v, v], []), "OCCURRENCES")):
        buffer = io.BytesIO()
        torch.save(((value,), {}), buffer)
        path = tampered(tmp_path / "evil.pt2", with_record("data/sample_inputs/model.pt", buffer.getvalue()))
        assert told in refusal(path)


def test_example_inputs_are_kept(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    torch.export.save(torch.export.export(nn.Linear(4, 3), (x,)), tmp_path / "m.pt2")
    program: Any = load(tmp_path / "m.pt2")
    assert torch.equal(program.example_inputs[0][0], x)
    assert program.example_inputs[1] == {}


def test_an_archive_with_two_roots_is_a_line(tmp_path: Path) -> None:
    saved(tmp_path / "m.pt", nn.Linear(2, 2))
    with zipfile.ZipFile(tmp_path / "m.pt") as old, zipfile.ZipFile(tmp_path / "two.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
            new.writestr(f"other/{name.partition('/')[2]}", old.read(name))
    refusal(tmp_path / "two.pt")


# ---- inputs


@pytest.mark.parametrize("specs", [["float32[999999999999999999]"], ["int8[100000,1000000]"], ["float32[99999,9999]"] * 3])
def test_inputs_of_exabytes_are_refused_before_they_are_drawn(specs: list[str]) -> None:
    with pytest.raises(InputError, match="the limit INPUT_BYTES is") as caught:
        from_specs(specs)
    assert "NORMFUSE_LIMIT_INPUT_BYTES" in (caught.value.hint or "")


def input_refusal(path: Path) -> str:
    begin = time.monotonic()
    with pytest.raises(InputError) as caught:
        from_file(path)
    assert time.monotonic() - begin < 10
    assert str(caught.value).isprintable()
    return str(caught.value)


def header(shape: str) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(2, np.float32))
    assert b"(2,), }" + b" " * (len(shape) - 4) in buffer.getvalue()
    return buffer.getvalue().replace(b"(2,), }" + b" " * (len(shape) - 4), shape.encode() + b", }", 1)


def test_arrays_are_as_large_as_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = header("(99999999999,)")
    (tmp_path / "x.npy").write_bytes(claims)
    input_refusal(tmp_path / "x.npy")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archived:
        archived.writestr("x.npy", claims)
    input_refusal(tmp_path / "x.npz")
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros(40 << 20, np.float32))
    assert "INFLATION" in input_refusal(tmp_path / "bomb.npz")
    np.savez(tmp_path / "large.npz", x=np.zeros(1 << 10))
    np.save(tmp_path / "large.npy", np.zeros(1 << 10))
    monkeypatch.setattr(limits, "INPUT_BYTES", 1 << 10)
    assert "INPUT_BYTES" in input_refusal(tmp_path / "large.npz")
    assert "INPUT_BYTES" in input_refusal(tmp_path / "large.npy")


@pytest.mark.parametrize("array", [np.float32(3), np.zeros((0, 3)), np.asfortranarray(np.arange(6.0).reshape(2, 3))])
def test_honest_arrays_are_read(array: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", arg0=array)
    for name in ("x.npy", "x.npz"):
        assert torch.equal(from_file(tmp_path / name).args[0], torch.tensor(array))


NO_DATA: dict[str, object] = {
    "call": Call(print, "x"),
    "module": nn.Linear(2, 2),
    "class": {"x": nn.ReLU},
    "function": [torch.nn.functional.gelu],
    "object": {"\x1b[2J": object},
    "shared": doubled(40, lambda v: [v, v], 1),
}


@pytest.mark.parametrize("name", list(NO_DATA))
def test_inputs_files_hold_data_only(name: str, tmp_path: Path) -> None:
    input_refusal(saved(tmp_path / "x.pt", NO_DATA[name]))


def test_inputs_that_hold_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{}], object), allow_pickle=True)
    np.savez(tmp_path / "x.npz", x=np.array([{}], object))
    input_refusal(tmp_path / "x.npy")
    input_refusal(tmp_path / "x.npz")


def test_a_pipe_is_no_inputs_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "regular file" in input_refusal(tmp_path / "pipe")


# ---- without torch


def test_without_torch_the_command_says_so(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0] == 'torch': raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
        "sys.meta_path.insert(0, Without())\n"
        "from normfuse.cli import main\n"
        "sys.argv = ['normfuse', *sys.argv[1:]]\n"
        "main()\n"
    )
    torch.save(nn.Linear(2, 2), tmp_path / "m.pt")
    for words in (["inspect", str(tmp_path / "m.pt")], ["--help"], ["passes"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr
        assert "bug" not in done.stderr
        if words == ["inspect", str(tmp_path / "m.pt")]:
            assert done.returncode == 2
            assert "pip install torch" in done.stderr


# ---- what running a program takes


def calls(*nodes: tuple[str, dict[str, Any]]) -> Edit:
    """A program with more calls, whose results are named m0, m1, …; the last is one more output."""

    def change(program: dict[str, Any]) -> None:
        graph, signature = graph_of(program), program["graph_module"]["signature"]
        made = []
        for at, (target, arguments) in enumerate(nodes):
            tensor = target.startswith("torch.ops.")
            result = {"as_tensor": {"name": f"m{at}"}} if tensor else {"as_sym_int": {"as_name": f"m{at}"}}
            inputs = [{"name": name if tensor else "", "arg": argument, "kind": 1} for name, argument in arguments.items()]
            node = {"target": target, "inputs": inputs, "outputs": [result], "metadata": {}}
            made.append(node | {"is_hop_single_tensor_return": None})
            kind, known = ("tensor", graph["tensor_values"]["p_0_bias"]) if tensor else ("sym_int", {"as_int": 3})
            graph[f"{kind}_values"][f"m{at}"] = known
        graph["nodes"][:0] = made
        graph["outputs"].append(result)
        signature["output_specs"].append({"user_output": {"arg": result}})
        entry = program["graph_module"]["module_call_graph"][0]["signature"]
        entry["out_spec"] = json.dumps([1, tree("builtins.tuple", "null", LEAF, LEAF)])

    return in_program(change)


def number(value: int) -> dict[str, Any]:
    return {"as_int": value}


def made(at: int) -> dict[str, Any]:
    return {"as_sym_int": {"as_name": f"m{at}"}}


def doubling(count: int, start: str) -> Edit:
    tensors = [[{"name": start}] * 2, *([{"name": f"m{at}"}] * 2 for at in range(count))]
    return calls(*(("torch.ops.aten.cat.default", {"tensors": {"as_tensors": each}}) for each in tensors))


MULTIPLIED = ("_operator.mul", {"a": number(2**62), "b": number(2**62)})
ENDLESS_NUMBERS: dict[str, Edit] = {
    "a power": calls(("_operator.pow", {"a": number(7), "b": number(10**9)})),
    "a power of a number that is computed": calls(
        ("torch.sym_max", {"a": number(7), "b": number(9)}), ("_operator.pow", {"a": made(0), "b": made(0)})
    ),
    "a shift": calls(("_operator.lshift", {"a": number(1), "b": number(10**12)})),
    "squares": calls(MULTIPLIED, *(("_operator.mul", {"a": made(at), "b": made(at)}) for at in range(40))),
    "squares of a largest one": calls(
        MULTIPLIED,
        *(("_operator.mul" if at % 2 else "torch.sym_max", {"a": made(at), "b": made(at)}) for at in range(40)),
    ),
}


@pytest.mark.parametrize("name", list(ENDLESS_NUMBERS))
def test_numbers_of_a_program_have_an_end(name: str, tmp_path: Path) -> None:
    assert "EXPRESSION_BITS" in refusal(tampered(tmp_path / "evil.pt2", ENDLESS_NUMBERS[name]))


def test_arithmetic_is_of_numbers(tmp_path: Path) -> None:
    repeated = calls(("_operator.mul", {"a": {"as_ints": [1]}, "b": number(10**12)}))
    assert "what is no number" in refusal(tampered(tmp_path / "evil.pt2", repeated))


@pytest.mark.parametrize("name", ["factorial", "comb", "perm", "prod", "pow"])
def test_arithmetic_has_no_factorials(name: str, tmp_path: Path) -> None:
    evil = calls((f"math.{name}", {"a": number(10**9)}))
    assert f"math.{name}" in refusal(tampered(tmp_path / "evil.pt2", evil))


ACTING = {
    "warn": {"message": {"as_string": "text"}},
    "_print": {"s": {"as_string": "text"}},
    "save": {"item": number(1), "filename": {"as_string": "file"}},
    "manual_seed": {"seed": number(1)},
    "set_grad_enabled": {"val": {"as_bool": True}},
    "ljust": {"self": {"as_string": "text"}, "width": number(10**12)},
    "seed": {},
    "backward": {"self": {"as_tensor": {"name": "p_0_bias"}}},
}


@pytest.mark.parametrize("name", list(ACTING))
def test_operators_only_compute(name: str, tmp_path: Path) -> None:
    evil = calls((f"torch.ops.aten.{name}.default", ACTING[name]))
    assert f"wants torch.ops.aten.{name}.default" in refusal(tampered(tmp_path / "evil.pt2", evil))


FULL = ("torch.ops.aten.full.default", {"size": {"as_ints": [10**11]}, "fill_value": {"as_float": 1.0}})


@pytest.mark.parametrize("edit", [doubling(36, "p_0_bias"), calls(FULL)], ids=["joined", "filled"])
def test_a_value_that_fills_the_memory_is_never_made(edit: Edit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = load(tampered(tmp_path / "evil.pt2", edit))
    with pytest.raises(TraceError, match="the limit VALUE_BYTES is") as caught:
        Program.from_exported(program)  # type: ignore[arg-type]
    assert "NORMFUSE_LIMIT_VALUE_BYTES=" in (caught.value.hint or "")
    monkeypatch.setattr(limits, "VALUE_BYTES", 1 << 50)
    Program.from_exported(program)  # type: ignore[arg-type]


def test_an_honest_program_of_sizes_is_read(tmp_path: Path) -> None:
    class Sizes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            half = (x.shape[0] * x.shape[1] + 1) // 2
            return x.reshape(-1)[: half**2 - half**2 + half] * (half + 1)

    dims = ({0: torch.export.Dim("rows", min=2), 1: torch.export.Dim("columns", min=2)},)
    torch.export.save(torch.export.export(Sizes(), (torch.ones(3, 4),), dynamic_shapes=dims), tmp_path / "sizes.pt2")
    loaded = load(tmp_path / "sizes.pt2").module()  # type: ignore[operator]
    assert torch.equal(loaded(torch.ones(5, 3)), torch.full((8,), 9.0))
