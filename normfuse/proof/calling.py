"""Models called as their users call them: with arguments, in their own dtype, by their own `forward` and guards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normfuse.errors import InputError, first_line
from normfuse.graph.interpreter import flat_inputs, run
from normfuse.graph.program import Program, Trains, at_inference
from normfuse.graph.sharded import in_stored_dtype, is_shard
from normfuse.proof.differences import identical
from normfuse.proof.trial_run import lacks_kernel
from normfuse.proof.undisturbed import seeded, undisturbed
from normfuse.sources.mapped import letting_go

ModelCall = Callable[[Sequence[Any], Mapping[str, Any]], list[Tensor]]
"""A call with arguments -> the tensors of what it returns, and behind them the state that it updates."""


@dataclass(frozen=True)
class Answer:
    """What a call came to.

    Attributes:
        outputs: its tensors, as `normfuse.graph.interpreter.run` orders them; None where it raised.
        refusal: a line on why it raised.
        idle: it was never a question of the inputs: this machine does not have an operator in that dtype, or they were known
            not to fit before the call.
    """

    outputs: Sequence[Tensor] | None
    refusal: str = ""
    idle: bool = False

    @property
    def refuses(self) -> bool:
        """Whether it is for the inputs that it raised."""
        return self.outputs is None and not self.idle


def answer(call: Callable[[], Sequence[Tensor]]) -> Answer:
    """The outputs of a call, or why there are none."""
    try:
        return Answer(call())
    except Exception as error:  # a guard, a forward or an operator raises anything
        return Answer(None, first_line(error), lacks_kernel(error) or isinstance(error, InputError))


def call_of_program(module: nn.Module, program: Program) -> ModelCall:
    """The call of a program's module, which is left as it was.

    Args:
        module: what `ExportedProgram.module` or `Result.module` made.
        program: says which of its tensors it updates.
    """

    def call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        with seeded(0), torch.no_grad(), _state_kept(module, program):
            return _tensors(returned(module, program, args, kwargs))

    return call


def call_of_module(module: nn.Module, program: Program, *, trains: Trains | None = None, as_traced: bool = True) -> ModelCall:
    """The call of a live module as it is at inference.

    Args:
        module: the module; it is left as it was.
        program: its trace.
        trains: as for `Program.trace`.
        as_traced: under ``no_grad`` or not, whichever way the trace went; False for ``no_grad``, under which torch's own fast
            paths may pass by what a module was changed to.
    """

    def once(args: Sequence[Any], kwargs: Mapping[str, Any], grad: bool) -> list[Tensor]:
        return _tensors(called_once(module, program, args, kwargs, trains=trains, grad=grad))

    def call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        usual = once(args, kwargs, False)
        if not as_traced:
            return usual
        traced = answer(lambda: run(program, flat_inputs(program, args, kwargs))).outputs
        return usual if traced is None or identical(usual, traced) else once(args, kwargs, True)

    return call


def called_once(
    module: nn.Module,
    program: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    trains: Trains | None = None,
    seed: int = 0,
    grad: bool = False,
) -> tuple[list[Any], list[Tensor]]:
    """What `returned` tells of one call of a live module as it is at inference; the module is left as it was."""
    with undisturbed(module), at_inference(module, trains), in_stored_dtype(module), seeded(seed), torch.set_grad_enabled(grad):
        return returned(module, program, args, kwargs)


def returned(
    module: nn.Module, program: Program, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Any], list[Tensor]]:
    """All that a call returns, flat, and the state that it updates; the arguments are copied.

    Args:
        module: the program's own, or what it was traced from.
        program: says which state that is.
        args: positional arguments.
        kwargs: keyword arguments.
    """
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (tuple(args), dict(kwargs)))
    with letting_go():
        given_back = module(*args, **kwargs)
    leaves = [_entries(each) if isinstance(each, Tensor) else each for each in pytree.tree_leaves(given_back)]
    return leaves, [each.detach().clone() for each in _updated(module, program, pytree.tree_leaves((args, kwargs)))]


def _entries(tensor: Tensor) -> Tensor:
    entries: Tensor = tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]
    return entries.detach()


def _tensors(given_back: tuple[list[Any], list[Tensor]]) -> list[Tensor]:
    leaves, state = given_back
    return [*(each for each in leaves if isinstance(each, Tensor)), *state]


def _updated(module: nn.Module, program: Program, inputs: Sequence[Any]) -> Iterator[Tensor]:
    """What a program says that it updates, as the module has it after a call.

    Args:
        module: the program's own, or what it was traced from.
        program: the program.
        inputs: the flat inputs of the call.
    """
    signature = program.exported.graph_signature
    for spec in signature.output_specs:
        if spec.kind.name == "USER_INPUT_MUTATION":
            yield inputs[list(signature.user_inputs).index(spec.target)]
        elif spec.kind.name.endswith("MUTATION"):
            yield attrgetter(str(spec.target))(module)


@contextlib.contextmanager
def _state_kept(module: nn.Module, program: Program) -> Iterator[None]:
    tensors = [attrgetter(name)(module) for name in sorted(program.written)]
    before = [each.detach().clone() for each in tensors]
    try:
        yield
    finally:
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
