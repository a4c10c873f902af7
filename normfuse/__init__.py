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
    from normfuse.api import Inspection, Result, deploy, inspect, restore, rewrite, tune
    from normfuse.errors import NormfuseError, VerificationFailed
    from normfuse.exporting import export
    from normfuse.findings import Claim
    from normfuse.inputs import Inputs
    from normfuse.loading import load
    from normfuse.nn.recalibrate import recalibrate
    from normfuse.planner import Plan, plan
    from normfuse.program import Program
    from normfuse.proof.evidence import Evidence
    from normfuse.report import Report
    from normfuse.stripping.calibration import Calibration, calibrate
    from normfuse.stripping.removal import strip
    from normfuse.verification import assert_equivalent, bisect, verify

__version__ = "0.1.0"

__all__ = [
    "Calibration", "Claim", "Evidence", "Inputs", "Inspection", "NormfuseError", "Plan", "Program", "Report", "Result",
    "VerificationFailed", "assert_equivalent", "bisect", "calibrate", "deploy", "export", "inspect", "load", "plan",
    "recalibrate", "restore", "rewrite", "strip", "tune", "verify",
]  # fmt: skip

_HOMES = {
    "api": ("Inspection", "Result", "deploy", "inspect", "restore", "rewrite", "tune"),
    "errors": ("NormfuseError", "VerificationFailed"),
    "proof.evidence": ("Evidence",),
    "exporting": ("export",),
    "findings": ("Claim",),
    "inputs": ("Inputs",),
    "loading": ("load",),
    "nn.recalibrate": ("recalibrate",),
    "planner": ("Plan", "plan"),
    "program": ("Program",),
    "report": ("Report",),
    "stripping.calibration": ("Calibration", "calibrate"),
    "stripping.removal": ("strip",),
    "verification": ("assert_equivalent", "bisect", "verify"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"normfuse.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'normfuse' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
