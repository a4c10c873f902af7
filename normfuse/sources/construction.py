"""A class is made by the settings of a stranger's configuration: no larger than the weights beside it could fill.

Ten million layers, or a table of 10¹² rows, are a few bytes of a config.json. The weights tell how large a model can be, so
it is bounded while it is made: how many modules it has, how many entries each value has, and all together.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from normfuse import limits
from normfuse.limits import OverLimit

_LAYERS = re.compile(r"(layers?|depths?|blocks?|stages?)$")
"""How settings end that count layers. Configurations make lists of that length, before there is any module."""


def check_settings(settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Refuse settings that ask for more layers, or labels, than the weights could fill.

    Raises:
        OverLimit: they do.
    """
    entries = sum(each.numel() for each in weights.values())
    for name, count in _numbers("", settings):
        if _LAYERS.search(name) and count > _modules(weights):
            raise OverLimit(f"{name} is {count:,}, and there are {len(weights):,} tensors to fill them", "MODULES")
        if name == "num_labels" and count > entries:
            raise OverLimit(f"{name} is {count:,}, and there are weights of {entries:,} entries", "MODEL_ENTRIES")


@contextlib.contextmanager
def no_larger_than(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Bound what is made inside by the weights that it is to hold.

    Raises:
        OverLimit: it has too many modules, or too many entries.
    """
    made, allowed = 0, _modules(weights)

    def count(module: Any, name: str, inner: Any) -> None:
        nonlocal made
        made += 1
        if made > allowed:
            raise OverLimit(f"it has more than {allowed:,} modules, and {len(weights):,} tensors to fill them", "MODULES")

    hook = register_module_module_registration_hook(count)
    try:
        with _Bounded(limits.MODEL_ENTRIES + 8 * sum(each.numel() for each in weights.values())):
            yield
    finally:
        hook.remove()


def _modules(weights: Mapping[str, Tensor]) -> int:
    return limits.MODULES + 8 * len(weights)


def _numbers(name: str, value: Any) -> Iterator[tuple[str, int | float]]:
    """Every number of a configuration, with the name that it or the list around it has."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _numbers(str(key), each)
    elif isinstance(value, list):
        for each in value:
            yield from _numbers(name, each)
    elif isinstance(value, int | float):
        yield name, value


class _Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stops what would make more entries than are allowed: a value of its own before it is made, all together after it."""

    def __init__(self, allowed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allowed = self.left = allowed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, unless it makes too much."""
        if _asked(func, args) > self.allowed:
            raise self._too_much(_asked(func, args))
        result = func(*args, **(kwargs or {}))
        if not any(isinstance(each, Tensor) for each in args):  # what is made of others is not kept beside them
            self.left -= sum(
                each.numel() for each in pytree.tree_leaves(result) if isinstance(each, Tensor) and not each.is_meta
            )
        if self.left < 0:
            raise self._too_much(self.allowed - self.left)
        return result

    def _too_much(self, entries: int) -> OverLimit:
        return OverLimit(f"it has {entries:,} entries, and weights for far fewer", "MODEL_ENTRIES")


def _asked(func: Any, args: Sequence[Any]) -> int:
    """How many entries an operator makes, as far as its arguments say so."""
    name, numbers = func.overloadpacket.__name__, [each for each in args if isinstance(each, int | float)]
    if name in ("arange", "linspace"):
        begin, end, step = (0, *numbers, 1)[:3] if len(numbers) == 1 else (*numbers, 1)[:3]
        return int(step) if name == "linspace" else int((end - begin) / (step or 1))
    if name == "eye":
        return int(math.prod([*numbers, *numbers][:2]))
    lists = [each for each in args if isinstance(each, list | tuple) and each and all(isinstance(size, int) for size in each)]
    return max([math.prod(each) for each in lists[:1]] + [each.numel() for each in args if isinstance(each, Tensor)], default=0)
