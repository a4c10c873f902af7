"""Inputs of a transformers model, from the names in its forward and the sizes in its configuration.

A name says what an input is (token ids, pixels, samples, spectrograms), and a configuration says how large it is; neither says
how names go together, so there are several candidates, the fullest first, and the model itself decides (`found_inputs`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from normfuse.sources.call_signature import parameters_of, required
from normfuse.sources.inputs import InputKey, Inputs
from normfuse.sources.specs import DEFAULT_LIMIT, check_memory

Shape: TypeAlias = tuple[int, ...]

BATCH = 2
TOKENS = 16  # of a sequence, where the model has room
FRAMES = 16  # of a sound behind the convolutions that read its samples
STEPS = 64  # of a spectrogram of any length
SIDE = 224  # of an image where nothing is said
SAMPLES = 6400  # of a sound where nothing is said: a multiple of what codecs take at once

_TABLES = ("vocab_size", "decoder_vocab_size", "src_vocab_size", "tgt_vocab_size")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions")
_CHANNELS = ("num_channels", "in_channels", "in_chans")
_FEATURES = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")


@dataclass(frozen=True)
class Tokens:
    """Token ids: of every row any but the special ones, then one end of text, then padding where the mask says so.

    Attributes:
        shape: rows and their length.
        rows: of the table that they index, as far as the configuration knows.
        special: ids that stand for something else than text, such as places of an image.
        end: what ends a text.
        pad: what stands where the mask is 0.
        padded: so many at the end of the last row are masked.
    """

    shape: Shape
    rows: int
    special: frozenset[int] = frozenset()
    end: int | None = None
    pad: int | None = None
    padded: int = 0

    def drawn(self, rows: int, generator: torch.Generator) -> Tensor:
        """Ids below ``rows``."""
        table = torch.arange(rows)
        plain = table[~torch.isin(table, torch.tensor([*self.special, -1]))]
        plain = plain if plain.numel() > 1 else table
        ids = plain[torch.randint(0, plain.numel(), self.shape, generator=generator)]
        long = self.shape[1]
        for row in range(self.shape[0]):
            text = long - (self.padded if row == self.shape[0] - 1 else 0)
            if self.end is not None and self.end < rows and self.end != self.pad:
                ids[row, text - 1] = self.end
            if self.pad is not None and self.pad < rows:
                ids[row, text:] = self.pad
        return ids


@dataclass(frozen=True)
class Wanted:
    """What a model might be called with.

    Attributes:
        given: inputs whose values do not matter.
        tokens: keyword inputs that index tables.
    """

    given: Inputs
    tokens: Mapping[str, Tokens] = field(default_factory=dict)
    device: torch.device | None = None

    def drawn(self, limits: Mapping[InputKey, int]) -> Inputs:
        """The inputs, with ids below the limits that are known."""
        generator = torch.Generator().manual_seed(0)
        ids = {
            name: tokens.drawn(limits.get(name, tokens.rows), generator).to(self.device) for name, tokens in self.tokens.items()
        }
        return replace(self.given, kwargs={**ids, **self.given.kwargs})


def fitted(model: nn.Module, tensor: Tensor) -> Tensor:
    """`tensor` on the model's device, and in its dtype where both are floating."""
    weight = next((weight for weight in model.parameters() if weight.is_floating_point()), torch.empty(0))
    return tensor.to(weight.device, weight.dtype if tensor.is_floating_point() else tensor.dtype)


def inputs_by_name(model: Any) -> Iterator[Wanted]:
    """Candidates, the fullest first; none where the forward or the configuration does not say enough."""
    main, config = getattr(model, "main_input_name", None), getattr(model, "config", None)
    parameters = parameters_of(model)
    if not isinstance(main, str) or main not in parameters or config is None:
        return
    known = _Config(config)
    shapes = {name: shapes for name in parameters if (shapes := known.shapes(name))}
    text = [name for name in ("input_ids", "decoder_input_ids") if name in parameters]
    names = [*shapes, *text]
    if main not in names:
        return
    for kept, mask, batch in _choices(names, main, "attention_mask" in parameters):
        if set(required(parameters)) <= {*kept, *(["attention_mask"] if mask else [])}:
            pictured = [name for name in kept if name in shapes]
            left = [name for name in shapes if name not in kept]
            for sizes in itertools.product(*(shapes[name] for name in pictured)):
                tokens = [name for name in kept if name in text]
                yield _Draft(model, known, dict(zip(pictured, sizes, strict=True)), tokens, mask, batch).wanted(left)


def _choices(names: Sequence[str], main: str, masks: bool) -> Iterator[tuple[tuple[str, ...], bool, int]]:
    """(names, whether padding is masked, rows), the fullest first and nothing twice."""
    decoder = "decoder_input_ids"
    kept = [tuple(names), tuple(name for name in names if name in (main, decoder)), (main,)]
    mask = (True, False) if masks else (False,)
    for batch, some, masked in itertools.product((BATCH, 1), dict.fromkeys(kept), mask):
        if not masked or "input_ids" in some:
            yield some, masked, batch


