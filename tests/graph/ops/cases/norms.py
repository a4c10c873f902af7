"""Calls of norms."""

from __future__ import annotations

from typing import Any

from normfuse.graph.views import aten
from tests.graph.ops.calls import HIDING, Draw, case


@case(aten.layer_norm.default, aten.native_layer_norm.default, table=HIDING)
@case(aten.layer_norm.default)
def norm(d: Draw, op: Any) -> Any:
    shape = (*d.shape(0, 2), d.of((2, 3, 4)))
    sizes = shape[-d.of(range(1, len(shape) + 1)) :] if d.of(range(3)) == 0 else shape[-1:]
    x = d.normal(*shape)
    affine = d.of(("none", "none", "gain", "shift", "both", "itself"))
    weight = d.normal(*sizes) if affine in ("gain", "both") else None
    bias = d.normal(*sizes) if affine in ("shift", "both") else None
    if affine == "itself" and sizes == shape:
        weight, bias = (x, None) if d.flag() else (None, x)
    return {"input": x, "normalized_shape": list(sizes), "weight": weight, "bias": bias, "eps": d.of((1e-5, 0.1))}


@case(aten.rms_norm.default, aten._fused_rms_norm.default)
def _rms_norm(d: Draw, op: Any) -> Any:
    shape = (*d.shape(1, 2), d.of((2, 3, 4)))
    sizes = shape[-d.of((1, 1, 2)) :]
    return {
        "input": d.normal(*shape),
        "normalized_shape": list(sizes),
        "weight": d.normal(*sizes) if d.flag() else None,
        "eps": d.of((1e-5, 0.1)),
    }


@case(aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default, aten._native_batch_norm_legit.default,
      aten._native_batch_norm_legit.no_stats, aten._native_batch_norm_legit_functional.default,
      aten.instance_norm.default)  # fmt: skip
def _batch_norm(d: Draw, op: Any) -> Any:
    batch, channels = (3, 3) if d.flag() else (d.of((2, 4)), d.of((1, 2, 3)))
    x = d.normal(batch, channels, *(d.of((2, 3)) for _ in range(d.of((1, 2)))))
    affine = {"weight": d.normal(channels), "bias": d.normal(channels)}
    affine = dict.fromkeys(affine) if d.flag() else affine  # type: ignore[assignment]
    statistics = {"running_mean": d.normal(channels), "running_var": d.normal(channels).abs() + 0.5}
    more: dict[str, Any] = {"momentum": 0.1, "eps": d.of((1e-5, 0.1))}
    if op is aten.instance_norm.default:
        own = d.flag()
        stored = dict.fromkeys(statistics) if own else statistics
        return {"input": x, **affine, **stored, **more, "use_input_stats": own, "cudnn_enabled": False}
    if "no_training" not in str(op):
        more["training"] = "no_stats" in str(op)  # in training others write to operands of theirs
    if op is aten.batch_norm.default:
        more["cudnn_enabled"] = False
    return {"input": x, **affine, **({} if "no_stats" in str(op) else statistics), **more}


@case(aten.group_norm.default, aten.native_group_norm.default)
def _group_norm(d: Draw, op: Any) -> Any:
    groups, own, places = (2, 2, 4) if d.flag() else (d.of((1, 2)), d.of((1, 3)), d.of((2, 3)))
    batch, channels = d.of((1, 2, 4)), groups * own
    affine = {"weight": d.normal(channels), "bias": d.normal(channels)}
    affine = dict.fromkeys(affine) if d.flag() else affine  # type: ignore[assignment]
    more = {"num_groups": groups}
    if op is aten.native_group_norm.default:
        more = {"N": batch, "C": channels, "HxW": places, "group": groups}
    return {"input": d.normal(batch, channels, places), **affine, **more, "eps": d.of((1e-5, 0.1))}
