"""TorchScript programs by torch's own converter, and compared with what they compute: the converter is young."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from normfuse.errors import TraceError, first_line
from normfuse.graph.interpreter import flat_inputs
from normfuse.graph.program import Program, quiet
from normfuse.proof.cases import Case, other_sizes, other_values
from normfuse.proof.equivalence import compare
from normfuse.proof.evidence import Verdict
from normfuse.proof.sides import called_side, program_side
from normfuse.sources.inputs import Inputs
from normfuse.sources.loading import SCRIPT


def traced_script(script: torch.jit.ScriptModule, given: Inputs) -> Program:
    """A TorchScript program as one that can be rewritten.

    Args:
        script: the program.
        given: what it is called with.

    Raises:
        TraceError: torch's converter cannot read it, or makes another function of it.
    """
    try:
        from torch._export.converter import TS2EPConverter

        with quiet():
            exported = TS2EPConverter(script, given.args, given.kwargs or None).convert()  # type: ignore[no-untyped-call]
            made = exported.module(check_guards=False)
    except Exception as error:  # of a converter that asserts what it does not know
        raise TraceError(
            f"torch's converter cannot read this TorchScript program: {first_line(error)[:200]}", hint=SCRIPT
        ) from error
    program = Program.trace(made, given.args, given.kwargs, given.dynamic_shapes)
    flat = flat_inputs(program, given.args, given.kwargs)
    for case in (Case("as given", tuple(flat), given=True), *other_values(program, flat), *other_sizes(program, flat)):
        _check(script, program, case)
    return program


def _check(script: torch.jit.ScriptModule, program: Program, case: Case) -> None:
    args, kwargs = pytree.tree_unflatten(list(case.flat), program.exported.call_spec.in_spec)
    try:
        with torch.no_grad():
            theirs = [each for each in pytree.tree_leaves(script(*args, **kwargs)) if isinstance(each, Tensor)]
    except Exception:  # it does not take what is no user's own input
        if case.given:
            raise
        return
    side = called_side("the TorchScript program", lambda _: theirs)
    if compare(program_side("what was converted", program), side, [case]).verdict is not Verdict.PROVEN:
        said = f"torch's converter makes another function of this TorchScript program: they differ on '{case.name}'"
        raise TraceError(said, hint=SCRIPT)
