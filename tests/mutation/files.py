"""Broken ONNX files made from right ones, as an exporter or a runtime's optimizer would break them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

Break = Callable[[], None]
NORMS = ("LayerNormalization", "RMSNormalization", "BatchNormalization", "InstanceNormalization", "GroupNormalization")


def broken(path: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Every broken version of a file, written one after the other to the same place in a folder.

    A change that the tensor's dtype cannot hold is none: 1.001 times most numbers of bfloat16 is the same number.
    """
    for place in range(len(list(_breaks(onnx.load(path))))):
        model = onnx.load(path)
        mistake, act = list(_breaks(model))[place]
        act()
        if model == onnx.load(path):
            continue
        target = folder / path.name
        onnx.save(model, target)
        yield mistake, target


def _breaks(model: Any) -> Iterator[tuple[str, Break]]:
    graph = model.graph
    read = {name for node in graph.node for name in node.input}
    floats = [each for each in graph.initializer if each.name in read and numpy_helper.to_array(each).dtype.kind in "fV"]
    for each in floats:
        value = _wide(each)
        if value.ndim and value.shape[0] > 1 and np.any(value[0]):
            yield f"one channel of {each.name} scaled by 1.001", _setter(each, _scaled(value))
        if value.ndim == 1 and value.size > 1 and np.any(value):
            yield f"{each.name} dropped", _setter(each, np.zeros_like(value))
        if value.ndim == 2 and value.shape[0] == value.shape[1] and not np.allclose(value, value.T):
            yield f"{each.name} transposed", _setter(each, value.T)
    for one, other in pairwise(floats):
        a, b = _wide(one), _wide(other)
        if a.shape == b.shape and a.size > 1 and not np.allclose(a, b):
            yield f"{one.name} and {other.name} swapped", _both(_setter(one, b), _setter(other, a))
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "epsilon" and node.op_type in NORMS:
                yield f"eps of {node.name} × 10", _attribute(attribute, attribute.f * 10)
        if node.op_type == "Sub":
            yield f"operands of {node.name} exchanged", _exchange(node)


def _wide(tensor: Any) -> Any:
    return numpy_helper.to_array(tensor).astype(np.float64)


def _scaled(value: Any) -> Any:
    """Its first entries along axis 0 times 1.001."""
    return np.concatenate([value[:1] * 1.001, value[1:]])


def _setter(tensor: Any, value: Any) -> Break:
    def act() -> None:
        dtype = numpy_helper.to_array(tensor).dtype
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value.astype(dtype)), tensor.name))

    return act


def _both(one: Break, other: Break) -> Break:
    def act() -> None:
        one()
        other()

    return act


def _attribute(attribute: Any, value: float) -> Break:
    def act() -> None:
        attribute.f = value

    return act


def _exchange(node: Any) -> Break:
    def act() -> None:
        node.input[0], node.input[1] = node.input[1], node.input[0]

    return act
