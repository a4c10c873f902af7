"""A model in float64: ONNX Runtime runs the pieces that it has kernels for, and torch the operators between them.

ONNX Runtime has no convolution and no erf of that width on a CPU, and the constants of its tanh-Gelu are float32. In float32, a
weight that is wrong by a thousandth drowns in the rounding of all the others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from normfuse.errors import ExportError
from normfuse.exporters.onnx_walk import attributes_of, bodies_of
from normfuse.graph.literals import shortened
from normfuse.proof.artifacts import Run
from normfuse.sources.packages import package

EPSILON, SLOPE, GATE = (shortened(each) for each in (1e-5, 0.01, 0.2))
"""Attributes that a file leaves to ONNX: of the norms, LeakyRelu and HardSigmoid."""
SELU = (shortened(1.6732632423543772), shortened(1.0507009873554805))
"""Those of Selu, by which torch's own numbers are meant."""


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool,
    strides: Sequence[int] = (),
    pads: Sequence[int] = (),
    dilations: Sequence[int] = (),
    output_padding: Sequence[int] = (),
    group: int = 1,
    kernel_shape: Sequence[int] = (),
    auto_pad: str = "NOTSET",
) -> Tensor:
    rank = weight.dim() - 2
    ones, zeros = [1] * rank, [0] * rank
    padding = _before(pads) or zeros
    if not transposed:  # the two ends of an axis may differ
        before, after = padding, pads[rank:] or zeros
        x = F.pad(x, [size for pair in zip(reversed(before), reversed(after), strict=True) for size in pair])
        padding = zeros
    sizes = (strides or ones, padding, dilations or ones, transposed, output_padding or zeros)
    return torch.convolution(x, weight, bias, *sizes, group)


def _average_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    strides: Sequence[int] = (),
    pads: Sequence[int] = (),
    dilations: Sequence[int] = (),
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    auto_pad: str = "NOTSET",
) -> Tensor:
    rank = len(kernel_shape)
    pool: Callable[..., Tensor] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
    return pool(x, kernel_shape, strides or [1] * rank, _before(pads) or [0] * rank, bool(ceil_mode), bool(count_include_pad))


def _before(pads: Sequence[int]) -> Sequence[int]:
    """ONNX pads all axes at their beginnings, then all at their ends."""
    return pads[: len(pads) // 2]


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **attributes: Any) -> Tensor:
    causal, scale = bool(attributes.get("is_causal")), attributes.get("scale")
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _layer_norm(
    x: Tensor, scale: Tensor, shift: Tensor | None = None, *, axis: int = -1, epsilon: float = EPSILON, stash_type: int = 1
) -> Tensor:
    bare = F.layer_norm(x, x.shape[axis:], eps=epsilon) * scale
    return bare if shift is None else bare + shift


def _hard_sigmoid(x: Tensor, alpha: float = GATE, beta: float = 0.5) -> Tensor:
    """max(0, min(1, αx + β)); a sixth is what is meant by a sixth that is rounded to float32."""
    if alpha == shortened(1 / 6):
        return torch.clamp((x + 6 * beta) / 6, 0.0, 1.0)
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


def _selu(x: Tensor, alpha: float = SELU[0], gamma: float = SELU[1]) -> Tensor:
    return F.selu(x) if (alpha, gamma) == SELU else F.elu(x, alpha) * gamma


KERNELS: dict[str, Callable[..., Tensor]] = {
    "Atan": torch.atan,
    "Attention": _attention,
    "AveragePool": _average_pool,
    "Conv": lambda *values, **attributes: _conv(*values, transposed=False, **attributes),
    "ConvTranspose": lambda *values, **attributes: _conv(*values, transposed=True, **attributes),
    "Celu": lambda x, alpha=1.0: F.celu(x, alpha),
    "Elu": lambda x, alpha=1.0: F.elu(x, alpha),
    "Erf": torch.erf,
    "Gelu": lambda x, approximate="none": F.gelu(x, approximate=approximate),
    "GlobalAveragePool": lambda x: x.mean(tuple(range(2, x.dim())), keepdim=True),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": F.hardswish,
    "InstanceNormalization": lambda x, scale, shift, epsilon=EPSILON: F.instance_norm(x, None, None, scale, shift, eps=epsilon),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda x, alpha=SLOPE: F.leaky_relu(x, alpha),
    "Mish": F.mish,
    "PRelu": lambda x, slope: torch.where(x < 0, x * slope, x),
    "Selu": _selu,
    "Softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "Softsign": F.softsign,
}
"""Operators by torch that ONNX Runtime has not in float64, or computes in a way that loses half of its digits.

Of the inputs in order, and the attributes by name. Its LayerNormalization computes the variance as a difference of two means,
which float64 shows where a mean is large.
"""
SINGLE = {"linear", "cubic"}
"""Modes of Resize that ONNX Runtime computes with weights of float32, whatever the dtype."""


