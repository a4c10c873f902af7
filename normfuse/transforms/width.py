"""Take one entry away from every vector of a zero-mean stream: which norms profit, and the edits that do it.

A stream is what norms read, and all that it is made of: values linked by sums, views, joins along other axes. `center` says
which norms' inputs can have zero mean; then one entry is superfluous (`basis`). All values of the stream change together:
stored tensors that write it are changed by a formula, and so are those that read its norms (`into_products`). What cannot
change its width stays outside, behind an explicit change of basis: where a value enters the stream, or where somebody reads it
as it was. There must be fewer of these than norms, or the stream is left alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from operator import attrgetter

import networkx as nx
import torch
from torch import Tensor
from torch.fx import Node

from normfuse.analysis.facts import Facts
from normfuse.analysis.obstacles import Obstacle, Why, named
from normfuse.graph.edits import Edit, NewTensor, Reroute, Resize, SetTensor
from normfuse.graph.expressions import Call, Formula, Read, Ref, reads, uncentered
from normfuse.graph.findings import Claim, Finding, Refusal, Rewrite
from normfuse.graph.ops.lookup import carries, is_mean_of, rank
from normfuse.graph.ops.sizes import follows, meets_full_width, says_size
from normfuse.graph.parts import PIECE
from normfuse.graph.program import Program
from normfuse.graph.views import HALVES, Norm, NormKind, arguments, aten, dtype, shape, tensors_in
from normfuse.sources.mapped import let_go
from normfuse.transforms.backward import Backward, Key, Step
from normfuse.transforms.basis import Basis
from normfuse.transforms.forward import is_size_blind
from normfuse.transforms.into_products import Products, Reading, products
from normfuse.transforms.maps import Map
from normfuse.transforms.zero_mean import ZERO_MEAN, CentredRegions, center


def propose(program: Program, facts: Facts, pass_name: str, basis: Basis) -> Iterator[Finding]:
    """One rewrite per stream, and a refusal for every norm that concerns the pass and stays as wide as it is.

    Args:
        program: the program.
        facts: of it.
        pass_name: who proposes.
        basis: how streams are stored.
    """
    known = centered(facts)
    concerned: list[Norm] = []
    for norm in facts.norms:
        is_centred = all(axis in known[norm.x] for axis in norm.axes)
        if norm.kind == NormKind.LAYER_NORM or (norm.kind == NormKind.RMS_NORM and is_centred):
            size = shape(norm.x)[norm.axes[0]]
            if len(norm.axes) == 1 and isinstance(size, int) and size > 2:
                concerned.append(norm)
            else:
                over = f"{len(norm.axes)} axes together" if len(norm.axes) > 1 else f"an axis of size {size}"
                yield Refusal(pass_name, program.site(norm.out), "NF402", f"it normalizes over {over}")
        elif norm.kind == NormKind.RMS_NORM and len(norm.axes) == 1 and (at := _rounded_writer(facts, known, norm)) is not None:
            why = f"its input has zero mean but for rounding: '{program.stored[at.name]}' and all that writes it were centred"
            hint = f"run {pass_name} on the original model, alone or in one plan with what centred them"
            yield Refusal(pass_name, program.site(norm.out), "NF406", f"{why}, and rounded", program.site(at), hint)
    for found in narrow(facts, concerned, basis):
        if isinstance(found, Kept):
            at = found.obstacle.witness or found.obstacle.at
            reason = f"{_ABOUT[found.code]}{named(program, at)} {found.obstacle}"
            yield Refusal(pass_name, program.site(found.norm.out), found.code, reason, program.site(at))
        else:
            yield _rewrite(program, pass_name, basis, found)


def _rewrite(program: Program, pass_name: str, basis: Basis, found: Narrowing) -> Rewrite:
    tensors = sum(isinstance(edit, SetTensor) for edit in found.edits)
    explicit = f"; {found.explicit} explicit change{'s' * (found.explicit > 1)} of basis inserted" if found.explicit else ""
    return Rewrite(
        pass_name=pass_name,
        sites=tuple(program.site(norm.out) for norm in found.norms),
        was=tuple(norm.kind for norm in found.norms),
        becomes=basis.becomes,
        edits=found.edits,
        region=frozenset(node.name for node in found.nodes),
        claim=Claim.ROUNDING,
        because=f"their stream of zero mean is stored in one entry less; {tensors} stored tensors change{explicit}",
    )


@dataclass(frozen=True)
class Narrowing:
    """Norms whose stream gets one entry less, with the edits that do it.

    Attributes:
        norms: in execution order.
        edits: the changes, those of the norms included.
        nodes: the values that the reasoning is about.
        explicit: how many changes of basis are left to be computed at every call.
    """

    norms: tuple[Norm, ...]
    edits: tuple[Edit, ...]
    nodes: frozenset[Node]
    explicit: int


@dataclass(frozen=True)
class Kept:
    """A norm that keeps its width, and why.

    Attributes:
        norm: the norm.
        code: the refusal's code.
        obstacle: what is in the way.
    """

    norm: Norm
    code: str
    obstacle: Obstacle


def narrow(facts: Facts, norms: Iterable[Norm], basis: Basis) -> Iterator[Narrowing | Kept]:
    """Choose the norms whose streams get one entry less.

    Args:
        facts: of the program.
        norms: each over one axis of a fixed size of at least two.
        basis: how the stream is stored.
    """
    read_by: dict[Norm, Products] = {}
    for norm in norms:
        found = products(facts, norm, basis)
        if isinstance(found, Obstacle):
            yield Kept(norm, "NF403", found)
        else:
            read_by[norm] = found
    known = centered(facts)
    wishes = [norm for norm in read_by if norm.kind == NormKind.LAYER_NORM and norm.axes[0] not in known[norm.x]]
    centering = center(facts, wishes)
    for norm, obstacle in centering.blocked:
        yield Kept(norm, "NF401", obstacle)
    blocked = {norm for norm, _ in centering.blocked}
    streams = _Streams(facts, basis, read_by, known, centering)
    for group in streams.groups([norm for norm in read_by if norm not in blocked]):
        yield from streams.narrowed(group)


_ABOUT = {
    "NF401": "its input cannot have zero mean: ",
    "NF403": "its output is read where no other basis can be: ",
    "NF404": "its stream cannot be narrower: ",
    "NF405": "it would cost what it saves: ",
}


def centered(facts: Facts) -> dict[Node, frozenset[int]]:
    """Axes along which values have zero mean: by construction, or because a pass has centred what writes them."""
    return facts.centered_with(partial(_centered_by_formula, facts.program))


def _rounded_writer(facts: Facts, known: Mapping[Node, frozenset[int]], norm: Norm) -> Node | None:
    """A stored tensor that writes a norm's input, where all that do have zero mean up to the rounding of their dtype.

    Measured, so it says what a pass has done before and is no fact to rely on: what writes the input is zero-mean by chance.
    """
    walk = _Rounded(facts, known)
    stopped = walk.carry(((norm.x, norm.axes[0]), ZERO_MEAN), on=False)
    return None if stopped else walk.writer


class _Rounded(Backward):
    def __init__(self, facts: Facts, known: Mapping[Node, frozenset[int]]) -> None:
        super().__init__(facts)
        self.known = known
        self.writer: Node | None = None

    def decided(self, node: Node, axis: int, pending: Map) -> Step | None:
        return Step() if axis in self.known[node] else None

    def stored(self, node: Node, axis: int, pending: Map) -> Step:
        program = self.facts.program
        tensor = program.tensor(program.stored[node.name]) if node.name in program.stored else None
        if tensor is None or not _is_nearly_centred(tensor, axis):
            return self.stuck(node, axis, pending)
        self.writer = node if self.writer is None and tensor.any() else self.writer
        return Step()

    def stuck(self, node: Node, axis: int, pending: Map) -> Step:
        return Step(obstacle=Obstacle(Why.HAS_MEAN, node))


def _is_nearly_centred(tensor: Tensor, axis: int) -> bool:
    """Whether the means along an axis are no larger than rounding every entry once would make them."""
    if tensor.is_meta or not tensor.is_floating_point():
        return False
    least = max(torch.finfo(tensor.dtype).eps, 2.0**-49)  # a mean that is itself taken in float64
    for piece in _pieces(tensor.detach(), axis):
        wide = piece.double()
        if not bool((wide.mean(axis).abs() <= least * wide.abs().mean(axis)).all()):
            return False
    let_go(tensor)
    return True


def _pieces(tensor: Tensor, axis: int) -> Sequence[Tensor]:
    """A tensor cut along another axis, so that no more than a piece of a large one is widened at a time."""
    across = max((each for each in range(tensor.dim()) if each != axis % tensor.dim()), key=tensor.size, default=None)
    if across is None or tensor.numel() <= PIECE:
        return (tensor,)
    return torch.split(tensor, max(1, PIECE * tensor.size(across) // tensor.numel()), across)


def _centered_by_formula(program: Program, node: Node) -> set[int]:
    formula = program.formulas.get(program.stored.get(node.name, ""))
    return set() if formula is None else set(uncentered(formula)[1])


class _Stream(Backward):
    """The values of one stream: those that get narrower, and where it begins and ends.

    Attributes:
        entries: values that stay as they are, beside a narrowed copy of this name.
    """

    def __init__(self, streams: _Streams) -> None:
        super().__init__(streams.facts)
        self.streams = streams
        self.entries: dict[Key, str] = {}

    @cached_property
    def keys(self) -> dict[Key, tuple[Key, ...]]:
        """The values that get narrower, with what they are made of."""
        return {key: step.operands for key, step in self.steps.items() if key not in self.entries and step.obstacle is None}

    def decided(self, node: Node, axis: int, pending: Map) -> Step | None:
        if (node, axis) in self.streams.paid:
            return self._entry(node, axis)
        if node.name in self.streams.scaled:
            branch = self.facts.program.nodes[next(reads(self.streams.scaled[node.name].by))]
            return Step(((branch, axis - (rank(node) - rank(branch))),))
        return None

    def stored(self, node: Node, axis: int, pending: Map) -> Step:
        return Step() if self.facts.editable(node) else Step(obstacle=Obstacle(Why.FIXED_WIDTH, node))

    def carried(self, node: Node, axis: int, pending: Map, operands: tuple[Key, ...]) -> Step:
        if (other := meets_full_width(node, axis, operands)) is not None:
            return Step(obstacle=Obstacle(Why.EXPANDED, node, (other.name,)))
        if not follows(node, axis):
            return Step(obstacle=Obstacle(Why.NO_WIDTH, node))
        return super().carried(node, axis, pending, operands)

    def stuck(self, node: Node, axis: int, pending: Map) -> Step:
        if carries(node, axis) == () and says_size(node):  # zeros
            return self.carried(node, axis, pending, ())
        if axis in self.streams.known[node]:
            return self._entry(node, axis)
        return Step(obstacle=Obstacle(Why.NO_BASIS, node))

    def _entry(self, node: Node, axis: int) -> Step:
        """The stream begins here, and nothing before it changes."""
        self.entries[node, axis] = f"{node.name}_narrowed_{axis}"
        return Step()


class _Streams:
    """Streams of one program in one basis."""

    def __init__(
        self,
        facts: Facts,
        basis: Basis,
        read_by: Mapping[Norm, Products],
        known: Mapping[Node, frozenset[int]],
        centering: CentredRegions,
    ) -> None:
        self.facts, self.basis, self.read_by, self.known = facts, basis, read_by, known
        edits = [edit for region in centering.regions for edit in region.edits]
        self.paid = {key for region in centering.regions for key in region.centered_copies}
        self.centred = {edit.name: edit.formula for edit in edits if isinstance(edit, SetTensor)}
        self.scaled = {edit.node: edit for edit in edits if isinstance(edit, Reroute) and isinstance(edit.by, Ref)}
        """products with a LayerScale that goes into its writers"""
        self.order = {node: place for place, node in enumerate(facts.program.graph.nodes)}

    # -- walking back --------------------------------------------------------------------------------------------------

    def groups(self, norms: list[Norm]) -> list[list[Norm]]:
        """Norms that share a value of their streams belong together."""
        links, (stream, _) = nx.Graph(), self._back(norms)
        links.add_edges_from((norm, (norm.x, norm.axes[0])) for norm in norms)
        links.add_edges_from((key, operand) for key, operands in stream.keys.items() for operand in operands)
        members = [[m for m in each if isinstance(m, Norm)] for each in nx.connected_components(links)]
        ordered = [sorted(each, key=lambda norm: self.order[norm.out]) for each in members]
        return sorted(ordered, key=lambda each: self.order[each[0].out])

    def _back(self, norms: Iterable[Norm]) -> tuple[_Stream, Obstacle | None]:
        stream = _Stream(self)
        return stream, stream.carry(*(((norm.x, norm.axes[0]), Map(basis=self.basis)) for norm in norms))

    # -- judging -------------------------------------------------------------------------------------------------------

    def narrowed(self, norms: list[Norm]) -> Iterator[Narrowing | Kept]:
        """One stream, as far as it can be narrowed; the norms that stay as they are."""
        while norms:
            refused = list(self._unclaimed(norms))
            if not refused:
                break
            yield from refused
            norms = [norm for norm in norms if norm not in {each.norm for each in refused}]
        stream, stopped = self._back(norms)
        outside = stopped or self._outside(stream, norms)
        if isinstance(outside, Obstacle):
            yield from (Kept(norm, "NF404", outside) for norm in norms)
            return
        explicit = len(outside) + sum(not self._is_free(key, stream, norms) for key in stream.entries)
        if explicit >= len(norms):
            at = next(iter((*outside, *(key[0] for key in stream.entries))), None)
            cost = (explicit, len(norms))
            yield from (Kept(norm, "NF405", Obstacle(Why.COSTS, at or norm.x, cost)) for norm in norms)
        elif norms:
            yield self._written(norms, stream, outside, explicit)

    def _unclaimed(self, norms: list[Norm]) -> Iterator[Kept]:
        """Norms some of whose layers read a weight that somebody else reads too, or reads in another way."""
        layers = [layer for norm in norms for layer in self.read_by[norm].layers]
        for norm in norms:
            rivals = (self._rival(layer, layers) for layer in self.read_by[norm].layers)
            found = next((rival for rival in rivals if rival is not None), None)
            if found is not None:
                name, reader = found
                yield Kept(norm, "NF403", Obstacle(Why.READS_TOO, reader, (name,)))

    def _rival(self, layer: Reading, layers: list[Reading]) -> tuple[str, Node] | None:
        """A tensor of a layer that somebody else reads, and who."""
        for name in (layer.weight, layer.bias if layer.map.shift is not None else None):
            sharing = [other for other in layers if name is not None and name in (other.weight, other.bias)]
            claimed = {other.way[-1][0] if other.way and name == other.weight else other.node for other in sharing}
            users = self.facts.program.reader_of(name).users if name is not None else ()
            others = (*(user for user in users if user not in claimed), *(o.node for o in sharing if not _alike(layer, o)))
            if name is not None and others:
                return name, others[0]
        return None

    def _outside(self, stream: _Stream, norms: list[Norm]) -> dict[Node, tuple[str, ...]] | Obstacle:
        """Values of a stream that somebody reads in their full width, with these readers."""
        inner = {node: norm for norm in norms for node in norm.inner}
        taken: dict[Node, Counter[Key]] = defaultdict(Counter)
        for (reader, _), operands in stream.keys.items():
            taken[reader].update(operands)
        outside: dict[Node, tuple[str, ...]] = {}
        for node, axis in stream.keys:
            strays = [
                reader
                for reader in node.users
                if not (reader in inner and inner[reader].x is node)
                and not is_size_blind(reader, node, axis)
                and taken[reader][node, axis] != sum(each is node for each in tensors_in((reader.args, reader.kwargs)))
            ]
            if strays and (node in outside or node in self.facts.constant or any(each.op == "output" for each in strays)):
                return Obstacle(Why.READS_IN_FULL, strays[0], (node.name,))
            if strays:
                outside[node] = tuple(reader.name for reader in strays)
        return outside

    def _is_free(self, key: Key, stream: _Stream, norms: list[Norm]) -> bool:
        """Whether the stream begins at a mean-subtraction that nobody else needs: it narrows instead."""
        node, axis = key
        inside = {reader for reader, _ in stream.keys}.union(*(norm.inner for norm in norms))
        return _is_mean_subtraction(node, axis) and inside.issuperset(node.users)

    # -- writing it down -----------------------------------------------------------------------------------------------

    def _written(self, norms: list[Norm], stream: _Stream, outside: Mapping[Node, tuple[str, ...]], explicit: int) -> Narrowing:
        resized = [*stream.keys, *(key for norm in norms for key in self.read_by[norm].values)]
        layers = [layer for norm in norms for layer in self.read_by[norm].layers]
        resized += [key for layer in layers for key in self._of_weight(layer)]
        formulas = self._writers(stream)
        made = list(self._readers(layers, formulas))
        edits: list[Edit] = [SetTensor(name, formula) for name, formula in formulas.items()]
        edits += [Resize(node.name, axis, _width(node, axis) - 1) for node, axis in dict.fromkeys(resized)]
        edits += [self.scaled[node.name] for node, _ in stream.keys if node.name in self.scaled]
        for key, name in stream.entries.items():
            edits += [self._entry(key, name, stream), Resize(name, key[1], _width(*key) - 1)]
        edits += [self._normalized(norm, stream) for norm in norms]
        edits += [Reroute(node.name, Ref(x.name)) for norm in norms for node, x in self.read_by[norm].dropped]
        edits += made
        axes = {node: axis for node, axis in stream.keys if node in outside}
        for node, readers in outside.items():
            by = self.basis.widened(Ref(node.name), axes[node], _width(node, axes[node]), _is_half(node))
            edits.append(Reroute(node.name, by, readers))
        nodes = {node for node, _ in (*resized, *stream.entries)} | {layer.node for layer in layers}
        nodes |= {node for norm in norms for node in norm.inner}
        nodes |= {self.facts.program.reader_of(layer.bias) for layer in layers if layer.bias and layer.map.shift is not None}
        return Narrowing(tuple(norms), tuple(edits), frozenset(nodes), explicit)

    def _of_weight(self, layer: Reading) -> Iterator[Key]:
        yield (self.facts.program.reader_of(layer.weight), layer.dim)
        yield from layer.way

    def _writers(self, stream: _Stream) -> dict[str, Formula]:
        """The stored tensors that write a stream, one entry narrower."""
        formulas: dict[str, Formula] = {}
        for node, axis in stream.keys:
            if node.op == "placeholder":
                name = self.facts.program.stored[node.name]
                before = formulas.get(name) or self.centred.get(name) or Read(name)
                formulas[name] = self.basis.written(before, axis, _width(node, axis))
        return formulas

    def _readers(self, layers: list[Reading], formulas: dict[str, Formula]) -> Iterator[Edit]:
        """The layers behind the norms; what writes a stream as well is changed on top of that."""
        writers = dict(formulas)
        for layer in layers:
            node = self.facts.program.reader_of(layer.weight)
            plain = writers.get(layer.weight, Read(layer.weight))
            formulas[layer.weight] = layer.map.read(plain, layer.dim, _width(node, layer.dim))
            if layer.map.shift is None:
                continue
            weighed = plain.scaled(layer.map.shift, layer.dim)
            if layer.bias is not None or layer.takes_bias:
                out = 1 - layer.dim if rank(node) == 2 else 0
                added = Call("sum.dim_IntList", (weighed, tuple(own for own in range(rank(node)) if own != out)))
                if layer.bias is not None:
                    formulas[layer.bias] = writers.get(layer.bias, Read(layer.bias)).shifted(added, 0)
                else:
                    yield from self._new_bias(layer, added)
            else:
                made = f"normfuse_{layer.node.name}_map"
                yield NewTensor(made, Call("sum.dim_IntList", (weighed, (layer.dim,), rank(node) > 2)), layer.weight)
                yield Reroute(layer.node.name, Ref(layer.node.name) + Ref(made))

    def _new_bias(self, layer: Reading, value: Formula) -> Iterator[Edit]:
        made = f"normfuse_{layer.node.name}_bias"
        named = {**arguments(layer.node), "bias": Ref(made)}
        yield NewTensor(made, value, next(reads(value)))
        yield Reroute(layer.node.name, Call.of(layer.node.target, [*named.values()]))

    def _entry(self, key: Key, name: str, stream: _Stream) -> Reroute:
        """Where the stream begins at a value that stays as it is."""
        node, axis = key
        x = node.args[0] if _is_mean_subtraction(node, axis) else node
        assert isinstance(x, Node)
        readers = sorted({reader.name for (reader, _), operands in stream.keys.items() if key in operands})
        return Reroute(node.name, self.basis.narrowed(Ref(x.name), axis, _width(*key), _is_half(node)), tuple(readers), name)

    def _normalized(self, norm: Norm, stream: _Stream) -> Reroute:
        (axis,) = norm.axes
        x = Ref(stream.entries.get((norm.x, axis), norm.x.name))
        d = _width(norm.x, axis)
        return Reroute(norm.out.name, self.basis.normalized(x, axis, rank(norm.x), d, norm.eps, dtype(norm.x) in HALVES))


def _is_half(node: Node) -> bool:
    return dtype(node) in HALVES


def _width(node: Node, axis: int) -> int:
    return int(shape(node)[axis])


def _is_mean_subtraction(node: Node, axis: int) -> bool:
    return node.target is aten.sub.Tensor and arguments(node)["alpha"] == 1 and is_mean_of(node.args[1], node.args[0], axis)  # type: ignore[arg-type]


def _alike(one: Reading, other: Reading) -> bool:
    """Whether two layers ask the same of a weight and bias that they share."""
    asked = attrgetter("weight", "bias", "dim", "map")
    return bool(asked(one) == asked(other))
