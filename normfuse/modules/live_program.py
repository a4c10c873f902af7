"""Live mode of a program: what a rewrite makes of a stored tensor is computed at every call, from the tensor as it was.

The new tensors of a rewritten program are formulas. Evaluated, they make the program that serves (deploy mode). Here they
become calls of the graph instead: the program keeps exactly the tensors of the original, under their names, and gradients reach
them. Whatever an optimizer does to them, weight decay included, it does to the original model.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from normfuse.graph.arithmetic import operator_named
from normfuse.graph.edits import copied
from normfuse.graph.expressions import ALONG_AXIS, Call, Formula, Number, Read, along_axis, interpret, reads
from normfuse.graph.program import Program
from normfuse.graph.shapes import fake_mode
from normfuse.graph.views import aten
from normfuse.sources.inputs import Inputs


def traced_as_set(module: nn.Module, given: Inputs) -> Program:
    """A module as its parts are set, in training or in evaluation mode: what it draws at random in training is in the graph.

    Raises:
        TraceError: torch.export could not trace it.
    """
    training = {each for each in module.modules() if each.training}
    traced = Program.trace(module, given.args, given.kwargs, given.dynamic_shapes, trains=training.__contains__)
    note = "the live program is the model in training mode; it cannot be set to evaluation mode"
    if not module.training:
        note = "the model is in evaluation mode, so the live program has no dropout; call model.train() first to train with it"
    return replace(traced, notes=(note,))


def alive(program: Program) -> Program:
    """A rewritten program with its formulas as calls of the graph, over the tensors that it was traced with.

    Formulas are computed in float32 at least, whatever the dtype of the tensors; the result is rounded to the tensor's own.

    Args:
        program: the program, its formulas not evaluated.

    Returns:
        A program without formulas. Its parameters are those of the model that was traced, not copies.
    """
    draft, copies = copied(program)
    graph, state = draft.graph, dict(program.exported.state_dict)
    stored = {name: copies[node] for node, name in program.stored.items()}
    readers = {name: list(stored[name].users) for name in program.formulas}
    promised = {name: stored[name].meta["val"] for name in program.formulas}
    read = {leaf for name, formula in program.formulas.items() if readers[name] for leaf in reads(formula)}
    with fake_mode(graph), torch.no_grad():
        for name in read:
            stored[name].meta["val"] = _like(program.tensor(name))
        for name, formula in program.formulas.items():
            if readers[name]:
                value = _Emitted(graph, stored, formula, name).rounded_to(promised[name])
                for reader in readers[name]:
                    reader.replace_input_with(stored[name], value)
    for name in program.formulas.keys() - read:
        if program.tensor(name).is_meta:  # a new tensor, which only its formula gives a value
            graph.erase_node(stored[name])
            del state[name]
        else:
            stored[name].meta["val"] = _like(program.tensor(name))
    graph.lint()
    return Program(program.rebuilt(draft, graph, state), notes=program.notes)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


class _Emitted:
    """A formula as calls behind a graph's placeholders."""

    def __init__(self, graph: Graph, stored: Mapping[str, Node], formula: Formula, name: str) -> None:
        self.graph, self.stored, self.name = graph, stored, name
        leaves = [stored[each].meta["val"] for each in reads(formula)]
        self.dtype = reduce(torch.promote_types, (each.dtype for each in leaves), torch.float32)
        self.device = leaves[0].device if leaves else None
        self.first = next(node for node in graph.nodes if node.op != "placeholder")
        self.value: Node = interpret(formula, self._leaf, self._made)

    def rounded_to(self, promised: Tensor) -> Node:
        """The value in the dtype that the tensor has."""
        value = self._cast(self.value, promised.dtype)
        assert value.meta["val"].shape == promised.shape, f"'{self.name}' would have another shape than its formula"
        return value

    def _leaf(self, leaf: Read | Number) -> Node:
        if isinstance(leaf, Read):
            return self._cast(self.stored[leaf.name], self.dtype)
        return self._call(aten.full.default, [], leaf.value, dtype=self.dtype, device=self.device)

    def _made(self, call: Call, values: list[Any]) -> Node:
        if call.op in ALONG_AXIS:
            rank = values[0].meta["val"].dim()
            made: Node = along_axis(call, values, rank, lambda op, *args: self._call(operator_named(op), *args))
            return made
        result = self._call(operator_named(call.op), *values, **dict(call.kwargs))
        several = isinstance(result.meta["val"], (tuple, list))
        return self._call(operator.getitem, result, call.output) if several else result

    def _cast(self, value: Node, dtype: torch.dtype) -> Node:
        same = value.meta["val"].dtype == dtype
        return value if same else self._call(aten._to_copy.default, value, dtype=dtype)

    def _call(self, target: Any, *args: Any, **keywords: Any) -> Node:
        with self.graph.inserting_before(self.first):
            node = self.graph.call_function(target, args, keywords)
        node.meta["normfuse"] = ("live", self.name)
        node.meta["val"] = target(*torch.fx.node.map_arg(args, lambda each: each.meta["val"]), **keywords)
        return node
