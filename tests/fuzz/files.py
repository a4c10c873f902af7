"""Files of every kind that normfuse reads: a small good one of each, hostile ones made by hand, mutations of all of them."""

from __future__ import annotations

import functools
import importlib
import io
import json
import operator
import os
import pickle
import pickletools
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from tests.fuzz.worker import STRANGER

SPEC = ("--input", "float32[2,4]")
CONTROL = "\x1b]0;title\x07\x1b[2J\u202e"
NUMBERS: tuple[Any, ...] = (0, -1, 1, 2**31, 2**63, 10**400, -(10**18), 1e308, float("nan"), float("inf"), True, None)
WORDS: tuple[Any, ...] = ("", CONTROL, "../../x", "9**9**9", "__import__('os')", "a" * 70000, "aten.save", [], {}, [[]] * 9)


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: for reports.
        ending: of its files.
        words: the command that reads a file, given its path and the good model's.
        made: writes a good one.
    """

    name: str
    ending: str
    words: Callable[[str, str], list[str]]
    made: Callable[[Path, Path], Any]


def good_model() -> nn.Sequential:
    """A model with something for every pass."""
    torch.manual_seed(0)
    layers = (nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.RMSNorm(4), nn.Linear(4, 3))
    return nn.Sequential(*layers).eval()


def _program(dynamic: bool) -> Any:
    sizes = ({0: torch.export.Dim("batch")},) if dynamic else None
    return torch.export.export(good_model(), (torch.randn(2, 4),), dynamic_shapes=sizes)


def _onnx(path: Path, good: Path) -> None:
    from normfuse.exporters import onnx
    from normfuse.graph.program import Program

    onnx.export(Program.trace(good_model(), (torch.randn(2, 4),)), path)


def _plan(path: Path, good: Path) -> None:
    from normfuse.graph.program import Program
    from normfuse.planning.planner import plan

    chosen = plan(Program.trace(good_model(), (torch.randn(2, 4),)), ["pre_rmsnorm", "fold_affine", "conv_bn"])
    path.write_text(chosen.to_json())


def _calibration(path: Path, good: Path) -> None:
    from normfuse.sources.inputs import Inputs
    from normfuse.stripping import calibration

    calibration.calibrate(good, [Inputs((torch.randn(8, 4),), {})]).save(str(path))


def _inspected(path: str, good: str) -> list[str]:
    return ["inspect", path, *SPEC]


def _alone(path: str, good: str) -> list[str]:
    return ["inspect", path]


def _legacy(path: Path) -> None:
    torch.save(good_model(), path, _use_new_zipfile_serialization=False)


def _given(path: str, good: str) -> list[str]:
    return ["inspect", good, "--inputs", path]


KINDS = (
    Kind("module", ".pt", _inspected, lambda path, good: torch.save(good_model(), path)),
    Kind("legacy module", ".pt", _inspected, lambda path, good: _legacy(path)),
    Kind("state dict", ".pt", _inspected, lambda path, good: torch.save(good_model().state_dict(), path)),
    Kind("program", ".pt2", _alone, lambda path, good: torch.export.save(_program(False), path)),
    Kind("dynamic program", ".pt2", _alone, lambda path, good: torch.export.save(_program(True), path)),
    Kind("safetensors", ".safetensors", _inspected, lambda path, good: save_file(good_model().state_dict(), path)),
    Kind("ONNX file", ".onnx", lambda path, good: ["verify", good, path, *SPEC], _onnx),
    Kind("inputs .pt", ".pt", _given, lambda path, good: torch.save({"arg0": torch.randn(2, 4)}, path)),
    Kind("inputs .npy", ".npy", _given, lambda path, good: np.save(path, np.ones((2, 4), np.float32))),
    Kind("inputs .npz", ".npz", _given, lambda path, good: np.savez_compressed(path, arg0=np.ones((2, 4), np.float32))),
    Kind("inputs .safetensors", ".safetensors", _given, lambda path, good: save_file({"arg0": torch.randn(2, 4)}, path)),
    Kind(
        "lock",
        ".json",
        lambda path, good: ["rewrite", good, "--pass", "pre_rmsnorm", "--pass", "fold_affine", "--pass", "conv_bn", "--dry-run",
                            "--locked", path, *SPEC],
        _plan,
    ),
    Kind(
        "calibration",
        ".json",
        lambda path, good: ["strip", good, "--calibration", path, "--data", str(Path(good).with_name("data.pt")),
                            "--max-loss-increase", "0.1", "-o", str(Path(path).with_suffix(".out.pt2"))],
        _calibration,
    ),
)  # fmt: skip


# -- made by hand ------------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def callables(bait: Path) -> list[tuple[Any, ...]]:
    """Functions that act, with arguments that show it, and functions of allowed packages."""
    target = str(bait / "written")
    acting: list[tuple[Any, ...]] = [(os.system, f"touch {target}"), (os.mkdir, target + ".d"), (open, target, "w")]
    acting += [(importlib.import_module, STRANGER), (exec, f"import {STRANGER}"), (eval, "9**9**9"), (torch.save, 1, target)]
    acting += [(np.save, target, np.ones(2)), (Path.touch, Path(target)), (torch.load, target), (io.FileIO, target, "w")]
    acting += [(operator.methodcaller("touch"), Path(target)), (functools.partial(os.system, f"touch {target}"),)]
    acting += [(nn.Module.__call__, nn.Linear(2, 2), torch.ones(1)), (getattr, os, "system"), (pickle.loads, b"cos\nsystem\n")]
    acting += [(torch.zeros, 2**40), (bytearray, 2**36), (range, 10**18), (pow, 10, 10**8), (list, range(10**9))]
    acting += [
        (torch.hub.download_url_to_file, "http://localhost:9", target),
        (np.fromfile, target),
        (torch.from_file, target, True, 9),
    ]
    names = [name for name in dir(nn.functional) if name.islower() and not name.startswith("_")]
    acting += [(getattr(nn.functional, name), Path(target), "w") for name in names if callable(getattr(nn.functional, name))]
    return acting


def places(call: Any) -> list[Any]:
    """Objects to save that hold a call where a file may have something."""
    module = good_model()
    attribute, forward, hook, child, parameter, name = (good_model() for _ in range(6))
    attribute.__dict__["note"] = call
    forward.__dict__["forward"] = call
    hook._forward_pre_hooks = OrderedDict({0: call})
    child._modules["x"] = call
    parameter[0]._parameters["weight"] = call
    name._modules = OrderedDict(zip([CONTROL, *"abcde"], module._modules.values(), strict=True))
    return [call, {"weight": call}, {CONTROL: call}, [call], attribute, forward, hook, child, parameter, name]


def hand_made(rng: random.Random, path: Path, bait: Path) -> None:
    """A pickle with a call of any function in any place."""
    function, *arguments = rng.choice(callables(bait))
    thing = rng.choice(places(Call(function, *arguments)))
    try:
        torch.save(thing, path, _use_new_zipfile_serialization=rng.random() < 0.7)
    except Exception:  # not everything can be pickled
        torch.save(Call(os.system, f"touch {bait / 'written'}"), path)


# -- mutations ---------------------------------------------------------------------------------------------------------


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes that are flipped, cut, doubled, zeroed or put elsewhere."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 40))):
        if not out:
            break
        start = rng.randrange(len(out))
        end = min(len(out), start + rng.choice((1, 4, 16, 200)))
        kind = rng.randrange(7)
        if kind == 0:
            out[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[start] = rng.randrange(256)
        elif kind == 2:
            del out[start:end]
        elif kind == 3:
            out[start:start] = out[start:end]
        elif kind == 4:
            out[start:end] = bytes(end - start)
        elif kind == 5:
            out[start:end] = rng.choice((b"\xff", b"\x7f")) * (end - start)
        elif rng.random() < 0.3:
            del out[start:]
    return bytes(out)


def mutated_zip(rng: random.Random, data: bytes) -> bytes:
    """An archive whose records are changed, swapped, dropped, doubled or renamed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = [(each.filename, archive.read(each)) for each in archive.infolist()]
    place = rng.randrange(len(records))
    name, content = records[place]
    kind = rng.randrange(7)
    if kind <= 2:
        records[place] = (name, mutated_content(rng, name, content))
    elif kind == 3:
        other = rng.randrange(len(records))
        records[place], records[other] = (name, records[other][1]), (records[other][0], content)
    elif kind == 4:
        records.pop(place)
    elif kind == 5:
        records.append((name, mutated_bytes(rng, content)))
    else:
        records[place] = (rng.choice(("../x", "/x", CONTROL, name.upper(), name.partition("/")[2] or "y", "x" * 300)), content)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for each, held in records:
            archive.writestr(each, held)
    return out.getvalue()


