"""The command line; the only file that prints.

    exit 0    done
    exit 1    the answer is no: not equivalent, or --strict and a pass did nothing
    exit 2    the question could not be asked: a wrong option, a file that is not a model, a bug

The answer goes to stdout, as text or (--json) as exactly one JSON document; progress, warnings and errors go to stderr.
torch and everything that needs it is imported inside the commands, so that help comes at once.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import rich_click as click
from click.exceptions import Exit
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from normfuse.deadline import in_time
from normfuse.errors import InputError, NormfuseError, NormfuseWarning, VerificationFailed, did_you_mean
from normfuse.escaping import escaped, json_text
from normfuse.limits import OverLimit

if TYPE_CHECKING:
    from normfuse.inputs import Inputs
    from normfuse.proof.evidence import Evidence
    from normfuse.report import Report

YES, NO, CANNOT, INTERRUPTED, UNREAD = 0, 1, 2, 130, 141  # the last two as shells count SIGINT and SIGPIPE
PIPED_WIDTH = 100_000  # where a program reads, no line is folded or cut
HELP = {"theme": "default-slim", "text_paragraph_linebreaks": "\n\n", "padding_helptext_first_line": (0, 0, 1, 0)}
Command: TypeAlias = Callable[..., Any]


class _Commands(click.RichGroup):
    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of this file."""
        return list(self.commands)

    def main(self, args: Sequence[str] | None = None, *more: Any, **extra: Any) -> Any:
        """Ask, and leave with the exit code; whatever goes wrong becomes a line."""
        words = list(sys.argv[1:] if args is None else args)
        sys.exit(_answer(lambda: super(_Commands, self).main(words, *more, **extra | {"standalone_mode": False}), words))


def _answer(ask: Callable[[], int | None], words: Sequence[str]) -> int:
    # The words are searched: a command that cannot start has no parsed options.
    as_json, debug = "--json" in words, "--debug" in words or os.environ.get("NORMFUSE_DEBUG", "0") not in ("", "0")
    for stream in (sys.stdout, sys.stderr):  # no reason to fail: a character that the terminal cannot show
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    interrupts: list[int] = []
    try:
        with _warnings_as_lines(debug), _noting(interrupts), in_time():
            return ask() or YES
    except (KeyboardInterrupt, click.Abort):
        return _complain(INTERRUPTED, "interrupted", None, as_json)
    except click.UsageError as error:
        return _complain(CANNOT, error.format_message(), f"{error.ctx.command_path} --help" if error.ctx else None, as_json)
    except Exception as error:
        if debug:
            _trace(error)
        if interrupts:  # libraries make other errors of it, where it comes while they are imported
            return _complain(INTERRUPTED, "interrupted", None, as_json)
        if isinstance(error, NormfuseError):
            return _complain(error.exit_code, str(error), error.hint, as_json, getattr(error, "report", None))
        return _complain(CANNOT, *_foreign(error), as_json)


@contextlib.contextmanager
def _noting(interrupts: list[int]) -> Iterator[None]:
    """An interrupt is raised as ever, and noted."""

    def note(number: int, frame: Any) -> None:
        interrupts.append(number)
        signal.default_int_handler(number, frame)

    own = threading.current_thread() is threading.main_thread()
    if not own or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _trace(error: Exception) -> None:
    told = traceback.TracebackException.from_exception(error)
    if isinstance(error, NormfuseError):
        told.__notes__ = None  # type: ignore[attr-defined]  # the hint, which gets a line of its own
    for line in "".join(told.format()).split("\n"):
        print(escaped(line), file=sys.stderr)


def _foreign(error: Exception) -> tuple[str, str]:
    """What to say of an error that is not normfuse's own."""
    if isinstance(error, OverLimit):
        return str(error), error.hint
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "there is not enough memory", "nothing was written; a smaller model or smaller inputs need less"
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("normfuse"):
        package = error.name.partition(".")[0]
        return f"the package '{package}' is not installed", f"pip install {package}"
    if isinstance(error, OSError) and error.strerror:
        return (
            f"{error.strerror}{f': {error.filename}' if error.filename else ''}",
            "make room, or look at the permissions there",
        )
    hint = "this is a bug of normfuse; please report it with what the same command says with --debug"
    return f"{type(error).__name__}: {error}", hint


