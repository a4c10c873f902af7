"""Run a program's graph with stored tensors of our choice: in its own dtype, or all of it in float64.

Tensors are fetched when they are first read and dropped after their last reader, so that a float64 run never holds a
float64 copy of the model; large ones are taken block by block (`normfuse.graph.large`), and the pages of those that are mapped
from a file are let go of.

An operator that has no kernel in float64 (per-channel fake quantization, quantized operators, custom ones that check dtypes)
runs in its own dtype there: what it reads is rounded to the dtype that it had when the model was traced, and its result is
widened again. So do calls that draw random numbers, which are other numbers in float64.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import ConstantArgument
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate, map_arg
from torch.utils import _pytree as pytree

from normfuse.errors import InputError
from normfuse.graph.large import read_in_blocks
from normfuse.graph.literals import counts_short, short_arguments
from normfuse.graph.nodes import attribute_of, draws, operator_name
from normfuse.graph.ops.rounding import reads_bits
from normfuse.graph.parts import Weights
from normfuse.graph.program import Program
from normfuse.graph.seeds import torch_seeded
from normfuse.graph.stored_values import StoredValues
from normfuse.graph.views import HALVES, arguments, aten, default_rms_eps, dtype

NARROW = (*HALVES, torch.float32)
"""Dtypes in which torch's kernels compute with numbers of float32."""


def widened(value: Any, width: torch.dtype = torch.float64) -> Any:
    """A tensor or dtype with every narrower floating type replaced by ``width``; anything else as it is."""
    if isinstance(value, torch.dtype):
        wider = {**dict.fromkeys(NARROW, width), torch.complex64: width.to_complex()}
        return wider.get(value, value)
    return value.to(widened(value.dtype, width)) if isinstance(value, Tensor) else value


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Torch's default dtype is ``dtype`` inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def call(
    node: Node,
    values: Mapping[Node, Any],
    *,
    wide: bool,
    width: torch.dtype = torch.float64,
    short: Sequence[torch.dtype] = (),
) -> Any:
    """The result of one call; ``wide`` widens dtypes named in it too; in a dtype of ``short``, its numbers are short."""
    args, kwargs = map_arg((node.args, node.kwargs), lambda each: values[each])
    if counts_short(node, short):
        args, kwargs = short_arguments(node, args, kwargs)
    if wide:
        args, kwargs = map_aggregate(
            (args, kwargs), lambda each: widened(each, width) if isinstance(each, torch.dtype) else each
        )
        if node.target is aten._softmax.default and args[2:] and args[2]:
            args = (*args[:2], False)  # half_to_float means nothing in float64
        if node.target is aten.rms_norm.default and arguments(node)["eps"] is None:
            kwargs = {**kwargs, "eps": default_rms_eps(dtype(arguments(node)["input"]))}  # not float64's own
    return node.target(*args, **kwargs)  # type: ignore[operator]


def computed(wanted: Node, values: dict[Node, Any], fetch: Callable[[Node], Any] | None = None, *, wide: bool = False) -> Any:
    """The value of one node, computed of others that are known; those on the way are known afterwards.

    Args:
        wanted: the node.
        values: what is known.
        fetch: gives the value of a placeholder; None where all that are needed are known.
        wide: compute in float64, as `call` does.
    """
    waiting = [wanted]
    with torch.no_grad(), default_dtype(torch.float64 if wide else torch.get_default_dtype()):
        while waiting:
            node = waiting.pop()
            if node in values:
                continue
            if missing := [each for each in node.all_input_nodes if each not in values]:
                waiting += [node, *missing]
            elif node.op == "call_function":
                values[node] = call(node, values, wide=wide)
            else:
                values[node] = fetch(node) if fetch else values[node]
    return values[wanted]


Beside = Callable[[Node, Sequence[Any], Any, bool], Any]
"""Told of every call: its node, what it read, its result, whether it ran in its own dtype; gives the result to go on with."""


@dataclass(frozen=True)
class How:
    """How a graph is run; see `run`."""

    wide: bool = False
    width: torch.dtype = torch.float64
    short: Sequence[torch.dtype] = ()
    through: Callable[[Node, Any], Any] | None = None
    beside: Beside | None = None
    seed: int = 0
    default: torch.dtype = field(default_factory=torch.get_default_dtype)
    dropped: Callable[[Node], None] = lambda node: None


def run_graph(graph: Graph, fetch: Callable[[Node], Any], how: How) -> list[Any]:
    """The flat outputs of a lifted graph, whose placeholders ``fetch`` gives the values of."""
    wide, width = how.wide, how.width
    with torch.no_grad(), torch_seeded(how.seed), default_dtype(width if wide else how.default):
        return list(_values(graph, lambda node: widened(fetch(node), width) if wide else fetch(node), how))


