"""The command line: what every command is part of, and what becomes of whatever goes wrong.

    exit 0    done
    exit 1    the answer is no: not equivalent, or --strict and a pass did nothing
    exit 2    the question could not be asked: a wrong option, a file that is not a model, a bug

torch and everything that needs it is imported inside the commands, so that help comes at once.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import rich_click as click

from normfuse.cli.console import CANNOT, INTERRUPTED, YES, rendered, say, show, write_json
from normfuse.cli.deadline import in_time
from normfuse.errors import NormfuseError, NormfuseWarning
from normfuse.escaping import escaped
from normfuse.limits import OverLimit
from normfuse.sources.missing_packages import how_to_install
from normfuse.sources.ranks import own, started

HELP = {"theme": "default-slim", "text_paragraph_linebreaks": "\n\n", "padding_helptext_first_line": (0, 0, 1, 0)}


COMMANDS = ("rewrite", "inspect", "verify", "export", "explain", "passes", "calibrate", "strip")
"""In the order of the help; each is a file of this folder."""


class _Commands(click.RichGroup):
    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands as help lists them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command of a name, from the file of that name; of a wrong one all are read, and click names the nearest."""
        for each in [name] if name in COMMANDS else COMMANDS:
            self.commands[each] = getattr(importlib.import_module(f"normfuse.cli.{each}"), each)
        return self.commands.get(name)

    def main(self, args: Sequence[str] | None = None, *more: Any, **extra: Any) -> Any:
        """Ask, and leave with the exit code; whatever goes wrong becomes a line."""
        words = list(sys.argv[1:] if args is None else args)
        if own() > 0:
            sys.exit(_help() if _is_spread(words) else YES)
        sys.exit(_answer(lambda: super(_Commands, self).main(words, *more, **extra | {"standalone_mode": False}), words))


def _answer(ask: Callable[[], int | None], words: Sequence[str]) -> int:
    # The words are searched: a command that cannot start has no parsed options.
    as_json, debug = "--json" in words, "--debug" in words or os.environ.get("NORMFUSE_DEBUG", "0") not in ("", "0")
    for stream in (sys.stdout, sys.stderr):  # no reason to fail: a character that the terminal cannot show
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    interrupts: list[int] = []
    try:
        with _warnings_as_lines(debug), _noting(interrupts), in_time(), _together(words):
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


def _is_spread(words: Sequence[str]) -> bool:
    """Whether a command may ask other ranks for help; any other is rank 0's alone, which waits for nobody."""
    return list(words[:1]) == ["rewrite"] and "--help" not in words


def _together(words: Sequence[str]) -> contextlib.AbstractContextManager[None]:
    """This process is rank 0 of those that torchrun has started, if it has, and they may be needed."""
    if started() == 1 or not _is_spread(words):
        return contextlib.nullcontext()
    from normfuse.sources.ranks import group

    return group()


def _help() -> int:
    """Be another rank than 0, of which nothing is to be seen: what goes wrong is told by rank 0."""
    from normfuse.modules.spread import help_rank_0

    silent = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(silent, stream)
    try:
        help_rank_0()
    except (NormfuseError, KeyboardInterrupt):
        return CANNOT
    return YES


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
        return f"the package '{package}' is not installed", how_to_install(package)
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
        write_json({"error": error, "hint": hint} | ({"report": report.to_dict()} if report else {}))
    elif report:
        show(*rendered(report))
    say("error", error, "bold red")
    if hint:
        say("hint", hint, "bold")
    return code


@contextlib.contextmanager
def _warnings_as_lines(debug: bool) -> Iterator[None]:
    """Our own warnings, a line each; those of libraries are for us, not for our users."""
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", NormfuseWarning)
            warnings.showwarning = lambda message, *_, **__: say("warning", str(message), "bold yellow")
        yield


@click.group(cls=_Commands, name="normfuse", context_settings={"help_option_names": ["-h", "--help"]})
@click.rich_config(HELP)
@click.version_option(package_name="normfuse", message="normfuse %(version)s")
def main() -> None:
    """Rewrite the normalization layers of trained PyTorch models, exactly, and prove it.

    A MODEL is a file of torch.save(module) or torch.export.save(program).

    Exit codes: 0 done, 1 the answer is no, 2 the question could not be asked.
    """
