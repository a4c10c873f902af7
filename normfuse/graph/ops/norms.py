"""Operators that normalize, and the norm that a call of one is."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from normfuse.graph.ops.lookup import rank, row
from normfuse.graph.ops.row import COMPUTED, NO_MAP, NOT_CARRIED, PLAIN, SEEN, Carried, No, Normalization, operators
from normfuse.graph.views import Norm, NormKind, arguments, aten, default_rms_eps, dtype


def _trailing(a: dict[str, Any]) -> tuple[int, ...]:
    """The axes that the call names the sizes of."""
    axes = rank(a["input"])
    return tuple(range(axes - len(a["normalized_shape"]), axes))


def _all_but_channels(a: dict[str, Any]) -> tuple[int, ...]:
    return tuple(axis for axis in range(rank(a["input"])) if axis != 1)


def _channels_and_places(a: dict[str, Any]) -> tuple[int, ...]:
    return tuple(range(1, rank(a["input"])))


def _places(a: dict[str, Any]) -> tuple[int, ...]:
    return tuple(range(2, rank(a["input"])))


def _hides(node: Node, a: dict[str, Any], operand: Node) -> frozenset[int]:
    alone = a["input"] is operand and a["weight"] is not operand and a["bias"] is not operand
    tells = any(user.target is operator.getitem and user.args[1] == 1 for user in node.users)  # native: the mean itself
    # over several axes the norm sees how the means along one of them differ
    return frozenset({rank(operand) - 1}) if alone and not tells and len(a["normalized_shape"]) == 1 else frozenset()


_NORM: dict[str, Any] = {"keeps": COMPUTED, "computes": PLAIN}
_SEEING: dict[str, Any] = {**_NORM, "hides": SEEN, "shift": NOT_CARRIED, "width": NOT_CARRIED}
_LAYER_NORM, _RMS_NORM = (Normalization(kind, _trailing) for kind in (NormKind.LAYER_NORM, NormKind.RMS_NORM))
_BATCH_NORM = Normalization(NormKind.BATCH_NORM, _all_but_channels)
_GROUP_NORM = Normalization(NormKind.GROUP_NORM, _channels_and_places)
_INSTANCE_NORM = Normalization(NormKind.INSTANCE_NORM, _places)


@operators(
    aten.layer_norm.default,
    **_NORM, hides=_hides, role=_LAYER_NORM, shift=No("it is made of no operand"), width=No("it says how wide it is"),
)  # fmt: skip
def _plain_layer_norm(node: Node, a: dict[str, Any], axis: int) -> Carried:
    """Without gain and shift the result is centred by construction; with them its mean depends on the data."""
    last = axis == rank(node) - 1 and len(a["normalized_shape"]) == 1
    return () if last and a["weight"] is None and a["bias"] is None else None


operators(
    aten.native_layer_norm.default, **_NORM, hides=_hides, role=_LAYER_NORM, shift=NOT_CARRIED, width=NOT_CARRIED,
)(NO_MAP)  # fmt: skip
operators(aten.rms_norm.default, aten._fused_rms_norm.default, **_SEEING, role=_RMS_NORM)(NO_MAP)
operators(
    aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default, aten._native_batch_norm_legit.default,
    aten._native_batch_norm_legit.no_stats, aten._native_batch_norm_legit_functional.default,
    **_SEEING, role=_BATCH_NORM,
)(NO_MAP)  # fmt: skip
operators(aten.group_norm.default, aten.native_group_norm.default, **_SEEING, role=_GROUP_NORM)(NO_MAP)
operators(aten.instance_norm.default, **_SEEING, role=_INSTANCE_NORM)(NO_MAP)


def operator_norm(node: Node) -> Norm | None:
    """The norm that ``node`` yields by one operator, or None; some yield it as the first of several results."""
    call = node.args[0] if node.target is operator.getitem and node.args[1] == 0 else node
    known = row(call) if isinstance(call, Node) else None
    if known is None or not isinstance(known.role, Normalization):
        return None
    assert isinstance(call, Node)
    if (call is node) == isinstance(call.meta.get("val"), (tuple, list)):
        return None  # the call that has several results is no value
    a = arguments(call)
    eps = default_rms_eps(dtype(a["input"])) if a["eps"] is None else float(a["eps"])
    inner = frozenset({call, node})
    return Norm(node, known.role.kind, a["input"], known.role.axes(a), a["weight"], a.get("bias"), eps, inner)