def _values(graph: Graph, fetch: Callable[[Node], Any], how: How) -> Any:
    """The outputs of a graph, be it a program's own or a body's."""
    last_reader: dict[Node, Node] = {}
    for node in graph.nodes:
        for operand in node.all_input_nodes:
            last_reader[operand] = node
    values: dict[Node, Any] = {}
    for node in graph.nodes:
        for operand in node.all_input_nodes:
            if operand.op == "placeholder" and operand not in values:
                values[operand] = fetch(operand)
        if node.op == "output":
            return map_arg(node.args[0], lambda each: values[each])
        if node.op == "get_attr":
            values[node] = _attribute(node, how)
        elif node.op == "call_function" and (node in last_reader or draws(node)):  # assertions have no reader
            value, own = _called(node, values, how)
            if how.beside is not None:
                value = how.beside(node, [values[each] for each in node.all_input_nodes], value, own)
            values[node] = value if how.through is None or _is_batched(value) else how.through(node, value)
        for operand in node.all_input_nodes:
            if last_reader[operand] is node and values.pop(operand, None) is not None and operand.op == "placeholder":
                how.dropped(operand)
    raise AssertionError("a graph without an output")


_NUMBERS = re.compile(r"(rand|normal|bernoulli|multinomial|poisson|uniform|exponential|cauchy|geometric|log_normal|binomial)")
"""Operators whose random numbers depend on the dtype; a dropout's mask does not."""
_LACKS = re.compile(r"not implemented for '(Half|BFloat16)'")


def _called(node: Node, values: Mapping[Node, Any], how: How) -> tuple[Any, bool]:
    """The result of a call, and whether it ran in another dtype than the run, for want of a kernel."""
    if not how.wide:
        return _with_kernel(node, values, how)
    if (of_blocks := read_in_blocks(node, values)) is not None:
        return of_blocks, False
    if reads_bits(node) or (draws(node) and _NUMBERS.match(operator_name(node))):
        return _in_own_dtype(node, values, how), reads_bits(node)
    try:
        value = call(node, values, wide=True, width=how.width, short=how.short)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # kernels and custom operators refuse a dtype with whatever they like
        try:
            return _in_own_dtype(node, values, how), True
        except Exception:
            raise error from None  # it was not the dtype
    narrow = any(isinstance(each, Tensor) and each.dtype in NARROW for each in pytree.tree_leaves(value))
    if not narrow or how.width != torch.float64:
        return value, False
    return pytree.tree_map(lambda each: widened(each, how.width), value), True


def _with_kernel(node: Node, values: Mapping[Node, Any], how: How) -> tuple[Any, bool]:
    """The result in the stored dtype; where this machine has no kernel for half precision, of float32 and rounded."""
    try:
        return call(node, values, wide=False, short=how.short), False
    except (RuntimeError, NotImplementedError) as error:
        if not _LACKS.search(str(error)):
            raise
    operands = {each: pytree.tree_map(lambda x: widened(x, torch.float32), values[each]) for each in node.all_input_nodes}
    return _as_traced(call(node, operands, wide=True, width=torch.float32, short=how.short), node), True


def _in_own_dtype(node: Node, values: Mapping[Node, Any], how: How) -> Any:
    operands = {each: _as_traced(values[each], each) for each in node.all_input_nodes}
    with default_dtype(how.default):
        value = call(node, operands, wide=False, short=how.short)
    return pytree.tree_map(lambda each: widened(each, how.width), value)


def _as_traced(value: Any, node: Node) -> Any:
    """A value in the dtype that it had when the model was traced."""
    traced = node.meta.get("val")
    if isinstance(value, (tuple, list)) and isinstance(traced, (tuple, list)):
        return type(value)(_rounded_to(x, like) for x, like in zip(value, traced, strict=True))
    return _rounded_to(value, traced)


def _rounded_to(value: Any, like: Any) -> Any:
    floats = isinstance(value, Tensor) and isinstance(like, Tensor) and value.dtype in (*NARROW, torch.float64)
    return value.to(like.dtype) if floats and like.dtype in (*NARROW, torch.float64) else value


def _is_batched(value: Any) -> bool:
    """Whether a value stands for many, as in the functions of flex attention: random numbers cannot be put on those."""
    return isinstance(value, Tensor) and torch._C._functorch.is_batchedtensor(value)


def _attribute(node: Node, how: How) -> Any:
    value = attribute_of(node)
    if isinstance(value, GraphModule):
        return _body(value.graph, how)
    return widened(value, how.width) if how.wide else value


def _body(graph: Graph, how: How) -> Callable[..., Any]:
    """A body as a function of its operands, run as the program itself is."""
    placeholders = graph.find_nodes(op="placeholder")

    def run_body(*operands: Any) -> Any:
        outputs = _values(graph, dict(zip(placeholders, operands, strict=True)).__getitem__, how)
        return tuple(outputs) if isinstance(outputs, (list, tuple)) else outputs

    return run_body