def _complain(code: int, error: str, hint: str | None, as_json: bool, report: Any = None) -> int:
    error = escaped(" ".join(error.split()))
    if as_json:
        _write_json({"error": error, "hint": hint} | ({"report": report.to_dict()} if report else {}))
    elif report:
        _show(*_rendered(report))
    _say("error", error, "bold red")
    if hint:
        _say("hint", hint, "bold")
    return code


@contextlib.contextmanager
def _warnings_as_lines(debug: bool) -> Iterator[None]:
    """Our own warnings, a line each; those of libraries are for us, not for our users."""
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", NormfuseWarning)
            warnings.showwarning = lambda message, *_, **__: _say("warning", str(message), "bold yellow")
        yield


# -- what the commands share -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """How a model file is to be loaded and what it is to be called with, as the options say."""

    specs: tuple[str, ...]
    file: str | None
    seed: int
    trust_pickle: bool

    @property
    def path(self) -> str | None:
        """The file of inputs itself, without the function that is named in it."""
        script = SCRIPT.fullmatch(self.file or "")
        return script["path"] if script else self.file

    def inputs(self, model: str) -> Inputs | None:
        """The inputs that the user gave; None leaves it to the model to know them."""
        from normfuse import inputs

        if self.specs and self.file:
            raise InputError("--input and --inputs were both given", hint="give the inputs in one way")
        if self.file or not self.specs:
            if script := SCRIPT.fullmatch(self.file or ""):
                return inputs.from_script(script["path"], script["name"] or "inputs")
            return inputs.from_file(self.file) if self.file else None
        drawn = inputs.from_specs(self.specs, seed=self.seed)
        if all(each.is_floating_point() for each in (*drawn.args, *drawn.kwargs.values())):
            return drawn
        from normfuse.loading import load
        from normfuse.verification import is_exported

        if is_exported(model):
            return drawn
        limits = inputs.integer_limits(load(model, trust_pickle=self.trust_pickle), drawn)
        return inputs.from_specs(self.specs, seed=self.seed, index_limits=limits)


SPEC_HELP = (
    'An example input, such as "float32[batch,3,224,224]" or "ids:int64[batch=4,seq=16:1-512]"; a name in place of a size '
    "is a dynamic dim. Give it once for every input, or not at all where the model file tells of its inputs."
)

FILE_HELP = (
    "Example inputs from a .pt, .npy, .npz or .safetensors file; or FILE.py:NAME of your own, which is run: NAME() gives one "
    "example after the other, as a DataLoader does."
)
SCRIPT = re.compile(r"(?P<path>.*\.py)(?::(?P<name>\w+))?")


def _with_source(command: Command) -> Command:
    """Add the options that make a `Source`."""

    @click.option("--input", "specs", multiple=True, metavar="SPEC", help=SPEC_HELP)
    @click.option("--inputs", "file", metavar="FILE", help=FILE_HELP)
    @click.option("--seed", default=0, metavar="N", show_default=True, help="Seed of the inputs that --input draws.")
    @click.option("--trust-pickle", is_flag=True, help="Let the file run whatever code it contains on this machine.")
    @functools.wraps(command)
    def with_source(*, specs: tuple[str, ...], file: str | None, seed: int, trust_pickle: bool, **rest: Any) -> Any:
        return command(source=Source(specs, file, seed, trust_pickle), **rest)

    return with_source


def _with_answer(command: Command) -> Command:
    """Add the options of every command."""
    command = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks, as does NORMFUSE_DEBUG=1.")(
        command
    )
    return click.option("--json", "as_json", is_flag=True, help="Answer with one JSON document, errors included.")(command)


def _known_passes(_: click.Context, __: click.Parameter, names: tuple[str, ...]) -> str | list[str]:
    from normfuse.registry import passes

    for name in names:
        if name != "all" and name not in passes():
            raise InputError(f"there is no pass '{name}'", hint=did_you_mean(name, [*passes(), "all"], "see normfuse passes"))
    return "all" if "all" in names else list(dict.fromkeys(names))


