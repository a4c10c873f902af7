"""The command line; the only file that prints.

    exit 0    done
    exit 1    the answer is no: not equivalent, or --strict and a pass did nothing
    exit 2    the question could not be asked: a wrong option, a file that is not a model, a bug

The answer goes to stdout, as text or (--json) as exactly one JSON document; progress, warnings and errors go to stderr.
torch and everything that needs it is imported inside the commands, so that help comes at once.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import os
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import rich_click as click
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from normfuse.errors import InputError, NormfuseError, NormfuseWarning, VerificationFailed

if TYPE_CHECKING:
    from normfuse.api import Result
    from normfuse.inputs import Inputs

NO, CANNOT, INTERRUPTED, UNREAD = 1, 2, 130, 141  # the last two as shells count SIGINT and SIGPIPE
PIPED_WIDTH = 100_000  # no line of a table is folded or cut where a program reads it
Command: TypeAlias = Callable[..., Any]


class _Commands(click.RichGroup):
    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> Any:
        """Ask, and leave with the exit code; whatever goes wrong becomes one line."""
        words = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False
        sys.exit(_answer(lambda: super(_Commands, self).main(words, prog_name, **extra), words))


def _answer(ask: Callable[[], int | None], words: Sequence[str]) -> int:
    as_json = "--json" in words
    debug = "--debug" in words or os.environ.get("NORMFUSE_DEBUG", "0") not in ("", "0")
    for stream in (sys.stdout, sys.stderr):  # a path or a "→" that the terminal cannot show is no reason to fail
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        with _warnings_as_lines(debug):
            return ask() or 0
    except (KeyboardInterrupt, click.Abort):
        return _refuse(INTERRUPTED, "interrupted", None, as_json)
    except click.ClickException as error:
        usage = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "normfuse"
        return _refuse(CANNOT, error.format_message(), f"{usage} --help", as_json)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if not isinstance(error, NormfuseError):
            hint = "this is a bug of normfuse; please report it with what the same command says with --debug"
            return _refuse(CANNOT, f"{type(error).__name__}: {error}", hint, as_json)
        return _refuse(error.exit_code, str(error), error.hint, as_json, getattr(error, "report", None))


def _refuse(code: int, error: str, hint: str | None, as_json: bool, report: Any = None) -> int:
    error = " ".join(error.split())
    if as_json:
        _write(json.dumps({"error": error, "hint": hint} | ({"report": report.to_dict()} if report else {}), indent=2))
    elif report:
        _show(*_rendered(report))
    _say("error", error, "bold red")
    if hint:
        _say("hint", hint, "bold")
    return code


@contextlib.contextmanager
def _warnings_as_lines(debug: bool) -> Iterator[None]:
    """Our own warnings, a line each; the libraries' are for us, not for our users."""
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", NormfuseWarning)
            warnings.showwarning = lambda message, *_, **__: _say("warning", str(message), "bold yellow")
        yield


# -- what all commands share -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """How a model file is to be loaded and what it is to be called with, as the options say."""

    specs: tuple[str, ...]
    file: str | None
    seed: int
    trust_pickle: bool

    def inputs(self, model: str) -> Inputs | None:
        """The inputs that the user gave; None leaves it to the model to know them."""
        from normfuse import inputs

        if self.specs and self.file:
            raise InputError("--input and --inputs were both given", hint="give the inputs in one way")
        if self.file:
            return inputs.from_file(self.file)
        if not self.specs:
            return None
        drawn = inputs.from_specs(self.specs, seed=self.seed)
        if all(each.is_floating_point() for each in (*drawn.args, *drawn.kwargs.values())):
            return drawn
        from normfuse.loading import load

        limits = inputs.integer_limits(load(model, trust_pickle=self.trust_pickle), drawn)
        return inputs.from_specs(self.specs, seed=self.seed, index_limits=limits)


