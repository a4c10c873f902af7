"""Remove LayerNorms while a model is trained on, so that it recovers what each removal costs.

    recovery = Recovery(model, Schedule(layers=12, start=20, gaps=(2, 2, 3)), inputs=(x,), steps=300)
    for step, batch in enumerate(batches):
        recovery.begin(step)
        loss = recovery.loss(cross_entropy(model, batch))
        ...

Everything that a removal has done is in the model's state dict. To go on from a checkpoint, make the model and its `Recovery`
again, load the state dict, and continue with the next step: the run is the same, bit for bit.

Reference
    Baroni et al., arXiv 2507.02559, 2025, §3 (order, schedule, auxiliary loss).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.errors import NormfuseError
from normfuse.nn.fake_layer_norm import PATHS, FakeLayerNorm, Path, deviation
from normfuse.stripping.places import Place, attach, places
from normfuse.stripping.schedule import Event, Schedule


class Diverged(NormfuseError):
    """The loss is no number any more; training on is of no use."""


class Recovery:
    """The removal of a model's LayerNorms by a schedule, for any training loop.

    The model's LayerNorms are replaced by `FakeLayerNorm`, in place, with the same parameters, so an optimizer may be made
    before or after. A layer of the schedule is the same share of the model's norms of each kind: where an attention's values
    cannot be told from its queries and keys as modules (torch's MultiheadAttention), its norm goes with the values, and a
    decoder's second attention counts with the MLPs.

    Args:
        model: the model; its LayerNorms are replaced in place.
        schedule: when what is removed.
        inputs: example positional inputs, to trace the model with.
        kwargs: example keyword inputs.
        steps: optimizer steps of the run.
        auxiliary: weight λ of the auxiliary loss λ·mean (s - τ)², with s the deviation of each token where the final norm reads
            it, and τ its mean over tokens that neither begin nor end a text, without gradient: it makes one σ fit all tokens.
        momentum: share that the running mean of σ keeps per forward call.
        first_token: whether the first token has a σ of its own until the schedule takes it away.

    Attributes:
        norms: the `FakeLayerNorm` modules by path.
        events: the removals of the schedule, in order.

    Raises:
        TraceError: torch.export cannot trace the model.
        NormfuseError: there is no LayerNorm to remove, its parameters are in float16, the run is shorter than the schedule, or
            there is no final norm for the auxiliary loss to read. Nothing is changed then.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        inputs: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        steps: int,
        auxiliary: float = 0.1,
        momentum: float = 0.9,
        first_token: bool = False,
    ) -> None:
        self.events = tuple(event for event in schedule if first_token or event.kind not in ("end_of_text", "first_token"))
        self.require(steps)
        found = places(model, inputs, kwargs)
        if not found:
            hint = "only a LayerNorm that is a module of its own, over the last axis, can be removed in training"
            raise NormfuseError("this model has no LayerNorm that could be removed", hint=hint)
        final = None if found[-1].attention else found[-1]
        if auxiliary and final is None:
            raise NormfuseError("the auxiliary loss reads the input of a final norm, and there is none", hint="auxiliary=0")
        self.model, self.schedule, self.auxiliary = model, schedule, auxiliary
        self.norms = attach(model, found, momentum=momentum, first_token=first_token)
        self._shares = dict(_shares(found, final, schedule.layers))
        self._step, self._final_eps = 0, 0.0
        self._read: Tensor | None = None
        if auxiliary and final is not None:
            self.norms[final.path].register_forward_pre_hook(self._look)

    def require(self, steps: int) -> None:
        """Check that a run is long enough for the schedule.

        Raises:
            NormfuseError: it is not; norms would stay, and no step would follow the last removal.
        """
        last = self.events[-1].step
        if steps <= last + 1:
            hint = f"train for more than {last + 1} steps, or choose smaller gaps"
            raise NormfuseError(f"{steps} steps are too few: the last removal is at step {last}, counted from 0", hint=hint)

    def begin(self, step: int) -> tuple[Event, ...]:
        """Make the removals that are due; call it before each optimizer step, once, counting from 0.

        Args:
            step: the optimizer step that begins.

        Returns:
            The removals that were made now.
        """
        self._step = step
        return tuple(event for event in self.events if event.step <= step and self._apply(event))

    def loss(self, loss: Tensor, end_of_text: Tensor | None = None) -> Tensor:
        """The loss to train on: the task's own and the auxiliary one.

        Args:
            loss: of the task, for the latest forward call of the model; a scalar.
            end_of_text: True at tokens that end a text, of shape (batch, tokens); they do not count for the target.

        Raises:
            Diverged: the loss is NaN or infinite.
        """
        total = loss
        if self.auxiliary and self._read is not None:
            total = loss + self.auxiliary * uniformity(self._read, self._final_eps, end_of_text)
            self._read = None
        if not bool(torch.isfinite(total)):
            done = [event for event in self.events if event.step <= self._step]
            since = f", {self._step - done[-1].step} steps after '{done[-1].kind}' of layer {done[-1].layer}" if done else ""
            hint = "go on from a checkpoint before it with a lower learning rate, wider gaps or gradients clipped harder"
            raise Diverged(f"the loss is {loss.item()} at step {self._step}{since}", hint=hint)
        return total

    @property
    def is_complete(self) -> bool:
        """Whether no LayerNorm is left that the schedule removes."""
        return all(norm.is_removed and not norm.first_token for norm in self.norms.values())

    def _apply(self, event: Event) -> bool:
        """Make one removal; whether there was anything to do."""
        if event.kind == "end_of_text":
            return False  # its σ is the first token's, which follows
        if event.kind == "first_token":
            concerned = [norm for norm in self.norms.values() if norm.first_token]
            for norm in concerned:
                norm.remove_first()
            return bool(concerned)
        done = False
        for path, removed in self._shares.get((event.kind, event.layer), ()):
            missing = [each for each in removed if each not in self.norms[path].removed]
            if missing:
                self.norms[path].remove(*missing)
                done = True
        return done

    def _look(self, norm: nn.Module, given: tuple[Any, ...]) -> None:
        self._final_eps = float(getattr(norm, "eps", 0.0))
        self._read = given[0] if norm.training and torch.is_grad_enabled() else None


