"""What a plan's changes of modules are as code that others run: norms that become RMSNorm, and means that are subtracted."""

from __future__ import annotations

from torch import nn

from normfuse.errors import CannotApply
from normfuse.graph.expressions import Call, Expression, Ref
from normfuse.modules.placement import VALUE, Adaptation, Change
from normfuse.modules.unread_tensors import filled
from normfuse.sources.modeling_code import WITHOUT, Centring, SwappedNorm


def swaps(changes: Adaptation, model: nn.Module) -> tuple[list[SwappedNorm], list[Centring]]:
    """What a modeling file has to say of a plan.

    A module whose forward only gives its input is left to its own class, in which its tensors change nothing any more.

    Args:
        changes: of a plan that the model's own class can hold.
        model: the model.

    Raises:
        CannotApply: a change is something else; or there is no RMSNorm among them.
    """
    norms, centrings = [], []
    for path, change in changes.changes.items():
        match change:
            case Change("instead", by) if by in (VALUE, Call("clone.default", (VALUE,))):
                pass
            case Change("instead", by) if (norm := _norm(path, by, changes, model)) is not None:
                norms.append(norm)
            case Change(
                "before" | "after", Call("sub.Tensor", (of, Call("mean.dim", (again, (int(axis),), True), ())), ())
            ) if of == again == VALUE:
                centrings.append(Centring(path, axis, change.place == "before"))
            case _:
                raise CannotApply([f"what becomes of '{path}' is more than an RMSNorm or a mean-subtraction"], hint=WITHOUT)
    if not norms:
        raise CannotApply(["no norm of it becomes an RMSNorm, so there is nothing for code to say"], hint=WITHOUT)
    return norms, centrings


def _norm(path: str, by: Expression, changes: Adaptation, model: nn.Module) -> SwappedNorm | None:
    """An RMSNorm over the last axis whose gain and shift, where it has them, are the module's own."""
    shift: Ref | None = None
    match by:
        case Call("add.Tensor", (Call() as inner, Ref() as shift), ()):
            by = inner
    match by:
        case Call("rms_norm.default", (of, (int(size),), (None | Ref()) as gain, float(eps)), ()) if of == VALUE:
            weight = getattr(model.get_submodule(path), "weight", None) is not None
            name = f"{path}.weight"
            is_gain = gain == Ref(name) if gain else not weight or changes.neutral.get(name) == filled(name, 1.0)
            if is_gain and shift in (None, Ref(f"{path}.bias")):
                return SwappedNorm(path, size, eps, weight, shift is not None)
    return None
