"""What a deployed model makes of a state dict that it is to load.

The original's tensors are what the model's own classes are written for, and those of a deployed model stand by themselves. So a
deployed model that loads either is its own classes again, which is right for both; `normfuse.deploy` may be called once more. A
part of a checkpoint would leave weights of two kinds beside each other, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from normfuse.errors import NormfuseError
from normfuse.graph.program import identity
from normfuse.modules.record import GIVEN_UP, RECORD, Deployment, Rewritten, is_rewritten, own_class, rewritten

_HINT = "normfuse.restore(model) first, or load it whole into a new model; then deploy"


def note(model: nn.Module, changed: Iterable[Tensor], gone: Iterable[tuple[nn.Module, str]], *, came: bool) -> None:
    """Tell every record what all of them, now and before, have done to the state dict.

    Args:
        model: the model; its formulas are evaluated.
        changed: the tensors with new values.
        gone: (module, attribute) of tensors that were taken out.
        came: tensors were added.
    """
    before = [record.deployment for _, record in rewritten(model) if record.deployment is not None]
    names: dict[tuple[Any, ...], set[str]] = {identity(each): set() for each in changed}
    paths = {module: path for path, module in model.named_modules()}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and identity(tensor) in names and name not in module._non_persistent_buffers_set:
                names[identity(tensor)].add(_joined(path, name))
    deployment = Deployment(
        frozenset(frozenset(each) for each in names.values() if each).union(*(each.changed for each in before)),
        frozenset(_joined(paths[module], name) for module, name in gone).union(*(each.gone for each in before)),
        not list(gone) and not came and all(each.stands for each in before),
    )
    for module, record in rewritten(model):
        record.path, record.deployment = paths[module], deployment


def watched(model: nn.Module) -> None:
    """Look at what a deployed model loads from now on, where that matters to a module of it."""
    unwatched(model)
    if any(record.deployment is not None for _, record in rewritten(model)):
        model._register_load_state_dict_pre_hook(receive, with_module=True)  # type: ignore[no-untyped-call]


def unwatched(model: nn.Module) -> None:
    """Look no more."""
    for key, hook in list(model._load_state_dict_pre_hooks.items()):
        if getattr(hook, "hook", None) is receive:
            del model._load_state_dict_pre_hooks[key]


def receive(model: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Make a deployed model ready for a state dict: the hook of the model that was deployed.

    Raises:
        NormfuseError: only a part of what was changed comes; or the model's own classes could not compute the same of what it
            saves, and the names are not those that it saves.
    """
    found = [(path, module, module.__dict__[RECORD]) for path, module in model.named_modules() if is_rewritten(module)]
    deployment = next((record.deployment for _, _, record in found if record.deployment is not None), None)
    if deployment is None or any(record.path != path for path, _, record in found):
        return  # a part of what was deployed, or wrapped since: its modules say so themselves
    missing = [min(names) for names in deployment.changed if not any(f"{prefix}{name}" in state for name in names)]
    extra = [name for name in deployment.gone if f"{prefix}{name}" in state]
    if len(missing) == len(deployment.changed) and not extra:
        return  # nothing of what was changed comes: the weights of an adapter, say
    if missing or extra:
        which = f"does not have '{min(missing)}'" if missing else f"has '{min(extra)}'"
        raise NormfuseError(f"this model was deployed, and the state dict that it is to load {which}", hint=_HINT)
    for _, module, record in found:
        if deployment.stands:
            own_class(module)
            if record.kept is None:
                module.__dict__[GIVEN_UP] = True
        record.kept = None


def load_of(base: type[nn.Module]) -> Callable[..., None]:
    """``_load_from_state_dict`` of a rewritten module, which is still one only where not the whole model is loaded."""

    def load(self: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        record: Rewritten = self.__dict__[RECORD]
        held = (*self._parameters, *self._buffers)
        if record.deployment and record.deployment.stands and any(f"{prefix}{name}" in state_dict for name in held):
            raise NormfuseError(f"this is '{record.path}' of a model that was deployed as a whole", hint=_HINT)
        base._load_from_state_dict(self, state_dict, prefix, *rest)  # type: ignore[no-untyped-call]

    return load


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
