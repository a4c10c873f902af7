"""The shapes of a program while it is changed: new values get theirs, and no value changes its own unless a plan says so.

Values are computed on fake tensors, in execution order, for new calls and for all that read what changed its size. Whatever
comes out must be what was there before, with the sizes that the plan declares put in: also where an odd size would have slipped
through by broadcasting, or into a size that a view infers.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode

from normfuse import limits
from normfuse.errors import InvalidPlan, first_line
from normfuse.graph.ops.sizes import with_size
from normfuse.limits import OverLimit

Form: TypeAlias = Any
"""What may not change by accident: sizes and dtype of a tensor, of each tensor where there are several."""


class Shapes:
    """The shapes of a draft against those of the program that it is a copy of."""

    def __init__(self, old: Mapping[str, Node], copies: Mapping[str, Node], declared: Iterable[tuple[str, int, int]]) -> None:
        """Take the program's nodes and their copies, both by name, and the sizes that may change as (name, axis, size)."""
        self._copies = dict(copies)
        self._old = {copy: old[name] for name, copy in copies.items()}
        self._declared: dict[str, dict[int, int]] = defaultdict(dict)
        for name, axis, size in declared:
            self._declared[name][axis] = size
        self._changed: set[Node] = set()
        self._replaced: dict[Node, list[tuple[Node, str]]] = defaultdict(list)
        for name in self._declared.keys() & copies.keys():
            self._resize(copies[name])

    def _resize(self, node: Node) -> None:
        """The sizes that a call says follow."""
        if node.op == "call_function":
            for axis, size in self._declared[node.name].items():
                node.args, node.kwargs = with_size(node, axis, size)
            if node.args != self._old[node].args:
                self._changed.add(node)

    def store(self, name: str, sizes: tuple[int, ...]) -> None:
        """The stored tensor behind the node ``name`` will have these sizes.

        Raises:
            InvalidPlan: they are not those that it had, or that are declared.
        """
        node = self._copies[name]
        old = node.meta["val"]
        if [*map(str, sizes)] != [*self._expected(self._old[node], node.name)[0]]:
            raise InvalidPlan(f"'{node.name}' would have the shape {list(sizes)}, and the plan does not say so")
        if sizes != tuple(old.shape):
            with fake_mode(node.graph):
                node.meta["val"] = torch.empty(sizes, dtype=old.dtype, device=old.device)
            node.meta.pop("tensor_meta", None)
            self._changed.add(node)

    def replace(self, node: Node, by: Node, called: str) -> None:
        """``by`` is read in place of the draft's ``node``; its sizes are declared under the name ``called``."""
        self._replaced[by].append((node, called))

    def propagate(self, graph: Graph) -> None:
        """Give every value its shape, and check them all.

        Raises:
            InvalidPlan: a call cannot be computed, or a value would change its shape otherwise than declared.
        """
        with fake_mode(graph), torch.no_grad():
            for node in graph.nodes:
                stale = node not in self._old or node in self._changed or not self._changed.isdisjoint(node.all_input_nodes)
                if node.op == "call_function" and stale:
                    self._compute(node)
                if node.op in ("call_function", "placeholder"):
                    self._check(node, stale)
        unknown = self._declared.keys() - {old.name for old in self._old.values()} - self._names()
        if unknown:
            raise InvalidPlan(f"the plan speaks of '{min(unknown)}', which this model's graph does not have")

    def _names(self) -> set[str]:
        return {called for replaced in self._replaced.values() for _, called in replaced}

    def _compute(self, node: Node) -> None:
        args, kwargs = map_aggregate(
            (node.args, node.kwargs), lambda each: each.meta["val"] if isinstance(each, Node) else each
        )
        try:
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise InvalidPlan(f"'{node.name}' cannot be computed after these changes: {first_line(error)}") from error
        node.meta.pop("tensor_meta", None)

    def _check(self, node: Node, computed: bool) -> None:
        for replaced, called in self._replaced.get(node, ()):
            old = self._old.get(replaced, replaced)
            if _form(node) != self._expected(old, called):
                raise InvalidPlan(f"what takes the place of '{replaced.name}' has another shape or dtype")
            if _form(node) != _form(old):
                self._changed.add(node)
        if node in self._old and (computed or node.name in self._declared):
            if _form(node) != self._expected(self._old[node], node.name):
                raise InvalidPlan(f"'{node.name}' would change its shape or dtype, and the plan does not say so")
            if _form(node) != _form(self._old[node]):
                self._changed.add(node)

    def _expected(self, old: Node, called: str) -> Form:
        return _resized(_form(old), self._declared.get(called, {}))


def _form(node: Node) -> Form:
    return _form_of(node.meta.get("val"))


def _form_of(value: Any) -> Form:
    if isinstance(value, (list, tuple)):
        return [_form_of(each) for each in value]
    return (tuple(map(str, value.shape)), value.dtype) if isinstance(value, torch.Tensor) else str(value)


def _resized(form: Form, sizes: Mapping[int, int]) -> Form:
    if not sizes or isinstance(form, str):
        return form
    if isinstance(form, list):
        return [_resized(each, sizes) for each in form]
    return tuple(str(sizes.get(axis, size)) for axis, size in enumerate(form[0])), form[1]


class _Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses values that no machine can hold: shapes cost nothing, so a few bytes of a plan could ask for exabytes."""

    def __init__(self, entries: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries = entries

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (list, tuple)) else (result,):
            sizes = each.shape if isinstance(each, torch.Tensor) else ()
            if all(isinstance(size, int) for size in sizes) and math.prod(sizes) > self.entries:
                raise OverLimit(f"a value of {math.prod(sizes):,} entries", "FORMULA_ENTRIES")
        return result


def bounded(graph: Graph) -> _Bounded:
    """Values are computed, or only sized, up to a bound inside: `limits.FORMULA_ENTRIES`, or what the program itself needs."""
    known = (getattr(node.meta.get("val"), "shape", ()) for node in graph.nodes)
    own = [math.prod(sizes) for sizes in known if all(isinstance(size, int) for size in sizes)]
    return _Bounded(max(limits.FORMULA_ENTRIES, 16 * max(own, default=0)))


@contextlib.contextmanager
def fake_mode(graph: Graph) -> Iterator[None]:
    """The fake mode that the graph's values live in, where computing them lays no condition on dynamic sizes.

    torch's fake calls compare sizes: a convolution asks whether the batch has 16 entries before it chooses a kernel. The answer
    for the example would become a guard of the program, which then refuses every other size.
    """
    values = (node.meta.get("val") for node in graph.nodes)
    mode = next((value.fake_mode for value in values if hasattr(value, "fake_mode")), None)
    dynamic = mode is not None and mode.shape_env is not None
    # as while tracing: kernels in C++ take sizes for numbers
    with unguarded(mode), enable_python_dispatcher() if dynamic else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def unguarded(mode: Any) -> Iterator[None]:
    """A fake mode in which sizes are looked at without leaving a guard; nothing where there is none."""
    with contextlib.ExitStack() as inside:
        if mode is not None:
            inside.enter_context(mode)
            if mode.shape_env is not None:
                inside.enter_context(mode.shape_env.suppress_guards())
        yield