def _with_source(command: Command) -> Command:
    """The options that make a `Source`."""

    @functools.wraps(command)
    def packed(*, specs: tuple[str, ...], file: str | None, seed: int, trust_pickle: bool, **rest: Any) -> Any:
        return command(source=Source(specs, file, seed, trust_pickle), **rest)

    return _options(
        click.option(
            "--input", "specs", multiple=True, metavar="SPEC",
            help='An example input, such as "float32[batch,3,224,224]" or "ids:int64[batch=4,seq=16:1-512]"; a name in '
            "place of a size is a dynamic dim. Once for every input. Not needed where the model file tells of its inputs.",
        ),
        click.option("--inputs", "file", metavar="FILE", help="Example inputs from a .pt, .npy, .npz or .safetensors file."),
        click.option("--seed", default=0, metavar="N", show_default=True, help="Seed of the inputs that --input draws."),
        click.option("--trust-pickle", is_flag=True, help="Let MODEL run whatever code it contains on this machine."),
    )(packed)  # fmt: skip


def _with_answer(command: Command) -> Command:
    """The options of every command; `main` looks for them, because a command that fails to start has none."""
    return _options(
        click.option("--json", "as_json", is_flag=True, help="Answer with one JSON document on stdout, errors included."),
        click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."),
    )(command)


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    return lambda command: functools.reduce(lambda inner, option: option(inner), reversed(options), command)


def _known_passes(_: click.Context, __: click.Parameter, names: tuple[str, ...]) -> str | list[str]:
    from normfuse.registry import passes

    for name in names:
        if name != "all" and name not in passes():
            raise NormfuseError(f"there is no pass '{name}'", hint=_did_you_mean(name, [*passes(), "all"]))
    return "all" if "all" in names else list(dict.fromkeys(names))


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    by_lower = {each.lower(): each for each in known}
    near = difflib.get_close_matches(word.lower(), by_lower, cutoff=0.5)
    return f"did you mean {' or '.join(by_lower[each] for each in near)}?" if near else "normfuse passes lists what there is"


def _check_writable(targets: Iterable[str | Path | None], never_over: Iterable[str | None]) -> None:
    """Fail now rather than after minutes of proof: everything that `write_atomically` checks, and nothing is written."""
    from normfuse.loading import write_atomically

    class Writable(Exception):
        """Stops the write where only the content is missing."""

    def probe(temporary: Path) -> None:
        temporary.touch()
        raise Writable

    kept = [Path(each) for each in never_over if each]
    for target in (Path(each) for each in targets if each):
        with contextlib.suppress(Writable):
            write_atomically(target, probe, never_over=kept)
        kept.append(target)


def _write_text(path: str | None, text: Callable[[], str]) -> None:
    from normfuse.loading import write_atomically

    if path:
        write_atomically(Path(path), lambda temporary: temporary.write_text(text(), encoding="utf-8") and None)


# -- the commands ------------------------------------------------------------------------------------------------------


@click.group(cls=_Commands, name="normfuse", context_settings={"help_option_names": ["-h", "--help"]})
@click.rich_config({"theme": "default-slim"})
@click.version_option(package_name="normfuse", message="normfuse %(version)s")
def main() -> None:
    """Rewrite the normalization layers of trained PyTorch models, exactly, and prove it.

    A MODEL is a file of torch.save(module) or torch.export.save(program).

    Exit codes: 0 done, 1 the answer is no, 2 the question could not be asked.
    """


@main.command()
@click.argument("model")
@click.option("--pass", "passes", multiple=True, required=True, metavar="NAME", callback=_known_passes,
              help="A pass to run, or all; may be given again. See normfuse passes.")  # fmt: skip
@click.option(
    "-o", "--output", metavar="OUT.pt2", help="Where to write. [default: MODEL's name with .rewritten.pt2, beside it]"
)
@click.option("--dry-run", is_flag=True, help="Plan and print only: no model is written and nothing is proven.")
@click.option(
    "--strict", is_flag=True, help="Exit 1 and write no model if a pass rewrote nothing (with all: if every one did)."
)
@click.option("--verify", type=click.Choice(["full", "structure", "none"]), default="full", show_default=True,
              help="full runs both models in float64 and in their own dtype; structure runs nothing.")  # fmt: skip
@click.option("--allow", type=click.Choice(["exact", "rounding", "approximate"]), default="rounding", show_default=True,
              help="The weakest claim that a rewrite may make.")  # fmt: skip
