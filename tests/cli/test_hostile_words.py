"""Whatever a file or a command line says: one line of plain text, an exit code, and nothing that the terminal acts on."""

from __future__ import annotations

import html
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import normfuse
from normfuse.cli import main
from normfuse.errors import (
    CannotApply,
    InputError,
    MissingExtra,
    NormfuseError,
    NormfuseWarning,
    TraceError,
    VerificationFailed,
)
from normfuse.escaping import escaped, json_text
from normfuse.proof.evidence import Agreement, Evidence, Verdict
from normfuse.report.html import html as page
from normfuse.report.junit import junit
from normfuse.sources.inputs import Inputs
from tests.kills import killed_at_moments
from tests.zoo.spread import spread

SPEC = "--input", "float32[2,4]"
WRITABLE = "a\x1b]0;title\x07\x1b[2J\t\x7f\x9b\u202e\u2066\u2028[red]x[/red][link=file:]y[/link]:smile:<script>&"
NASTY = (
    "a\x1b]0;title\x07\x1b[2J\nok: b\r\t\x00\x7f\x9b\u202e\u2066\u2028\ud800[red]x[/red][link=file:///]y[/link]:smile:<script>&"
)


def ask(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def harmless(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose modules, and whose file, are called things."""
    folder = tmp_path_factory.mktemp("nasty")
    model = spread(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)))
    model._modules = OrderedDict(zip(("first", WRITABLE, "last"), model._modules.values(), strict=True))
    torch.save(model, folder / "m\x1b[2J[red].pt")
    return folder / "m\x1b[2J[red].pt"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "m.pt"
    torch.save(spread(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))), path)
    return path


# -- names from files --------------------------------------------------------------------------------------------------


def test_the_escape_is_what_python_writes() -> None:
    assert escaped("a\nb\x1b\u202e\ud800\x9b") == r"a\nb\x1b\u202e\ud800\x9b"
    assert escaped("naïve → σ 漢字 [red]") == "naïve → σ 漢字 [red]"
    assert escaped({"a\n": [("b\n", 3, None)]}) == {r"a\n": [(r"b\n", 3, None)]}
    assert escaped(Inputs(("x\n",), {})).args == (r"x\n",)


@pytest.mark.parametrize("words", [("inspect",), ("rewrite", "--pass", "all", "--dry-run")])
def test_names_are_shown_and_do_nothing(words: tuple[str, ...], nasty: Path) -> None:
    command, *more = words
    result = ask(command, nasty, *more, *SPEC)
    assert result.exit_code in (0, 2)
    assert harmless(result.stdout)
    assert harmless(result.stderr)
    assert r"\x1b" in result.stdout + result.stderr
    if result.exit_code == 0:
        assert "[red]" in result.stdout


@pytest.mark.parametrize("name", ['training"); RUN; ("', 'training")\n    RUN\n    ("', "a\\", "a\0", "a\nb", "a\r    RUN"])
@pytest.mark.parametrize("where", ["module", "parameter", "buffer", "attribute"])
def test_a_name_that_goes_on_as_code_is_refused(name: str, where: str, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    name = name.replace("RUN", f"open('{mark}', 'w')").replace(".", "")
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    holders: dict[str, Any] = {
        "module": model._modules, "parameter": model[0]._parameters, "buffer": model[0]._buffers, "attribute": vars(model[0]),
    }  # fmt: skip
    holders[where][name] = nn.Identity() if where == "module" else nn.Parameter(torch.ones(4))
    with pytest.raises(TraceError, match="cannot be the name") as caught:
        normfuse.rewrite(model.eval(), "all", (torch.randn(2, 4),))
    assert str(caught.value).isprintable()
    torch.save(model, tmp_path / "m.pt")
    result = ask("inspect", tmp_path / "m.pt", *SPEC)
    assert result.exit_code == 2
    assert "this is a bug" not in result.stderr
    assert not mark.exists()


def test_json_keeps_names_and_parses(nasty: Path) -> None:
    result = ask("inspect", nasty, *SPEC, "--json")
    assert result.stdout.isascii()
    assert harmless(result.stdout)
    json.loads(result.stdout, parse_constant=lambda name: pytest.fail(name))


def test_json_has_no_numbers_of_its_own() -> None:
    told = json_text({"eps": float("inf"), "\ud800": [float("nan"), (1.5, "\ud800")], "σ": {1: torch.Size([2])}})
    assert told.isascii()
    data = json.loads(told, parse_constant=lambda name: pytest.fail(name))
    assert data == {"eps": None, r"\ud800": [None, [1.5, r"\ud800"]], "σ": {"1": [2]}}


def test_an_eps_of_infinity_is_told(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, eps=float("inf"))), tmp_path / "m.pt")
    result = ask("inspect", tmp_path / "m.pt", *SPEC, "--json")
    assert result.exit_code in (0, 2)
    json.loads(result.stdout, parse_constant=lambda name: pytest.fail(name))


def evidence() -> Evidence:
    row = Agreement(NASTY, float("nan"), 1.0, Verdict.DISPROVEN, 4, 4)
    return Evidence(algebra=(row,), notes=(NASTY,), runtimes=(NASTY,))


def test_junit_always_parses() -> None:
    text = junit(evidence(), NASTY)
    suite = ElementTree.fromstring(text)
    assert harmless(text)
    assert suite.attrib["name"] == escaped(NASTY)
    assert [case.attrib["name"] for case in suite] == [escaped(NASTY)]


def test_a_page_shows_names() -> None:
    from normfuse.report.evidence_text import evidence_lines

    text = page(evidence_lines(evidence()), NASTY)
    assert harmless(text)
    text.encode()
    assert "<script>" not in text
    assert "[red]x[/red]" in re.sub(r"\s*\n", "", html.unescape(re.sub("<[^>]*>", "", text)))


@pytest.mark.parametrize("given", [("verify", "--junit"), ("verify", "--html")])
def test_files_of_verify_are_harmless(given: tuple[str, str], nasty: Path, tmp_path: Path) -> None:
    command, option = given
    ask(command, nasty, nasty, *SPEC, option, tmp_path / "out")
    text = (tmp_path / "out").read_text(encoding="utf-8")
    assert harmless(text)
    if option == "--junit":
        ElementTree.fromstring(text)


def test_keys_of_a_checkpoint_are_shown(tmp_path: Path) -> None:
    torch.save({NASTY.replace("\ud800", ""): 1}, tmp_path / "dict.pt")
    result = ask("inspect", tmp_path / "dict.pt")
    assert result.exit_code == 2
    assert harmless(result.stderr)
    assert len(result.stderr.splitlines()) == 2


def test_a_traceback_shows_names_too(tmp_path: Path) -> None:
    result = ask("inspect", tmp_path / "no\x1b[2J.pt", "--debug")
    assert "Traceback" in result.stderr
    assert harmless(result.stderr)
    assert result.stderr.count("hint: ") == 1


# -- errors in Python --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        NormfuseError(NASTY, hint=NASTY),
        InputError(NASTY, hint=NASTY),
        CannotApply([NASTY], hint=NASTY),
        VerificationFailed(NASTY, hint=NASTY),
        MissingExtra(NASTY, NASTY),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_one_line_with_its_hint_as_a_note(error: NormfuseError) -> None:
    assert str(error).isprintable()
    assert error.hint is not None
    assert error.hint.isprintable()
    assert error.__notes__ == [f"hint: {error.hint}"]


def test_an_error_without_a_hint_has_no_note() -> None:
    assert not hasattr(NormfuseError("x"), "__notes__")
    assert str(NormfuseWarning(NASTY)).isprintable()


@pytest.mark.parametrize(
    ("options", "near"),
    [
        ({"passes": "pre_rmsnrom"}, "pre_rmsnorm"),
        ({"passes": ["fold_afine"]}, "fold_affine"),
        ({"mode": "deplyo"}, "deploy"),
        ({"verify": "ful"}, "full"),
        ({"allow": "aproximate"}, "approximate"),
    ],
)
def test_python_suggests_what_was_meant(options: dict[str, Any], near: str) -> None:
    with pytest.raises(InputError, match="there is no") as caught:
        normfuse.rewrite(nn.Linear(4, 4), **{"passes": "all", "inputs": (torch.ones(2, 4),)} | options)
    assert f"did you mean {near}" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("options", "near"), [({"to": "onxx"}, "onnx"), ({"input_nams": ["x"]}, "input_names"), ({"to": "tensort"}, "tensorrt")]
)
def test_python_suggests_options_of_targets(options: dict[str, Any], near: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no") as caught:
        normfuse.export(nn.Linear(4, 4), tmp_path / "x.onnx", inputs=(torch.ones(2, 4),), **options)
    assert f"did you mean {near}" in str(caught.value.hint)


# -- command lines -----------------------------------------------------------------------------------------------------

BAD = {
    "an ending of nobody's": ("export {m} -o {d}/n.bin", "is a .onnx file, not n.bin"),
    "no ending": ("export {m} -o {d}/n", "is a .onnx file, not n"),
    "another ending": ("export {m} --to onnx -o {d}/n.xml", "is a .onnx file, not n.xml"),
    "a name that is not UTF-8": ("export {m} -o {d}/n\udce9.onnx", "is not UTF-8"),
    "an exported file of such a name": ("verify {m} {d}/n\udce9.onnx", "there is no file"),
    "a model of such a name": ("inspect {d}/n\udce9.pt", "cannot read"),
    "a folder for a model": ("inspect {d}", "is a folder"),
    "a folder for a report": ("rewrite {m} --pass all --report {d}", "it is a folder"),
    "a folder for a lock": ("rewrite {m} --pass all --locked {d}", "not a regular file"),
    "an endless lock": ("rewrite {m} --pass all --locked /dev/zero", "not a regular file"),
    "a report where nothing is": ("rewrite {m} --pass all --report {d}/no/r.json", "there is no folder"),
    "no path": ("rewrite {m} --pass all -o {d}/a\0b", "it is no path"),
    "a long name": ("rewrite {m} --pass all -o {d}/" + "x" * 300, "name too long"),
    "no pass": ("rewrite {m} --pass pre_rmsnrom", "there is no pass"),
    "no dtype": ("inspect {m} --input flo[2]", "unknown dtype"),
    "no dims": ("inspect {m} --input float32[2,-1]", "expected"),
    "sizes that do not fit": ("inspect {m} --input float32[2,5]", "error: "),
    "a full device": ("rewrite {m} --pass all -o /dev/full", "No space left"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_question_is_a_line(name: str, model: Path, tmp_path: Path) -> None:
    command, said = BAD[name]
    words = [word.format(m=model, d=tmp_path) for word in command.split(" ")]
    result = ask(*words, *(() if "--input" in words else SPEC))
    error, *hints = result.stderr.splitlines()
    assert result.exit_code == 2
    assert said in error
    assert error.startswith("error: ")
    assert len(hints) <= 1
    assert "this is a bug" not in result.stderr
    assert harmless(result.stderr)
    assert not list(tmp_path.iterdir())


def run(*words: object, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "normfuse", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_nobody_reads_what_is_said() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "normfuse", "inspect", "/no/such/file"]
    done = subprocess.run(command, stdout=writer, stderr=writer)
    os.close(writer)
    assert done.returncode == 2
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([*command[:3], "passes"], stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 2)
    assert b"No space left on device" in done.stderr


SLOW = """
def inputs():
    open(__file__ + ".asked", "w").close()
    time.sleep(60)
"""


def test_an_interrupt_is_a_line(model: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    script = tmp_path_factory.mktemp("inputs") / "slow.py"
    script.write_text(f"import time\n{SLOW}")
    # what a shell starts in the background ignores interrupts, and so would what the tests start there
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    asked = run("rewrite", model, "--pass", "all", "--inputs", script, "-o", tmp_path / "out.pt2", preexec_fn=heard)
    while not script.with_name("slow.py.asked").exists():
        assert asked.poll() is None
        time.sleep(0.05)
    asked.send_signal(signal.SIGINT)
    _, told = asked.communicate()
    assert asked.returncode == 130
    assert not list(tmp_path.iterdir())
    assert told.strip().splitlines()[-1] == b"error: interrupted"


# -- kills -------------------------------------------------------------------------------------------------------------


def killed(model: Path, folder: Path, words: tuple[object, ...], moments: int) -> int:
    """Kill a command at moments; whatever it leaves beside its output is gone after the next run."""
    out = folder / "out.pt2"

    def prepare() -> None:
        out.write_bytes(b"old")

    def check() -> None:
        assert out.read_bytes() == b"old" or torch.export.load(out)
        normfuse.sources.atomic.write_atomically(out, lambda path: (path.write_bytes(b"next"), None)[1])
        assert [path.name for path in folder.iterdir()] == ["out.pt2"]

    return killed_at_moments((*words, "-o", out), moments, prepare=prepare, check=check)[0]


def test_a_killed_run_leaves_old_or_new(model: Path, tmp_path: Path) -> None:
    assert killed(model, tmp_path, ("rewrite", model, "--pass", "pre_rmsnorm", *SPEC), 3) >= 1


@pytest.mark.slow
def test_a_run_killed_at_many_moments_leaves_old_or_new(model: Path, tmp_path: Path) -> None:
    assert killed(model, tmp_path, ("rewrite", model, "--pass", "all", *SPEC), 200) >= 100


@dataclass
class Unknown:
    a: torch.Tensor


class Wrapped(nn.LayerNorm):
    def forward(self, input: torch.Tensor) -> Any:
        return Unknown(super().forward(input))


@pytest.mark.parametrize(
    ("build", "hint"),
    [
        (lambda: Wrapped(4), "register_dataclass"),
        (lambda: nn.Sequential(nn.LazyLinear(4), nn.LayerNorm(4)), "lazy layers"),
        (lambda: nn.LayerNorm(4, device="meta"), "meta device"),
    ],
    ids=["dataclass", "lazy", "meta"],
)
def test_what_cannot_be_traced_says_what_to_do(build: Any, hint: str) -> None:
    with pytest.raises(NormfuseError) as caught:
        normfuse.rewrite(build(), "all", (torch.randn(2, 4),))
    assert hint in f"{caught.value} {caught.value.hint}"
