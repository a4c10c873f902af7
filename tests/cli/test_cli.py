"""Transcripts of the command line: what it says, what it writes, how it leaves."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from normfuse import api
from normfuse.cli import main
from normfuse.planning.registry import ALL, codes
from normfuse.report.manual import wrapped
from normfuse.report.sites import sites_text

SPEC = "float32[batch=2,seq=3,16]"


def ask(*words: object, **env: str) -> Result:
    return CliRunner(env=env).invoke(main, [str(word) for word in words])


def answer(*words: object) -> Any:
    """The one JSON document on stdout."""
    return json.loads(ask(*words, "--json").stdout)


def encoder(*, norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True, norm_first=norm_first)
    last = nn.LayerNorm(16) if norm_first else None
    model = nn.TransformerEncoder(layer, 2, norm=last, enable_nested_tensor=False).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.2, 0.3)
    return model


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that no test writes to."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    pre, x = encoder(norm_first=True), torch.randn(2, 3, 16)
    torch.save(pre, folder / "pre.pt")
    torch.save(encoder(norm_first=False), folder / "post.pt")
    torch.save(pre.state_dict(), folder / "weights.pt")
    torch.save((x,), folder / "inputs.pt")
    torch.save(nn.Sequential(nn.Embedding(7, 16), nn.LayerNorm(16)), folder / "table.pt")
    batch = torch.export.Dim("batch", min=1, max=8)
    torch.export.save(torch.export.export(pre, (x,), dynamic_shapes=({0: batch},)), folder / "pre.pt2")
    (folder / "text.pt").write_text("not a model")
    return folder


@pytest.fixture
def pre(models: Path, tmp_path: Path) -> Path:
    """The pre-norm program in a folder of its own."""
    return Path(shutil.copy(models / "pre.pt2", tmp_path / "pre.pt2"))


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- rewrite -----------------------------------------------------------------------------------------------------------


def test_rewrite_tells_what_it_did_and_writes_beside_the_model(pre: Path) -> None:
    result = ask("rewrite", pre, "--pass", "pre_rmsnorm")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert "   5  layer_norm → rms_norm  layers.0-1.norm1-2, norm" in lines
    assert "layer_norm       5      0" in lines
    assert "rms_norm         0      5" in lines
    levels = [line.split()[:2] for line in lines[-7:-3]]
    assert levels == [["structure", "ok"], ["algebra", "ok"], ["rounding", "ok"], ["called", "ok"]]
    assert lines[-3].startswith("note: operator by operator on a CPU, torch's rms_norm is slower")
    assert lines[-1].startswith(f"wrote {pre.with_suffix('')}.rewritten.pt2 (")
    assert written(pre.parent) == ["pre.pt2", "pre.rewritten.pt2"]
    assert result.stderr == ""


def test_the_written_program_is_the_model(pre: Path) -> None:
    assert ask("rewrite", pre, "--pass", "pre_rmsnorm", "-o", pre.with_name("out.pt2")).exit_code == 0
    before, after = (torch.export.load(path).module() for path in (pre, pre.with_name("out.pt2")))
    x = torch.randn(5, 3, 16)
    torch.testing.assert_close(after(x), before(x))


def test_rewrite_as_json_with_files(pre: Path, tmp_path: Path) -> None:
    files = "--report", tmp_path / "r.json", "--plan", tmp_path / "p.json"
    data = answer("rewrite", pre, "--pass", "all", *files)
    report, plan = (json.loads((tmp_path / name).read_text()) for name in ("r.json", "p.json"))
    assert data["written"] == str(tmp_path / "pre.rewritten.pt2")
    assert data["norms"] == {"before": {"layer_norm": 5}, "after": {"rms_norm": 5}}
    assert data["evidence"]["ok"]
    assert data["model"] == str(pre)
    assert {key: data[key] for key in report} == report
    assert set(data) - set(report) == {"dry_run", "written", "drift"}
    assert set(plan) == {"normfuse_plan", "passes", "rounds", "refusals"}


def test_a_dry_run_proves_nothing_and_writes_no_model(models: Path, tmp_path: Path) -> None:
    pre = Path(shutil.copy(models / "pre.pt", tmp_path))
    words = "rewrite", pre, "--pass", "pre_rmsnorm", "--input", SPEC, "--dry-run"
    result = ask(*words)
    assert result.exit_code == 0
    assert "   5  layer_norm → rms_norm  layers.0-1.norm1-2, norm" in result.stdout.splitlines()
    assert result.stdout.splitlines()[-1] == "dry run: no model written"
    assert "not proven" in result.stdout
    assert written(tmp_path) == ["pre.pt"]
    data = answer(*words, "--plan", tmp_path / "plan.json")  # a file that is asked for is written
    assert (data["dry_run"], data["written"], data["evidence"]["level"]) == (True, None, "none")
    assert written(tmp_path) == ["plan.json", "pre.pt"]


def test_what_is_refused_is_grouped_and_explained(models: Path) -> None:
    result = ask("rewrite", models / "post.pt", "--pass", "pre_rmsnorm", "--input", SPEC)
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert "   2  NF205  layers.0-1.norm2" in lines
    assert any(line.startswith("      layers.0.norm2: its input is made of another norm's output (layers.0") for line in lines)
    assert "rewrote nothing: pre_rmsnorm" in lines
    assert lines[-1] == "nothing to rewrite; nothing written"
    assert "post.rewritten.pt2" not in written(models)


@pytest.mark.parametrize("name", ["pre_rmsnorm", "all"])
def test_strict_with_nothing_done_is_a_no(models: Path, tmp_path: Path, name: str) -> None:
    words = "rewrite", models / "post.pt", "--pass", name, "--input", SPEC, "--strict", "-o", tmp_path / "out.pt2"
    result = ask(*words, "--json")
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    assert (data["written"], data["idle_passes"]) == (None, list(ALL) if name == "all" else [name])
    assert {each["code"] for each in data["refusals"]} <= set(codes())
    assert written(tmp_path) == []


def test_a_second_run_finds_nothing_to_do(pre: Path) -> None:
    ask("rewrite", pre, "--pass", "all", "--verify", "none")
    again = ask("rewrite", pre.with_name("pre.rewritten.pt2"), "--pass", "all", "--strict")
    assert again.exit_code == 1
    assert again.stdout.splitlines()[-1] == f"--strict: {', '.join(ALL)} rewrote nothing; nothing written"


@pytest.mark.parametrize("level", ["structure", "none"])
def test_less_than_a_proof_is_said(pre: Path, level: str) -> None:
    result = ask("rewrite", pre, "--pass", "all", "--verify", level)
    assert f"not proven: the verification level is '{level}'" in result.stdout
    assert ("structure  ok" in result.stdout) == (level == "structure")
    assert "pre.rewritten.pt2" in written(pre.parent)


def test_a_failed_proof_writes_the_report_and_no_model(pre: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normfuse.proof.judging.SPREAD", 1e-9)
    monkeypatch.setattr("normfuse.proof.agreement.FLOOR", 0.0)
    words = "rewrite", pre, "--pass", "all", "--report", tmp_path / "r.json"
    result = ask(*words)
    assert result.exit_code == 1
    assert "algebra    FAILED  error" in result.stdout
    assert result.stderr.startswith("error: outputs differ by ")
    assert written(tmp_path) == ["pre.pt2", "r.json"]
    assert not json.loads((tmp_path / "r.json").read_text())["evidence"]["ok"]
    data = answer(*words)
    assert set(data) == {"error", "hint", "report"}
    assert not data["report"]["evidence"]["ok"]


def test_inputs_from_a_file_and_drawn_inside_a_table(models: Path) -> None:
    given = answer("rewrite", models / "pre.pt", "--pass", "all", "--dry-run", "--inputs", models / "inputs.pt")
    assert given["norms"]["after"] == {"rms_norm": 5}
    data = answer("inspect", models / "table.pt", "--input", "int64[batch,5]", "--seed", "3")
    assert data["norms"][0]["passes"]["pre_rmsnorm"] == "becomes rms_norm"


# -- the other commands ------------------------------------------------------------------------------------------------


def test_inspect_has_a_row_per_norm(models: Path) -> None:
    result = ask("inspect", models / "pre.pt2")
    lines = result.stdout.splitlines()
    rows = list(itertools.takewhile(str, lines[3:]))
    assert result.exit_code == 0
    assert lines[2].split() == ["norm", "kind", "axis", "eps", "mean", "seen", "by", "would", "be"]
    assert rows[0].split() == ["layers.0.norm1", "layer_norm", "2", "1e-05", "—", "rms_norm"]
    assert len(rows) == 5
    assert lines[-2:] == ["layer_norm       5      0", "rms_norm         0      5"]


def test_inspect_as_json(models: Path) -> None:
    data = answer("inspect", models / "post.pt", "--input", SPEC)
    assert set(data) == {"model", "counts", "norms"}
    assert data["counts"] == {"layer_norm": 4}
    keys = {"site", "node", "module", "source", "kind", "by_hand", "axes", "eps", "gain", "shift", "seen_by", "passes"}
    assert all(set(norm) == keys for norm in data["norms"])
    assert data["norms"][0]["passes"]["pre_rmsnorm"].startswith("refused, NF201: ")


def test_verify_yes(models: Path, pre: Path) -> None:
    ask("rewrite", pre, "--pass", "all", "--verify", "none")
    result = ask("verify", pre, pre.with_name("pre.rewritten.pt2"))
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "equivalent"


def test_verify_no(models: Path, tmp_path: Path) -> None:
    words = "verify", models / "pre.pt", models / "post.pt", "--input", SPEC, "--junit", tmp_path / "v.xml"
    result = ask(*words)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].startswith("NOT equivalent: outputs differ by ")
    suite = ElementTree.parse(tmp_path / "v.xml").getroot()
    assert int(suite.attrib["failures"]) == len(suite.findall("testcase/failure")) > 0
    assert int(suite.attrib["tests"]) == len(suite)
    data = answer(*words)
    assert set(data) == {"a", "b", "equivalent", "verdict", "because", "hint", "evidence"}
    assert (data["equivalent"], data["evidence"]["ok"]) == (False, False)


def test_export_writes_onnx_that_verifies(models: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    file = tmp_path / "table.onnx"
    given = "--input", "int64[2,5]"
    data = answer("export", models / "table.pt", "-o", file, "--opset", "18", *given)
    assert set(data) == {"model", "to", "opset", "written", "evidence"}
    assert (data["written"], data["to"], data["opset"]) == (str(file), "onnx", 18)
    assert data["evidence"]["ok"]
    assert ask("verify", models / "table.pt", file, *given).exit_code == 0


def test_export_calls_inputs_and_outputs_as_told(models: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    file = tmp_path / "table.onnx"
    words = "export", models / "table.pt", "-o", file, "--input", "int64[2,5]"
    assert ask(*words, "--input-name", "words", "--output-name", "vectors").exit_code == 0
    graph = onnx.load(file).graph
    assert ([each.name for each in graph.input], [each.name for each in graph.output]) == (["words"], ["vectors"])
    assert ask("verify", models / "table.pt", file, "--input", "int64[2,5]").exit_code == 0
    refused = ask(*words, "--input-name", "words", "--input-name", "more")
    assert refused.exit_code == 2
    assert "1 distinct names are needed" in refused.stderr


@pytest.mark.parametrize("option", [("--size", "batch=1,2,4"), ("--capability", "8.9"), ("--dry-run",)])
def test_options_of_another_target_are_refused(models: Path, tmp_path: Path, option: tuple[str, ...]) -> None:
    result = ask("export", models / "table.pt", "-o", tmp_path / "t.onnx", "--input", "int64[2,5]", *option)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {option[0]} is not for --to onnx")
    result = ask("export", models / "table.pt", "-o", tmp_path / "t.engine", "--size", "batch=1")
    assert (result.exit_code, result.stderr.splitlines()[0]) == (2, "error: cannot read the sizes 'batch=1'")


def test_verify_on_the_examples_of_a_script(models: Path, tmp_path: Path) -> None:
    script = tmp_path / "batches.py"
    script.write_text("import torch\ndef some():\n    return ([torch.full((2, 5), n)] for n in (1, 3))")
    rows = answer("verify", models / "table.pt", models / "table.pt", "--inputs", f"{script}:some")["evidence"]["algebra"]
    assert rows[0]["case"] == "as given"
    assert rows[-1]["case"] == "example 2"
    assert ask("verify", models / "table.pt", models / "table.pt", "--inputs", f"{script}:none").exit_code == 2


def test_explain_a_pass_and_a_code() -> None:
    manual = ask("explain", "pre_rmsnorm").stdout
    assert manual.startswith("pre_rmsnorm\n\nTurn LayerNorms into RMSNorms")
    assert [line for line in manual.splitlines() if line.startswith("    NF203  ")]
    assert ask("explain", "nf203").stdout.startswith("NF203  (pre_rmsnorm)\n\nThe norm is over several axes")
    assert ask("explain", "NF101").stdout.startswith("NF101  (any pass)\n")
    assert set(answer("explain", "pre_rmsnorm")) == {"pass", "summary", "manual", "codes"}
    assert answer("explain", "NF203") == {"code": "NF203", "pass": "pre_rmsnorm", "story": codes()["NF203"]}


def test_passes() -> None:
    assert re.search(r"^pre_rmsnorm +Turn LayerNorms into RMSNorms", ask("passes").stdout, re.MULTILINE)
    each = {found["name"]: found for found in answer("passes")["passes"]}
    assert set(each["pre_rmsnorm"]) == {"name", "summary", "codes"}
    assert "NF203" in each["pre_rmsnorm"]["codes"]


def test_help_and_version() -> None:
    for command in main.commands:
        result = ask(command, "--help")
        assert result.exit_code == 0
        assert result.stdout.startswith(f"Usage: normfuse {command} [OPTIONS]")
    assert "Exit codes: 0 done, 1 the answer is no" in ask("-h").stdout
    assert ask("--version").stdout.startswith("normfuse ")


# -- what cannot be asked ----------------------------------------------------------------------------------------------

WRONG = {
    "no command": ("rewrit", ["'rewrit'", "Did you mean 'rewrite'?", "hint: normfuse --help"]),
    "no option": ("rewrite pre.pt2 --pas all", ["'--pas'", "'--pass'", "hint: normfuse rewrite --help"]),
    "no pass given": ("rewrite pre.pt2", ["Missing option '--pass'"]),
    "no model given": ("rewrite --pass all", ["Missing argument 'MODEL'"]),
    "no such pass": ("rewrite pre.pt2 --pass pre_rmsnrom", ["no pass 'pre_rmsnrom'", "did you mean pre_rmsnorm"]),
    "no such level": ("rewrite pre.pt2 --pass all --verify some", ["'some'", "full"]),
    "no such file": ("rewrite nowhere/no.pt --pass all", ["cannot read nowhere/no.pt: No such file", "check the path"]),
    "no model": ("inspect text.pt", ["text.pt is a text file, not a model"]),
    "a state dict": ("inspect weights.pt", ["weights.pt is a state dict"]),
    "a folder": ("inspect .", [". is a folder, not a model file"]),
    "no inputs": ("inspect pre.pt", ["no example inputs are known for TransformerEncoder", "--input"]),
    "bad spec": ("inspect pre.pt --input float32[2,", ["input spec 'float32[2,'", "position", "hint: write [name:]dtype"]),
    "wrong shape": ("inspect pre.pt --input float32[2,3,15]", ["could not trace TransformerEncoder"]),
    "inputs twice": ("inspect pre.pt --input float32[2] --inputs inputs.pt", ["--input and --inputs"]),
    "no inputs file": ("inspect pre.pt --inputs none.pt", ["none.pt"]),
    "over the input": ("rewrite pre.pt2 --pass all -o ./pre.pt2", ["it is the input pre.pt2", "-o"]),
    "over the other input": ("verify pre.pt pre.pt2 --junit pre.pt2", ["it is the input pre.pt2"]),
    "over each other": ("rewrite pre.pt2 --pass all --plan x --report ./x", ["two outputs have the same name"]),
    "no folder": ("rewrite pre.pt2 --pass all -o missing/out.pt2", ["there is no folder", "mkdir -p"]),
    "no report folder": ("rewrite pre.pt2 --pass all --dry-run --report missing/r.json", ["there is no folder"]),
    "into a folder": ("export pre.pt2 -o .", ["it is a folder"]),
    "no such target": ("export pre.pt2 --to tflite -o x", ["'tflite'", "onnx"]),
    "no such code": ("explain NF999", ["no pass and no code 'NF999'", "did you mean NF"]),
    "no such topic": ("explain pre_rmsnom", ["did you mean pre_rmsnorm"]),
    "nothing like it": ("explain xyzzy", ["see normfuse passes"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_question_that_cannot_be_asked(name: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    before = written(models)
    command, parts = WRONG[name]
    result = ask(*command.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    error, *hints = result.stderr.splitlines()
    assert error.startswith("error: ")
    assert all(hint.startswith("hint: ") for hint in hints)
    assert len(hints) <= 1
    assert [part for part in parts if part not in result.stderr] == []
    assert written(models) == before


def test_errors_are_json_too(models: Path) -> None:
    for words in (["rewrit"], ["explain", "NF999"], ["rewrite", models / "none.pt", "--pass", "all"]):
        result = ask(*words, "--json")
        assert result.exit_code == 2
        assert set(json.loads(result.stdout)) == {"error", "hint"}
        assert result.stderr.startswith("error: ")


@pytest.mark.parametrize(("raised", "code", "said"), [
    (KeyboardInterrupt(), 130, "error: interrupted"),
    (RuntimeError("first\nsecond"), 2, "error: RuntimeError: first second\nhint: this is a bug of normfuse"),
])  # fmt: skip
def test_what_nobody_planned_is_a_line(
    raised: BaseException, code: int, said: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inspect(*_: Any, **__: Any) -> None:
        print("noise")
        raise raised

    monkeypatch.setattr(api, "inspect", inspect)
    result = ask("inspect", models / "pre.pt2", "--json")
    assert result.exit_code == code
    assert "error" in json.loads(result.stdout)
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    if code == 2:
        assert "Traceback" in ask("inspect", models / "pre.pt2", "--debug").stderr
        assert "Traceback" in ask("inspect", models / "pre.pt2", NORMFUSE_DEBUG="1").stderr


# -- terminals, pipes, processes ---------------------------------------------------------------------------------------


def test_a_report_fits_a_terminal_and_is_not_folded_in_a_pipe(models: Path) -> None:
    words = "inspect", models / "post.pt", "--input", SPEC
    terminal = click.unstyle(ask(*words, FORCE_COLOR="1", COLUMNS="80").stdout).splitlines()
    piped = ask(*words).stdout.splitlines()
    assert max(map(len, terminal[1:])) <= 80
    assert max(map(len, piped)) > 80
    assert len(piped) < len(terminal)
    assert not any(line.endswith(" ") for line in piped)


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "latin-1"}
    return subprocess.run([sys.executable, *words], env=environment, encoding="latin-1", **options)


def test_help_and_passes_import_no_model_library() -> None:
    program = (
        "import sys, contextlib\nfrom normfuse.cli import main\n"
        "for words in (['--help'], ['passes']):\n    with contextlib.suppress(SystemExit): main(words)\n"
        "print([name for name in ('timm', 'transformers', 'torchvision', 'onnx', 'onnxruntime') if name in sys.modules])"
    )
    result = run("-c", program, capture_output=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert result.stderr == ""


def test_help_does_not_wait_for_torch() -> None:
    program = (
        "import sys, contextlib\nfrom normfuse.cli import main\nfrom normfuse.cli.app import COMMANDS\n"
        "for words in ([], *([each] for each in COMMANDS)):\n"
        "    with contextlib.suppress(SystemExit): main([*words, '--help'])\n"
        "print([name for name in ('torch', 'numpy', 'networkx', 'safetensors') if name in sys.modules])"
    )
    assert run("-c", program, capture_output=True).stdout.splitlines()[-1] == "[]"


def test_a_stream_that_cannot_show_it_all_is_no_error() -> None:
    result = run("-m", "normfuse", "explain", "pre_rmsnorm", capture_output=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "\\u2190" in result.stdout  # the arrow of the formula


def test_a_reader_that_leaves_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        result = run("-m", "normfuse", "passes", stdout=writing, stderr=subprocess.PIPE)
    finally:
        os.close(writing)
    assert (result.returncode, result.stderr) == (141, "")


# -- the pieces of the rendering ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("names", "text"), [
    ([], ""),
    (["norm"], "norm"),
    (["b.0.n1", "b.0.n2", "b.1.n1", "b.1.n2", "norm"], "b.0-1.n1-2, norm"),
    (["l.0.b.0.n", "l.0.b.1.n", "l.1.b.0.n", "l.1.b.1.n", "l.2.b.5.n"], "l.0-1.b.0-1.n, l.2.b.5.n"),
    (["a.9", "a.10", "a.12", "a.1"], "a.1,9-10,12"),
    (["a.0.x", "a.0.y", "a.1.x"], "a.0-1.x, a.0.y"),
    (["same", "same"], "same"),
])  # fmt: skip
def test_names_of_sites(names: list[str], text: str) -> None:
    assert sites_text(names) == text  # type: ignore[arg-type]


def test_a_manual_is_filled_anew() -> None:
    long = " ".join(["word"] * 22)  # 109 characters
    manual = f"Title\n\nHead\n    {long}\n    end.\n\nRefuses\n    NF301  {long}\n           end.\n    NF302  short"
    narrow = list(wrapped(manual, 60))
    assert max(map(len, narrow)) <= 60
    assert list(wrapped(manual, 200))[3] == f"    {long} end."
    assert list(wrapped(manual, 200))[-2:] == [f"    NF301  {long} end.", "    NF302  short"]
