"""How constant the deviation of each LayerNorm is on real inputs: measured once, kept in a file, told in a table.

σ is what a norm divides each token by, √(var x + ε). A norm whose σ hardly varies can be given a stored one at little cost;
one whose σ depends on the token cannot. Of each norm the file has the mean of σ, its spread, the positions that are outliers,
and what the first token does to it, which in large language models has a deviation far from all others'.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import RenderableType
from rich.text import Text
from torch import Tensor, nn
from torch.fx import Graph, Node

from normfuse.analysis.facts import analyze
from normfuse.api.opening import to_program
from normfuse.errors import InputError, LoadError, NormfuseError, first_line
from normfuse.escaping import escaped, json_text
from normfuse.graph.interpreter import How, flat_inputs, run_graph, user_inputs
from normfuse.graph.ops.lookup import rank
from normfuse.graph.program import Program
from normfuse.graph.views import HALVES, Norm, NormKind, aten, dtype
from normfuse.limits import OverLimit
from normfuse.proof.measuring import Progress
from normfuse.report.text import plain_table
from normfuse.sources.atomic import write_atomically
from normfuse.sources.batches import as_batch, taken
from normfuse.sources.inputs import Inputs
from normfuse.strict_json import items, number, parsed, read_file, record, text, whole

TARGETS = "targets"
"""The key of a batch's targets, which are not an input of the model."""
CONSTANT = 0.1
"""Spread over mean up to which a norm is told to be near-constant."""
OUTLIER = 0.25
"""How far the mean σ of a position may be from the median position's, as a share of it."""
_VERSION = 1

Batch: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any] | Inputs
"""A tensor (one positional input), a sequence (positional inputs), a mapping (keyword inputs) or `Inputs`; a keyword
``targets`` is no input of the model."""


