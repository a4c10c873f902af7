"""A traced model: a functional graph of aten calls, its named tensors, its example inputs and dynamic dims.

A `Program` wraps a `torch.export.ExportedProgram` in its lifted form: every stored tensor is a placeholder, so that the
readers of a *tensor* are the users of one node, whatever aliases and ties the module had. It is never mutated; edits
make another one (see `normfuse.graph.edits`). Weight changes are kept as formulas over the original tensors until they are
needed: planning costs no arithmetic, and several rewrites of one tensor round once.

This is the only file that calls `torch.export.export`, `load` and `save`.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export import _trace as exporting
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node

from normfuse.errors import TraceError, first_line, listed
from normfuse.graph.blocks import rounded
from normfuse.graph.expressions import Formula
from normfuse.graph.functional import functional, functional_in_place
from normfuse.graph.nodes import constants
from normfuse.graph.sharded import Gathered, memory_of, whole
from normfuse.graph.signature import signature_of
from normfuse.limits import OverLimit
from normfuse.sources.atomic import late_errors
from normfuse.sources.call_signature import what_forward_takes
from normfuse.sources.extents import check_values

Trains = Callable[[nn.Module], bool]
"""Whether a module is in training mode."""

STORED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


@dataclass(frozen=True)
class Site:
    """Where a node comes from, for messages only.

    Attributes:
        node: the node's name in the graph.
        module: path of the module that made it, such as ``encoder.layers.0.norm1``; empty for the model itself.
        source: the user's line that made it, as ``file.py:12``; empty when the tracer kept none.
    """

    node: str
    module: str = ""
    source: str = ""

    def __str__(self) -> str:
        return self.module or self.node

    def to_dict(self) -> dict[str, str]:
        """The site as JSON types."""
        return {"site": str(self), "node": self.node, "module": self.module, "source": self.source}


@dataclass(frozen=True)
class Program:
    """A traced model with the weight formulas that are still to be evaluated.

    Attributes:
        exported: the lifted, functional graph with the *original* tensors.
        formulas: what stored tensors become, by tensor name, over the original tensors.
        notes: what the user should know of how the model was traced.
    """

    exported: ExportedProgram
    formulas: Mapping[str, Formula] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    # -- making one ----------------------------------------------------------------------------------------------------

    @classmethod
    def trace(
        cls,
        module: nn.Module,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        dynamic_shapes: Any = None,
        *,
        trains: Trains | None = None,
    ) -> Program:
        """Trace a module as it behaves at inference; its training flags and its config are put back afterwards.

        A model in training mode is traced in evaluation mode. Where only parts of it are in training mode, they are meant to be
        (Monte-Carlo dropout, statistics that adapt to the test data), and stay so. A transformers model is traced without its
        key-value cache, which torch.export cannot return. Notes say so.

        Args:
            module: the trained model.
            args: example positional inputs.
            kwargs: example keyword inputs.
            dynamic_shapes: as for `torch.export.export`.
            trains: which of its modules are in training mode while it is traced, whatever they are now.

        Raises:
            TraceError: torch.export could not trace the model, or a value of it would be larger than `limits.VALUE_BYTES`.
        """
        _check_names(module, kwargs or {})
        with at_inference(module, trains) as notes, whole(module), quiet():
            try:
                exported = _exported(module, args, kwargs or {}, dynamic_shapes)
            except Exception as error:  # torch.export raises anything that the user's forward raises
                raise TraceError(
                    f"torch.export could not trace {type(module).__name__}: {first_line(error)}",
                    hint=f"{_trace_hint(str(error))}; its forward takes {what_forward_takes(module)}",
                ) from error
        return cls._of(_made_functional(exported, functional_in_place), tuple(notes))

    @classmethod
    def from_exported(cls, exported: ExportedProgram, notes: tuple[str, ...] = ()) -> Program:
        """Make a program functional (in-place ops, ``no_grad`` blocks) without decomposing linear, conv or norms.

        Torch's other names of operators become those that we know (`normfuse.graph.composites`).
        Placeholders of exactly the same tensor become one: torch.export merges names of one Parameter object, not a buffer
        or a second Parameter over the same memory, and a tie that the graph does not show could not be respected.
        """
        return cls._of(_made_functional(exported, functional), notes)

    @classmethod
    def _of(cls, exported: ExportedProgram, notes: tuple[str, ...]) -> Program:
        _check_memory(exported)
        program = cls(exported, notes=notes)
        first: dict[tuple[Any, ...], Node] = {}
        for node in program.graph.find_nodes(op="placeholder"):
            name = program.stored.get(node.name)
            if name is not None and program.tensor(name).numel() > 0:
                kept = first.setdefault(identity(program.tensor(name)), node)
                if kept is not node:
                    node.replace_all_uses_with(kept)
        return program

    # -- looking at it -------------------------------------------------------------------------------------------------

    @property
    def graph(self) -> Graph:
        """The graph; treat it as read-only."""
        graph: Graph = self.exported.graph
        return graph

    @cached_property
    def nodes(self) -> dict[str, Node]:
        """Every node by its name."""
        return {node.name: node for node in self.graph.nodes}

    @cached_property
    def stored(self) -> dict[str, str]:
        """Placeholder node name -> name of the stored tensor (parameter, buffer or constant) that it stands for."""
        return {
            spec.arg.name: spec.target
            for spec in self.exported.graph_signature.input_specs
            if spec.kind in STORED and spec.target is not None
        }

    @cached_property
    def written(self) -> frozenset[str]:
        """Names of stored tensors that the program itself updates; nothing may be folded into or computed from those."""
        signature = self.exported.graph_signature
        named = {*signature.buffers_to_mutate.values(), *getattr(signature, "parameters_to_mutate", {}).values()}
        return frozenset(named).union(*(self.twins(name) for name in named))

    @cached_property
    def constant(self) -> frozenset[Node]:
        """Values that depend on stored tensors alone; those that the program updates and random numbers are none."""
        return constants(self.graph, {node: name for node, name in self.stored.items() if name not in self.written})

    def tensor(self, name: str) -> Tensor:
        """The original stored tensor of this name."""
        state = self.exported.state_dict
        tensor: Tensor = state[name] if name in state else self.exported.constants[name]
        return tensor

    def tensor_names(self) -> Iterator[str]:
        """Names of all stored tensors, unused ones included."""
        yield from self.exported.state_dict
        yield from (name for name, value in self.exported.constants.items() if isinstance(value, Tensor))

    def reader_of(self, name: str) -> Node:
        """The placeholder node that stands for a stored tensor; its users are the tensor's readers."""
        return self.nodes[self._placeholder_of[name]]

    @cached_property
    def _placeholder_of(self) -> dict[str, str]:
        return {target: node for node, target in self.stored.items()}

    def twins(self, name: str) -> list[str]:
        """Other names of exactly the same tensor (tied weights keep one placeholder but several names)."""
        key = identity(self.tensor(name))
        return [other for other in self._names_by_identity.get(key, []) if other != name]

    @cached_property
    def _names_by_identity(self) -> dict[tuple[Any, ...], list[str]]:
        table: dict[tuple[Any, ...], list[str]] = {}
        for name in self.tensor_names():
            table.setdefault(identity(self.tensor(name)), []).append(name)
        return table

    def site(self, node: Node) -> Site:
        """Where a node comes from: module path and the user's source line; of one that a rewrite made, those it stands for."""
        stack = node.meta.get("nn_module_stack") or {}
        path = list(stack.values())[-1][0] if stack else ""
        return Site(node.meta.get("stands_for", node.name), module_path(path), _source_line(node.meta.get("stack_trace")))

    # -- using it ------------------------------------------------------------------------------------------------------

    def baked(self) -> Program:
        """The program with every formula evaluated in float64 and rounded once (deploy mode).

        Tensors that no formula changes are shared with the original, not copied. It is evaluated once, however often it is
        asked for.
        """
        return self._baked if self.formulas else self

    @cached_property
    def _baked(self) -> Program:
        state, constants = dict(self.exported.state_dict), dict(self.exported.constants)
        for name in self.formulas:
            new = rounded(self.formulas[name], self.tensor, self.tensor(name).dtype)
            for each in (name, *self.twins(name)):
                home = state if each in state else constants
                home[each] = _like(new, home[each])
        return Program(self.rebuilt(self.exported.graph_module, self.graph, state, constants), notes=self.notes)

    def with_own_handles(self) -> Program:
        """The same program over the same memory, which keeps its values where a model's tensors are given other memory."""
        state = {name: _like(tensor.detach(), tensor) for name, tensor in self.exported.state_dict.items()}
        constants = {name: each.detach() if type(each) is Tensor else each for name, each in self.exported.constants.items()}
        return replace(self, exported=self.rebuilt(self.exported.graph_module, self.graph, state, constants))

    def rebuilt(
        self,
        root: torch.fx.GraphModule,
        graph: Graph,
        state: Mapping[str, Tensor] | None = None,
        constants: Mapping[str, Any] | None = None,
    ) -> ExportedProgram:
        """An exported program with another graph or other tensors and everything else (dynamic dims, trees) kept."""
        old = self.exported
        new = ExportedProgram(
            root=root,
            graph=graph,
            graph_signature=signature_of(graph, old.graph_signature),
            state_dict=dict(old.state_dict if state is None else state),
            range_constraints=old.range_constraints,
            module_call_graph=old.module_call_graph,
            example_inputs=old.example_inputs,
            constants=dict(old.constants if constants is None else constants),
            verifiers=old.verifiers,
        )
        new._guards_code = list(old._guards_code)  # what any analysis asked of an example's sizes since is no guard
        return new

    def module(self) -> torch.fx.GraphModule:
        """A callable with the signature of the traced model."""
        with quiet():
            return self.baked().exported.module()

    def save(self, path: Path) -> None:
        """Write the baked program as ``.pt2``; `torch.export.load` opens it without normfuse."""
        with quiet(), late_errors(path) as stream:
            torch.export.save(self.baked().exported, stream)


