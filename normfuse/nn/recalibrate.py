"""Running statistics measured again, or mixed with those of other data; parameters stay.

SLAB closes its training so (frozen weights, a few epochs for the statistics alone), and α-BN mixes the statistics that a model
was trained with and those of the data that it meets: (1 - α) · source + α · target. Afterwards the norms are constants as
before and fold as before.

Reference
    Guo et al., SLAB, ICML 2024, published code (closing phase). You et al., "Test-time Batch Statistics Calibration for
    Covariate Shift" (α-BN), arXiv 2110.04065.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normfuse.nn.batch_channel_norm import EstimatedBatchNorm
from normfuse.nn.evo_norm import EvoNormB0
from normfuse.nn.power_norm import PowerNorm
from normfuse.nn.unified_norm import UnifiedNorm

M = TypeVar("M", bound=nn.Module)


def recalibrate(
    model: M,
    data: Iterable[Any],
    alpha: float = 1.0,
    *,
    call: Callable[[M, Any], object] | None = None,
) -> M:
    """Measure the running statistics of every norm in ``model`` on ``data``, in place.

    The model runs in eval without gradients, except that each norm normalizes with the statistics of the batch at hand (mixed
    by ``alpha``), as BatchNorm does in training. What is stored are the statistics of all the data together, whatever the size
    of the batches: means and variances are pooled, not averaged. They are exact for a norm whose input does not depend on
    another such norm; further on they are those of inputs that were normalized batch by batch, so use large batches.

    Known norms: torch's BatchNorm and SyncBatchNorm with running statistics (inside `RepBN`, `BatchChannelNorm` and `IBN` as
    well), `EstimatedBatchNorm`, `EvoNormB0`, `UnifiedNorm` and `PowerNorm`. Frozen copies of BatchNorm, and norms without
    running statistics, are left alone, as are norms that the data do not reach. Windows, counters and gradient estimates of
    UnifiedNorm and PowerNorm stay. Padding that a ``pad_mask`` marks is left out for those two; `RepBN` ignores the mask in
    eval, and so do its statistics here: give it batches without padding.

    Args:
        model: changed in place; its training flags are the same afterwards.
        data: batches. A mapping is passed as keyword arguments; of a list or tuple, as a loader with labels yields, what the
            forward requires, and the first element where it requires nothing (`normfuse.sources.batches`); anything else as it
            is. An optional argument that was given nothing of a longer tuple is told of by a `NormfuseWarning`.
        alpha: share of the new statistics: 1 replaces the old ones, less mixes (α-BN).
        call: how to run the model on a batch, in place of the above.

    Returns:
        The same model.

    Raises:
        ValueError: ``alpha`` is out of [0, 1], there is nothing to measure or no data, or a norm saw a single value per channel
            or an inf or nan. The model is then as it was.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is a share in [0, 1], not {alpha}")
    from normfuse.sources.batches import as_batch, taken, warn_of  # only here: the modules of this room need torch alone

    meters = {name: _Meter(name, module, alpha) for name, module in model.named_modules() if _statistics(module)}
    if not meters:
        raise ValueError("no module of this model has running statistics that could be measured")
    done = told = False
    with torch.no_grad(), _everything_in_eval(model):
        handles = [meter.module.register_forward_pre_hook(meter, with_kwargs=True) for meter in meters.values()]
        try:
            for batch in data:
                if call:
                    call(model, batch)
                else:
                    given = taken(model, as_batch(batch))
                    told = told or warn_of(given)
                    model(*given.args, **given.kwargs)
            if not any(meter.count for meter in meters.values()):
                raise ValueError("the data are empty, or reach none of the norms")
            final = [(meter, meter.statistics()) for meter in meters.values()]
            done = True
        finally:
            for handle in handles:
                handle.remove()
            for meter in meters.values():
                meter.restore()
        if done:
            for meter, statistics in final:
                meter.store(*statistics)
    return model


@contextmanager
def _everything_in_eval(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Meter:
    """Pools mean and variance of what one norm sees; gives the norm each batch's own to work with."""

    def __init__(self, name: str, module: nn.Module, alpha: float) -> None:
        self.name, self.module, self.alpha = name, module, alpha
        self.count = 0
        self._mean = self._squares = torch.zeros(())
        self._source = {key: value.clone() for key, value in _statistics(module).items()}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, pad_mask = (*args, *kwargs.values(), None)[:2]
        tokens = _tokens(module, x, pad_mask)
        variance, mean = torch.var_mean(tokens if tokens.dtype == torch.float64 else tokens.float(), 0, correction=0)
        self._pool(len(tokens), mean.double(), variance.double())
        self.store(mean, variance, variance)

    def _pool(self, count: int, mean: Tensor, variance: Tensor) -> None:
        """Chan's rule for two groups."""
        total, apart = self.count + count, mean - self._mean.to(mean)
        self._squares = self._squares.to(mean) + variance * count + apart.square() * (self.count * count / max(total, 1))
        self._mean = self._mean.to(mean) + apart * (count / max(total, 1))
        self.count = total

    def statistics(self) -> tuple[Tensor, Tensor, Tensor] | tuple[()]:
        """Mean, biased and unbiased variance of everything seen; nothing if nothing was."""
        if self.count == 0:
            return ()
        if self.count < 2:
            raise ValueError(f"'{self.name}' saw a single value per channel, which has no variance")
        if not bool(torch.isfinite(self._mean + self._squares).all()):
            raise ValueError(f"'{self.name}' saw an inf or nan")
        return self._mean, self._squares / self.count, self._squares / (self.count - 1)

    def store(self, *statistics: Tensor) -> None:
        """Write (1 - α) · source + α · these."""
        if not statistics:
            return
        mean, biased, unbiased = statistics
        second_moment = biased + mean.square()
        new = {
            "running_mean": mean,
            "running_var": second_moment if isinstance(self.module, UnifiedNorm) else unbiased,
            "running_phi": second_moment,
        }
        for key, buffer in _statistics(self.module).items():
            source, target = self._source[key], new[key].reshape(buffer.shape)
            buffer.copy_(target if self.alpha == 1 else (1 - self.alpha) * source + self.alpha * target)

    def restore(self) -> None:
        """Write the source back."""
        for key, buffer in _statistics(self.module).items():
            buffer.copy_(self._source[key])


_KNOWN = (_BatchNorm, EstimatedBatchNorm, EvoNormB0, UnifiedNorm, PowerNorm)


def _statistics(module: nn.Module) -> dict[str, Tensor]:
    """Buffers of running statistics; none where they are not tracked, or of a norm that is not known."""
    names = ("running_mean", "running_var", "running_phi") if isinstance(module, _KNOWN) else ()
    return {name: value for name, value in module.named_buffers(recurse=False) if name in names}


def _tokens(module: nn.Module, x: Tensor, pad_mask: Tensor | None) -> Tensor:
    """What the norm takes its statistics of, as (tokens, channels)."""
    if isinstance(module, PowerNorm) and module.group_scaling is not None:
        x = module.group_scaling(x)
    if not isinstance(module, UnifiedNorm | PowerNorm):
        x = x.movedim(1, -1)
    return x.flatten(0, -2) if pad_mask is None else x[~pad_mask]
