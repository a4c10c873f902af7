"""What a rewritten module reads and computes otherwise than its class says, as data that is copied and pickled with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.graph.expressions import Call, Formula, formed
from normfuse.graph.sharded import give_class, give_memory, inner_class
from normfuse.modules.codegen import NoTapeError, Tape
from normfuse.modules.on_shards import alike, as_read, laid_out_as
from normfuse.modules.placement import Change

RECORD = "_normfuse"
"""The attribute that holds a module's `Rewritten` record."""

GIVEN_UP = "_normfuse_given_up"
"""The attribute of a module that is its own class again, with other tensors, and whose former ones were not kept."""


@dataclass(frozen=True)
class Recipe:
    """How a tensor is formed.

    Attributes:
        formula: what to compute.
        names: the tensors that it reads.
        like: the attribute, of the module that reads the result, whose dtype the result takes.
    """

    formula: Formula
    names: tuple[str, ...]
    like: str


class Forming:
    """Tensors of one module that are formed together, and the code for it.

    Attributes:
        of_first: for each leaf whether the first of them is formed from it.
        scaled_axis: the axis along which the first is a tensor times a scale, if it is.
        has_bias: whether there is a second, which is then the bias beside the first.
    """

    def __init__(self, record: Rewritten, attributes: Sequence[str]) -> None:
        recipes = [record.tensors[each] for each in attributes]
        own_names = {recipe.like: (None, recipe.like) for recipe in recipes}
        self._homes = {name: record.home[name] for recipe in recipes for name in recipe.names}
        places = list(self._homes.values())
        self._homes |= {f"like {name}": home for name, home in own_names.items() if home not in places}
        self._likes = [list(self._homes.values()).index((None, recipe.like)) for recipe in recipes]
        self._formulas = [recipe.formula for recipe in recipes]
        self.of_first = tuple(name in recipes[0].names for name in self._homes)
        first = recipes[0].formula
        self.scaled_axis = dict(first.kwargs)["dim"] if isinstance(first, Call) and first.op == "scale" else None
        self.has_bias = len(recipes) == 2
        self._forward: dict[Any, Callable[..., tuple[Tensor | None, ...]]] = {}
        self._backward: dict[Any, Callable[..., tuple[Tensor | None, ...]] | None] = {}

    def leaves(self, module: nn.Module) -> list[Tensor]:
        """The tensors that the formulas read, as they are now; those whose dtypes the results take come last."""
        homes = [(holder or module, attribute) for holder, attribute in self._homes.values()]
        if torch.compiler.is_compiling():
            return [own(*home) for home in homes]
        return alike([as_read(own(*home), *home) for home in homes])

    def code(self, leaves: Sequence[Tensor], *, outside: bool = False) -> Callable[..., tuple[Tensor | None, ...]]:
        """What takes the leaves and returns the formulas' values; without autograd.

        With ``outside`` the first of them comes without its scale, and the scale comes last, or None where it is not apart.
        """
        key = (outside, _key(leaves))
        if key not in self._forward:
            try:
                self._forward[key] = self._tape(leaves, outside).forward()
            except NoTapeError:
                self._forward[key] = (lambda *given: (*self.by_autograd(*given), None)) if outside else self.by_autograd
        return self._forward[key]

    def gradients(
        self, leaves: Sequence[Tensor], mask: tuple[bool, ...], *, outside: bool = False
    ) -> Callable[..., tuple[Tensor | None, ...]] | None:
        """`Tape.backward` for a mask of the layer's input, its bias and the leaves; None where it is left to autograd."""
        key = (outside, mask, _key(leaves))
        if key not in self._backward:
            try:
                self._backward[key] = self._tape(leaves, outside).backward(mask[0], mask[1], mask[2:])
            except NoTapeError:
                self._backward[key] = None
        return self._backward[key]

    def by_autograd(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        """The formulas' values, of operations that autograd and compilers see."""
        read = dict(zip(self._homes, leaves, strict=True)).__getitem__
        values = (formed(each, read, _wide(leaves)) for each in self._formulas)
        laid = (laid_out_as(value, leaves[at]) for value, at in zip(values, self._likes, strict=True))
        return tuple(value.to(dtype) for value, dtype in zip(laid, self._dtypes(leaves), strict=True))

    def _tape(self, leaves: Sequence[Tensor], outside: bool) -> Tape:
        named = dict(zip(self._homes, leaves, strict=True))
        return Tape(self._formulas, named, self._dtypes(leaves), _wide(leaves), outside=outside)

    def _dtypes(self, leaves: Sequence[Tensor]) -> list[torch.dtype]:
        return [leaves[at].dtype for at in self._likes]


def _key(leaves: Sequence[Tensor]) -> tuple[Any, ...]:
    """What code is written down for, but for shapes, which a module's own tensors do not change."""
    return *[each.dtype for each in leaves], *[each.device for each in leaves]


def _wide(leaves: Sequence[Tensor]) -> torch.dtype:
    """The dtype to compute in."""
    return torch.float64 if any(each.dtype == torch.float64 for each in leaves) else torch.float32


@dataclass(frozen=True)
class Deployment:
    """What evaluating the formulas has done to a model's state dict.

    Attributes:
        changed: the names, each set of them for one tensor, under which the values that were put in are saved.
        gone: names that have left.
        stands: no name has come or gone, so the model's own classes compute the same of what is saved.
    """

    changed: frozenset[frozenset[str]] = frozenset()
    gone: frozenset[str] = frozenset()
    stands: bool = True


@dataclass
class Rewritten:
    """What a module reads and computes otherwise than its class says.

    Attributes:
        tensors: attribute → how its value is formed.
        home: tensor name → the module that holds it (None for the module itself, so that replicas hold their own) and the
            attribute there.
        change: what becomes of the forward method.
        neutral: attribute → what it becomes once the formulas are evaluated: nobody reads it, but the module's own class would.
        lent: attribute → the module and the attribute there that hold it once the formulas are evaluated.
        borrowed: likewise, where they are evaluated already.
        guards: modules that must not be in training mode; while one is, the module does what its own class says.
        spare: (module, home, name) of tensors that nobody reads once the formulas are evaluated.
        kept: the model's own tensors after `bake` has put others in their place; None where they were not kept.
        path: where the module was in its model when the formulas were evaluated.
        deployment: what evaluating them has done to the model; None where they are not evaluated yet.
    """

    tensors: dict[str, Recipe] = field(default_factory=dict)
    home: dict[str, tuple[nn.Module | None, str]] = field(default_factory=dict)
    change: Change | None = None
    neutral: dict[str, Recipe] = field(default_factory=dict)
    lent: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)
    borrowed: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)
    guards: list[nn.Module] = field(default_factory=list)
    spare: list[tuple[nn.Module, str, str]] = field(default_factory=list)
    kept: list[FormerTensor] | None = field(default_factory=list)
    path: str = ""
    deployment: Deployment | None = None
    _formings: dict[tuple[str, ...], Forming] = field(default_factory=dict, repr=False, compare=False)

    def forming(self, *attributes: str) -> Forming:
        """How some tensors are formed together."""
        found = self._formings.get(attributes)
        if found is None:
            found = self._formings[attributes] = Forming(self, attributes)
        return found

    def keep(self, kept: FormerTensor) -> None:
        """Remember a tensor as it was, where those before it were not given up."""
        if self.kept is not None:
            self.kept = [*self.kept, kept]

    def evaluated(self) -> None:
        """Forget the formulas: the tensors have their values."""
        self.borrowed = {**self.borrowed, **self.lent}
        self.tensors, self.neutral, self.lent, self.guards, self.spare = {}, {}, {}, [], []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_formings": {}}  # a copy has modules of its own


