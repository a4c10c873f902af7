"""What people call, a file per question; each is a few calls of the parts."""

from normfuse.api.exporting import export
from normfuse.api.in_place import deploy, restore, tune
from normfuse.api.inspection import Inspection, inspect
from normfuse.api.result import Result
from normfuse.api.rewriting import rewrite
from normfuse.api.verification import assert_equivalent, bisect, verify

__all__ = [
    "Inspection",
    "Result",
    "assert_equivalent",
    "bisect",
    "deploy",
    "export",
    "inspect",
    "restore",
    "rewrite",
    "tune",
    "verify",
]
