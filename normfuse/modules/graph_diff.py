"""Two graphs, of a program and of what a plan makes of it: what is still there, and who reads another value than before.

The graphs are compared rather than the edits of the plan replayed, so several rounds of rewrites are one difference. Calls of
modules are told apart by the stack that tracing has left on every node.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate

from normfuse.analysis.obstacles import Obstacle, Why
from normfuse.graph.ops.lookup import keeps, reads_entries
from normfuse.graph.ops.row import Keeps
from normfuse.graph.program import Program, module_path
from normfuse.graph.views import arguments, aten, shape, tensors_in
from normfuse.modules.unread_tensors import Bare, UnreadTensors, is_same_without

Instance: TypeAlias = str
"""One call of a module in a trace, such as ``L__self__conv@1`` for the second call of ``conv``."""


@dataclass(frozen=True)
class Unplaced:
    """A new value that has no place on modules.

    Attributes:
        obstacle: why it has no place, at the value that it would have replaced.
        origin: (pass, site) of the rewrite that wanted it, where the graph tells.
    """

    obstacle: Obstacle
    origin: tuple[str, str] | None


class Comparison:
    """Two graphs, and the values that readers read instead of others.

    Attributes:
        merges: norms that are one in the new graph may stay several on modules, which then compute it again.
        same: node of the new graph → the node of the old one that it still is.
        paths: module call → path of the module.
        bodies: module call → the nodes of the old graph that were traced in it.
        biases: names of biases that their modules did not have, with the weight beside each.
        layers: those names, with the old calls of the layers.
        unread: the tensors that nobody reads any more.
        neutralized: old values that need no change of a module: with neutral tensors, they are what takes their place.
        served: of these, those whose place is taken by what another old value still is: the new graph computes both at once.
        unplaced: new values that have no place on modules.
    """

    def __init__(self, program: Program, rewritten: Program, *, merges: bool = False) -> None:
        self.old, self.new, self.merges = program, rewritten, merges
        self.unread = UnreadTensors(program, rewritten)
        self.neutralized: dict[Node, Bare] = {}
        self.served: set[Node] = set()
        self.unplaced: list[Unplaced] = []
        self.biases: dict[str, str] = {}
        self.layers: dict[str, Node] = {}
        self.paths: dict[Instance, str] = {}
        self.bodies: dict[Instance, set[Node]] = defaultdict(set)
        for node in program.graph.nodes:
            for instance, path in stack_of(node):
                self.paths[instance] = path
                self.bodies[instance].add(node)
        self.same = {node: program.nodes[node.name] for node in rewritten.graph.nodes if self._stayed(node)}
        for node in rewritten.graph.find_nodes(op="placeholder"):
            if node.name not in program.nodes:
                self._new_tensor(node)

    def _stayed(self, node: Node) -> bool:
        return node.name in self.old.nodes and "normfuse" not in node.meta

    def _new_tensor(self, tensor: Node) -> None:
        """A new tensor has a place on modules where it is the bias of a layer that had none."""
        name = self.new.stored[tensor.name]
        (reader,) = tensor.users if len(tensor.users) == 1 else (None,)
        layer = self._layer_without_bias(tensor, reader) if reader is not None else None
        home, _, own_name = name.rpartition(".")
        weight = self.old.stored[arguments(layer)["weight"].name] if layer is not None else ""
        if reader is None or layer is None or own_name != "bias" or {_path(layer), weight.rpartition(".")[0]} != {home}:
            by = next(iter(tensor.users), tensor)
            self._refuse(Why.NEW_TENSOR, by, new=by)
            return
        self.same[reader] = layer
        self.biases[name], self.layers[name] = weight, layer

    def _layer_without_bias(self, tensor: Node, reader: Node) -> Node | None:
        a = arguments(reader) if isinstance(reader.target, torch._ops.OpOverload) else {}
        weight = a.get("weight")
        if a.get("bias") is not tensor or not isinstance(weight, Node) or weight.name not in self.old.stored:
            return None
        found = [
            node
            for node in self.old.nodes[weight.name].users
            if node.target is reader.target and stack_of(node) == stack_of(reader) and arguments(node)["bias"] is None
        ]
        return found[0] if len(found) == 1 else None

    # -- what is read instead ------------------------------------------------------------------------------------------

    @cached_property
    def replaced(self) -> dict[tuple[Node, Node], set[Node]]:
        """(Old value, new value) → the readers, nodes of the old graph, that read the new one instead."""
        self._recognize_copies()
        found: dict[tuple[Node, Node], set[Node]] = defaultdict(set)
        waiting = list(self.same.items())
        while waiting:
            new, old = waiting.pop()
            for pair in _pairs(old, new):
                before, after = self._behind_copies(*pair)
                if after not in self.same and (self._is_same_call(after, before) or self._is_same_without(after, before)):
                    self.same[after] = before  # a view behind a norm, made anew behind what took its place
                    waiting.append((after, before))
                if self._serves_too(after, before):
                    waiting.append((after, before))
                elif self.same.get(after) is not before and before not in self.served:
                    found[before, after].add(old)
                    waiting.extend(self._given_anew(before, after))
        return found

    def _serves_too(self, after: Node, before: Node) -> bool:
        """Whether a new call is another old one as well: norms of one value are one once none has a gain of its own."""
        other = after in self.same and self.same[after] is not before and before not in self.served
        if not self.merges or not other or not self._is_same_without(after, before):
            return False
        self.served.add(before)
        return True

    def _behind_copies(self, before: Node, after: Node) -> tuple[Node, Node]:
        """What a copy was of that nobody reads any more, such as the same dtype again: what takes its place is read itself."""
        while keeps(before) is Keeps.COPY and before.name not in self.new.nodes and keeps(after) is not Keeps.COPY:
            before = before.all_input_nodes[0]
        return before, after

    def _given_anew(self, value: Node, new: Node) -> Iterator[tuple[Node, Node]]:
        """What a module that gives way was given, where the new graph makes it anew of what took another norm's place."""
        for instance in self._owners(value):
            inputs = self._inputs(instance)
            for made in self._made(new, {}) if len(inputs) == 1 else ():
                (given,) = inputs
                if self._is_same_call(made, given):
                    self.same[made] = given
                    yield made, given

    def _recognize_copies(self) -> None:
        """New calls that compute what an old call computes, such as the view in front of a norm."""
        for node in self.new.graph.nodes:
            operands = [self.same.get(each) for each in node.all_input_nodes] if node.op == "call_function" else []
            if node not in self.same and operands and operands[0] is not None:
                alike = (each for each in operands[0].users if self._is_same_call(node, each))
                old = next((each for each in alike if each.all_input_nodes == operands), None)
                if old is not None:
                    self.same[node] = old

    def _is_same_call(self, new: Node, old: Node) -> bool:
        """Whether two nodes call one operator with one set of settings, on whatever operands."""
        gone = old.name not in self.new.nodes
        alike = new.op == old.op == "call_function" and len(_operands(new)) == len(_operands(old))
        return alike and gone and _settings(new) == _settings(old)

    def _is_same_without(self, new: Node, old: Node) -> bool:
        """Whether a new call is an old norm or layer without its gain or bias: then the old one is left, neutral."""

        def is_still(after: Any, before: Any) -> bool:
            return self.same.get(after) is before if isinstance(before, Node) else bool(after == before)

        operators = isinstance(old.target, torch._ops.OpOverload) and old.name not in self.new.nodes
        if not operators or not is_same_without(new, old, is_still):
            return False
        bare, was, now = self.unread.bare(old), arguments(old), arguments(new)
        given_up = [each for key, each in was.items() if isinstance(each, Node) and now[key] is None]
        if bare.value is not old or self.unread.left_by(bare, given_up):
            return False
        self.neutralized[old] = bare
        return True

    @cached_property
    def _still_there(self) -> set[Node]:
        assert self.replaced is not None  # completes what is the same
        return set(self.same.values()) | self.served

    def _readers(self, value: Node) -> set[Node]:
        """Readers of an old value that are still there and would notice a change."""
        return {reader for reader in value.users if reader in self._still_there and reads_entries(reader)}

    # -- modules and values ---------------------------------------------------------------------------------------------

    def _refuse(self, code: Why, value: Node, *detail: str, new: Node | None = None) -> None:
        origin = new.meta.get("normfuse") if new is not None else None
        self.unplaced.append(Unplaced(Obstacle(code, value, detail), origin))

    def _owners(self, value: Node) -> Iterator[Instance]:
        """The module calls that a value is computed in, the innermost first."""
        return (instance for instance, _ in reversed(stack_of(value)))

    def _around(self, readers: set[Node]) -> Iterator[Instance]:
        """The module calls that all readers are in, the innermost first."""
        if readers:
            first, *others = readers
            yield from (each for each in self._owners(first) if all(each in dict(stack_of(other)) for other in others))

    def _outputs(self, instance: Instance) -> set[Node]:
        body = self.bodies[instance]
        return {node for node in body if any(user not in body and reads_entries(user) for user in node.users)}

    def _inputs(self, instance: Instance) -> set[Node]:
        body = self.bodies[instance]
        read = {operand for node in body for operand in node.all_input_nodes} - body
        return {node for node in read if node.name not in self.old.stored}

    def _now(self, value: Node) -> Node:
        """An old value's node in the new graph."""
        return self._by_old[value]

    @cached_property
    def _by_old(self) -> dict[Node, Node]:
        return {old: new for new, old in self.same.items()}

    def _made(self, new: Node, stops: Mapping[Node, Node]) -> set[Node]:
        """The nodes of a new value's expression that the old graph does not have."""
        if new in self.same or new in stops or new.op == "placeholder":
            return set()
        return {new}.union(*(self._made(operand, stops) for operand in new.all_input_nodes))

    def _leaves(self, new: Node, stops: Mapping[Node, Node]) -> set[Node]:
        """The values that a new value is computed from; stored tensors, and what depends on them alone, are left out."""
        if new.name in self.new.stored or self.same.get(new) in self.old.constant:
            return set()
        if new in self.same or new in stops:
            return {new}
        return set().union(*(self._leaves(operand, stops) for operand in new.all_input_nodes))