def uniformity(x: Tensor, eps: float, end_of_text: Tensor | None = None) -> Tensor:
    """The mean over all tokens of (s - τ)², with s = √(var x + ε) and τ its mean over ordinary tokens, without gradient.

    Args:
        x: what the final norm reads, (batch, tokens, channels).
        eps: of the final norm.
        end_of_text: True at tokens that end a text.
    """
    s = deviation(x, eps)
    ordinary = torch.ones_like(s, dtype=torch.bool)
    if x.dim() > 2 and x.shape[-2] > 1:
        ordinary[..., 0] = False
    if end_of_text is not None:
        ordinary &= ~end_of_text
    weight = ordinary.to(s.dtype)
    target = ((s * weight).sum() / weight.sum().clamp(min=1.0)).detach()
    return (s - target).square().mean()


def _shares(
    found: Sequence[Place], final: Place | None, layers: int
) -> Iterator[tuple[tuple[str, int], list[tuple[str, tuple[Path, ...]]]]]:
    """What each removal of a schedule concerns: paths of norms, and of each the paths that are removed."""
    attention = [place for place in found if place.attention]
    mlp = [place for place in found if not place.attention and place is not final]
    for layer in range(layers):
        share = [place for place in mlp if mlp.index(place) * layers // len(mlp) == layer]
        yield ("mlp", layer), [(place.path, PATHS) for place in share]
        share = [place for place in attention if attention.index(place) * layers // len(attention) == layer]
        yield ("main", layer), [(place.path, ("main",)) for place in share if place.readers]
        yield ("values", layer), [(place.path, ("values",) if place.readers else PATHS) for place in share]
    yield ("final", 0), [(final.path, PATHS)] if final else []


def frozen(model: nn.Module) -> bool:
    """Whether every `FakeLayerNorm` of a model is removed, so that nothing but arithmetic with stored numbers is left."""
    return all(module.is_removed for module in model.modules() if isinstance(module, FakeLayerNorm))
