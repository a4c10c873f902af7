"""What a model's own class makes of the tensors that a plan leaves behind: a state dict must stand by itself.

A norm whose gain has gone into its readers still has a gain, and where the model is built anew from its class and loads the
state dict, that gain is applied. So a tensor that nobody reads any more takes the number with which its class changes nothing:

    a gain      1 (0 where the class adds one to it, as Gemma's and Nemotron's do)
    a shift     0
    statistics  mean 0 and variance 1 - ε, so that √(variance + ε) is 1

Which number that is follows from the graph: from the operator's argument, or from the arithmetic between tensor and value.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch.fx import Node

from normfuse.analysis.affine import constant_formula
from normfuse.analysis.facts import Facts
from normfuse.graph.expressions import Call, Formula, Read, evaluate, reads
from normfuse.graph.ops.lookup import computes, keeps, neutral, reads_entries
from normfuse.graph.ops.lookup import layer as layer_of
from normfuse.graph.ops.norms import operator_norm
from normfuse.graph.ops.row import SAME, Computes
from normfuse.graph.program import Program
from normfuse.graph.views import NormKind, arguments, dtype, shape

_CLOSE = 1e-12


@dataclass(frozen=True)
class Bare:
    """What a value is where the tensors that it is made with are neutral.

    Attributes:
        value: the earlier value that it is then, or the norm without gain and shift that it is then.
        numbers: tensor name → its neutral number.
        readers: the calls that read those tensors.
        norms: whether a norm is among what then does nothing.
    """

    value: Node
    numbers: dict[str, float]
    readers: frozenset[Node]
    norms: bool


class UnreadTensors:
    """The tensors that a rewritten program does not read any more, and their neutral numbers."""

    def __init__(self, program: Program, rewritten: Program) -> None:
        self.program, self._facts = program, Facts(program)
        read = {name for node, name in rewritten.stored.items() if rewritten.nodes[node].users}
        known = set(program.tensor_names())
        self.read = frozenset(read.union(*(program.twins(name) for name in read & known)))
        unread = {name for node, name in program.stored.items() if program.nodes[node].users} - self.read
        self.names = unread & set(program.exported.state_dict)  # the class never sees what is not saved

    def bare(self, value: Node, stop: Node | None = None) -> Bare:
        """Follow a value back, at most to ``stop``, through what changes nothing where its tensors are neutral."""
        numbers: dict[str, float] = {}
        readers: set[Node] = set()
        norms = False
        while value is not stop:
            onward, wanted = self._step(value)
            found = [self._solved(entering, number) for entering, number in wanted]
            if onward is not None and None in found:
                break
            for each in found:
                numbers |= each or {}
            readers |= {call_of(value)} if wanted else set()
            if onward is None:
                break
            norms, value = norms or operator_norm(value) is not None, onward
        return Bare(value, numbers, frozenset(readers), norms)

    def _step(self, node: Node) -> tuple[Node | None, list[tuple[Node, float]]]:
        """The operand that a call gives where others are (constant, number), or None where a norm is left."""
        norm = operator_norm(node)
        if norm is not None:
            a = arguments(call_of(node))
            roles = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0 - norm.eps}
            wanted = [(a[each], number) for each, number in roles.items() if isinstance(a.get(each), Node)]
            return norm.x if norm.kind == NormKind.BATCH_NORM and not a.get("training") and norm.eps < 1 else None, wanted
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            return None, []
        a, constant = arguments(node), self.program.constant
        if layer_of(node):
            return None, [(a["bias"], 0.0)] if isinstance(a["bias"], Node) else []
        if keeps(node) in SAME:
            return a["self"], []
        x, other = a.get("self"), a.get("other")
        if x in constant and computes(node) in (Computes.PRODUCT, Computes.SUM):
            x, other = other, x
        number = neutral(node)
        if number is None or not isinstance(x, Node) or x in constant or other not in constant:
            return None, []
        if str(shape(x)) != str(shape(node)):
            return None, []
        return x, [(other, number)]

    def _solved(self, entering: Node, number: float) -> dict[str, float] | None:
        """Numbers for the tensors that a constant is computed from, with which all its entries are one number."""
        formula = constant_formula(self._facts, entering)
        names = list(dict.fromkeys(reads(formula))) if formula is not None else []
        if formula is None or not names or not self.names.issuperset(names):
            return None
        tried: list[tuple[float, ...]] = [(number,), *product((1.0, 0.0), repeat=len(names))] if len(names) < 5 else []
        if len(names) == 1:
            tried += self._line(formula, names, number)
        good = (dict(zip(names, each, strict=True)) for each in tried if len(each) == len(names))
        return next((each for each in good if self._is(formula, each, number)), None)

    def _line(self, formula: Formula, names: list[str], number: float) -> Iterator[tuple[float, ...]]:
        at_zero, at_one = (self._value(formula, {names[0]: each}).flatten()[0].item() for each in (0.0, 1.0))
        if at_one != at_zero:
            yield ((number - at_zero) / (at_one - at_zero),)

    def _is(self, formula: Formula, numbers: dict[str, float], number: float) -> bool:
        return bool((self._value(formula, numbers) - number).abs().max() <= _CLOSE)

    def _value(self, formula: Formula, numbers: dict[str, float]) -> torch.Tensor:
        like = self.program.tensor
        return evaluate(formula, lambda name: torch.full_like(like(name), numbers[name], dtype=torch.float64))

    def entering(self, name: str) -> Iterator[Node]:
        """The calls at which a tensor, or what is computed from it, meets what is no constant."""
        waiting = [self.program.reader_of(name)]
        while waiting:
            for reader in waiting.pop().users:
                if reader in self.program.constant:
                    waiting.append(reader)
                elif reads_entries(reader):
                    yield reader

    def left_by(self, bare: Bare, given_up: list[Node]) -> bool:
        """Whether tensors that a norm is to give up have no neutral number."""
        formulas = [constant_formula(self._facts, each) for each in given_up]
        return any(each is None or not bare.numbers.keys() >= set(reads(each)) for each in formulas)

    def neutral(self, bare: list[Bare]) -> dict[str, float]:
        """Tensors, among those of some values, whose number is neutral for every call that reads them."""
        readers = frozenset[Node]().union(*(each.readers for each in bare))
        found: dict[str, float] = {}
        disputed: set[str] = set()
        for each in bare:
            disputed |= {name for name, number in each.numbers.items() if found.setdefault(name, number) != number}
        return {
            name: number for name, number in found.items() if name not in disputed and readers.issuperset(self.entering(name))
        }

    def borrowed(self, layer: Node, bare: list[Bare], neutral: dict[str, float]) -> str | None:
        """The shift of the norm behind a layer, where that norm does nothing any more: it may hold the layer's new bias."""
        readers = [reader for reader in layer.users if reads_entries(reader)]
        a = arguments(readers[0]) if len(readers) == 1 and isinstance(readers[0].target, torch._ops.OpOverload) else {}
        shift = a.get("bias")
        name = self.program.stored.get(shift.name) if isinstance(shift, Node) and a.get("input") is layer else None
        if name is None or name not in neutral or not any(readers[0] in each.readers and each.norms for each in bare):
            return None
        alone = list(self.entering(name)) == readers and not self.program.twins(name)
        return name if alone and dtype(layer) == self.program.tensor(name).dtype else None


def call_of(value: Node) -> Node:
    """The call that yields a value, alone or among others."""
    source = value.args[0] if value.target is operator.getitem else value
    return source if isinstance(source, Node) else value


def filled(name: str, number: float) -> Formula:
    """A tensor with one number everywhere."""
    return Call("full_like.default", (Read(name), number))


def is_same_without(new: Node, old: Node, is_still: Callable[[Any, Any], bool]) -> bool:
    """Whether a new call is an old norm or layer without tensors that the old one has, all else being alike.

    Args:
        new: a node.
        old: a node of the program before.
        is_still: whether a new and an old argument are the same.
    """
    was, now = operator_norm(old), operator_norm(new)
    alike = was is not None and now is not None and was.kind != NormKind.BATCH_NORM and was.eps == now.eps
    if new.target is not old.target or not (alike or layer_of(new)):
        return False
    before, after = arguments(old), arguments(new)
    gone = {key for key in ("weight", "bias") if after.get(key, 0) is None}
    compared = [key for key in before if key not in {"input", "eps", "cudnn_enable", "cudnn_enabled"} | gone]
    return all(is_still(after[key], before[key]) for key in compared)