@dataclass(frozen=True)
class FormerTensor:
    """A tensor of a module as it was: ``home`` is ``_parameters`` or ``_buffers``, ``data`` its value where that changed."""

    module: nn.Module
    home: str
    name: str
    tensor: Tensor | None
    data: Tensor | None

    def put_back(self) -> None:
        """Make the module hold it again."""
        getattr(self.module, self.home)[self.name] = self.tensor
        if self.tensor is not None and self.data is not None:
            give_memory(self.tensor, self.data)


def is_rewritten(module: nn.Module) -> bool:
    """Whether a module has a record."""
    return RECORD in module.__dict__


def rewritten(model: nn.Module) -> Iterator[tuple[nn.Module, Rewritten]]:
    """The modules that have a record, with it."""
    return ((module, module.__dict__[RECORD]) for module in model.modules() if is_rewritten(module))


def was_changed(model: nn.Module) -> bool:
    """Whether a model is tuned or deployed, its own tensors kept or not."""
    return any(RECORD in each.__dict__ or GIVEN_UP in each.__dict__ for each in model.modules())


def own(module: nn.Module, name: str) -> Any:
    """The tensor that a module itself holds under a name."""
    for home in (module.__dict__, module._parameters, module._buffers):
        if name in home:
            return home[name]
    raise AttributeError(f"'{type(module).__name__}' object has no attribute '{name}'")


def home_of(module: nn.Module, name: str) -> str:
    """Where a module holds a tensor: ``_parameters`` or ``_buffers``."""
    return "_parameters" if name in module._parameters else "_buffers"


def is_idle(module: nn.Module, record: Rewritten) -> bool:
    """Whether the module does what its own class says: a guard is training, or it is a replica, which knows no other ones."""
    for guard in record.guards:
        if guard.training:
            return True
    return bool(record.guards) and module.__dict__.get("_is_replica", False)


def plain(module: nn.Module) -> nn.Module:
    """A rewritten module with its own class, its record still there."""
    give_class(module, inner_class(module).__mro__[1])
    return module


def own_class(module: nn.Module) -> None:
    """Give a module its own class back."""
    if is_rewritten(module):
        del plain(module).__dict__[RECORD]
