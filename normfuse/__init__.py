"""normfuse: rewrite the normalization layers of trained PyTorch models, exactly, and prove it.

    result = normfuse.rewrite(model, passes=["pre_rmsnorm"], inputs=(x,))
    result.report.to_dict()
    result.save("model.rms.pt2")

The names are imported when they are first used, so that ``normfuse --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normfuse.api import (
        Inspection,
        Result,
        assert_equivalent,
        bisect,
        deploy,
        export,
        inspect,
        restore,
        rewrite,
        tune,
        verify,
    )  # fmt: skip
    from normfuse.errors import NormfuseError, VerificationFailed
    from normfuse.graph.findings import Claim
    from normfuse.graph.program import Program
    from normfuse.nn.recalibrate import recalibrate
    from normfuse.planning.planner import Plan, plan
    from normfuse.proof.evidence import Evidence
    from normfuse.report.report import Report
    from normfuse.sources.inputs import Inputs
    from normfuse.sources.loading import load
    from normfuse.sources.opened import open
    from normfuse.sources.source import Source
    from normfuse.stripping.calibration import Calibration, calibrate
    from normfuse.stripping.removal import strip

__version__ = "0.1.0"

__all__ = [
    "Calibration", "Claim", "Evidence", "Inputs", "Inspection", "NormfuseError", "Plan", "Program", "Report", "Result",
    "Source", "VerificationFailed", "assert_equivalent", "bisect", "calibrate", "deploy", "export", "inspect", "load", "open",
    "plan", "recalibrate", "restore", "rewrite", "strip", "tune", "verify",
]  # fmt: skip

_HOMES = {
    "api": (
        "Inspection", "Result", "assert_equivalent", "bisect", "deploy", "export", "inspect", "restore", "rewrite", "tune",
        "verify",
    ),
    "errors": ("NormfuseError", "VerificationFailed"),
    "graph.findings": ("Claim",),
    "graph.program": ("Program",),
    "nn.recalibrate": ("recalibrate",),
    "planning.planner": ("Plan", "plan"),
    "proof.evidence": ("Evidence",),
    "report.report": ("Report",),
    "sources.inputs": ("Inputs",),
    "sources.loading": ("load",),
    "sources.opened": ("open",),
    "sources.source": ("Source",),
    "stripping.calibration": ("Calibration", "calibrate"),
    "stripping.removal": ("strip",),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"normfuse.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'normfuse' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