def assembled(model: Any, opened: Callable[[Any], Run]) -> Run:
    """A way to run an ``onnx_ir.Model`` piece by piece.

    A value's stage is the number of operators of `KERNELS` on the longest way to it; all that lies between two stages is
    one piece.

    Args:
        model: the model; operators of `KERNELS` in its subgraphs and functions are left to ONNX Runtime.
        opened: gives the way to run a piece, which is a model too.

    Raises:
        ExportError: what is left after `KERNELS` cannot be opened either, or is computed in float32 all the same.
    """
    graph = model.graph
    if any(node.op_type == "Resize" and attributes_of(node).get("mode") in SINGLE for node in graph.all_nodes()):
        raise ExportError("ONNX Runtime resizes in float32")
    if any(value.dtype is None for node in graph for value in node.outputs):  # the inputs of a piece have types
        package("onnx_ir.passes.common", "onnx").ShapeInferencePass()(model)
    stage: dict[Any, int] = defaultdict(int)  # graph inputs, stored tensors and what a subgraph defines: 0
    between: dict[int, list[Any]] = defaultdict(list)
    filled: dict[int, list[Any]] = defaultdict(list)
    for node in graph:
        at = max((stage[value] for value in _read(node)), default=0)
        ours = _is_ours(node)
        (filled if ours else between)[at].append(node)
        stage.update(dict.fromkeys(node.outputs, at + ours))
    pieces = {at: piece for at, nodes in between.items() if (piece := _piece(model, nodes, opened))}

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        given = [value for value in graph.inputs if value.name not in graph.initializers]
        held: dict[str, Tensor] = dict(zip([value.name for value in given], inputs, strict=True))
        for at in sorted({*pieces, *filled}):
            if at in pieces:
                wanted, made, piece = pieces[at]
                held.update(zip(made, piece([held[name] for name in wanted]), strict=True))
            for node in filled[at]:
                held[node.outputs[0].name] = _filled(node, held)
        return [_value(value, held) for value in graph.outputs]

    return run


def _is_ours(node: Any) -> bool:
    """Whether torch has the operator with these attributes."""
    if node.op_type not in KERNELS or node.domain:
        return False
    named = attributes_of(node)
    if node.op_type == "LayerNormalization":  # one that gives its statistics too has them to give as it computes them
        return not any(map(_users, node.outputs[1:]))
    if node.op_type == "Attention":  # of four axes, from nothing but these inputs
        given = [value is not None for value in node.inputs]
        whole = node.inputs[0].shape is not None and node.inputs[0].shape.rank() == 4 and not any(given[4:])
        both = bool(named.get("is_causal")) and any(given[3:])
        return whole and not both and not named.get("softcap") and not any(map(_users, node.outputs[1:]))
    pads, dilations = named.get("pads", ()), named.get("dilations", ())
    alike = node.op_type == "Conv" or list(_before(pads)) == list(pads[len(pads) // 2 :])
    plain = node.op_type != "AveragePool" or all(size == 1 for size in dilations)
    return alike and plain and named.get("auto_pad", "NOTSET") == "NOTSET"


def _piece(model: Any, nodes: Sequence[Any], opened: Callable[[Any], Run]) -> tuple[list[str], list[str], Run] | None:
    """Names of what a piece reads and of what others read of it, and how to run it; None where nothing of it is read."""
    ir, inside = package("onnx_ir", "onnx"), set(nodes)
    made = [value for node in nodes for value in node.outputs if value.is_graph_output() or not _users(value) <= inside]
    if not made:
        return None
    read = dict.fromkeys(value for node in nodes for value in _read(node))
    wanted = [
        value for value in read if value.graph is model.graph and value.producer() not in inside and value.const_value is None
    ]
    graph = ir.convenience.extract(model.graph, wanted, made)
    piece = ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))
    return [value.name for value in wanted], [value.name for value in made], opened(piece)


def _users(value: Any) -> set[Any]:
    return {node for node, _ in value.uses()}


def _read(node: Any) -> Iterator[Any]:
    """What a node reads, itself and in its subgraphs."""
    yield from (value for value in node.inputs if value is not None)
    for graph in bodies_of(node):
        yield from (value for inner in graph.all_nodes() for value in inner.inputs if value is not None)
        yield from graph.outputs


def _filled(node: Any, held: dict[str, Tensor]) -> Tensor:
    values = [None if value is None else _value(value, held) for value in node.inputs]
    return KERNELS[node.op_type](*values, **attributes_of(node))


def _value(value: Any, held: dict[str, Tensor]) -> Tensor:
    if value.name not in held:
        held[value.name] = torch.from_numpy(value.const_value.numpy().copy())
    return held[value.name]
