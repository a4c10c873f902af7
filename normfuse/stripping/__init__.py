"""Removal of LayerNorm: measured (`calibration`), in training (`recovery`, by a `schedule`), or without (`removal`).

    recovery = Recovery(model, Schedule(layers=12, start=20, gaps=(2, 2, 3)), inputs=(x,), steps=300)

makes a model's norms linear while it is trained on; the pass ``strip_layernorm`` folds them away afterwards.
"""

from __future__ import annotations

from normfuse.stripping.places import Place, Reader, attach, places
from normfuse.stripping.recovery import Diverged, Recovery
from normfuse.stripping.schedule import Event, Schedule
from normfuse.stripping.trainer import trainer_callback

__all__ = ["Diverged", "Event", "Place", "Reader", "Recovery", "Schedule", "attach", "places", "trainer_callback"]