@dataclass(frozen=True)
class Deviation:
    """σ of one norm over all tokens of the calibration data.

    Attributes:
        site: path of the norm's module, or the name of its node.
        node: name of its node in the traced graph.
        tokens: how many were seen.
        mean: mean of σ.
        spread: standard deviation of σ.
        least: the smallest σ.
        most: the largest σ.
        sigma: 1/mean(1/σ), the σ by which the average token is scaled as by its own; large outliers hardly move it.
        first: mean σ of the first position over the mean of all others; 1 where there are no positions.
        rest_spread: standard deviation over mean of σ, the first position left out.
        outliers: positions whose mean σ is more than a quarter away from the median position's.
    """

    site: str
    node: str
    tokens: int
    mean: float
    spread: float
    least: float
    most: float
    sigma: float
    first: float
    rest_spread: float
    outliers: tuple[int, ...]

    @property
    def is_near_constant(self) -> bool:
        """Whether one number stands for σ at every token, within a tenth."""
        return self.rest_spread <= CONSTANT and abs(self.first - 1) <= CONSTANT


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` measured.

    Attributes:
        model: how the user named the model.
        batches: how many there were.
        norms: one entry per LayerNorm over the last axis, in execution order.
        left_out: what of the batches is no input, if anything; not in the file.
    """

    model: str
    batches: int
    norms: tuple[Deviation, ...]
    left_out: str | None = None

    def of(self, program: Program, norm: Norm) -> Deviation | None:
        """What is known of a norm of the same model: by its module where that computes one norm, by its node otherwise."""
        site = program.site(norm.out)
        named = [each for each in self.norms if each.site == str(site)]
        return named[0] if len(named) == 1 else next((each for each in named if each.node == site.node), None)

    def to_dict(self) -> dict[str, Any]:
        """The calibration as JSON types."""
        norms = [{**asdict(each), "outliers": list(each.outliers)} for each in self.norms]
        return {"normfuse_calibration": _VERSION, "model": self.model, "batches": self.batches, "norms": norms}

    def save(self, path: str | Path) -> Path:
        """Write JSON, atomically."""
        content = json_text(self.to_dict(), indent=1) + "\n"
        write_atomically(Path(path), lambda file: file.write_text(content, encoding="utf-8"))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            LoadError: the file is not there, or is no calibration of this version.
        """
        try:
            data = record(parsed(read_file(path)))
            if data["normfuse_calibration"] != _VERSION:
                raise LoadError(f"{path} is a calibration of version {data['normfuse_calibration']}, not {_VERSION}")
            norms = tuple(map(_deviation_of, items(data["norms"])))
            return cls(text(data["model"]), whole(data["batches"]), norms)
        except (OSError, KeyError, ValueError, OverLimit) as error:
            hint = "normfuse calibrate MODEL --data FILE -o cal.json writes one"
            reason = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
            raise LoadError(f"{path} is no calibration: {reason}", hint=hint) from error

    def render(self) -> Iterator[RenderableType]:
        """A row per norm, and how many are near-constant."""
        self = escaped(self)
        table = plain_table("norm", "σ", "spread", "first token", "range", "outlier positions", "")
        for each in self.norms:
            cells = (
                each.site, f"{each.mean:.4g}", f"{each.rest_spread:.1%}", f"× {each.first:.3g}",
                f"{each.least:.3g} to {each.most:.3g}", _positions(each.outliers), "near-constant" * each.is_near_constant,
            )  # fmt: skip
            table.add_row(*map(Text, cells))
        yield table
        yield ""
        near = sum(each.is_near_constant for each in self.norms)
        tokens = max((each.tokens for each in self.norms), default=0)
        said = f"{near} of {len(self.norms)} norms are near-constant (within {CONSTANT:.0%}) on {tokens} tokens"
        yield Text(said, "bold")
        if self.left_out:
            yield Text(f"note: {self.left_out}", "dim")


def _deviation_of(data: Any) -> Deviation:
    """A norm of a calibration file, every figure of which is one that can have been measured."""
    figures = {each.name: number(record(data)[each.name]) for each in fields(Deviation) if each.type == "float"}
    if not all(map(math.isfinite, figures.values())) or min(figures["mean"], figures["sigma"], figures["least"]) < 0:
        raise ValueError(f"'{text(data['site'])}' has a deviation that no norm has")
    places = tuple(map(whole, items(data["outliers"])))
    return Deviation(site=text(data["site"]), node=text(data["node"]), tokens=whole(data["tokens"]), outliers=places, **figures)


def _positions(places: Sequence[int]) -> str:
    shown = ", ".join(map(str, places[:4]))
    return f"{shown}, … {len(places)} in all" if len(places) > 4 else shown


def calibrate(
    model: Any,
    data: Iterable[Batch],
    *,
    dynamic_shapes: Any = None,
    trust_pickle: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Measure the deviation σ = √(var x + ε) of every LayerNorm of a model over the last axis, on real inputs, in one pass.

    Args:
        model: an `nn.Module`, an `ExportedProgram`, a `Program`, or the path of one; it runs as at inference.
        data: batches; the first one is what a module is traced with, so all have its sizes unless dims are dynamic. Of tuples
            what the forward requires is taken (`normfuse.sources.batches`).
        dynamic_shapes: as for `torch.export.export`.
        trust_pickle: as for `rewrite`.
        progress: told (what, done, total); total is 0 where the data do not tell their length.

    Returns:
        The calibration; `save` it, or give it to `strip`.

    Raises:
        InputError: there are no batches, or one does not fit the model.
        NormfuseError: the model has no such norm, or a deviation is inf or nan.
    """
    total = len(data) if isinstance(data, Sized) else 0
    batches = iter(data)
    first = next(batches, None)
    if first is None:
        raise InputError("there are no calibration data", hint="give one batch at least")
    name, program, example = to_program(model, iter([inputs_of(first)]), None, dynamic_shapes, trust_pickle)
    norms = last_axis_norms(program)
    if not norms:
        raise NormfuseError(f"{name} has no LayerNorm over its last axis", hint="normfuse inspect MODEL lists its norms")
    watch, sums, done = _Watch(program, norms), [_Sums() for _ in norms], 0
    for batch in itertools.chain([first], batches):
        if progress:
            progress("calibrating", done, total)
        given = taken(program, inputs_of(batch))
        for sigma, each in zip(watch(flat_inputs(program, given.args, given.kwargs)), sums, strict=True):
            each.add(sigma)
        done += 1
    found = (each.deviation(program, norm) for each, norm in zip(sums, norms, strict=True))
    return Calibration(name, done, tuple(found), example.left_out)


def inputs_of(batch: Batch) -> Inputs:
    """The inputs of a batch; its targets are none."""
    given = as_batch(batch)
    return replace(given, kwargs={key: value for key, value in given.kwargs.items() if key != TARGETS})


def targets_of(batch: Batch) -> Tensor | None:
    """The targets of a batch, if it has any."""
    return as_batch(batch).kwargs.get(TARGETS)


def batches_of(data: Inputs, size: int) -> list[Inputs]:
    """Rows of inputs cut into batches; what does not fill a batch is left out.

    Args:
        data: tensors with as many rows each.
        size: rows of a batch.

    Raises:
        InputError: they have different numbers of rows, or fewer than a batch has.
    """
    tensors = [*data.args, *data.kwargs.values()]
    rows = {each.shape[0] if isinstance(each, Tensor) and each.dim() else 0 for each in tensors}
    if len(rows) != 1 or min(rows) < size:
        hint = f"every tensor of the data must have the same number of rows, {size} at least; --batch makes batches smaller"
        raise InputError(f"data of {sorted(rows)} rows cannot be cut into batches of {size}", hint=hint)
    cuts = range(0, min(rows) - size + 1, size)
    return [
        Inputs(
            tuple(each[at : at + size] for each in data.args), {key: each[at : at + size] for key, each in data.kwargs.items()}
        )
        for at in cuts
    ]


def last_axis_norms(program: Program) -> list[Norm]:
    """The LayerNorms of a program that are over its last axis alone."""
    return [norm for norm in analyze(program).norms if norm.kind == NormKind.LAYER_NORM and norm.axes == (rank(norm.x) - 1,)]


class _Watch:
    """Runs a program and gives σ of some of its norms for every token."""

    def __init__(self, program: Program, norms: Sequence[Norm]) -> None:
        self.program, self.norms = program, norms
        self.graph = Graph()
        twins: dict[Node, Node] = {}
        self.graph.graph_copy(program.graph, twins)
        variances = [self._variance(twins[norm.x], dtype(norm.x)) for norm in norms]
        self.graph.output(variances)
        self.placeholders = {twins[node]: node for node in program.graph.find_nodes(op="placeholder")}
        self.graph.owning_module = program.exported.graph_module

    def _variance(self, x: Node, kind: torch.dtype | None) -> Node:
        if kind in HALVES:
            x = self.graph.call_function(aten._to_copy.default, (x,), {"dtype": torch.float32})
        return self.graph.call_function(aten.var.correction, (x, [-1]), {"correction": 0})

    def __call__(self, flat: Sequence[Any]) -> list[Tensor]:
        given = dict(zip(user_inputs(self.program), flat, strict=True))

        def fetch(node: Node) -> Any:
            original = self.placeholders[node]
            name = self.program.stored.get(original.name)
            return given[original] if name is None else self.program.tensor(name)

        variances = run_graph(self.graph, fetch, How())
        return [(each.double() + norm.eps).sqrt() for each, norm in zip(variances, self.norms, strict=True)]


class _Sums:
    """Sums over tokens in float64, from which all that is told of σ follows."""

    def __init__(self) -> None:
        self.all = torch.zeros(4, dtype=torch.float64)
        self.by_position = torch.zeros(3, 0, dtype=torch.float64)
        self.least, self.most = math.inf, 0.0

    def add(self, sigma: Tensor) -> None:
        sigma = sigma.cpu()
        rows = sigma.reshape(-1, sigma.shape[-1]) if sigma.dim() > 1 else sigma.reshape(-1, 1)
        ones = torch.ones_like(rows)
        self.all += torch.stack([each.sum() for each in (ones, rows, rows.square(), rows.reciprocal())])
        here = torch.stack([each.sum(0) for each in (ones, rows, rows.square())])
        longer = max(here.shape[1], self.by_position.shape[1])
        grown = (nn.functional.pad(each, (0, longer - each.shape[1])) for each in (self.by_position, here))
        self.by_position = sum(grown, torch.zeros(3, longer, dtype=torch.float64))
        self.least, self.most = min(self.least, rows.min().item()), max(self.most, rows.max().item())

    def deviation(self, program: Program, norm: Norm) -> Deviation:
        site = program.site(norm.out)
        if not bool(torch.isfinite(self.all).all()):
            raise NormfuseError(f"'{site}' saw an inf or nan", hint="calibrate in float32, on inputs that the model can handle")
        count, mean, spread = _moments(self.all)
        positions = self.by_position[1] / self.by_position[0]
        _, rest_mean, rest_spread = _moments(self.by_position[:, 1:].sum(1)) if len(positions) > 1 else (count, mean, spread)
        first = positions[0].item() / rest_mean if len(positions) > 1 else 1.0
        median = positions.median()
        outliers = ((positions - median).abs() > OUTLIER * median).nonzero().flatten().tolist()
        sigma = count / self.all[3].item()
        return Deviation(
            str(site), site.node, int(count), mean, spread, self.least, self.most, sigma, first, rest_spread / rest_mean,
            tuple(outliers) if len(positions) > 1 else (),
        )  # fmt: skip


def _moments(sums: Tensor) -> tuple[float, float, float]:
    """Count, mean and standard deviation from count, sum and sum of squares."""
    count, total, squares = (float(each) for each in sums[:3])
    mean = total / count
    return count, mean, math.sqrt(max(squares / count - mean * mean, 0.0))