def _check_writable(targets: Iterable[str | Path | None], sources: Iterable[str | None]) -> None:
    """Fail now rather than after minutes of proof: do all that `write_atomically` does, short of putting a file there."""
    from normfuse.atomic import is_stream, write_atomically

    class Writable(Exception):
        """Stops the write where only the content is missing."""

    def probe(temporary: Path) -> None:
        temporary.touch()
        raise Writable

    kept, asked = ([Path(each) for each in paths if each] for paths in (sources, targets))
    if not all(each.exists() for each in kept):
        return  # whoever reads it has a better message
    for target in asked:
        with contextlib.suppress(Writable):
            write_atomically(target, probe, never_over=kept)
    files = [os.path.realpath(each) for each in asked if not is_stream(each)]
    if len(set(files)) < len(files):
        raise InputError("two outputs have the same name", hint="give each its own")


def _write_file(path: str | None, text: str) -> None:
    from normfuse.atomic import write_atomically

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")

    if path:
        write_atomically(Path(path), write)


# -- the commands ------------------------------------------------------------------------------------------------------


@click.group(cls=_Commands, name="normfuse", context_settings={"help_option_names": ["-h", "--help"]})
@click.rich_config(HELP)
@click.version_option(package_name="normfuse", message="normfuse %(version)s")
def main() -> None:
    """Rewrite the normalization layers of trained PyTorch models, exactly, and prove it.

    A MODEL is a file of torch.save(module) or torch.export.save(program).

    Exit codes: 0 done, 1 the answer is no, 2 the question could not be asked.
    """


# fmt: off
@main.command()
@click.argument("model")
@click.option("--pass", "passes", multiple=True, required=True, metavar="NAME", callback=_known_passes,
              help="A pass to run, or all; may be given again. See normfuse passes.")
@click.option("-o", "--output", metavar="OUT.pt2", help="Where to write. [default=beside MODEL, MODEL's stem + .rewritten.pt2]")
@click.option("--mode", type=click.Choice(["deploy", "live"]), default="deploy", show_default=True, metavar="MODE",
              help="deploy evaluates the new weights; live writes a program to train, which keeps MODEL's own parameters and "
                   "computes the new weights from them at every call.")
@click.option("--dry-run", is_flag=True, help="Plan and print only: no model is written and nothing is proven.")
@click.option("--strict", is_flag=True,
              help="If a pass rewrote nothing (with all: if no pass rewrote anything), write no model and exit 1.")
@click.option("--verify", type=click.Choice(["full", "structure", "none"]), default="full", show_default=True, metavar="LEVEL",
              help="What to prove: full runs both models in float64 and in their own dtype, structure runs nothing, or none.")
@click.option("--allow", type=click.Choice(["exact", "rounding", "approximate"]), default="rounding", show_default=True,
              metavar="CLAIM", help="The weakest claim that a rewrite may make: exact, rounding or approximate.")
@click.option("--keep-unread", is_flag=True,
              help="Keep tensors that the result does not read, such as those of a folded norm.")
@click.option("--report", metavar="FILE", help="Write the report as JSON: what was rewritten, refused and proven.")
@click.option("--plan", metavar="FILE", help="Write the plan as JSON: the edits, with the formula of every new weight.")
@click.option("--locked", metavar="FILE",
              help="A plan that --plan wrote: if this model would be rewritten differently, write nothing and exit 1.")
