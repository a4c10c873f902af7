"""``torch.compile(model, backend="normfuse")``: the rewrites for models that never leave PyTorch.

    compiled = torch.compile(model, backend="normfuse")
    with torch.no_grad():
        compiled(x)

The backend rewrites what dynamo captured and hands it to inductor. Whatever it does not rewrite goes to inductor as it is:

    gradients     A graph that may be trained (gradients are enabled and an input wants one) is never touched.
    nothing to do No pass found anything; `normfuse.inspect` tells the reasons.
    unsupported   It cannot be rewritten safely (tensor subclasses, an output that is a view of a tensor which the graph writes
                  to, sizes that torch.export would fix); a `NormfuseWarning` says why.

Options, as ``torch.compile(..., options={...})``; all others, and ``mode``, are inductor's:

    passes        names of passes; default ``("offline_norm",)``.
    verify        ``"structure"`` (default), ``"full"`` or ``"none"``, as for `normfuse.rewrite`; ``"full"`` runs the graph in
                  float64 on the inputs that it is compiled for, and with other weights, fourteen times in all.
    inner         the backend that compiles the rewritten graph; default ``"inductor"``. A name or a backend.

Changed weights are computed when a graph first meets a model's tensors, kept beside the originals, and computed again when one
of these is written to or replaced: an optimizer's step, ``load_state_dict``, an exponential moving average. Looking costs
0.3 µs per tensor and call. PyTorch does not see writes in place through ``weight.data``, and neither does this: call
`torch._dynamo.reset` after them.

``torch._dynamo.utils.counters["normfuse"]`` counts the graphs rewritten and left alone, norms, and times weights were computed.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.utils import counters
from torch._guards import TracingContext, tracing
from torch.fx import GraphModule, Node

from normfuse.errors import NormfuseError, NormfuseWarning, first_line
from normfuse.graph.interpreter import flat_inputs
from normfuse.planning.planner import plan_and_apply
from normfuse.planning.registry import find
from normfuse.proof.cases import Case
from normfuse.proof.evidence import checked
from normfuse.proof.proving import checked_level, prove
from normfuse.torch_compile.capture import Captured, Regraphed
from normfuse.torch_compile.weight_cache import WeightCache

Compiled: TypeAlias = Any
"""What a backend returns, and a backend: any callable."""


@dataclass(frozen=True)
class Options:
    """What ``torch.compile(..., options=...)`` may say; see the module."""

    passes: Sequence[str] = ("offline_norm",)
    verify: str = "structure"
    inner: Any = "inductor"
    others: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def given(cls, options: Mapping[str, Any] | None) -> Options:
        """The options with inductor's own set apart.

        Raises:
            NormfuseError: a value is none that there is.
        """
        own = {name: value for name, value in (options or {}).items() if name in ("passes", "verify", "inner")}
        chosen = cls(**own, others={name: value for name, value in (options or {}).items() if name not in own})
        checked_level(chosen.verify)
        if isinstance(chosen.passes, str):
            raise NormfuseError("passes must be a list of names", hint=f"options={{'passes': ['{chosen.passes}']}}")
        for name in chosen.passes:
            find(name)
        return chosen

    def compiler(self, mode: str | None) -> Compiled:
        """The backend that compiles what comes out."""
        if self.inner == "inductor":
            return torch._TorchCompileInductorWrapper(mode, dict(self.others), None)  # type: ignore[no-untyped-call]
        return lookup_backend(self.inner)


def normfuse(
    graph_module: GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compile a graph of dynamo's, rewritten where that is possible and safe.

    Args:
        graph_module: what dynamo captured.
        inputs: its inputs in the order of its placeholders: the model's tensors, sizes, and what the model is called with.
        mode: as for `torch.compile`; inductor's.
        options: see the module.

    Returns:
        What dynamo calls in the graph's place.

    Raises:
        NormfuseError: an option is none that there is. No graph is a reason to raise.
    """
    chosen = Options.given(options)
    inner = chosen.compiler(mode)
    counts = counters["normfuse"]
    if _trains(graph_module, inputs):
        counts["graphs left to training"] += 1
        return inner(graph_module, inputs)
    try:
        with tracing(None), torch.inference_mode(False), torch.no_grad():
            regraphed = _rewritten(graph_module, inputs, chosen)
    except TensorifyScalarRestartAnalysis:
        raise
    except Exception as error:  # torch.export raises anything, and the model must run all the same
        warnings.warn(f"a graph is compiled without normfuse: {first_line(error)}", NormfuseWarning, stacklevel=2)
        counts["graphs not supported"] += 1
        return inner(graph_module, inputs)
    if regraphed is None:
        counts["graphs without a rewrite"] += 1
        return inner(graph_module, inputs)
    counts["graphs rewritten"] += 1
    return _compiled(regraphed, inner, inputs)


def _trains(graph_module: GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether gradients may be wanted: of an input, or of an output that the graph itself turned them on for."""
    (outputs,) = graph_module.graph.output_node().args
    made = [each.meta.get("example_value") for each in outputs if isinstance(each, Node)]  # type: ignore[union-attr]
    wanted = [*inputs, *made] if torch.is_grad_enabled() else made
    return any(isinstance(each, Tensor) and each.requires_grad for each in wanted)


def _rewritten(graph_module: GraphModule, inputs: Sequence[Any], chosen: Options) -> Regraphed | None:
    """The graph with the passes' rewrites; None where there are none."""
    captured = Captured(graph_module, inputs)
    if not captured.stored:
        return None
    program = captured.traced(inputs)
    with _without_autocast(inputs):  # its casts are calls of the program by now
        made, after = plan_and_apply(program, list(chosen.passes))
        if not made.rounds:
            return None
        if chosen.verify != "none":
            flat = flat_inputs(program, [inputs[position] for position in captured.given])
            checked(prove(program, after, made, [Case("as given", tuple(flat), given=True)], level=chosen.verify))
    counters["normfuse"]["norms rewritten"] += sum(len(each.sites) for each in made.rewrites)
    return captured.regraphed(after, inputs)


def _compiled(regraphed: Regraphed, inner: Compiled, inputs: Sequence[Any]) -> Compiled:
    weights = WeightCache(regraphed.formulas, regraphed.stored)
    feeds, constants = regraphed.feeds, regraphed.constants

    def arranged(inputs: Sequence[Any]) -> list[Any]:
        ours = {**constants, **weights.of(inputs)} if constants else weights.of(inputs)
        return [inputs[each] if isinstance(each, int) else ours[each] for each in feeds]

    given = arranged(inputs)
    ours = [each for each, feed in zip(given, feeds, strict=True) if isinstance(feed, str)]
    with _sizes_fixed(ours), _without_autocast(inputs):
        run = inner(regraphed.graph_module, given)
    return lambda *inputs: run(*arranged(inputs))


@contextlib.contextmanager
def _sizes_fixed(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Compilers take the sizes of these tensors as numbers; they could not be guarded, for dynamo does not see our tensors."""
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    fakes = [mode.from_tensor(each, static_shapes=True) for each in tensors] if mode is not None else []
    yield  # the mode knows them for as long as they live
    del fakes


@contextlib.contextmanager
def _without_autocast(inputs: Sequence[Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for device in {each.device.type for each in inputs if isinstance(each, Tensor)}:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
