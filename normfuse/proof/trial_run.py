"""Whether a model runs on the user's own inputs at all; if it does not, that is said before anything is compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from normfuse.errors import InputError, first_line
from normfuse.graph.interpreter import run
from normfuse.graph.program import Program

GIVE_FITTING = "give inputs on which the model itself runs"
"""What to do where a model refuses inputs."""


def as_spec(value: Any) -> str:
    """An input as `--input` writes it, such as ``float32[2,3]``; of anything but a tensor, what it is."""
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}[{','.join(map(str, value.shape))}]"


def lacks_kernel(error: Exception) -> bool:
    """Whether an error says that this machine does not have an operator in a dtype, which is no fault of the inputs."""
    return isinstance(error, NotImplementedError) or "not implemented for" in str(error)


def trial_run(program: Program, flat: Sequence[Any]) -> list[Tensor] | None:
    """The outputs in the stored dtype on the user's own inputs; None where this machine lacks a kernel for that dtype.

    Raises:
        InputError: the program does not run on them.
    """
    try:
        return run(program, flat)
    except Exception as error:  # torch's operators raise anything
        if lacks_kernel(error):
            return None
        hint = _what_to_write(program, flat)
        raise InputError(f"the original does not run on these inputs: {first_line(error)}", hint=hint) from error


def _what_to_write(program: Program, flat: Sequence[Any]) -> str:
    given = [as_spec(value) for value in flat]
    stored = {program.tensor(name).dtype for name in program.stored.values()}
    held = sorted((each for each in stored if each.is_floating_point), key=str)
    theirs = f"they are {', '.join(given)}"
    if len(held) != 1:
        return f"{theirs}; {GIVE_FITTING}"
    fitting = [as_spec(value.to(held[0])) if isinstance(value, Tensor) else as_spec(value) for value in flat]
    if fitting == given:
        return f"{theirs}; {GIVE_FITTING}"
    dtype = str(held[0]).removeprefix("torch.")
    return f"{theirs}, and the model's tensors are {dtype}: give {', '.join(fitting)} (--input '{fitting[0]}')"