@_with_source
@_with_answer
def rewrite(model: str, passes: Any, output: str | None, mode: str, dry_run: bool, strict: bool, verify: str, allow: str,
            keep_unread: bool, report: str | None, plan: str | None, locked: str | None, source: Source, as_json: bool) -> int:
    # fmt: on
    """Rewrite the norms of MODEL, prove that its outputs stay the same, and write the result.

    The result is a torch.export program, which torch.export.load opens without normfuse. It is written only if there was
    something to rewrite, and it is proven first.
    """
    started, written = time.perf_counter(), None
    target = Path(output) if output else Path(model).parent / f"{Path(model).stem}.rewritten.pt2"
    _check_writable((None if dry_run else target, report, plan), (model, source.path, locked))
    with _working("loading and tracing") as progress:
        from normfuse import api
        from normfuse.locking import drift, read_lock

        lock = read_lock(locked) if locked else None

        try:
            result = api.rewrite(
                model, passes, source.inputs(model), mode=mode, verify="none" if dry_run else verify, allow=allow,
                trust_pickle=source.trust_pickle, keep_unread=keep_unread, progress=progress,
            )  # fmt: skip
        except VerificationFailed as failure:
            _write_file(report, failure.report.to_json())
            raise
        drifted = drift(lock, result.report.plan) if lock else []
        code, ending = _outcome(result.report, passes == "all", strict, dry_run, drifted)
        if not ending:
            written = str(result.save(target))
            ending = _wrote(written, started)
        _write_file(report, result.report.to_json())
        _write_file(plan, result.report.plan.to_json())
    data = {**result.report.to_dict(), "dry_run": dry_run, "written": written, "drift": drifted}
    return _tell(as_json, data, *result.report.render(), "", Text(ending, "bold")) or code


def _outcome(report: Report, everything: bool, strict: bool, dry_run: bool, drifted: list[str]) -> tuple[int, str]:
    """The exit code, and why no model is to be written (empty if it is)."""
    done = any(report.plan.rewrites)
    if drifted:
        return NO, "\n".join(["--locked: the plan is another one; nothing written", *escaped(drifted)])
    if strict and report.idle_passes and not (everything and done):
        return NO, f"--strict: {', '.join(report.idle_passes)} rewrote nothing; nothing written"
    if not done:
        return YES, "nothing to rewrite; nothing written"
    return YES, "dry run: no model written" if dry_run else ""


def _wrote(target: str, started: float) -> str:
    return escaped(f"wrote {target} ({Path(target).stat().st_size / 1e6:.1f} MB) in {time.perf_counter() - started:.1f} s")


@main.command()
@click.argument("model")
@_with_source
@_with_answer
def inspect(model: str, source: Source, as_json: bool) -> int:
    """List every norm of MODEL: its kind, who sees the mean of its input, and what each pass would do with it."""
    with _working("loading and tracing"):
        from normfuse import api

        inspection = api.inspect(model, source.inputs(model), trust_pickle=source.trust_pickle)
    return _tell(as_json, inspection.to_dict(), *inspection.render())


@main.command()
@click.argument("a")
@click.argument("b")
@click.option("--junit", metavar="FILE", help="Write the cases as JUnit XML.")
@click.option("--html", metavar="FILE", help="Write the evidence as a page.")
@click.option("--bisect", "bisects", is_flag=True, help="If they differ, find the first node where two programs part.")
@_with_source
@_with_answer
def verify(a: str, b: str, junit: str | None, html: str | None, bisects: bool, source: Source, as_json: bool) -> int:
    """Compare the models A and B on ordinary and on hostile inputs; exit 1 if they are not the same function.

    Exit 2 if nothing was compared, as where all outputs are NaN: that is neither a yes nor a no.

    Each may be a model file, an .onnx file, OpenVINO's .xml, an ExecuTorch .pte, a TensorRT engine or an AOTInductor package,
    and runs in its own runtime. Their weights may be rounded differently.
    """
    _check_writable([junit, html], (a, b, source.path))
    with _working("loading and tracing") as progress:
        from normfuse import report, verification

        given = source.inputs(next((each for each in (a, b) if not verification.is_exported(each)), a))
        evidence = verification.verify(a, b, given, trust_pickle=source.trust_pickle, progress=progress)
        parting = None
        if bisects and evidence.verdict == "disproven":
            parting = verification.bisect(a, b, given, trust_pickle=source.trust_pickle)
        because = None if evidence.ok else evidence.complaint()
        ending = _answered(evidence)
        parts = [escaped(str(parting))] if parting else []
        lines = [*_rendered(evidence), report.differences_table(evidence.differences), "", *parts]
        _write_file(junit, report.junit(evidence, f"normfuse verify {a} {b}"))
        _write_file(html, report.html([*lines, ending], f"normfuse verify {a} {b}"))
    data = {"a": a, "b": b, "equivalent": evidence.ok, "verdict": evidence.verdict, "because": because}
    data |= {"hint": evidence.missing.hint if evidence.missing else None, "evidence": evidence.to_dict()}
    data |= {"parts_at": parting.to_dict() if parting else None} if bisects else {}
    return _tell(as_json, data, *lines, ending) or {"proven": YES, "disproven": NO, "not compared": CANNOT}[evidence.verdict]


