"""What a plan means for the modules that a program was traced from: which tensors they read, which forwards change.

The graph before and the graph after are compared, so several rounds of rewrites are one change. Of a reader that is still
there but reads another value, the new value is placed on modules in one of three ways:

    instead   a module's forward gives an expression of its input: BatchNorm → its input, LayerNorm → RMSNorm
    after     an expression of what the module's forward gave: a mean-subtraction behind an embedding's dropout
    before    the module is given an expression of its first input: a mean-subtraction in front of the first block

Everything else has no place on modules and is refused before anything is changed:

    NF104  The rewrite cannot be made on the live modules: it would put an operation between two functions of one forward
           method, or it replaces code that is in no module of its own; or what is saved of the model would be another
           function in its own class, or its files hold a tensor in another form than the class has it.
           Rewrite the traced program instead (normfuse.rewrite).

Tensors that nobody reads afterwards take the numbers with which their classes change nothing (`unread_tensors`), and where a
class only has to be given such numbers, no forward changes at all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import Node

from normfuse.analysis.obstacles import Why
from normfuse.graph.expressions import Call, Expression, Formula, Ref, literal, reads, substitute
from normfuse.graph.ops.lookup import reads_entries
from normfuse.graph.ops.norms import operator_norm
from normfuse.graph.program import Program
from normfuse.graph.sharded import is_sharded
from normfuse.graph.views import shape
from normfuse.modules.graph_diff import Comparison, Instance, Unplaced, stack_of
from normfuse.modules.unread_tensors import filled

VALUE = Ref("·")
"""In an expression on a module: the module's input (``instead``, ``before``) or what its forward gave (``after``)."""

FREE_OF_SIZES = frozenset({
    "rms_norm.default", "layer_norm.default", "mul.Tensor", "add.Tensor", "sub.Tensor", "neg.default", "mean.dim",
    "transpose.int", "permute.default", "type_as.default", "clone.default",
    "_to_copy.default", "relu.default", "silu.default", "gelu.default", "hardswish.default", "hardsigmoid.default",
    "hardtanh.default", "sigmoid.default", "tanh.default", "leaky_relu.default", "elu.default", "mish.default",
})  # fmt: skip
"""What may run on modules: a live model meets other sizes than the traced ones, which `view` would have in its arguments."""


@dataclass(frozen=True)
class Change:
    """What becomes of one module's forward: an expression over `VALUE` and stored tensors' names."""

    place: str
    by: Expression


def both(first: Change | None, then: Change) -> Change | None:
    """Two changes of a module as one, where the second is made on the module as the first has left it; None where none is."""
    if first is None or then.place == "instead":
        return then
    if (first.place == "before" and then.place == "before") or (first.place == "instead" and then.place == "before"):
        return Change(first.place, substitute(first.by, {VALUE.name: then.by}))
    return Change(first.place, substitute(then.by, {VALUE.name: first.by})) if first.place != "before" else None


@dataclass(frozen=True)
class Adaptation:
    """A rewritten program as changes of modules.

    Attributes:
        formulas: what stored tensors become, over the original ones, new biases included.
        biases: names of biases that their modules did not have, with the tensor whose dtype each takes.
        lent: of these, those that a norm which has given way holds as its shift, so that no new key is needed.
        changes: module path → what becomes of its forward.
        neutral: names of tensors that nobody reads any more → the formulas with which their classes change nothing.
        neutralized: of these, those of modules whose forward stays as it is.
        leaving: names of tensors that nobody reads any more and that are not neutral: they leave the state dict.
        unplaced: what cannot be expressed; nothing may be applied unless it is empty.
    """

    formulas: Mapping[str, Formula]
    biases: Mapping[str, str]
    lent: Mapping[str, str]
    changes: Mapping[str, Change]
    neutral: Mapping[str, Formula]
    neutralized: frozenset[str]
    leaving: frozenset[str]
    unplaced: tuple[Unplaced, ...]


