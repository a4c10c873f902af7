"""Which norms of a model may be rewritten: globs over the paths of modules, as `--only` and `--keep` give them.

A call at a place that is not chosen stays as it is, and everything else is planned around it. The planner asks, and the facts
that passes are given know no norm that is not chosen (`normfuse.analysis.facts.Facts.norms`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from normfuse.errors import InputError, did_you_mean
from normfuse.graph.program import Site


@dataclass(frozen=True)
class Choice:
    """The norms that may be rewritten.

    Attributes:
        only: globs of those that may; none for all of them.
        skip: globs of those that stay, whatever ``only`` says.
    """

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    @classmethod
    def of(cls, only: str | Sequence[str] = (), skip: str | Sequence[str] = ()) -> Choice:
        """A choice as users give it: one glob, or several.

        Raises:
            InputError: a glob is no text.
        """
        return cls(_globs(only), _globs(skip))

    def __bool__(self) -> bool:
        """Whether anything is left out."""
        return bool(self.only or self.skip)

    def __str__(self) -> str:
        told = [f"{what} {', '.join(globs)}" for what, globs in (("only", self.only), ("without", self.skip)) if globs]
        return ", ".join(told) or "all norms"

    def why_kept(self, site: Site) -> str | None:
        """Why what is at a place stays as it is; None where it is chosen."""
        place = str(site)
        for glob in self.skip:
            if fnmatchcase(place, glob):
                return f"it is kept, as '{glob}' asks"
        if self.only and not any(fnmatchcase(place, glob) for glob in self.only):
            return f"it is not chosen by '{', '.join(self.only)}'"
        return None

    def require(self, norms: Iterable[Site]) -> None:
        """Raise where a glob is of no norm.

        Raises:
            InputError: it names no norm of the program; the hint names the nearest.
        """
        places = list(dict.fromkeys(map(str, norms)))
        for glob in (*self.only, *self.skip):
            if not any(fnmatchcase(place, glob) for place in places):
                otherwise = "normfuse inspect lists them" if places else "the model has no norm"
                raise InputError(f"'{glob}' is the path of no norm", hint=did_you_mean(glob, places, otherwise))


EVERYTHING = Choice()
"""Every norm."""


def _globs(given: str | Sequence[str]) -> tuple[str, ...]:
    globs = (given,) if isinstance(given, str) else tuple(given)
    if not all(isinstance(each, str) for each in globs):
        raise InputError("only and skip take paths of modules, or globs of them", hint='such as skip="transformer.h.0.*"')
    return tuple(dict.fromkeys(globs))
