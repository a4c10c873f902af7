"""`normfuse.strip`: remove LayerNorms without training, as many as a bound on the loss allows, and fold what is left of them.

Each norm is given a stored σ: its calibrated one, or the one that a published checkpoint's eps stands for. What the removal of
one norm alone costs ranks them; then norm after norm is removed, the one next that costs least with all before it gone, as
long as the loss stays within the bound. The result is folded by the pass `strip_layernorm`, and that step is proven like any
other: it is the removal that is approximate, and what it costs is measured on the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text
from torch import nn

from normfuse.analysis.facts import norm_counts
from normfuse.api.opening import files_of, to_program
from normfuse.errors import InputError, NormfuseError, VerificationFailed
from normfuse.escaping import escaped, json_text
from normfuse.graph.findings import Claim
from normfuse.graph.program import Program, Site
from normfuse.graph.views import Norm
from normfuse.passes.strip_layernorm import is_published, overflows, with_sigmas
from normfuse.planning.planner import plan_and_apply
from normfuse.planning.registry import find
from normfuse.proof.cases import cases_for
from normfuse.proof.evidence import checked
from normfuse.proof.measuring import Progress
from normfuse.proof.proving import checked_level, prove
from normfuse.report.report import Report
from normfuse.report.text import plain_table
from normfuse.sources.atomic import write_atomically
from normfuse.sources.inputs import Inputs
from normfuse.stripping.calibration import Batch, Calibration, calibrate, inputs_of, last_axis_norms
from normfuse.stripping.quality import Quality, loss, measure


class TooCostly(VerificationFailed):
    """The model is worse than the bound allows; nothing is written, and ``report`` tells by how much."""


@dataclass(frozen=True)
class Candidate:
    """A norm that could be removed.

    Attributes:
        site: where it is.
        sigma: the σ that it would be given.
        because: where that comes from.
        cost: by how much its removal alone raises the loss, in nats; None where it was not asked.
        removed: whether it was removed.
    """

    site: Site
    sigma: float
    because: str
    cost: float | None = None
    removed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The candidate as JSON types."""
        cost = self.cost if self.cost is not None and math.isfinite(self.cost) else None
        return {**asdict(self), "site": str(self.site), "node": self.site.node, "cost": cost}


@dataclass(frozen=True)
class StripReport:
    """What was removed, what it costs, and the report of the folding.

    Attributes:
        model: how the user named the model.
        bound: the largest increase of the loss that was allowed, in nats.
        candidates: every norm that could be removed, the cheapest first.
        unknown: norms that could not, and why.
        quality: the folded model beside the original.
        folding: the report of `strip_layernorm` on the model with stored deviations.
    """

    model: str
    bound: float
    candidates: tuple[Candidate, ...]
    unknown: tuple[tuple[str, str], ...]
    quality: Quality
    folding: Report

    @property
    def removed(self) -> tuple[Candidate, ...]:
        """The norms that were removed."""
        return tuple(each for each in self.candidates if each.removed)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return {
            "model": self.model,
            "bound": self.bound,
            "claim": "approximate",
            "removed": len(self.removed),
            "candidates": [each.to_dict() for each in self.candidates],
            "unknown": [{"site": site, "reason": reason} for site, reason in self.unknown],
            "quality": self.quality.to_dict(),
            "folding": self.folding.to_dict(),
        }

    def to_json(self) -> str:
        """The report as JSON text."""
        return json_text(self.to_dict())

    def render(self) -> Iterator[RenderableType]:
        """The report for a terminal: norms by cost, the folding, what it costs."""
        self = escaped(self)
        table = plain_table("norm", "σ", "costs alone (nats)", "")
        for each in self.candidates:
            cost = "—" if each.cost is None else f"{each.cost:+.4f}"
            cells = (str(each.site), f"{each.sigma:.4g}", cost, "removed" if each.removed else "stays")
            table.add_row(*map(Text, cells))
        yield table
        yield ""
        for site, reason in self.unknown:
            yield Text(f"stays: {site}: {reason}")
        yield from self.folding.render()
        yield ""
        yield from self.quality.render()


