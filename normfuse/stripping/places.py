"""Where a model's LayerNorms are as modules, and which layers make the values of an attention of them.

Nothing is told by names or classes. The model is traced; a LayerNorm is what the trace proves to be one, its module is where
the trace says it was computed, and that module is replaced only if it computes the same as its replacement. The values of an
attention are what is multiplied by a softmax; following them back to the layer that made them, with a number for every one of
its output channels, tells which channels are values, however they are split and moved on the way.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from normfuse.analysis.facts import Facts, analyze
from normfuse.errors import NormfuseError
from normfuse.graph.interpreter import computed
from normfuse.graph.ops.lookup import keeps, layer, product, rank
from normfuse.graph.ops.row import MOVES, SAME, Keeps
from normfuse.graph.program import Program
from normfuse.graph.views import Norm, NormKind, arguments, aten, shape
from normfuse.nn.convert import forget_layer_norms
from normfuse.nn.fake_layer_norm import FakeLayerNorm


@dataclass(frozen=True)
class Reader:
    """A layer that makes values of a norm's output.

    Attributes:
        path: of its module.
        columns: which of its output channels are values; None for all.
    """

    path: str
    columns: tuple[int, ...] | None


@dataclass(frozen=True)
class Place:
    """A LayerNorm that is a module of its own.

    Attributes:
        path: of the module.
        size: channels.
        eps: of the norm.
        gain: own name of the module's gain, or None.
        shift: own name of the module's shift, or None.
        attention: whether an attention takes its values from it.
        readers: the layers that make those values, where they are modules; empty where they cannot be told apart.
    """

    path: str
    size: int
    eps: float
    gain: str | None
    shift: str | None
    attention: bool
    readers: tuple[Reader, ...]


def places(model: nn.Module, inputs: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> tuple[Place, ...]:
    """Every LayerNorm of a model that can be replaced as a module, in execution order; a shared one is there once.

    Args:
        model: the model; it is traced and not changed.
        inputs: example positional inputs.
        kwargs: example keyword inputs.

    Raises:
        TraceError: torch.export cannot trace the model.
    """
    program = Program.trace(model, tuple(inputs), dict(kwargs or {}))
    facts = analyze(program)
    made = _values(facts)
    found: dict[nn.Module, Place] = {}
    for norm in facts.norms:
        path = program.site(norm.out).module
        if norm.kind == NormKind.LAYER_NORM and norm.axes == (rank(norm.x) - 1,) and path:
            place, module = _place(model, path, norm, made.get(path, [])), model.get_submodule(path)
            if module in found:  # called more than once: its paths are not told apart
                first = found[module]
                found[module] = replace(first, attention=first.attention or bool(place and place.attention), readers=())
            elif place is not None:
                found[module] = place
    return tuple(found.values())


def attach(
    model: nn.Module, found: Sequence[Place], *, momentum: float = 0.9, first_token: bool = False
) -> dict[str, FakeLayerNorm]:
    """Put a `FakeLayerNorm` at each place, in place, with the same parameters; the function is as before.

    Args:
        model: the model that the places are of.
        found: the places.
        momentum: of each `FakeLayerNorm`.
        first_token: of each `FakeLayerNorm`.

    Returns:
        The new modules by path.

    Raises:
        NormfuseError: the norms are in float16, in which σ and its gradients overflow.
    """
    made = {place.path: _fake(model, place, momentum, first_token) for place in found}
    by_identity = {model.get_submodule(path): fake for path, fake in made.items()}
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in by_identity:
                module._modules[name] = by_identity[child]
    forget_layer_norms(model, set(made.values()))
    for place in found:
        for reader in place.readers:
            _Values(made[place.path], reader.columns).hook(model.get_submodule(reader.path))
        made[place.path].readers_of_values = len(place.readers)
    return made


def _fake(model: nn.Module, place: Place, momentum: float, first_token: bool) -> FakeLayerNorm:
    old = model.get_submodule(place.path)
    gain, shift = (None if name is None else getattr(old, name) for name in (place.gain, place.shift))
    kinds = {each.dtype for each in (gain, shift) if each is not None}
    if torch.float16 in kinds:
        hint = "keep the weights in float32 or bfloat16; autocast may compute in float16"
        raise NormfuseError(f"'{place.path}' has float16 parameters, in which training without norms overflows", hint=hint)
    device = next((each.device for each in (gain, shift) if each is not None), None)
    made = FakeLayerNorm(
        place.size, place.eps, elementwise_affine=False, momentum=momentum, first_token=first_token, device=device,
        dtype=torch.float64 if torch.float64 in kinds else None,
    )  # fmt: skip
    made.weight, made.bias = gain, shift
    return made.train(old.training)


# -- the norm as a module ----------------------------------------------------------------------------------------------


def _place(model: nn.Module, path: str, norm: Norm, readers: list[tuple[Reader | None, Node]]) -> Place | None:
    module = model.get_submodule(path)
    own = [name for name, _ in module.named_parameters(recurse=False)]
    size = shape(norm.x)[-1]
    if next(module.children(), None) is not None or len(own) > 2 or not isinstance(size, int):
        return None
    split = [reader for reader, _ in readers]
    known = tuple(reader for reader in split if reader is not None) if None not in split else ()
    for names in (*permutations(own), *((None, name) for name in own)):
        gain, shift = (*names, None, None)[:2]
        place = Place(path, size, norm.eps, gain, shift, bool(split), known)
        if {gain, shift} - {None} == set(own) and _computes_the_same(module, place):
            return place
    return None


@torch.no_grad()
def _computes_the_same(module: nn.Module, place: Place) -> bool:
    """Whether a norm's module is the LayerNorm of its place for other parameters and inputs as well."""
    generator = torch.Generator().manual_seed(0)
    try:
        twin = copy.deepcopy(module).double().cpu().eval()
        for parameter in twin.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5)
        x = 3.0 * torch.randn(2, 3, place.size, generator=generator, dtype=torch.float64) + 1.0
        gain, shift = (None if name is None else getattr(twin, name) for name in (place.gain, place.shift))
        expected = nn.functional.layer_norm(x, (place.size,), gain, shift, place.eps)
        got = twin(x)
    except (RuntimeError, TypeError, ValueError):
        return False
    return isinstance(got, Tensor) and got.shape == expected.shape and bool(torch.allclose(got, expected, rtol=1e-9, atol=1e-9))