def adapt(
    program: Program,
    rewritten: Program,
    model: nn.Module,
    *,
    same_keys: bool = False,
    stored: AbstractSet[str] | None = None,
) -> Adaptation:
    """Express the difference of two programs as changes of the modules that they were traced from.

    Args:
        program: the traced model.
        rewritten: what a plan made of it; its formulas not yet evaluated.
        model: the model; it is looked at, not changed.
        same_keys: what is saved must have the very keys that the model's class has, whoever loads it.
        stored: names of the tensors that files hold in the form that the model has: others cannot change. None: all can.
    """
    comparison = _Placement(program, rewritten, merges=same_keys)  # what is deployed is counted
    comparison.keep_sizes()
    changes = dict(comparison.agreed(model))
    if same_keys:
        comparison.refuse_norms_that_stay()
    fixed = _SHARDS if is_sharded(model) else _LENIENT if same_keys or is_lenient(model) else None
    neutral, neutralized, leaving, lent = comparison.left_behind(changes, fixed)
    formulas = {name: formula for name, formula in rewritten.formulas.items() if name not in neutral.keys() | leaving}
    if stored is not None:
        comparison.refuse_other_forms((lent.get(name, name) for name in (*formulas, *neutral)), stored)
    unplaced = tuple(comparison.unplaced)
    return Adaptation(formulas, comparison.biases, lent, changes, neutral, neutralized, leaving, unplaced)


_LENIENT = Why.LEAVES, Why.LEFT_OUT
_SHARDS = Why.LEAVES_SHARDS, Why.LEFT_WHOLE
"""Where no key may go or come: why one may not go, and why one may not come."""


def is_lenient(model: nn.Module) -> bool:
    """Whether what the model saves is loaded with missing or unexpected keys, and a warning (transformers, diffusers)."""
    return any(hasattr(each, "save_pretrained") and hasattr(each, "from_pretrained") for each in model.modules())