def _answered(evidence: Evidence) -> Text:
    """The last line of `verify`."""
    if evidence.ok:
        return Text("equivalent", "bold green")
    if evidence.missing and evidence.verdict == "not compared":
        said = f": {escaped(evidence.missing.reason)}\nhint: {escaped(evidence.missing.hint)}"
        return Text.assemble(("NOT COMPARED", "bold yellow"), said)
    return Text(escaped(f"NOT equivalent: {evidence.complaint()}"), "bold red")


ONLY = {
    "dry_run": ("--dry-run", "tensorrt"),
    "capabilities": ("--capability", "tensorrt"),
    "sizes": ("--size", "tensorrt"),
    "input_names": ("--input-name", "onnx"),
    "output_names": ("--output-name", "onnx"),
}
"""Argument of an exporter -> the option that gives it, and the target that it is for."""


def _sizes(text: str) -> tuple[str, tuple[int, ...]]:
    match = re.fullmatch(r"(\w+)=(\d+),(\d+),(\d+)", text)
    if match is None:
        raise InputError(f"cannot read the sizes '{text}'", hint="write DIM=SMALLEST,USUAL,LARGEST, such as batch=1,8,64")
    name, *sizes = match.groups()
    return name, tuple(map(int, sizes))


# fmt: off
@main.command()
@click.argument("model")
@click.option("--to", "target", type=click.Choice(["onnx", "tensorrt", "openvino", "executorch", "aoti"]), metavar="TARGET",
              help="onnx, tensorrt, openvino, executorch or aoti. [default=by how OUT ends: .onnx, .engine, .xml, .pte]")
@click.option("-o", "--output", required=True, metavar="OUT", help="The file to write.")
@click.option("--opset", default=20, show_default=True, metavar="N", help="Version of ONNX's standard operators.")
@click.option("--capability", "capabilities", multiple=True, metavar="X.Y",
              help="With tensorrt: a GPU generation to build for ahead of time, such as 8.9; may be given again.")
@click.option("--size", "sizes", multiple=True, metavar="DIM=A,B,C",
              help="With tensorrt: smallest, usual and largest size of a dynamic dim, such as batch=1,8,64; for every dim.")
@click.option("--input-name", "input_names", multiple=True, metavar="NAME",
              help="With onnx: what the file calls its inputs, given once for each, in order.")
@click.option("--output-name", "output_names", multiple=True, metavar="NAME", help="With onnx: the same for its outputs.")
@click.option("--dry-run", is_flag=True, help="With tensorrt: say of every operator whether TensorRT takes it; write nothing.")
@_with_source
@_with_answer
def export(model: str, target: str | None, output: str, opset: int, dry_run: bool, source: Source, as_json: bool,
           sizes: tuple[str, ...], **options: tuple[str, ...]) -> int:
    # fmt: on
    """Write MODEL for a runtime, run it there, and compare; a file that computes something else is removed."""
    started = time.perf_counter()
    _check_writable([None if dry_run else output], (model, source.path))
    with _working("exporting"):
        from normfuse import exporting

        target, example = exporting.target_of(target, output), source.inputs(model)
        further: dict[str, Any] = {name: given for name, given in options.items() if given}
        further |= {"sizes": dict(map(_sizes, sizes))} if sizes else {}
        if strange := [ONLY[name][0] for name in (*further, *(["dry_run"] if dry_run else [])) if ONLY[name][1] != target]:
            raise InputError(f"{strange[0]} is not for --to {target}", hint="normfuse export --help says what it is for")
        if dry_run:
            nodes = exporting.supported(model, opset=opset, inputs=example, trust_pickle=source.trust_pickle)
            refused = [str(each) for each in nodes if not each.supported]
            ending = f"TensorRT takes {len(nodes) - len(refused)} of {len(nodes)} operators"
            data: dict[str, Any] = {"model": model, "to": target, "operators": len(nodes), "refused": refused}
            return _tell(as_json, data, *escaped(refused), Text(ending, "bold")) or (NO if refused else YES)
        evidence = exporting.export(model, output, to=target, opset=opset, inputs=example, trust_pickle=source.trust_pickle,
                                    **further)  # fmt: skip
    data = {"model": model, "to": target, "opset": opset, "written": output, "evidence": evidence.to_dict()}
    return _tell(as_json, data, *_rendered(evidence), "", Text(_wrote(output, started), "bold"))


