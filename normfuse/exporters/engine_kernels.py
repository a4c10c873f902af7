"""The kernels that a compiler made of a program, and what became of its norms, read off what the compiler tells of itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from normfuse.analysis.facts import analyze
from normfuse.graph.program import Program, Site

_LAYER = re.compile(r"^Name: (?P<name>\S+), LayerType: (?P<kind>[^,]+),.*?(?:Metadata: (?P<nodes>.*))?$", re.MULTILINE)
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


@dataclass(frozen=True)
class Kernel:
    """One step of a compiled engine.

    Attributes:
        name: as the compiler calls it; TensorRT's names list the operations inside.
        kind: what made it, such as ``gemm``.
        nodes: names of the ONNX nodes that it computes.
    """

    name: str
    kind: str
    nodes: tuple[str, ...]


def from_log(lines: Iterable[str]) -> tuple[Kernel, ...] | None:
    """The kernels of TensorRT's verbose build log; None where it has no such list, or nodes cannot be told."""
    listed = [match for text in lines if text.startswith("Layers:") for match in _LAYER.finditer(text)]
    return _if_known(Kernel(each["name"], each["kind"], tuple(_NODE.findall(each["nodes"] or ""))) for each in listed)


def from_inspector(text: str) -> tuple[Kernel, ...] | None:
    """The kernels of an engine inspector's JSON; None where it is not as expected."""
    try:
        layers: list[Any] = json.loads(text)["Layers"]
        made = [(each["Name"], each["LayerType"], each["Metadata"]) for each in layers]
    except (ValueError, KeyError, TypeError):
        return None
    return _if_known(Kernel(str(name), str(kind), tuple(_NODE.findall(str(nodes)))) for name, kind, nodes in made)


def _if_known(kernels: Iterable[Kernel]) -> tuple[Kernel, ...] | None:
    found = tuple(kernels)
    return found if any(kernel.nodes for kernel in found) else None


@dataclass(frozen=True)
class NormKernels:
    """What became of one norm.

    Attributes:
        site: where the norm is in the model.
        kind: as in `normfuse.graph.views.Norm`.
        kernels: names of the kernels that compute a part of it; one is best, none means that it was folded away.
    """

    site: Site
    kind: str
    kernels: tuple[str, ...]


def of_norms(program: Program, sites: Mapping[str, Site], kernels: Sequence[Kernel]) -> tuple[NormKernels, ...]:
    """The kernels of every norm of a program.

    Args:
        program: the program that was exported.
        sites: ONNX node -> where in that program it comes from.
        kernels: the engine's.
    """
    made_of: dict[str, set[str]] = {}
    for node, site in sites.items():
        made_of.setdefault(site.node, set()).add(node)
    found = []
    for norm in analyze(program).norms:
        nodes: set[str] = set().union(*(made_of.get(program.site(node).node, set()) for node in norm.inner))
        names = tuple(kernel.name for kernel in kernels if nodes & set(kernel.nodes))
        found.append(NormKernels(program.site(norm.out), norm.kind, names))
    return tuple(found)


def in_words(norms: Sequence[NormKernels] | None) -> str:
    """What became of the norms, as a sentence."""
    if norms is None:
        return "what became of the norms is not known: the compiler's log is not as expected"
    if not any(norm.kernels for norm in norms):
        return "no norm kernel is left"
    if all(len(norm.kernels) == 1 for norm in norms):
        return "the norm became one kernel" if len(norms) == 1 else f"each of the {len(norms)} norms became one kernel"
    counts = [sum(len(norm.kernels) == number for norm in norms) for number in (0, 1)]
    return f"of {len(norms)} norms {counts[1]} became one kernel, {len(norms) - sum(counts)} several, {counts[0]} none"