def flat_inputs(
    program: Program, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, *, cast: bool = False
) -> list[Any]:
    """The program's inputs in the order of its placeholders.

    Args:
        program: what takes them.
        args: positional inputs.
        kwargs: keyword inputs.
        cast: bring floats and integers to the dtype of their kind that the program was traced with.

    Raises:
        InputError: the inputs do not have the structure, dtypes or fixed sizes that the program was traced with.
    """
    spec = program.exported.call_spec.in_spec
    names = list(spec.child(1).context) if spec.num_children > 1 else []
    if set(names) != set(kwargs or {}):
        raise InputError(f"the model takes the keyword inputs {names}, not {sorted(kwargs or {})}")
    flat, given = pytree.tree_flatten((tuple(args), {name: (kwargs or {})[name] for name in names}))
    if given != spec:
        raise InputError(f"the model takes {spec.num_leaves} inputs nested as when it was traced; these are {len(flat)}")
    if cast:
        flat = [_cast(value, node) for value, node in zip(flat, user_inputs(program), strict=True)]
    for place, (value, node) in enumerate(zip(flat, user_inputs(program), strict=True)):
        _check_input(place, value, node)
    fixed = [spec.arg for spec in program.exported.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    for place, (value, arg) in enumerate(zip(flat, fixed, strict=True)):
        if isinstance(arg, ConstantArgument) and (isinstance(value, Tensor) or value != arg.value):
            told = type(value).__name__ if isinstance(value, Tensor) else repr(value)
            raise InputError(f"input {place} was fixed at {arg.value!r} when the model was traced; {told} does not fit")
    return flat


def _cast(value: Any, node: Node | None) -> Any:
    wanted = dtype(node) if node is not None else None
    if not isinstance(value, Tensor) or wanted is None or torch.bool in (value.dtype, wanted):
        return value
    same_kind = value.is_floating_point() == wanted.is_floating_point and value.is_complex() == wanted.is_complex
    return value.to(wanted) if same_kind else value


def user_inputs(program: Program) -> list[Node | None]:
    """The placeholder of each user input; None for one that is a constant of the trace."""
    specs = (spec for spec in program.exported.graph_signature.input_specs if spec.kind.name == "USER_INPUT")
    return [program.nodes.get(spec.arg.name) if hasattr(spec.arg, "name") else None for spec in specs]


def _check_input(place: int, value: Any, node: Node | None) -> None:
    traced = node.meta.get("val") if node is not None else None
    if not isinstance(traced, Tensor) or node is None:
        return
    wanted = f"{str(traced.dtype).removeprefix('torch.')}[{', '.join(map(str, traced.shape))}]"
    if not isinstance(value, Tensor):
        raise InputError(f"input {place} ('{node.name}') must be a tensor {wanted}, not a {type(value).__name__}")
    fits = value.dtype == traced.dtype and value.dim() == traced.dim()
    if not fits or any(isinstance(a, int) and a != b for a, b in zip(traced.shape, value.shape, strict=True)):
        given = f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
        raise InputError(f"input {place} ('{node.name}') was traced as {wanted}; {given} does not fit")


def run(
    program: Program,
    flat: Sequence[Any],
    *,
    wide: bool = False,
    width: torch.dtype = torch.float64,
    weights: Weights | None = None,
    short: Sequence[torch.dtype] = (),
    through: Callable[[Node, Any], Any] | None = None,
    beside: Beside | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """The flat tensor outputs of a program, its formulas included, and behind them the state that it updates.

    Args:
        program: what to run.
        flat: inputs as `flat_inputs` orders them.
        wide: run all of it in ``width``: casts to narrower floating types become casts to it, and formulas are not rounded to
            a stored dtype.
        width: float64, or float32 for a program in half precision.
        weights: changes every floating stored tensor before formulas read it. A formula holds for any weights, so two
            programs that are one function stay one function under the same change.
        short: round the numbers of calls in these dtypes to float32.
        through: what the value of every call that is read goes through.
        beside: see `Beside`.
        seed: of the random numbers that the program draws: the same ones in every run with the same seed.
    """
    users = iter(flat)
    given = {
        spec.arg.name: next(users)
        for spec in program.exported.graph_signature.input_specs
        if spec.arg.name not in program.stored and spec.kind.name == "USER_INPUT"
    }

    stored = StoredValues(program, wide, width, weights)

    def fetch(node: Node) -> Any:
        return stored.of(node) if node.name in program.stored else given[node.name]

    def dropped(node: Node) -> None:
        if node.name in program.stored:
            stored.let_go(node)

    how = How(wide, width, short, through, beside, seed, dropped=dropped)
    outputs = run_graph(program.graph, fetch, how)
    kinds = [spec.kind.name for spec in program.exported.graph_signature.output_specs]
    pairs = [pair for pair in zip(outputs, kinds, strict=True) if isinstance(pair[0], Tensor)]
    # what the caller gets, then what the program updates
    return [v for v, kind in pairs if kind == "USER_OUTPUT"] + [v for v, kind in pairs if kind.endswith("MUTATION")]
