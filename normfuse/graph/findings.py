"""What a pass may say of a site: a `Rewrite`, a `Refusal`, or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeAlias

from normfuse.errors import one_of
from normfuse.graph.edits import Edit, NewTensor, SetTensor
from normfuse.graph.program import Site

NO_NORM = "no norm"
"""What a norm becomes that is gone."""


class Claim(IntEnum):
    """How close a rewrite stays to the original function, weakest last."""

    EXACT = 0
    """the same bits"""
    ROUNDING = 1
    """the same function of real numbers; other roundings"""
    APPROXIMATE = 2
    """another function, with a measured bound; never runs unasked"""

    @classmethod
    def named(cls, name: str) -> Claim:
        """The claim of a name, such as ``rounding``."""
        return cls[one_of(str(name).lower(), [each.name.lower() for each in cls], "claim").upper()]


@dataclass(frozen=True)
class Rewrite:
    """A pass's proposal: edits that stand or fall together.

    Attributes:
        pass_name: the pass that proposes.
        sites: the norms that it changes; more than one where they share writers.
        was: the kind of each site's norm, such as ``layer_norm``, or what it was where it is none, such as ``affine``.
        becomes: what each of them will be, such as ``rms_norm`` (counted after the edits are made).
        edits: the changes.
        region: names of the nodes whose values the rewrite reasons about; every reader of a changed tensor must be one.
        claim: how close it stays to the original.
        because: the facts relied on, in plain English.
    """

    pass_name: str
    sites: tuple[Site, ...]
    was: tuple[str, ...]
    becomes: str
    edits: tuple[Edit, ...]
    region: frozenset[str]
    claim: Claim
    because: str

    @property
    def formed(self) -> list[SetTensor | NewTensor]:
        """The edits that give stored tensors their values."""
        return [edit for edit in self.edits if isinstance(edit, SetTensor | NewTensor)]

    @property
    def changed(self) -> set[str]:
        """Names of the stored tensors and nodes that are edited."""
        return {edit.name if isinstance(edit, SetTensor | NewTensor) else edit.node for edit in self.edits}


@dataclass(frozen=True)
class Refusal:
    """Why a pass that concerns a site did not propose.

    Attributes:
        pass_name: the pass that refuses.
        site: the norm.
        code: ``NF...``; `normfuse explain CODE` tells its story.
        reason: one sentence in plain English.
        at: the node that stands in the way.
        hint: what the user can do, or empty.
    """

    pass_name: str
    site: Site
    code: str
    reason: str
    at: Site | None = None
    hint: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The refusal as JSON types."""
        return {
            "pass": self.pass_name,
            **self.site.to_dict(),
            "code": self.code,
            "reason": self.reason,
            "at": self.at.to_dict() if self.at else None,
            "hint": self.hint,
        }


Finding: TypeAlias = Rewrite | Refusal