@click.option("--report", metavar="FILE.json", help="Write the report: what was rewritten, refused and proven.")
@click.option("--plan", metavar="FILE.json", help="Write the plan: the edits, with the formula of every new weight.")
@_with_source
@_with_answer
def rewrite(
    model: str, passes: Any, output: str | None, dry_run: bool, strict: bool, verify: str, allow: str,
    report: str | None, plan: str | None, source: Source, as_json: bool,
) -> int:  # fmt: skip
    """Rewrite the norms of MODEL, prove that its outputs stay the same, and write the result.

    The result is a torch.export program that torch.export.load opens without normfuse. It is not written unless it was
    proven, at the level of --verify, and not if there is nothing to rewrite.
    """
    started = time.perf_counter()
    target = Path(output) if output else Path(model).with_name(f"{Path(model).stem}.rewritten.pt2")
    _check_writable((None if dry_run else target, report, plan), (model, source.file))
    with _working("loading and tracing") as progress:
        from normfuse import api

        try:
            result = api.rewrite(
                model, passes, source.inputs(model), verify="none" if dry_run else verify, allow=allow,
                trust_pickle=source.trust_pickle, progress=progress,
            )  # fmt: skip
        except VerificationFailed as failure:
            _write_text(report, failure.report.to_json)
            raise
        outcome = _outcome(result, strict, everything=passes == "all")
        if write := not outcome and not dry_run:
            result.save(target)
        _write_text(report, result.report.to_json)
        _write_text(plan, result.report.plan.to_json)
    if as_json:
        _write_json({**result.report.to_dict(), "dry_run": dry_run, "written": str(target) if write else None})
    else:
        ending = outcome or ("dry run: nothing proven, no model written" if dry_run else _wrote(target, started))
        _show(*_rendered(result.report), "", Text(ending, style="bold"))
    return NO if outcome.startswith("strict") else 0


def _outcome(result: Result, strict: bool, *, everything: bool) -> str:
    """Why no model is to be written; empty if it is."""
    idle = result.report.idle_passes
    if strict and idle and not (everything and any(result.report.plan.rewrites)):
        return f"strict: {', '.join(idle)} rewrote nothing; nothing written"
    return "" if any(result.report.plan.rewrites) else "nothing to rewrite; nothing written"


def _wrote(target: Path, started: float) -> str:
    return f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB) in {time.perf_counter() - started:.1f} s"


@main.command()
@click.argument("model")
@_with_source
@_with_answer
def inspect(model: str, source: Source, as_json: bool) -> None:
    """List every norm of MODEL: its kind, who sees the mean of its input, and what each pass would do with it."""
    with _working("loading and tracing"):
        from normfuse import api

        inspection = api.inspect(model, source.inputs(model), trust_pickle=source.trust_pickle)
    if as_json:
        _write_json(inspection.to_dict())
    else:
        _show(*inspection.render())


@main.command()
@click.argument("a")
@click.argument("b")
@click.option("--junit", metavar="FILE.xml", help="Write the cases as JUnit XML.")
@_with_source
@_with_answer
def verify(a: str, b: str, junit: str | None, source: Source, as_json: bool) -> int:
    """Compare the models A and B on ordinary and on hostile inputs; exit 1 if they are not the same function.

    Their weights may be rounded differently. B may be an .onnx file, which ONNX Runtime runs.
    """
    _check_writable([junit], (a, b, source.file))
    with _working("loading and tracing") as progress:
        from normfuse import api, report

        evidence = api.verify(a, b, source.inputs(a), trust_pickle=source.trust_pickle, progress=progress)
        _write_text(junit, lambda: report.junit(evidence, f"normfuse verify {a} {b}"))
    because = None if evidence.ok else evidence.complaint()
    if as_json:
        _write_json({"a": a, "b": b, "equivalent": evidence.ok, "because": because, "evidence": evidence.to_dict()})
    else:
        answer = Text("equivalent", "bold green") if evidence.ok else Text(f"NOT equivalent: {because}", "bold red")
        _show(*_rendered(evidence), "", answer)
    return 0 if evidence.ok else NO