def mutated_content(rng: random.Random, name: str, content: bytes) -> bytes:
    """A record of an archive, changed by what it is."""
    if name.endswith(".json"):
        return mutated_json(rng, content)
    if name.endswith(".pkl"):
        return mutated_pickle(rng, content)
    return mutated_bytes(rng, content)


GLOBALS = ("os system", "posix system", "builtins eval", "builtins exec", "builtins getattr", "torch save", "torch load",
           f"{STRANGER} touch", "functools partial", "torch.nn.functional softmax", "collections OrderedDict", "numpy save",
           "torch.nn.modules.linear Linear", "torch.storage UntypedStorage", "torch.jit load", "subprocess Popen")  # fmt: skip


def mutated_pickle(rng: random.Random, data: bytes) -> bytes:
    """A pickle with another global, another number, or operations dropped, doubled, exchanged or put in."""
    try:
        marks = [(code.name, argument, start) for code, argument, start in pickletools.genops(data)]
    except Exception:
        return mutated_bytes(rng, data)
    ends = [start for *_, start in marks[1:]] + [len(data)]
    parts = [data[start:end] for (_, _, start), end in zip(marks, ends, strict=True)]
    place = rng.randrange(len(parts))
    kind = rng.randrange(6)
    if kind <= 1 and (globals_ := [i for i, (name, _, _) in enumerate(marks) if name in ("GLOBAL", "STACK_GLOBAL")]):
        module, name = rng.choice(GLOBALS).split()
        parts[rng.choice(globals_)] = f"c{module}\n{name}\n".encode()
    elif kind == 2 and (numbers := [i for i, (name, _, _) in enumerate(marks) if "INT" in name]):
        parts[rng.choice(numbers)] = pickle.dumps(rng.choice(NUMBERS), 2)[2:-1]
    elif kind == 3:
        parts.insert(place, rng.choice((b"R", b"b", b"\x81", b"o", b"(", b"t", b"}", b"]", b"N", b"Q", b"0", b"2", b"u", b"e")))
    elif kind == 4:
        parts.pop(place)
    else:
        other = rng.randrange(len(parts))
        parts[place], parts[other] = parts[other], parts[place]
    return b"".join(parts)


