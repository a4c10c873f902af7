"""A modeling file beside the tensors of a transformers folder: the stock class, with RMSNorm where it has LayerNorm.

Transformers loads such a file where its user trusts it (``trust_remote_code=True``), and carries it along when the model is
saved again. The class in it has the stock class's own name, so that everything that goes by the name (the loss,
`architectures`, pipelines) goes on; `auto_map` in config.json leads to it. Who does not trust the file gets the stock class,
which computes the same of these tensors: where no mean arrives, LayerNorm is RMSNorm.

What is written into the file is a class name, which must be one of transformers' own, and numbers and module paths, as
literals of Python.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from string import Template
from typing import Any

from torch import nn

from normfuse.errors import CannotApply, InputError
from normfuse.sources.transformers_folder import CONFIG, read_config

FILE = "modeling_rms_norm.py"
"""The modeling file, beside config.json."""

WITHOUT = "leave out --as-code (as_code=True): the folder is then for the stock class, which computes the same"


@dataclass(frozen=True)
class SwappedNorm:
    """A LayerNorm that becomes an RMSNorm over the last axis.

    Attributes:
        path: of the module.
        size: of the last axis.
        eps: ε under the root.
        weight: it has a gain, under the stock name.
        bias: it has a shift, under the stock name; without one the stock norm's leaves the folder.
    """

    path: str
    size: int
    eps: float
    weight: bool = True
    bias: bool = False


@dataclass(frozen=True)
class Centring:
    """An explicit mean-subtraction on the way into a module, or out of it.

    Attributes:
        path: of the module.
        axis: along which the mean is taken.
        before: of the module's first input, and not of what it gives.
    """

    path: str
    axis: int
    before: bool = False


def add_code(folder: Path, model: nn.Module, norms: Sequence[SwappedNorm], centrings: Sequence[Centring] = ()) -> None:
    """Write the modeling file into a folder that has a config.json, and let that lead to it.

    Args:
        folder: the folder; its tensors are those of the class that is written (`unheld` tells which go).
        model: a model of the stock class.
        norms: what becomes an RMSNorm.
        centrings: where a mean is subtracted.

    Raises:
        CannotApply: the model is of no class of transformers that can be extended so.
        InputError: the folder has a file of that name.
    """
    text, auto_map = code(model, norms, centrings), auto_classes(model)
    if (folder / FILE).exists():
        raise InputError(f"the folder has a {FILE} of its own, which would be written over", hint=WITHOUT)
    config = read_config(folder / CONFIG)
    config["auto_map"] = {name: f"{Path(FILE).stem}.{type(model).__name__}" for name in auto_map}
    (folder / FILE).write_text(text, encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def unheld(model: nn.Module, norms: Iterable[SwappedNorm]) -> frozenset[str]:
    """Names of the stock class's tensors that the written class does not have: shifts, and nothing else.

    Args:
        model: a model of the stock class.
        norms: what becomes an RMSNorm.
    """
    paths = {id(model.get_submodule(each.path)): each for each in norms}
    return frozenset(
        f"{path}.bias"
        for path, module in model.named_modules(remove_duplicate=False)
        if id(module) in paths and not paths[id(module)].bias and getattr(module, "bias", None) is not None
    )


def code(model: nn.Module, norms: Sequence[SwappedNorm], centrings: Sequence[Centring] = ()) -> str:
    """The text of the modeling file.

    Raises:
        CannotApply: the model is of no class of transformers, or its modules have names that a file cannot tell apart.
    """
    name, paths = stock_name(model), [path for path, _ in model.named_modules(remove_duplicate=False)]
    settings = {each.path: {"size": each.size, "eps": each.eps, "weight": each.weight, "bias": each.bias} for each in norms}
    named = {*settings, *(each.path for each in centrings)}
    if not named.issubset(paths) or not all(math.isfinite(each.eps) for each in norms):
        raise CannotApply(["the norms to swap are not norms of this model"], hint=WITHOUT)
    means = {before: {each.path: each.axis for each in centrings if each.before is before} for before in (True, False)}
    tables = {each: _table({path: _literal(axis) for path, axis in means[each].items()}) for each in means}
    return _TEMPLATE.substitute(
        name=name,
        norms=_table({pattern: _literal(each) for pattern, each in _patterns(settings, paths)}),
        tables=_TABLES.substitute(before=tables[True], after=tables[False]) if centrings else "",
        hooks=_HOOKS if centrings else "",
        registered=_REGISTERED if centrings else "",
        renamed=_RENAMED.substitute(name=name) if _is_renamed(name) else "",
    )


def _is_renamed(name: str) -> bool:
    """Whether transformers changes names of stored tensors for this class, which it does not for a class beside the tensors."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:  # an older one, which changes them for none
        return False
    return get_checkpoint_conversion_mapping(name) is not None  # type: ignore[no-untyped-call]