class _Placement(Comparison):
    """A comparison whose new values are put on modules; what has no place is left in `unplaced`."""

    def keep_sizes(self) -> None:
        """A tensor of another size has no place in a module whose code counts on its size."""
        for old in self.old.graph.find_nodes(op="placeholder"):
            new = self.new.nodes.get(old.name)
            if old.name in self.old.stored and new is not None and shape(new) != shape(old):
                self._refuse(Why.OTHER_SIZE, old, self.old.stored[old.name])

    def refuse_norms_that_stay(self) -> None:
        """A norm that is gone for its readers has no place in a class that computes one whatever its tensors are."""
        for value, new in self.replaced:
            bare = self.unread.bare(value, self.same.get(new))
            if new in self.same and bare.value is not self.same[new] and operator_norm(bare.value) is not None:
                self._refuse(Why.STAYS, value)

    def refuse_other_forms(self, names: Iterable[str], stored: AbstractSet[str]) -> None:
        """A tensor that no file holds as the model has it cannot be written there."""
        old = self.old
        known = set(old.tensor_names()).intersection(old.stored.values())
        for name in sorted(known.intersection(names)):
            if stored.isdisjoint((name, *old.twins(name))):
                self._refuse(Why.OTHER_FORM, old.reader_of(name), name)

    def left_behind(
        self, changes: Mapping[str, Change], fixed: tuple[Why, Why] | None
    ) -> tuple[dict[str, Formula], frozenset[str], frozenset[str], dict[str, str]]:
        """What becomes of tensors that nobody reads any more: (neutral, neutralized, leaving, lent) as in `Adaptation`.

        Args:
            changes: of modules.
            fixed: None where keys may go and come.
        """
        bare = [self.unread.bare(value, self.same.get(new)) for value, new in self.replaced]
        bare += self.neutralized.values()
        numbers = self.unread.neutral(bare)
        neutralized = {name: value for value, each in self.neutralized.items() for name in each.numbers}
        found = {name: self.unread.borrowed(layer, bare, numbers) for name, layer in self.layers.items()}
        lent = {name: home for name, home in found.items() if home is not None}
        inside = tuple(f"{path}." if path else "" for path, each in changes.items() if each.place == "instead")
        leaving = self.unread.names - numbers.keys()
        for name in sorted(leaving):
            reader = next(iter(self.unread.entering(name)), self.old.reader_of(name))
            if name in neutralized or not name.startswith(inside):
                self._refuse(Why.UNREAD, neutralized.get(name, reader), name)
            elif fixed:
                self._refuse(fixed[0], reader, name)
        for name in sorted(self.biases.keys() - lent.keys()):
            if fixed:
                self._refuse(fixed[1], self.layers[name], name, new=next(iter(self.new.reader_of(name).users)))
        return {name: filled(name, each) for name, each in numbers.items()}, frozenset(neutralized), frozenset(leaving), lent

    def agreed(self, model: nn.Module) -> Iterator[tuple[str, Change]]:
        """Changes of modules: one that is called several times must change alike in all of its calls."""
        calls: dict[int, set[Instance]] = defaultdict(set)
        for instance, path in self.paths.items():
            calls[id(model.get_submodule(path))].add(instance)
        found: dict[int, list[tuple[Instance, Node, Change]]] = defaultdict(list)
        for placed in self._placed():
            found[id(model.get_submodule(self.paths[placed[0]]))].append(placed)
        for module, places in found.items():
            instance, value, change = places[0]
            if {each for each, _, _ in places} != calls[module] or any(other != change for _, _, other in places):
                self._refuse(Why.CALLED_AGAIN, value)
            else:
                yield self.paths[instance], change

    def _placed(self) -> Iterator[tuple[Instance, Node, Change]]:
        """(Module call, value that is replaced, change); what has no place is left in `unplaced`."""
        seen_as: dict[Node, Node] = {}
        later: list[tuple[Node, Node, set[Node]]] = []
        for (value, new), readers in self.replaced.items():
            made = self._made(new, {})
            if value in {self.same.get(leaf) for leaf in self._leaves(new, {})} and made:
                found = self._insert(value, new, made, readers)
                if found is not None:
                    seen_as[new] = value
                    yield found[0], value, found[1]
            else:
                later.append((value, new, readers))
        order = {node: place for place, node in enumerate(self.old.graph.nodes)}
        for value, new, readers in sorted(later, key=lambda each: order[each[0]]):
            found_here = list(self._instead(value, new, seen_as, readers))
            if found_here and new not in self.same:
                seen_as[new] = value  # what reads the new value is given what the module gives
            yield from found_here

    def _insert(self, value: Node, new: Node, made: set[Node], readers: set[Node]) -> tuple[Instance, Change] | None:
        """Something is done to a value on its way to its readers."""
        leaves = {self.same.get(leaf) for leaf in self._leaves(new, {})}
        by = self._expression(new, {})
        if leaves - {value} or by is None:
            self._refuse(Why.READS_TWO, value, new=new)
            return None
        raw = {user for user in self._now(value).users if user not in made and reads_entries(user)}
        for instance in self._owners(value):
            if self._outputs(instance) == {value} and all(self.same.get(user) in self.bodies[instance] for user in raw):
                return instance, Change("after", by)
        for instance in self._around(readers):
            inside = [user for user in (*raw, *new.users) if instance in dict(stack_of(user))]
            if value not in self.bodies[instance] and set(inside) == set(new.users):
                return instance, Change("before", by)
        self._refuse(Why.IN_A_FORWARD, value, new=new)
        return None

    def _instead(
        self, value: Node, new: Node, seen_as: dict[Node, Node], readers: set[Node]
    ) -> Iterator[tuple[Instance, Node, Change]]:
        """A module's whole forward gives way to an expression of its input."""
        leaves = {seen_as.get(leaf) or self.same.get(leaf) for leaf in self._leaves(new, seen_as)}
        source = next(iter(leaves), None)
        by = self._expression(new, seen_as)
        way = list(self._way(value, source)) if self._readers(value) <= readers else []
        placed = len(leaves) == 1 and by is not None and way and way[-1][1] is source
        if not placed and self._neutralizes(value, new):
            return
        if len(leaves) != 1:
            self._refuse(Why.READS_SEVERAL, value, new=new)
        elif by is None:
            self._refuse(Why.HAS_SIZES, value, new=new)
        elif not way or way[-1][1] is not source:
            whole = self._whole_forward(value, seen_as)
            if whole is None:
                self._refuse(Why.NO_MODULE, value, new=new)
            else:
                yield whole
        else:
            if by == VALUE and self._is_read_beside(*way[-1]):
                by = Call("clone.default", (VALUE,))
            for place, (instance, _) in enumerate(way):
                yield instance, value, Change("instead", VALUE if place else by)

    def _whole_forward(self, value: Node, seen_as: dict[Node, Node]) -> tuple[Instance, Node, Change] | None:
        """A forward that does more than give a value (casts, transpositions, a gain of its own): all of it is made anew."""
        instance = next(self._owners(value), None)
        if instance is None or len(self._outputs(instance)) != 1 or len(self._inputs(instance)) != 1:
            return None
        (result,), source = self._outputs(instance), self._inputs(instance)
        anew = {self._now(node): node for node in self.bodies[instance] & self._still_there}
        new = self._now(result) if result in anew.values() else None
        if new is None:
            return None
        self.same = {node: old for node, old in self.same.items() if node not in anew}
        by = self._expression(new, seen_as)
        if by is None or {seen_as.get(leaf) or self.same.get(leaf) for leaf in self._leaves(new, seen_as)} != source:
            self.same |= anew
            return None
        seen_as[new] = result
        return instance, value, Change("instead", by)

    def _neutralizes(self, value: Node, new: Node) -> bool:
        """Whether a value is what takes its place where its tensors are neutral, no norm done for nothing."""
        bare = self.unread.bare(value, self.same.get(new))
        if bare.value is not self.same.get(new) or bare.norms:
            return False
        self.neutralized[value] = bare
        return True

    def _way(self, value: Node, source: Node | None) -> Iterator[tuple[Instance, Node]]:
        """From a value back to its source through modules of which nothing is left: (call, what it is given)."""
        while value is not source and value not in self._still_there:
            found = next(((i, given) for i in reversed(list(self._owners(value))) if (given := self._given(i, value))), None)
            if found is None:
                return
            instance, value = found
            yield instance, value

    def _is_read_beside(self, instance: Instance, source: Node) -> bool:
        """Whether somebody else, the caller included, holds what the last module on a way is given.

        The module gave a tensor of its own, into which the model's code may write.
        """
        return source.op == "placeholder" or any(instance not in dict(stack_of(user)) for user in source.users)

    def _given(self, instance: Instance, value: Node) -> Node | None:
        """The one value that a module call is given, if it computes this value and nothing that is still there."""
        body = self.bodies[instance]
        computes = any(reads_entries(node) for node in body & self._still_there - self.old.constant)
        inputs = self._inputs(instance)
        return next(iter(inputs)) if not computes and self._outputs(instance) == {value} and len(inputs) == 1 else None

    # -- expressions ---------------------------------------------------------------------------------------------------

    def _expression(self, new: Node, stops: Mapping[Node, Node]) -> Expression | None:
        """A new value over `VALUE` and tensors' names; None where it has sizes of the trace in it."""
        if new.name in self.new.stored:
            return Ref(self.new.stored[new.name])
        if new in stops or (new in self.same and self.same[new] not in self.old.constant):
            return VALUE
        op = str(new.target).removeprefix("aten.")
        if op not in FREE_OF_SIZES:
            return None
        args = [self._expression(each, stops) if isinstance(each, Node) else literal(each) for each in new.args]
        if None in [a for a, b in zip(args, new.args, strict=True) if b is not None]:
            return None
        if new.kwargs.keys() - {"dtype"}:
            return None
        in_dtype = ("dtype", str(new.kwargs["dtype"]).removeprefix("torch.")) if "dtype" in new.kwargs else None
        return Call(op, tuple(args), (in_dtype,) if in_dtype else ())


def stored_names(by: Expression) -> Iterator[str]:
    """Names of the stored tensors that a change's expression reads."""
    return (name for name in reads(by) if name != VALUE.name)


def input_of(program: Program, path: str) -> torch.Tensor | None:
    """The (fake) value that a module was given in the trace; None where it is not given one tensor of fixed sizes."""
    body = {node for node in program.graph.nodes if path in {each for _, each in stack_of(node)}}
    given = {operand for node in body for operand in node.all_input_nodes} - body
    values = [node.meta.get("val") for node in given if node.name not in program.stored]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    fixed = len(tensors) == len(values) > 0 and all(isinstance(size, int) for size in tensors[0].shape)
    return tensors[0] if fixed else None