def mutated_json(rng: random.Random, data: bytes) -> bytes:
    """A document with another value, key, type or depth somewhere."""
    try:
        document = json.loads(data)
    except ValueError:
        return mutated_bytes(rng, data)
    for _ in range(rng.choice((1, 1, 3))):
        holders = _holders(document)
        if not holders:
            break
        holder = rng.choice(holders)
        key: Any = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        kind = rng.randrange(5)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(("x", CONTROL, "__class__"))] = holder.pop(key)
        elif kind == 2:
            holder[key] = [holder[key]] * rng.choice((2, 1000))
        else:
            holder[key] = rng.choice((*NUMBERS, *WORDS))
    text = json.dumps(document)
    if rng.random() < 0.05:
        text = "[" * 100_000 + text
    return text.encode()


def _holders(document: Any) -> list[Any]:
    found, todo = [], [document]
    while todo:
        each = todo.pop()
        if isinstance(each, (dict, list)) and each:
            found.append(each)
            todo += each.values() if isinstance(each, dict) else each
    return found


SPECS = ("float32[2,4]", "x:int64[batch=4,seq=16:1-512]", "ids:int64[batch,4]", "float16[2,4]", "bool[2]", "float32[]")


def mutated_spec(rng: random.Random) -> str:
    """What might be written behind ``--input``."""
    text = rng.choice(SPECS)
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(text) + 1)
        put = rng.choice((CONTROL, "9" * 30, "[", "]", ",", ":", "=", "-1", "0", "é", " ", "**", "99999999999", "1-"))
        text = text[:place] + put + text[place + rng.randrange(3) :]
    return text.replace("\0", "")


@dataclass
class Corpus:
    """Good files in a folder, and what is made of them.

    Attributes:
        folder: where they are.
        bait: where hostile files try to write.
    """

    folder: Path
    bait: Path

    def __post_init__(self) -> None:
        strangers = self.bait.parent / "strangers"
        for each in (self.folder, self.bait, strangers):
            each.mkdir(parents=True, exist_ok=True)
        (strangers / f"{STRANGER}.py").write_text("def touch(*_): pass\n")
        self.good = self.folder / "good.pt"
        torch.save(good_model(), self.good)
        torch.save({"arg0": torch.randn(8, 4), "targets": torch.randint(3, (8,))}, self.folder / "data.pt")
        self.contents: dict[str, bytes] = {}
        for place, kind in enumerate(KINDS):
            path = self.folder / f"kind{place}{kind.ending}"
            kind.made(path, self.good)
            self.contents[kind.name] = path.read_bytes()

    def warm(self) -> list[list[str]]:
        """The commands on good files."""
        return [kind.words(str(self.folder / f"kind{place}{kind.ending}"), str(self.good)) for place, kind in enumerate(KINDS)]

    def drawn(self, seed: int) -> tuple[str, list[str], Path | None]:
        """The kind, the command and the file of a seed."""
        rng = random.Random(seed)
        if rng.random() < 0.05:
            return "spec", ["inspect", str(self.good), "--input", mutated_spec(rng)], None
        kind = rng.choice(KINDS)
        path = self.folder / f"case{kind.ending}"
        if kind.ending == ".pt" and rng.random() < 0.5:
            hand_made(rng, path, self.bait)
        else:
            path.write_bytes(self.mutated(rng, kind))
        return kind.name, kind.words(str(path), str(self.good)), path

    def mutated(self, rng: random.Random, kind: Kind) -> bytes:
        """A mutation of the good file of a kind."""
        data = self.contents[kind.name]
        if kind.ending == ".json":
            return mutated_json(rng, data) if rng.random() < 0.8 else mutated_bytes(rng, data)
        if data[:2] == b"PK" and rng.random() < 0.7:
            return mutated_zip(rng, data)
        if kind.name == "legacy module" and rng.random() < 0.5:
            return mutated_pickle(rng, data)
        if kind.ending == ".safetensors" and rng.random() < 0.5:
            return _mutated_header(rng, data)
        return mutated_bytes(rng, data)


def _mutated_header(rng: random.Random, data: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header = mutated_json(rng, data[8 : 8 + size])
    return len(header).to_bytes(8, "little") + header + data[8 + size :]
