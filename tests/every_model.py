"""The small models that every pass, every target and the proof itself are tried on."""

from __future__ import annotations

from tests.batch_norms import FOLDS, Fold
from tests.models import TRAPS, Trap
from tests.streams import STREAMS
from tests.stripping.models import REMOVED, Removed

MODELS: dict[str, Trap | Fold | Removed] = {**TRAPS, **FOLDS, **STREAMS, **REMOVED}

REWRITTEN = {
    "conv_bn": "conv",
    "fold_affine": "plain",
    "offline_norm": "by hand",
    "pre_crmsnorm": "missing biases",
    "pre_crmsnorm_compressed": "plain",
    "pre_rmsnorm": "tied head",
    "prepbn": "rep tokens",
    "strip_layernorm": "removed",
    "unified_norm": "unified norm, post-norm",
}
"""A model per pass that the pass rewrites."""