def _operands(node: Node) -> list[Node]:
    """Every node among a call's arguments, once per occurrence, in the order of the operator's schema."""
    return list(tensors_in(arguments(node) if isinstance(node.target, torch._ops.OpOverload) else (node.args, node.kwargs)))


def _pairs(old: Node, new: Node) -> Iterator[tuple[Node, Node]]:
    """Operands of a call before and after, by argument; what only one of the two has is left out."""
    if not isinstance(old.target, torch._ops.OpOverload):
        yield from zip(_operands(old), _operands(new), strict=True)
        return
    before, after = arguments(old), arguments(new)
    for name in before:
        yield from zip(tensors_in(before[name]), tensors_in(after.get(name)), strict=False)


def _settings(node: Node) -> Any:
    """A call's operator and arguments with the operands left blank; a transposition is a permutation."""
    if node.target is aten.transpose.int:
        order, a = list(range(len(shape(node)))), arguments(node)
        order[a["dim0"]], order[a["dim1"]] = order[a["dim1"]], order[a["dim0"]]
        return aten.permute.default, {"self": None, "dims": order}
    given = arguments(node) if isinstance(node.target, torch._ops.OpOverload) else (node.args, node.kwargs)
    return node.target, map_aggregate(given, lambda each: None if isinstance(each, Node) else each)


def stack_of(node: Node) -> list[tuple[Instance, str]]:
    """The module calls that a node was traced in, the outermost first: (call, path)."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(key, module_path(path)) for key, (path, _) in stack.items()]


def _path(node: Node) -> str:
    return stack_of(node)[-1][1] if stack_of(node) else ""
