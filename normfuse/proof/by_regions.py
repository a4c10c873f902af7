"""The proof of a rewrite region by region: cost and memory are a region's, and all of them together imply the whole.

Each region (`normfuse.proof.regions`) is a pair of small programs, which are proven as whole ones are: in float64 and in their
stored dtypes, with the model's weights and with others. What enters is drawn, in every manner that norms are sensitive to, and
is once what it was on a run of the original on the user's inputs; whole numbers are always those of the run.

A region that does not hold for any values may still hold for those that it gets, or may not matter for what is made of it: then
what feeds it and what it feeds is taken into it, more and more, and in the end all of the model. Only what holds counts.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from normfuse.errors import NormfuseError, first_line
from normfuse.graph.interpreter import run, user_inputs
from normfuse.graph.parts import Weights
from normfuse.graph.program import Program
from normfuse.graph.views import dtype
from normfuse.proof.cases import HOSTILE, Case
from normfuse.proof.evidence import Evidence
from normfuse.proof.measuring import Progress, evidence_of
from normfuse.proof.randomness import drawn
from normfuse.proof.regions import Cut, Region, Search
from normfuse.proof.steps import notes_of_own_dtype
from normfuse.proof.trials import FORM_ONLY, Proof, Trial, other_weights
from normfuse.sources.safetensors_file import bytes_of

DEPTHS = (4, 16, 64, 256, 1024, 1 << 20)
"""How many calls deep what feeds a region, and what it feeds, is taken into it, one attempt after the other."""


def can_be_cut(original: Program, rewritten: Program) -> bool:
    """Whether regions can be run by themselves: the same random numbers are drawn, in the same order."""
    return drawn(original.graph) == drawn(rewritten.graph)


def proven_by_regions(
    original: Program,
    rewritten: Program,
    changed: Collection[str],
    cases: Sequence[Case],
    so_far: Evidence,
    progress: Progress | None = None,
) -> Evidence:
    """Evidence that two programs are one function, region by region.

    Args:
        original: the original.
        rewritten: the rewritten program, its formulas not evaluated.
        changed: the stored tensors that a formula changes.
        cases: the user's inputs first; others are run for their sizes.
        so_far: what is known before.
        progress: called with (what, done, total).

    Raises:
        NormfuseError: the original does not run on the user's inputs.
    """
    return _ByRegions(original, rewritten, set(changed), cases, progress).proven(so_far)


class _ByRegions:
    def __init__(
        self, original: Program, rewritten: Program, changed: set[str], cases: Sequence[Case], progress: Progress | None
    ) -> None:
        self.original, self.rewritten, self.changed, self.progress = original, rewritten, changed, progress
        self.cases = cases
        self.runs = list(_runs(original, cases))
        self.alike = [case for case in cases[1:] if _sizes(case) == _sizes(cases[0])]
        self.search = Search(original, rewritten, self.runs[0].drawn)
        self.known: dict[Any, tuple[Evidence, bool]] = {}
        self.own: set[str] = set()
        self.site = ""

    def proven(self, so_far: Evidence) -> Evidence:
        for depth in chain(DEPTHS, repeat(DEPTHS[-1])):
            outputs = self.search.outputs()
            still_open = [each for each in outputs if isinstance(each, Region)]
            if still_open and self._grown(self.search.first_open([each.theirs for each in still_open]), depth):
                continue
            needed = self.search.needed([each for each in outputs if isinstance(each, Cut)])
            regions = [(cut.region, cut.axis) for cut in needed if cut.region] + [(each, None) for each in still_open]
            evidence, failed = self._all(regions, so_far)
            if failed is None or not self._grown(failed.theirs, depth):
                break
        return replace(evidence, notes=(*evidence.notes, *notes_of_own_dtype(self.own)))

    def _grown(self, node: Node, depth: int) -> bool:
        """Whether there is more that the region of a node can take in; then it has."""
        self.site = self.site or str(self.rewritten.site(node))
        return self.search.grow(node, depth)

    def _all(self, regions: Sequence[tuple[Region, int | None]], so_far: Evidence) -> tuple[Evidence, Region | None]:
        """The evidence of regions, up to the first that does not hold."""
        self._see([cut.ours.name for region, _ in regions for cut in region.cuts])
        found, failed = [so_far], None
        for done, (region, axis) in enumerate(regions):
            name = str(self.rewritten.site(region.theirs))
            if self.progress:
                self.progress(name, done, len(regions))
            key = (region.ours, region.theirs, axis, tuple((cut.ours, cut.axis) for cut in region.cuts))
            if key not in self.known:
                self.known[key] = self._region(name, region, axis)
            evidence, held = self.known[key]
            found.append(evidence)
            if not held:
                failed = region
                break
        return _together(so_far, found), failed

    def _see(self, names: Collection[str]) -> None:
        """What entered regions on the user's inputs."""
        self.runs[0].see(self.original, {*names})

    def _region(self, name: str, region: Region, axis: int | None) -> tuple[Evidence, bool]:
        """What is found of a region, and whether it holds for any values; one that is all of the model need not."""
        ours, theirs = region.programs(self.original, self.rewritten, axis)
        read = {*theirs.stored.values(), *ours.stored.values()}
        proof = Proof(ours, ours, theirs, theirs, sorted(self.changed & read), None)
        whole = all(cut.theirs.op == "placeholder" for cut in region.cuts)
        where = self.site if whole and self.site else name
        trials = [replace(each, name=f"{where}: {each.name}") for each in self._trials(region, bool(read))]
        try:
            evidence = evidence_of(trials, proof.measured, Evidence("regions"), None)
        except Exception as error:  # operators refuse numbers that they cannot compute with
            if whole:
                raise
            return Evidence("regions", notes=(f"'{where}' does not run by itself: {first_line(error)}",)), False
        self.own |= proof.in_own_dtype
        return evidence, evidence.ok and (whole or len(evidence.algebra) == len(trials))

    def _trials(self, region: Region, weighted: bool) -> Iterator[Trial]:
        nodes = [cut.ours for cut in region.cuts]
        yield Trial("as seen", self.runs[0].seen(nodes), given=True)
        plain = self.runs[0].drawn(nodes)
        if any(map(_is_float, plain)):
            yield Trial("drawn", plain)
            for name, change in HOSTILE.items():
                hostile = tuple(change(each) if _is_float(each) else each for each in plain)
                yield Trial(name, hostile, rounded=False)  # a value made another way has roundings of its own
        for case in self.alike if any(node.name in self.runs[0].indices for node in nodes) else ():
            yield Trial(case.name, self.runs[0].drawn(nodes, case))
        for other in self.runs[1:]:
            yield Trial(other.name, other.drawn(nodes))
        for name, weights in other_weights(self.changed).items() if weighted else ():
            yield Trial(name, plain, weights=weights)
        if numbers := [node.name for node in nodes if _computes_numbers(node)]:
            yield from self._on_other_numbers(nodes, numbers)

    def _on_other_numbers(self, nodes: Sequence[Node], numbers: Sequence[str]) -> Iterator[Trial]:
        """Masks and indices that the model computes, with every value that they have on a case or with other weights."""
        known = {_bytes_of(self.runs[0], numbers)}
        for other, weights in self._other_runs:
            value = _bytes_of(other, numbers)
            if value not in known:
                known.add(value)
                yield Trial(f"{other.name}, its numbers", other.drawn(nodes), weights=weights)

    @cached_property
    def _other_runs(self) -> list[tuple[_Run, Weights | None]]:
        """The original on every other case, and with other weights."""
        asked: list[tuple[Case, Weights | None]] = [(case, None) for case in self.cases[1:]]
        asked += [(replace(self.cases[0], name=name), each) for name, each in other_weights(self.changed).items()]
        found = []
        for case, weights in asked:
            with contextlib.suppress(Exception):  # hostile inputs may be none for the original
                found.append((_Run(self.original, case, weights), weights))
        return found