@dataclass(frozen=True)
class Stripped:
    """A model without some of its LayerNorms.

    Attributes:
        program: the folded program, its weights evaluated.
        report: what was removed, what that costs, and the proof of the folding.
        inputs: the example inputs.
        sources: files that `save` must not overwrite.
    """

    program: Program
    report: StripReport
    inputs: Inputs
    sources: tuple[Path, ...] = ()

    def module(self) -> nn.Module:
        """A module that is called with the same arguments as the original."""
        return self.program.module()

    def save(self, path: str | Path) -> Path:
        """Write ``.pt2`` atomically; `torch.export.load` opens it without normfuse.

        Raises:
            InputError: the path is the input file, or its folder does not exist.
        """
        write_atomically(Path(path), self.program.save, never_over=self.sources)
        return Path(path)


def strip(
    model: Any,
    data: Iterable[Batch],
    calibration: Calibration | str | Path | None = None,
    *,
    max_loss_increase: float,
    dynamic_shapes: Any = None,
    verify: str = "full",
    trust_pickle: bool = False,
    progress: Progress | None = None,
) -> Stripped:
    """Remove, without training, the largest set of LayerNorms that a bound on the loss allows, and fold what is left of them.

    This makes another function of the model (claim ``approximate``). What it costs is measured on the data, on which the norms
    were chosen as well: measure on other data before you trust it.

    Args:
        model: an `nn.Module`, an `ExportedProgram`, a `Program`, or the path of one. It is not changed.
        data: batches, as for `calibrate`, kept in memory. A mapping may have ``targets``, a class for every prediction (-100:
            none); without them a batch of token ids predicts its own next tokens.
        calibration: what `calibrate` measured, or its file; None to measure on the data.
        max_loss_increase: by how much the mean cross-entropy may rise, in nats per prediction.
        dynamic_shapes: as for `torch.export.export`.
        verify: as for `rewrite`: how the folding is proven.
        trust_pickle: as for `rewrite`.
        progress: told (what, done, total).

    Returns:
        The model without those norms; with none removed, the original.

    Raises:
        InputError: there are no batches, or nothing tells their targets.
        NormfuseError: there is no LayerNorm that could be removed; or it is a published checkpoint in float16, which overflows.
        TooCostly: the checkpoint is in the published format, and reading it as it is meant costs more than the bound.
        VerificationFailed: the folding is not equivalent; this would be a bug of normfuse.
    """
    checked_level(verify)
    batches = list(data)
    if not batches:
        raise InputError("there are no data to measure on", hint="give one batch at least")
    name, program, given = to_program(model, iter([inputs_of(batches[0])]), None, dynamic_shapes, trust_pickle)
    given = replace(given, dynamic_shapes=None)
    meant, choices, unknown = _candidates(program, batches, calibration, progress)
    base = loss(program, batches)
    ranked = _ranked(program, choices, batches, base, progress)
    chosen = _largest(program, meant, ranked, batches, base, base + max_loss_increase, progress)
    linear = _with(program, chosen)
    folding, folded = plan_and_apply(linear, ["strip_layernorm"])
    tried = cases_for(linear, given)
    evidence = prove(linear, folded, folding, tried, level=verify, progress=progress)
    notes = (*program.notes, *given.notes)
    report = Report(name, folding, evidence, norm_counts(program), norm_counts(folded), notes=notes)
    checked(evidence, report)
    baked = folded.baked()
    quality = measure(program, baked, batches, progress)
    gone = {each.site.node for each in chosen}
    told = tuple(replace(each, removed=each.site.node in gone) for each in (*meant, *ranked))
    stripping = StripReport(name, max_loss_increase, told, unknown, quality, report)
    if chosen and quality.increase > max_loss_increase:
        said = f"the loss rises by {quality.increase:.4f} nats, more than {max_loss_increase:g}"
        raise TooCostly(said, stripping, hint="nothing was written; allow more, or train the model on without norms")
    return Stripped(baked, stripping, given, files_of(model))