def stock_name(model: nn.Module) -> str:
    """The name under which transformers has a model's class.

    Raises:
        CannotApply: it has not, so that a file cannot import it.
    """
    import transformers

    name = type(model).__name__
    if not name.isidentifier() or not name.isascii() or getattr(transformers, name, None) is not type(model):
        raise CannotApply([f"{name} is no class of transformers, which code beside the tensors could extend"], hint=WITHOUT)
    return name


def auto_classes(model: nn.Module) -> list[str]:
    """The auto classes of transformers that lead to a model's class."""
    from transformers.models.auto import modeling_auto

    found, cls, config = [], type(model), type(model.config)
    for name in sorted(vars(modeling_auto)):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        known = mapping.get(config, ()) if mapping is not None and name.startswith("Auto") else ()
        if cls in (known if isinstance(known, tuple) else (known,)):
            found.append(name)
    return found or ["AutoModel"]


def _patterns(settings: Mapping[str, Any], paths: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Settings of modules by patterns that match those modules and no others: blocks in a row are one line."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path, each in settings.items():
        groups.setdefault((_pattern(path), repr(each)), []).append(path)
    for (pattern, _), members in groups.items():
        matched = {path for path in paths if fnmatchcase(path, pattern)}
        for path in [pattern] if matched == set(members) else map(_escaped, members):
            yield path, settings[members[0]]


def _pattern(path: str) -> str:
    return ".".join("*" if part.isdecimal() else _escaped(part) for part in path.split("."))


def _escaped(path: str) -> str:
    return re.sub(r"[*?[]", r"[\g<0>]", path)


def _table(rows: Mapping[str, str]) -> str:
    """A dictionary, a row per line, whose values are literals already."""
    return "{\n" + "".join(f"    {_literal(key)}: {value},\n" for key, value in rows.items()) + "}" if rows else "{}"


def _literal(value: Any) -> str:
    """A literal of Python, in plain ASCII and with double quotes where it needs no escapes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(each)}" for key, each in value.items()) + "}"
    if isinstance(value, str) and re.fullmatch(r"[\w.*?\[\] -]*", value, re.ASCII):
        return f'"{value}"'
    return ascii(value)


_TEMPLATE = Template('''\
"""${name} as transformers has it, with RMSNorm in the place of LayerNorm.

For the tensors beside this file that is the same function: normfuse has moved the mean that a LayerNorm subtracts into the
layers in front of it. Load it with from_pretrained(FOLDER, trust_remote_code=True); it needs torch and transformers alone.
"""

from fnmatch import fnmatchcase

import torch
import transformers
from torch import nn

# module paths, * for any -> the RMSNorm there; a gain that went into the layers behind it is 1
NORMS = ${norms}
${tables}

class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x²) + eps) ⊙ weight, and + bias where that could not go into the layers behind."""

    def __init__(self, size, eps, weight, bias):
        super().__init__(size, eps=eps, elementwise_affine=weight)
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x):
        y = super().forward(x)
        return y if self.bias is None else y + self.bias

${hooks}
class ${name}(transformers.${name}):
    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        swapped = {}  # a module that has several names is one RMSNorm
        for path, module in list(self.named_modules(remove_duplicate=False)):
            settings = next((each for pattern, each in NORMS.items() if fnmatchcase(path, pattern)), None)
            if settings is not None:
                parent, _, attribute = path.rpartition(".")
                setattr(self.get_submodule(parent), attribute, swapped.setdefault(module, RMSNorm(**settings)))
${registered}${renamed}''')

_RENAMED = Template("""

try:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
except ImportError:  # a transformers that renames no tensors
    pass
else:  # stored tensors have the names of the stock class, which transformers changes for this one too when it is told so
    register_checkpoint_conversion_mapping("${name}", get_checkpoint_conversion_mapping("${name}") or [], overwrite=True)
""")

_TABLES = Template("""
# module path -> the axis whose mean is subtracted from what the module is given, or from what it gives
CENTRED_BEFORE = ${before}
CENTRED_AFTER = ${after}
""")

_HOOKS = '''
def centred(x, axis):
    return x - x.mean(axis, keepdim=True)


class CentreInput:
    """A hook that subtracts the mean from a module's first argument."""

    def __init__(self, axis):
        self.axis = axis

    def __call__(self, module, args, kwargs):
        if args:
            return (centred(args[0], self.axis), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: centred(kwargs[first], self.axis)}


class CentreOutput:
    """A hook that subtracts the mean from what a module gives."""

    def __init__(self, axis):
        self.axis = axis

    def __call__(self, module, args, output):
        return centred(output, self.axis)

'''

_REGISTERED = """\
        for path, axis in CENTRED_BEFORE.items():
            self.get_submodule(path).register_forward_pre_hook(CentreInput(axis), with_kwargs=True)
        for path, axis in CENTRED_AFTER.items():
            self.get_submodule(path).register_forward_hook(CentreOutput(axis))
"""