@main.command()
@click.argument("model")
@click.option("--to", "target", type=click.Choice(["onnx"]), default="onnx", show_default=True, help="The runtime.")
@click.option("-o", "--output", required=True, metavar="OUT", help="The file to write.")
@click.option("--opset", default=20, show_default=True, metavar="N", help="ONNX: version of the standard operators.")
@_with_source
@_with_answer
def export(model: str, target: str, output: str, opset: int, source: Source, as_json: bool) -> None:
    """Write MODEL for a runtime, run it there, and compare; a file that computes something else is removed."""
    started = time.perf_counter()
    _check_writable([output], (model, source.file))
    with _working(f"exporting to {target}"):
        from normfuse import api

        evidence = api.export(
            model, output, opset=opset, inputs=source.inputs(model), trust_pickle=source.trust_pickle
        )  # fmt: skip
    if as_json:
        said = {"model": model, "to": target, "opset": opset, "written": output, "evidence": evidence.to_dict()}
        _write_json(said)
    else:
        _show(*_rendered(evidence), "", Text(_wrote(Path(output), started), style="bold"))


@main.command()
@click.argument("topic", metavar="PASS|CODE")
@_with_answer
def explain(topic: str, as_json: bool) -> None:
    """Tell what a pass does and when it refuses, or what a refusal's code means."""
    from normfuse.registry import codes, passes

    if topic in passes():
        found = passes()[topic]
        told = {"pass": topic, "summary": found.summary, "manual": found.manual, "codes": found.codes}
        text = f"{topic}\n\n{found.manual}"
    elif (code := topic.upper()) in codes():
        owner = next((name for name, each in passes().items() if code in each.codes), None)
        told = {"code": code, "pass": owner, "story": codes()[code]}
        text = f"{code}  ({owner or 'any pass'})\n\n{codes()[code]}"
    else:
        raise NormfuseError(f"there is no pass and no code '{topic}'", hint=_did_you_mean(topic, [*passes(), *codes()]))
    if as_json:
        _write_json(told)
    else:
        _write("\n".join(_wrapped(text)))


@main.command()
@_with_answer
def passes(as_json: bool) -> None:
    """List the passes."""
    from normfuse.registry import passes
    from normfuse.report import plain_table

    if as_json:
        each = [{"name": each.name, "summary": each.summary, "codes": list(each.codes)} for each in passes().values()]
        _write_json({"passes": each})
        return
    table = plain_table("pass", "what it does")
    for found in passes().values():
        table.add_row(Text(found.name, "bold"), Text(found.summary))
    _show(table)


# -- printing ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _working(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar on a terminal's stderr; what models and libraries print meanwhile goes to stderr as well."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=False)
    with contextlib.redirect_stdout(sys.stderr), bar:
        task = bar.add_task(what, total=None)
        yield lambda case, done, total: bar.update(task, description=f"proving: {case}", completed=done, total=total)


def _rendered(answer: Any) -> Iterable[RenderableType]:
    from normfuse.report import Report, evidence_lines

    return answer.render() if isinstance(answer, Report) else evidence_lines(answer)


def _show(*parts: RenderableType) -> None:
    """Print for people; where a program reads, no line is cut."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    with console.capture() as caught:
        for part in parts:
            console.print(part)
    _write("\n".join(line.rstrip() for line in caught.get().splitlines()))


def _write_json(data: Any) -> None:
    _write(json.dumps(data, indent=2, allow_nan=False))


def _write(text: str) -> None:
    try:
        click.echo(text)
    except BrokenPipeError:  # the reader, such as head, has enough; nor shall the interpreter complain when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise click.exceptions.Exit(UNREAD) from None


def _say(kind: str, text: str, style: str) -> None:
    Console(stderr=True, soft_wrap=True).print(Text.assemble((f"{kind}:", style), f" {text}"))


def _wrapped(manual: str) -> Iterator[str]:
    """The manual's lines, those that are too long for the terminal folded under their own beginning."""
    console = Console()
    width = console.width if console.is_terminal else 100
    for line in manual.splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        yield from textwrap.wrap(line, width, subsequent_indent=indent) or [""]
