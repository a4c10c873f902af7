"""A recipe applied by all processes that torchrun has started: each writes some of the files.

Rank 0 has planned and knows the recipe, which it tells the others, with where the files are and who writes which. A file is
made of the recipe and of the original files alone, so it is the same whoever makes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

from normfuse.errors import NormfuseError
from normfuse.graph.expressions import reads
from normfuse.limits import OverLimit
from normfuse.modules.recipe import Recipe
from normfuse.proof.measuring import Progress
from normfuse.sources.atomic import helping
from normfuse.sources.file_making import check_room
from normfuse.sources.ranks import exchanged, group, hear, joined, own, spread, tell
from normfuse.sources.source import Stored
from normfuse.sources.tensor_files import Weights, open_weights


def write_spread(stored: Stored, recipe: Recipe, target: Path, progress: Progress | None = None) -> set[str]:
    """Write the files of a model as a recipe changes them, with the help of the other ranks where there are any.

    Args:
        stored: how the model came.
        recipe: what becomes of its tensors.
        target: as for `Weights.write`.
        progress: told of the files that this process writes.

    Returns:
        Names in the files of the tensors of which a bit has changed.

    Raises:
        OSError: a file cannot be written, or there is not enough room for all of them.
        Unfinished: another rank is gone.
        NormfuseError: another rank could not do its part.
    """
    weights = stored.weights
    if joined() == 1 or len(weights.parts) < 2 or not _can_be_told(recipe):
        return _write(weights, recipe, target, progress=progress)
    check_room(target, weights.nbytes)
    alone = _reading_elsewhere(weights, recipe)
    files = spread([(each.path.name, each.path.stat().st_size) for each in weights.parts if each.path.name not in alone])
    files[0] += [*alone, *([weights.index.name] if weights.index else [])]
    tell(json.dumps({"path": os.path.abspath(stored.path), "to": str(target), "files": files, "recipe": recipe.to_json()}))
    return _by_all(lambda: _write(weights, recipe, target, files[0], progress))


def help_rank_0() -> None:
    """Be another rank: do what rank 0 asks for, until it is done.

    Raises:
        Unfinished: it is gone.
    """
    with group():
        while task := hear():
            _by_all(partial(_asked, **json.loads(task)))


def _asked(path: str, to: str, files: list[list[str]], recipe: str) -> set[str]:
    with helping(Path(to)):
        return _write(open_weights(path), Recipe.from_json(recipe), Path(to), files[own()])


def _write(
    weights: Weights, recipe: Recipe, target: Path, only: Collection[str] | None = None, progress: Progress | None = None
) -> set[str]:
    return weights.write(target, recipe.changes(weights.tensor), recipe.dropped, only=only, progress=progress)


def _can_be_told(recipe: Recipe) -> bool:
    """Whether others hear the same recipe; operators of another package's pass may be known here alone."""
    try:
        return Recipe.from_json(recipe.to_json()).formulas == recipe.formulas
    except (ValueError, OverLimit):
        return False


def _reading_elsewhere(weights: Weights, recipe: Recipe) -> list[str]:
    """Names of files for which tensors are needed that only rank 0 has."""
    needing = {name for name, formula in recipe.formulas.items() if recipe.elsewhere.keys() & set(reads(formula))}
    return [each.path.name for each in weights.parts if needing & set(each.keys)]


def _by_all(work: Callable[[], set[str]]) -> set[str]:
    """What the ranks have done together; what went wrong on another rank is an error of rank 0."""
    error: Exception | None = None
    changed = set[str]()
    try:
        changed = work()
    except Exception as failed:  # the others have to hear of it
        error = failed
    told = [json.loads(each) for each in exchanged(json.dumps({"changed": sorted(changed), "error": _as_data(error)}))]
    if own() == 0:
        if error is not None:
            raise error
        for rank, answer in enumerate(told):
            if answer["error"]:
                raise _of_rank(rank, **answer["error"])
    return {name for answer in told for name in answer["changed"]}


def _as_data(error: Exception | None) -> dict[str, Any] | None:
    if error is None:
        return None
    said, hint = str(error) or type(error).__name__, getattr(error, "hint", None)
    if isinstance(error, OSError) and error.errno and error.strerror:
        return {"kind": "system", "number": error.errno, "said": error.strerror, "hint": hint}
    kind = "bug"
    if isinstance(error, (NormfuseError, OverLimit)):
        kind = "told"
    elif isinstance(error, MemoryError):
        kind = "memory"
    return {"kind": kind, "number": 0, "said": said if kind != "bug" else f"{type(error).__name__}: {said}", "hint": hint}


def _of_rank(rank: int, kind: str, number: int, said: str, hint: str | None) -> Exception:
    said = f"{said} (on rank {rank})"
    if kind == "system":
        return OSError(number, said)
    if kind == "told":
        return NormfuseError(said, hint=hint)
    return MemoryError(said) if kind == "memory" else RuntimeError(said)