def _together(so_far: Evidence, found: Sequence[Evidence]) -> Evidence:
    rows: dict[str, Any] = {
        name: tuple(chain.from_iterable(getattr(each, name) for each in found)) for name in ("algebra", "rounding")
    }
    notes = tuple(dict.fromkeys(chain.from_iterable(each.notes for each in found)))
    missing = next((each.missing for each in found if each.missing), None)
    shown = [each.sensitivity for each in found if each.sensitivity]
    worst = max(shown, key=lambda each: each.change, default=None)
    return replace(so_far, **rows, notes=notes, missing=missing, sensitivity=worst)


@dataclass(frozen=True)
class _Form:
    """A tensor without its entries; views depend on how it lies in memory."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    def laid_out(self, value: Tensor) -> Tensor:
        """A tensor of these entries."""
        repeats = any(step == 0 and size > 1 for size, step in zip(self.shape, self.strides, strict=True))
        strides = value.stride() if repeats else self.strides
        return torch.empty_strided(self.shape, strides, dtype=self.dtype).copy_(value)


class _Run:
    """One run of the original: the form of every value, and the values that are no floats."""

    def __init__(self, program: Program, case: Case, weights: Weights | None = None) -> None:
        self.name, self.flat = case.name, case.flat
        self.forms: dict[str, _Form] = {}
        self.values: dict[str, Any] = {}
        self.places = {node.name: place for place, node in enumerate(user_inputs(program)) if node}
        self.inputs = {name: case.flat[place] for name, place in self.places.items()}
        self.indices = {name for name, value in self.inputs.items() if isinstance(value, Tensor) and not _is_float(value)}
        for name, value in self.inputs.items():
            self._keep(name, value, value.dtype if isinstance(value, Tensor) else None)
        run(program, case.flat, wide=True, weights=weights, through=self._through)

    def _through(self, node: Node, value: Any) -> Any:
        traced = node.meta.get("val")
        self._keep(node.name, value, traced.dtype if isinstance(traced, Tensor) else None)
        return value

    def _keep(self, name: str, value: Any, dtype: torch.dtype | None) -> None:
        if isinstance(value, Tensor) and dtype is not None and (value.is_floating_point() or value.is_complex()):
            self.forms[name] = _Form(value.shape, value.stride(), dtype)
        elif not isinstance(value, (tuple, list)):
            self.values[name] = value.clone() if isinstance(value, Tensor) else value

    def see(self, program: Program, names: set[str]) -> None:
        """Keep these values of floats too, in the dtype that they are traced in."""

        def through(node: Node, value: Any) -> Any:
            if node.name in wanted:
                self.values[node.name] = value.to(wanted[node.name], copy=True)
            return value

        for name in names & self.inputs.keys():
            self.values[name] = self.inputs[name]
        wanted = {name: self.forms[name].dtype for name in names - self.values.keys() if name in self.forms}
        if wanted:
            run(program, self.flat, wide=True, through=through)

    def seen(self, nodes: Sequence[Node]) -> tuple[Any, ...]:
        """The values of nodes on this run."""
        return tuple(self.values[node.name] for node in nodes)

    def drawn(self, nodes: Sequence[Node], case: Case | None = None) -> tuple[Any, ...]:
        """Random floats in their place, the same ones for the same node; where a case is given, its own whole numbers."""

        def value(name: str) -> Any:
            if case is not None and name in self.indices:
                return case.flat[self.places[name]]
            return self._drawn(name) if name in self.forms else self.values[name]

        return tuple(value(node.name) for node in nodes)

    def _drawn(self, name: str) -> Tensor:
        form = self.forms[name]
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        kind = torch.complex64 if form.dtype.is_complex else torch.float32
        return form.laid_out(torch.randn(form.shape, generator=generator, dtype=kind))


def _computes_numbers(node: Node) -> bool:
    """Whether a value is a mask or an index that the model makes of its inputs or its weights."""
    kind = dtype(node)
    return node.op == "call_function" and kind is not None and not kind.is_floating_point and not kind.is_complex


def _bytes_of(found: _Run, names: Sequence[str]) -> tuple[Any, ...]:
    values = [found.values[name] for name in names]
    return tuple((tuple(each.shape), bytes(bytes_of(each))) for each in values)


def _runs(program: Program, cases: Sequence[Case]) -> Iterator[_Run]:
    """The run on the user's inputs, and one for every other set of sizes."""
    known: list[Any] = []
    for case in cases:
        sizes = _sizes(case)
        if sizes in known:
            continue
        try:
            yield _Run(program, case)
        except Exception as error:
            if not known:  # the user's own inputs must run
                raise NormfuseError(f"the model does not run in float64: {first_line(error)}", hint=FORM_ONLY) from error
        known.append(sizes)


def _sizes(case: Case) -> list[Any]:
    return [each.shape if isinstance(each, Tensor) else each for each in case.flat]


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