@dataclass(frozen=True)
class _Draft:
    model: Any
    config: _Config
    floats: Mapping[str, Shape]
    text: Sequence[str]
    mask: bool
    batch: int

    def wanted(self, left: Sequence[str]) -> Wanted:
        check_memory(sum(4 * self.batch * math.prod(shape) for shape in self.floats.values()))
        generator = torch.Generator().manual_seed(0)
        kwargs: dict[str, Any] = {
            name: fitted(self.model, torch.randn(self.batch, *shape, generator=generator))
            for name, shape in self.floats.items()
        }
        long = self.config.tokens
        padded = long // 4 if self.mask and self.batch > 1 else 0
        if self.mask:
            kwargs["attention_mask"] = torch.ones(self.batch, long, dtype=torch.int64)
            kwargs["attention_mask"][-1, long - padded :] = 0
            kwargs["attention_mask"] = fitted(self.model, kwargs["attention_mask"])
        sizes = {"input_ids": (long, padded), "decoder_input_ids": (max(1, long // 2), 0)}
        tokens = {name: self.config.text((self.batch, sizes[name][0]), self._rows(), sizes[name][1]) for name in self.text}
        told = (
            f"the inputs that were found leave out {', '.join(left)}: what only those reach is not in the trace"
            if left
            else None
        )
        return Wanted(Inputs((), kwargs, left_out=told), tokens, fitted(self.model, torch.empty(0)).device)

    def _rows(self) -> int:
        try:  # code of the model's class
            table = getattr(self.model.get_input_embeddings(), "num_embeddings", None)
        except Exception:
            table = None
        known = [*self.config.tables, *([table] if type(table) is int and table > 0 else [])]
        return min(known, default=DEFAULT_LIMIT)


class _Config:
    """What a configuration and those within it say; anything can be in them."""

    def __init__(self, config: Any) -> None:
        self._parts = list(_parts(config))
        self.tables = self._counts(_TABLES)
        room = min((each // 2 for each in self._counts(_POSITIONS)), default=TOKENS)  # half: some count from an offset
        self.tokens = max(1, min(TOKENS, room))

    def text(self, shape: Shape, rows: int, padded: int) -> Tokens:
        """How token ids are to be drawn."""
        special = [id for part in self._parts for name, value in part.items() if _special(name) for id in _ids(value)]
        end, pad = (next(iter(self._ids(name)), None) for name in ("eos_token_id", "pad_token_id"))
        return Tokens(shape, rows, frozenset(special), end, pad, padded)

    def shapes(self, name: str) -> list[Shape]:
        """Shapes of one row of an input that is not text, the likeliest first."""
        return {
            "pixel_values": self._pixels,
            "input_values": self._samples,
            "input_features": self._spectrograms,
            "past_values": self._series,
        }.get(name, list)()

    def _pixels(self) -> list[Shape]:
        channels, size = self._said(_CHANNELS, 3), self._said(("image_size",), SIDE)
        sides = (size, size) if _count(size) else size
        if not _count(channels) or not isinstance(sides, tuple | list) or len(sides) != 2 or not all(map(_count, sides)):
            return []
        image = (channels, *sides)
        frames = self._said(("num_frames",), None)
        return [(frames, *image), image] if _count(frames) else [image]

    def _samples(self) -> list[Shape]:
        bins, steps = self._said(("num_mel_bins",), None), self._said(("max_length",), None)
        kernels, strides = (self._said((name,), None) for name in ("conv_kernel", "conv_stride"))
        if kernels is None and bins is not None:
            return [(steps, bins)] if _count(steps) and _count(bins) else []
        samples = SAMPLES
        if kernels is not None or strides is not None:
            if not all(isinstance(each, tuple | list) and each and all(map(_count, each)) for each in (kernels, strides)):
                return []
            samples = FRAMES
            for kernel, stride in zip(reversed(kernels), reversed(strides), strict=False):
                samples = (samples - 1) * stride + kernel
                check_memory(samples)  # before it has a thousand digits
        channels = self._said(("audio_channels",), 1)
        return [(samples,), (channels, samples)] if _count(channels) else [(samples,)]

    def _spectrograms(self) -> list[Shape]:
        bins, positions = self._said(_FEATURES, None), self._said(("max_source_positions",), None)
        if not _count(bins):
            return []
        return [*([(bins, 2 * positions)] if _count(positions) else []), (STEPS, bins)]

    def _series(self) -> list[Shape]:
        steps, channels = self._said(("context_length",), None), self._said(("num_input_channels",), None)
        return [(steps, channels)] if _count(steps) and _count(channels) else []

    def _said(self, names: Sequence[str], default: Any) -> Any:
        """What the outermost configuration says that says anything but None."""
        said = (part[name] for part in self._parts for name in names if part.get(name) is not None)
        return next(said, default)

    def _counts(self, names: Collection[str]) -> list[int]:
        return [part[name] for part in self._parts for name in names if _count(part.get(name))]

    def _ids(self, name: str) -> list[int]:
        return [id for part in self._parts for id in _ids(part.get(name))]


def _parts(config: Any, depth: int = 3) -> Iterator[Mapping[str, Any]]:
    """The settings of a configuration, then of those within it."""
    settings = {name: value for name, value in getattr(config, "__dict__", {}).items() if isinstance(name, str)}
    yield {**settings, **{own: settings[theirs] for own, theirs in _renamed(config).items() if theirs in settings}}
    for value in settings.values():
        if depth and hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            yield from _parts(value, depth - 1)


def _renamed(config: Any) -> Mapping[str, str]:
    """What transformers calls a setting -> what this configuration calls it."""
    names = getattr(config, "attribute_map", None)
    return names if isinstance(names, Mapping) else {}


def _special(name: str) -> bool:
    return name.endswith(("_token_id", "_token_index"))


def _ids(value: Any) -> list[int]:
    return [each for each in (value if isinstance(value, tuple | list) else [value]) if type(each) is int and each >= 0]


def _count(value: Any) -> bool:
    return type(value) is int and value > 0