# -- the values of an attention ----------------------------------------------------------------------------------------


def _values(facts: Facts) -> dict[str, list[tuple[Reader | None, Node]]]:
    """By path of a norm's module: the layers that make an attention's values of it; None for one that is no module."""
    program = facts.program
    found: dict[str, list[tuple[Reader | None, Node]]] = {}
    for value in _attended(program):
        maker, way = _back(facts, value)
        if maker is None:
            continue
        given = arguments(maker)
        path = program.site(_source(given["mat1"] if "mat1" in given else given.get("input", given.get("self")))).module
        readers = found.setdefault(path, [])
        if all(other is not maker for _, other in readers):
            readers.append((_reader(program, maker, way), maker))
    return found


def _attended(program: Program) -> Iterator[Node]:
    """What is multiplied by the weights of an attention."""
    for node in program.graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            yield arguments(node)["value"]
        elif node.target in (aten.matmul.default, aten.bmm.default) and _is_softmax(node.args[0]):
            yield node.args[1]


def _source(node: Any) -> Node:
    """What a value is a view of."""
    assert isinstance(node, Node)
    return _source(node.args[0]) if keeps(node) and isinstance(node.args[0], Node) else node


def _is_softmax(node: Any) -> bool:
    while isinstance(node, Node) and keeps(node) in SAME | {Keeps.EXPAND}:
        node = node.args[0]
    return isinstance(node, Node) and "softmax" in str(node.target)


def _back(facts: Facts, node: Any) -> tuple[Node | None, list[Node]]:
    """The first product with a stored weight behind a value, and the moves between."""
    way: list[Node] = []
    while isinstance(node, Node):
        factors = product(node)
        if layer(node) or (factors is not None and arguments(node)[factors.weight] in facts.constant):
            return node, way[::-1]
        if not keeps(node):
            break
        way.append(node)
        node = node.args[0]
    return None, []


def _reader(program: Program, maker: Node, way: list[Node]) -> Reader | None:
    """The module that is this layer and nothing else, and its channels that are values."""
    path = program.site(maker).module
    inside = [node for node in program.graph.nodes if node.op == "call_function" and program.site(node).module == path]
    if not path or any(node is not maker and keeps(node) not in MOVES for node in inside):
        return None
    size = shape(maker)[-1]
    numbered = torch.arange(size, dtype=torch.float64).expand([int(each) for each in shape(maker)])
    values = computed(way[-1] if way else maker, {maker: numbered}, wide=True)
    columns = tuple(sorted({int(each) for each in values.unique()}))
    return Reader(path, None if len(columns) == size else columns)


class _Values:
    """Lets a layer that makes values read the values' path of a norm."""

    def __init__(self, norm: FakeLayerNorm, columns: tuple[int, ...] | None) -> None:
        self.norm, self.columns = norm, columns

    def hook(self, layer: nn.Module) -> None:
        """Stand before the layer where all it makes are values, and behind it otherwise."""
        if self.columns is None:
            layer.register_forward_pre_hook(self.before)
        else:
            layer.register_forward_hook(self.behind)

    def before(self, layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        values = self.norm.take_values(given[0])
        return None if values is None else (values, *given[1:])

    def behind(self, layer: nn.Module, given: tuple[Any, ...], result: Tensor) -> Tensor | None:
        values = self.norm.take_values(given[0])
        if values is None or self.columns is None:
            return None
        chosen = torch.zeros(result.shape[-1], dtype=torch.bool, device=result.device)
        chosen[list(self.columns)] = True
        return torch.where(chosen, layer.forward(values), result)