def _exported(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> ExportedProgram:
    try:
        return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        if not type(error).__module__.startswith("torch._dynamo"):
            raise
        # dynamo traces the bodies of cond and its like, and knows the module's own tensors in them only in strict mode
        return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=True)


def _made_functional(exported: ExportedProgram, make: Callable[[ExportedProgram], ExportedProgram]) -> ExportedProgram:
    _check_written((*exported.state_dict, *exported.constants))
    with quiet():
        try:
            return make(exported)
        except Exception as error:  # as torch raises it, where an updated buffer has two names for one
            raise TraceError(
                f"torch.export could not make this program functional: {first_line(error)}",
                hint="run exported.run_decompositions({}) by itself for the whole story",
            ) from error


_TRACE_HINTS = (
    ("register a pytree", "tell torch of the output's class: torch.export.register_dataclass(TheClass)"),
    ("uninitialized parameter", "call the model once on an input, so that its lazy layers get their sizes"),
    ("cpu and meta", "its weights are on the meta device: model.to_empty(device='cpu'), then load_state_dict"),
    (
        "data-dependent",
        "its forward decides in Python by what tensors hold, as a loop over the experts that have tokens does: compute all of "
        "them, or use torch.cond; torch.export.export(model, inputs, strict=False) tells the line",
    ),
    ("", "run torch.export.export(model, inputs, strict=False) by itself for the whole story"),
)


