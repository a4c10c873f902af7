"""Below which number integers are drawn: the size of the table that they index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from normfuse.errors import InputError, first_line
from normfuse.sources.call_signature import require_names, what_forward_takes
from normfuse.sources.inputs import INTEGERS, InputKey, Inputs
from normfuse.sources.mapped import is_mapped, letting_go

# ---- limits of integer inputs


def integer_limits(model: nn.Module | torch.export.ExportedProgram, inputs: Inputs) -> dict[InputKey, int]:
    """For each integer input that indexes a table, the size of the smallest one, found by one run of the model.

    An input is followed through views, casts and copies, not through arithmetic. Inputs that index nothing are left out. A
    model that lies in files and is larger than `LARGEST_RUN` is run on shapes alone, where it can be.

    Raises:
        InputError: the model does not run on these inputs.
    """
    if isinstance(model, nn.Module):
        require_names(model, inputs.args, inputs.kwargs)
    module = model.module() if isinstance(model, torch.export.ExportedProgram) else model
    modes = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False  # not eval(): exported modules refuse it, and nothing may notice this run
        with torch.no_grad(), torch.random.fork_rng(devices=()), letting_go():
            imagined = _seen_on_shapes(module, inputs) if _in_files(module) > LARGEST_RUN else None
            return _seen(module, inputs.args, inputs.kwargs) if imagined is None else imagined
    except Exception as error:
        takes = f"give others with --input; its forward takes {what_forward_takes(model)}"
        raise InputError(f"the model does not run on these inputs: {first_line(error)}", hint=takes) from error
    finally:
        for part, mode in modes:
            part.training = mode


LARGEST_RUN = 1 << 32
"""Bytes of a model's tensors that are read from files for the sake of its inputs."""


def _in_files(module: nn.Module) -> int:
    return sum(each.nbytes for each in (*module.parameters(), *module.buffers()) if is_mapped(each))


def _seen(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[InputKey, int]:
    lookups = _Lookups({**dict(enumerate(args)), **dict(_named(kwargs))})
    with lookups:
        module(*args, **kwargs)
    return lookups.limits


def _seen_on_shapes(module: nn.Module, inputs: Inputs) -> dict[InputKey, int] | None:
    """What is seen where no tensor has values; None where the model asks for some."""
    with FakeTensorMode(allow_non_fake_inputs=True) as shapes:
        args, kwargs = pytree.tree_map_only(Tensor, shapes.from_tensor, (inputs.args, inputs.kwargs))
        try:
            return _seen(module, args, kwargs)
        except Exception:  # or the model does not run, which it then says itself
            return None


def _named(inputs: Mapping[str, Any], before: str = "") -> Iterator[tuple[InputKey, Any]]:
    """Keyword inputs, those of dicts with dots in their names."""
    for name, value in inputs.items():
        if isinstance(value, Mapping):
            yield from _named(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def has_integers(inputs: Inputs) -> bool:
    """Whether an input might index a table."""
    return any(isinstance(leaf, Tensor) and leaf.dtype in INTEGERS for leaf in pytree.tree_leaves((inputs.args, inputs.kwargs)))


class _Lookups(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches which inputs reach a table as indices; ``limits`` has the smallest table of each."""

    def __init__(self, inputs: Mapping[InputKey, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limits: dict[InputKey, int] = {}
        self._source: dict[int, InputKey] = {}
        self._kept: list[Tensor] = []  # or the address of a freed tensor would be taken for it
        for key, value in inputs.items():
            if isinstance(value, Tensor):
                self._follow(value, key)

    def _follow(self, tensor: Tensor, key: InputKey | None) -> None:
        if key is not None and tensor.dtype in INTEGERS and tensor.numel():
            self._source[_address(tensor)] = key
            self._kept.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and note what it looks up."""
        result = func(*args, **(kwargs or {}))
        for index, limit in _looked_up(func, args):
            key = self._source.get(_address(index))
            if key is not None:
                self.limits[key] = min(limit, self.limits.get(key, limit))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
            self._follow(result, self._source.get(_address(args[0])))
        return result


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # shared by all views


def _looked_up(func: Any, args: Sequence[Any]) -> Iterator[tuple[Tensor, int]]:
    """The index tensors of one operator, each with the number of rows that it may choose from."""
    aten = torch.ops.aten
    if func in (aten.embedding.default, aten._embedding_bag.default, aten._embedding_bag_forward_only.default):
        yield args[1], args[0].shape[0]
    elif func is aten.index_select.default:
        yield args[2], args[0].shape[args[1]]
    elif func is aten.index.Tensor and args[1][0] is not None:  # table[ids]; indices of later dims are rare
        yield args[1][0], args[0].shape[0]
