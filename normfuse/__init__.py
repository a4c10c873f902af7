"""normfuse: rewrite the normalization layers of trained PyTorch models, exactly, and prove it.

    result = normfuse.rewrite(model, passes=["pre_rmsnorm"], inputs=(x,))
    result.report.to_dict()
    result.save("model.rms.pt2")
"""

from normfuse.api import Inspection, Result, export, inspect, rewrite, verify
from normfuse.errors import NormfuseError, VerificationFailed
from normfuse.findings import Claim
from normfuse.inputs import Inputs
from normfuse.loading import load
from normfuse.planner import Plan, plan
from normfuse.program import Program
from normfuse.report import Report
from normfuse.evidence import Evidence

__version__ = "0.1.0"

__all__ = [
    "Claim", "Evidence", "Inputs", "Inspection", "NormfuseError", "Plan", "Program", "Report", "Result",
    "VerificationFailed", "__version__", "export", "inspect", "load", "plan", "rewrite", "verify",
]  # fmt: skip
