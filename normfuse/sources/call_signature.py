"""What a model's forward takes, read from its signature."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from normfuse.errors import InputError, first_line, listed

_SHOWN = 12  # of optional inputs; transformers has thirty


def parameters_of(model: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a module's forward; none where its signature says nothing."""
    try:
        found = inspect.signature(_inner(model).forward).parameters
    except (AttributeError, TypeError, ValueError):  # no module, or a forward that is no plain function
        return {}
    return {name: each for name, each in found.items() if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}


def required(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Those without a default."""
    return [name for name, each in parameters.items() if each.default is each.empty]


def require_names(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse inputs that a module's forward has no places for, or too few of.

    Raises:
        InputError: they are.
    """
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except (AttributeError, ValueError):  # no module, or a forward that is no plain function
        return
    except TypeError as error:
        told = f"these inputs do not fit {type(model).__name__}: {first_line(error)}"
        raise InputError(told, hint=f"its forward takes {what_forward_takes(model)}") from None


def what_forward_takes(model: Any) -> str:
    """One line of names, the required ones first."""
    spec = getattr(getattr(getattr(model, "exported", model), "call_spec", None), "in_spec", None)
    if spec is not None:  # a program
        args, *kwargs = spec.children()
        names = [*(["1 positional input"] if args.num_children == 1 else []), *(kwargs[0].context if kwargs else ())]
        return ", ".join([f"{args.num_children} positional inputs", *names] if args.num_children > 1 else names) or "nothing"
    parameters = parameters_of(model)
    needed = required(parameters)
    optional = [name for name in parameters if name not in needed]
    told = [f"{', '.join(needed)} (required)"] if needed else []
    if optional:
        told.append(f"{listed(optional, _SHOWN)} (optional)")
    return "; ".join(told) or "any inputs"


def _inner(model: Any) -> Any:
    """The module in one that is compiled, or of many devices, whose own forward takes anything."""
    inner = getattr(model, "_orig_mod", getattr(model, "module", None))
    return inner if isinstance(model, nn.Module) and isinstance(inner, nn.Module) else model
