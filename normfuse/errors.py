"""What can go wrong, as a tree.

    NormfuseError            exit 2: the question could not be asked
     ├─ LoadError            the file is not a model that we can (or may) read
     ├─ InputError           example inputs are missing, or do not fit the model
     ├─ TraceError           torch.export could not trace the model
     ├─ InvalidPlan          the plan does not fit this program
     ├─ CannotApply          the plan cannot be made on the model's modules; lists each reason
     ├─ MissingExtra         an optional package is needed; names the pip command that brings it
     ├─ ExportError          the target refused the program; names the node
     ├─ Diverged             the loss of a training without norms is no number (normfuse.stripping)
     └─ VerificationFailed   exit 1: the rewritten program is not the original; carries the report
         ├─ NotCompared      exit 2: there was nothing to compare, so it is neither proven nor disproven
         └─ TooCostly        a removal costs more than the bound (normfuse.stripping.removal)

A pass that cannot rewrite does not raise: it yields a `Refusal`, which is a value.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from normfuse.escaping import escaped


class NormfuseError(Exception):
    """Base of all errors that normfuse raises on purpose; ``str()`` is one plain line, ``hint`` says what to do next.

    A traceback shows the hint as well. Names from files are escaped in both.
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(escaped(message))
        self.hint = hint and escaped(hint)
        if self.hint:
            self.add_note(f"hint: {self.hint}")


class LoadError(NormfuseError):
    """The file is not a model that normfuse can, or may, read."""


class InputError(NormfuseError):
    """Example inputs are missing or do not fit the model."""


class TraceError(NormfuseError):
    """torch.export could not trace the model, or the trace is another function than the model."""


class InvalidPlan(NormfuseError):
    """The plan does not fit this program."""


@dataclass(frozen=True)
class Reason:
    """One thing that stands in the way, as a sentence, and what to do about it."""

    what: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.what} (hint: {self.hint})" if self.hint else self.what


class CannotApply(NormfuseError):
    """The plan cannot be made on the live modules; nothing was changed.

    Attributes:
        reasons: everything that stands in the way, as sentences.
        obstacles: the same, each with a hint of its own.
    """

    def __init__(self, reasons: Sequence[str | Reason], *, hint: str | None = None) -> None:
        self.obstacles = tuple(each if isinstance(each, Reason) else Reason(each, hint or "") for each in reasons)
        self.reasons = [each.what for each in self.obstacles]
        hints = dict.fromkeys(each.hint for each in self.obstacles if each.hint)
        told = "; ".join(dict.fromkeys(self.reasons))
        super().__init__(f"this cannot be done on the model's modules: {told}", hint="; ".join(hints) or hint)


class ExportError(NormfuseError):
    """The target runtime refused the program."""


class MissingExtra(NormfuseError):
    """An optional package is needed; the hint is the pip command that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs the package '{package}', which is not installed", hint=f"pip install 'normfuse[{extra}]'")
        self.extra = extra


class VerificationFailed(NormfuseError):
    """The rewritten program is not equivalent; ``report`` holds the evidence."""

    exit_code = 1

    def __init__(self, message: str, report: Any = None, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.report = report


class NotCompared(VerificationFailed):
    """Neither a yes nor a no: nothing was compared, or a level of the proof could not be run; ``report`` holds the evidence."""

    exit_code = 2


class NormfuseWarning(UserWarning):
    """Something the user should know that does not stop the work."""

    def __init__(self, message: str) -> None:
        super().__init__(escaped(message))


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """A hint for a word that is none of those known: the nearest of them, or else what is said otherwise, or all."""
    by_lower = {each.lower(): each for each in known}
    near = difflib.get_close_matches(word.lower(), by_lower, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(by_lower[each] for each in near)}?"
    return otherwise or f"there are {', '.join(by_lower.values())}"


def listed(names: Iterable[str], shown: int = 6) -> str:
    """Names for a message: the first of them, and how many more there are."""
    names = list(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def one_of(word: str, known: Iterable[str], what: str) -> str:
    """The word, if it is known.

    Args:
        word: what the user asked for.
        known: what there is.
        what: what the words name, such as ``pass``.

    Raises:
        InputError: it is not; the hint names the nearest.
    """
    known = list(known)
    if word not in known:
        raise InputError(f"there is no {what} '{word}'", hint=did_you_mean(str(word), known))
    return word


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