def _trace_hint(said: str) -> str:
    return next(hint for part, hint in _TRACE_HINTS if part in said)


def _check_names(module: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Refuse names that would end the literal that torch writes them into, and go on as code: torch.fx quotes none."""
    for path, child in module.named_modules(remove_duplicate=False):
        _check_written((path, *child._parameters, *child._buffers, *vars(child)))
    if strange := next((name for name in kwargs if not str(name).isidentifier()), None):
        raise TraceError(
            f"'{strange}' is no name of an argument", hint="give keyword inputs by the names of forward's arguments"
        )


def _check_written(names: Iterable[Any]) -> None:
    for name in names:
        if _ENDS_LITERAL.search(str(name)):
            hint = "rename it: torch writes names into the code of a program"
            raise TraceError(f"'{name}' cannot be the name of a module or a tensor", hint=hint)


_ENDS_LITERAL = re.compile(r'["\\\r\n\0]')


def module_path(traced: str) -> str:
    """The path of a module as its model knows it, from an entry of a node's ``nn_module_stack``."""
    return re.sub(r"@\d+$", "", re.sub(r"^(L\['self'\]|_export_root\b)\.?", "", traced))


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors have in common that are the same entries of the same memory."""
    held = memory_of(tensor.shard) if isinstance(tensor, Gathered) else tensor
    return (
        held.untyped_storage()._cdata,
        held.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
    )


def _like(new: Tensor, old: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _source_line(stack_trace: str | None) -> str:
    """The innermost frame that is not torch's own, as ``package/file.py:12``."""
    frames: list[tuple[str, str]] = re.findall(r'File "([^"]+)", line (\d+)', stack_trace or "")
    own = [(file, line) for file, line in frames if "/torch/" not in file.replace("\\", "/") and "<" not in file]
    own = own or frames
    if not own:
        return ""
    file, line = own[-1]
    tail = re.split(r"site-packages/|dist-packages/", file.replace("\\", "/"))[-1]
    return f"{tail if tail != file else Path(file).name}:{line}"


@contextlib.contextmanager
def at_inference(module: nn.Module, trains: Trains | None = None) -> Iterator[list[str]]:
    """The module as it behaves at inference, and with no key-value cache; yields what to tell the user of it.

    Args:
        module: the model; its training flags and its configs are put back.
        trains: which of its modules are in training mode, whatever they are now. None: those that are in training mode while
            the model itself is not.
    """
    before, root = {child: child.training for child in module.modules()}, module.training
    configs = {id(config): config for child in before if (config := getattr(child, "config", None)) is not None}
    caching = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    notes = _told_of_training(module) if trains is None else []
    try:
        for child, training in before.items():
            child.training = training and not root if trains is None else trains(child)
        for config in caching:
            config.use_cache = False
        yield notes + (["the model was traced without its key-value cache (config.use_cache)"] if caching else [])
    finally:
        for child, training in before.items():
            child.training = training
        for config in caching:
            config.use_cache = True


def _told_of_training(module: nn.Module) -> list[str]:
    """What the user should know of a model's training flags."""
    if module.training:
        return ["the model was in training mode; it was traced in evaluation mode"]
    kept: list[str] = []
    for path, child in module.named_modules():
        if child.training and not any(path.startswith(f"{outer}.") for outer in kept):
            kept.append(path)
    if not kept:
        return []
    some = listed([f"'{path}'" for path in kept], 3)
    return [
        f"{some} in training mode inside a model in evaluation mode: kept so; model.eval() sets all of it to evaluation mode"
    ]


def _check_memory(exported: ExportedProgram) -> None:
    try:
        check_values(exported.graph_module)
    except OverLimit as over:
        hint = f"give smaller inputs, or raise the limit: {over.setting}"
        raise TraceError(f"the model is not run: {over}", hint=hint) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch.export warns of its own deprecations, logs its failures at length and prints graphs; they are not for our users."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), mock.patch.object(exporting, "print", create=True):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