@main.command()
@click.argument("topic", metavar="PASS|CODE")
@_with_answer
def explain(topic: str, as_json: bool) -> int:
    """Tell what a pass does and when it refuses, or what a refusal's code means."""
    from normfuse.registry import codes, passes
    from normfuse.report import wrapped

    code = topic.upper()
    if found := passes().get(topic):
        data: dict[str, Any] = {"pass": topic, "summary": found.summary, "manual": found.manual, "codes": found.codes}
        text = f"{topic}\n\n{found.manual}"
    elif code in codes():
        owner = next((name for name, each in passes().items() if code in each.codes), None)
        data = {"code": code, "pass": owner, "story": codes()[code]}
        text = f"{code}  ({owner or 'any pass'})\n\n{codes()[code]}"
    else:
        hint = did_you_mean(topic, [*passes(), *codes()], "see normfuse passes")
        raise InputError(f"there is no pass and no code '{topic}'", hint=hint)
    return _tell(as_json, data, Text("\n".join(wrapped(text, min(Console().width, 120)))))


@main.command()
@_with_answer
def passes(as_json: bool) -> int:
    """List the passes."""
    from normfuse.registry import passes
    from normfuse.report import plain_table

    table = plain_table("pass", "what it does")
    for each in passes().values():
        table.add_row(Text(each.name, "bold"), Text(each.summary))
    data = [{"name": each.name, "summary": each.summary, "codes": list(each.codes)} for each in passes().values()]
    return _tell(as_json, {"passes": data}, table)


# -- printing ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _working(what: str, doing: str = "proving: ") -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar on a terminal's stderr; what models and libraries print meanwhile goes to stderr as well."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=False)
    with contextlib.redirect_stdout(sys.stderr), bar:
        task = bar.add_task(what, total=None)
        yield lambda case, done, total: bar.update(task, description=escaped(f"{doing}{case}"), completed=done, total=total)


def _tell(as_json: bool, data: Any, *parts: RenderableType) -> int:
    if as_json:
        _write_json(data)
    else:
        _show(*parts)
    return YES


def _rendered(answer: Any) -> Iterable[RenderableType]:
    from normfuse.report import evidence_lines

    return answer.render() if hasattr(answer, "render") else evidence_lines(answer)


def _show(*parts: RenderableType) -> None:
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    with console.capture() as caught:
        for part in parts:
            console.print(part)
    _write("\n".join(line.rstrip() for line in caught.get().splitlines()))


def _write_json(data: Any) -> None:
    _write(json_text(data))


def _write(text: str) -> None:
    try:
        click.echo(text)
    except OSError as error:
        _give_up(sys.stdout)
        if isinstance(error, BrokenPipeError):  # the reader, such as head, has enough
            raise Exit(UNREAD) from None
        raise InputError(f"cannot write the answer: {error.strerror}", hint="make room where the output goes") from error


def _say(kind: str, text: str, style: str) -> None:
    line = Text.assemble((f"{kind}:", style), f" {escaped(text)}")
    try:
        Console(stderr=True, soft_wrap=True, highlight=False, emoji=False).print(line)
    except (OSError, SystemExit):  # nobody reads what goes wrong either; rich would leave with a code of its own
        _give_up(sys.stderr)


def _give_up(stream: Any) -> None:
    """Nothing more is written there, nor shall the interpreter complain at its last flush."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


from normfuse import cli_strip  # noqa: E402, F401 - more commands