def _candidates(
    program: Program, batches: Sequence[Batch], calibration: Any, progress: Progress | None
) -> tuple[list[Candidate], list[Candidate], tuple[tuple[str, str], ...]]:
    """Norms that are meant to be linear, norms that could be, and those of which nothing is known."""
    norms = last_axis_norms(program)
    meant = [_meant(program, norm) for norm in norms if is_published(norm)]
    others = [norm for norm in norms if not is_published(norm)]
    if others and calibration is None:
        calibration = calibrate(program, batches, progress=progress)
    known = Calibration.load(calibration) if isinstance(calibration, (str, Path)) else calibration
    choices: list[Candidate] = []
    unknown: list[tuple[str, str]] = []
    for norm in others:
        found = known.of(program, norm) if known is not None else None
        site = program.site(norm.out)
        if found is None:
            unknown.append((str(site), "NF605: it is not in the calibration; calibrate the same model"))
        else:
            because = f"σ = {found.sigma:.4g} of {found.tokens} tokens, spread {found.rest_spread:.1%}"
            choices.append(Candidate(site, found.sigma, because))
    if not meant and not choices:
        hint = "normfuse inspect MODEL lists its norms; normfuse calibrate measures them"
        raise NormfuseError("there is no LayerNorm that could be removed", hint=hint)
    return meant, choices, tuple(unknown)


def _meant(program: Program, norm: Norm) -> Candidate:
    site = program.site(norm.out)
    if overflows(norm):
        hint = "convert the checkpoint from float32 or bfloat16"
        raise NormfuseError(f"'{site}' is in the published format, whose eps of {norm.eps:g} overflows float16", hint=hint)
    return Candidate(site, norm.eps**0.5, f"its eps of {norm.eps:g} stands for this σ")


def _with(program: Program, chosen: Iterable[Candidate]) -> Program:
    """The program with stored deviations: approximate, and only asked for here."""
    sigmas = {each.site.node: each.sigma for each in chosen}
    because: Mapping[str, str] = {each.site.node: each.because for each in chosen}
    removal = replace(find("strip_layernorm"), propose=with_sigmas(sigmas, because))
    return plan_and_apply(program, [removal], allow=Claim.APPROXIMATE)[1]


def _ranked(
    program: Program, choices: Sequence[Candidate], batches: Sequence[Batch], base: float, progress: Progress | None
) -> list[Candidate]:
    """The norms with what each removal alone costs, the cheapest first."""
    costed = []
    for done, each in enumerate(choices):
        if progress:
            progress(f"without {each.site}", done, len(choices))
        costed.append(replace(each, cost=loss(_with(program, [each]), batches) - base))
    return sorted(costed, key=lambda each: _or_infinite(each.cost or 0.0))


def _largest(
    program: Program,
    meant: Sequence[Candidate],
    ranked: Sequence[Candidate],
    batches: Sequence[Batch],
    base: float,
    allowed: float,
    progress: Progress | None,
) -> list[Candidate]:
    """Norm after norm, the one next without which the loss is least, until it would be more than is allowed.

    The order does not depend on the bound, so that a larger bound never removes fewer. A norm is asked again only when what was
    found with fewer norms removed would make it the next one.
    """
    chosen, waiting = list(meant), {each: _or_infinite(base + (each.cost or 0.0)) for each in ranked}
    asked = dict.fromkeys(ranked, 0)  # how many norms were gone when it was asked
    while waiting:
        each = min(waiting, key=waiting.__getitem__)
        if asked[each] != len(chosen):
            if progress:
                progress(f"and without {each.site}", len(chosen), len(meant) + len(ranked))
            waiting[each] = _or_infinite(loss(_with(program, [*chosen, each]), batches))
            asked[each] = len(chosen)
        elif waiting[each] > allowed:
            break
        else:
            chosen.append(each)
            del waiting[each]
    return chosen


def _or_infinite(value: float) -> float:
    """NaN, which a model without a norm may give, is the largest loss."""
    return math.inf if math.isnan(value) else value
