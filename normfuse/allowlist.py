"""What a model file may name: the rules behind "loading never executes a stranger's code".

A pickle is a program whose only words are names and calls. torch's weights-only unpickler refuses every name that it
is not told about; this file decides, name by name, what it is told, by rule and not by model:

    module classes      any `nn.Module` class of an installed package; of torch itself only `torch.nn` and `torch.ao.nn`
    settings classes    dataclasses, enums, transformers' configs: classes that do nothing when an instance is made
    tensor functions    `torch.nn.functional.*` and the builtins behind it, such as `torch._C._nn.gelu`
    plain containers    `functools.partial`, `argparse.Namespace`, `collections.defaultdict`, `list`, `int`, …

A name outside an installed package is refused before anything is imported: neither the working directory nor
`__main__` is a package, and a folder there that shadows an installed package is found out by its place on the disk.

What an allowed class may then do. The unpickler knows three verbs: NEWOBJ (make an empty instance), BUILD (fill it,
through `__setstate__` where there is one) and REDUCE (call). Pickled modules need the first two only, but a hostile
file could REDUCE a class, and so run any installed constructor with its own arguments: some of them download, or load
another pickle. So the unpickler gets a `Blueprint` in place of the class, which can be instantiated and not called.
`torch.nn.modules` classes are passed as they are: modules keep them as values (`norm_layer`), and their constructors
only allocate. Enums, partial and the builtins above are called by honest pickles, and calling them is harmless; what a
partial holds is itself under these rules and is not called while loading.

What remains: `__setstate__` and a module's forward are code of installed packages that runs on the file's data, while
loading too (torch's own `_rebuild_from_type_v2`, which is always allowed, calls what it is given, and that can be a
module). Nothing here judges that code, only whose it is.

An exported program (.pt2) is JSON and raw tensors, but `torch.export.load` and the program that it returns turn text of
that JSON into code in more places than its pickles (torch 2.13), so `archive_strangers` reads it first:

    pickles             example inputs (retried with weights_only=False), tensor subclasses, opaque and custom objects
    machine code        data/aotinductor/*.so is opened with the dynamic loader
    target              a dotted path under torch, `_operator` or math: whatever it reaches is called by the program
    expr_str            sizes go through sympy.sympify, which is eval
    guards_code         goes through exec when the program is unlifted
    names               of nodes, inputs, parameters, dictionary keys: pasted into source that goes through exec
    in_spec, out_spec   defaultdict factories and enum keys import any module, the working directory's too

Each has its own narrow grammar below; all other text must be a plain word. Only the free text that no code is made of
(stack traces, and strings that are an operator's arguments, which are quoted with repr) is let through unread.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import dataclasses
import enum
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import re
import site
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch
import torch.fx
from torch import nn


class NotAllowed(Exception):
    """The file asks for something that no rule allows; ``names`` says for what, all at once."""

    def __init__(self, *names: str) -> None:
        # The names are a stranger's text on their way to a terminal: nothing in them may be a control character.
        self.names = tuple(name if name.isprintable() else ascii(name) for name in names)
        super().__init__(", ".join(self.names))


class Blueprint:
    """An installed class as the unpickler sees it: instances can be made and filled, the class cannot be called.

    The unpickler says ``cls.__new__(cls, *args)`` to make an instance, and compares its type with what it may fill.
    Making one is always ``object.__new__``, so a class's own ``__new__`` does not run either.
    """

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.__dict__["__new__"] = lambda _blueprint, *_arguments: object.__new__(cls)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: this is what REDUCE does."""
        raise NotAllowed(f"a call of {self.cls.__module__}.{self.cls.__qualname__}()")

    def __eq__(self, other: object) -> bool:
        return other is self.cls or (isinstance(other, Blueprint) and other.cls is self.cls)

    def __hash__(self) -> int:
        return hash(self.cls)


PLAIN: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "types.SimpleNamespace": types.SimpleNamespace,
    "collections.defaultdict": collections.defaultdict,
    "collections.deque": collections.deque,
    "functools.partial": functools.partial,
    **{f"builtins.{kind.__name__}": kind for kind in (bool, int, float, str, list, tuple, dict, frozenset, slice)},
}
# Modules of C functions from tensors to tensors. `torch` itself is not among them: it has load, save and from_file.
TENSOR_BUILTINS = frozenset({"torch._C._nn", "torch._C._fft", "torch._C._special", "torch._C._linalg"})
SETTINGS_BASES = frozenset(
    {
        "transformers.configuration_utils.PreTrainedConfig",
        "transformers.configuration_utils.PretrainedConfig",
        "transformers.generation.configuration_utils.GenerationConfig",
    }
)
# Modules that carry code as data: what they do is in the file, not in the installed package.
CODE_CARRIERS = (torch.fx.GraphModule, torch.jit.ScriptModule)


def resolve(names: Iterable[str]) -> list[Any]:
    """What to hand to `torch.serialization.safe_globals` for the names that a pickle uses.

    Raises:
        NotAllowed: with all names that no rule allows. Unless every name's package is installed, nothing is imported.
    """
    installed = {name: name in PLAIN or is_installed(name.rpartition(".")[0]) for name in sorted(set(names))}
    judged = [
        name
        for name, known in installed.items()
        if known and (all(installed.values()) or name.rpartition(".")[0] in sys.modules)
    ]
    found = {name: _permitted(name) for name in judged}
    if strangers := [name for name, known in installed.items() if not known or found.get(name, name) is None]:
        raise NotAllowed(*strangers)
    return [(thing, name) for name, thing in found.items()]


def is_installed(module: str) -> bool:
    """Whether `module` belongs to an installed distribution, and would be imported from where that one lives."""
    # Importing a package's `__main__` runs its command line.
    parts = module.split(".")
    return is_identifier_path(module) and "__main__" not in parts and _is_installed_package(parts[0])


def is_identifier_path(name: str) -> bool:
    """Whether `name` could be a dotted Python name, such as ``torch.nn``."""
    return all(_IDENTIFIER.fullmatch(part) for part in name.split("."))


_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def _is_installed_package(top: str) -> bool:
    distributions = _distributions().get(top, [])
    try:
        spec = importlib.util.find_spec(top) if distributions else None  # of a top-level name: imports nothing
    except (ImportError, ValueError):
        return False
    if spec is None or not spec.has_location or spec.origin is None:
        return False
    sites = _site_folders()
    return any(Path(spec.origin).resolve().is_relative_to(home) for home in sites + _sources(distributions, sites))


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def _site_folders() -> list[Path]:
    folders = [*site.getsitepackages(), *(p for p in sys.path if Path(p).name in ("site-packages", "dist-packages"))]
    return [Path(folder).resolve() for folder in [*folders, site.getusersitepackages()] if folder]


def _sources(distributions: Iterable[str], sites: list[Path]) -> list[Path]:
    """The source folders of those distributions that the user installed in place (`pip install -e`)."""
    found = []
    for dist in (d for name in distributions for d in importlib.metadata.distributions(name=name)):
        # A stranger's folder can hold a .dist-info too; only one inside site-packages was put there by an installer.
        if Path(str(dist.locate_file(""))).resolve() in sites:
            link = json.loads(dist.read_text("direct_url.json") or "{}")
            if link.get("dir_info", {}).get("editable"):
                found.append(Path(url2pathname(urlparse(link["url"]).path)).resolve())
    return found


def _permitted(name: str) -> Any | None:
    """The thing behind `name` as the unpickler may have it; None where no rule allows it."""
    if name in PLAIN:
        return PLAIN[name]
    module, _, attribute = name.rpartition(".")
    try:
        thing = vars(importlib.import_module(module)).get(attribute)
    except (Exception, SystemExit):  # whatever goes wrong in an import, the name is not there to be used
        return None
    if isinstance(thing, type):
        return _permitted_class(thing)
    return thing if _is_tensor_function(thing, module) else None


def _permitted_class(cls: type) -> Any | None:
    if issubclass(cls, nn.Module):
        if cls.__module__.startswith("torch.nn.modules."):
            return cls
        inside = f"{cls.__module__}."
        ours = not inside.startswith("torch.") or inside.startswith(("torch.nn.", "torch.ao.nn."))
        return Blueprint(cls) if ours and not issubclass(cls, CODE_CARRIERS) else None
    if issubclass(cls, enum.Enum):
        return cls if len(cls) else None  # an enum without members is a factory of classes
    ancestors = {f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__}
    acts = any(name in vars(base) for base in cls.__mro__ for name in ("__call__", "__setstate__", "__del__"))
    return Blueprint(cls) if (dataclasses.is_dataclass(cls) or ancestors & SETTINGS_BASES) and not acts else None


def _is_tensor_function(thing: Any, module: str) -> bool:
    if inspect.isbuiltin(thing):
        return module in TENSOR_BUILTINS and not thing.__name__.startswith("_")
    if not inspect.isfunction(thing) or not thing.__module__ == module == "torch.nn.functional":
        return False
    # `distance_function`: not the one function that calls a function given to it.
    return not thing.__name__.startswith("_") and "distance_function" not in inspect.signature(thing).parameters


# ---- exported programs

_WORD = re.compile(r"[\w.:/+-]*")
_TREE_TEXT = re.compile(r"[\w. -]*")
_SYMBOL = re.compile(r"[a-z]+\d+", re.ASCII)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Fields of the schema that map names (a stranger's choice) to things: the names are not field names.
_NAMED = _words(
    "tensor_values sym_int_values sym_float_values sym_bool_values custom_obj_values as_string_to_argument"
    " range_constraints treespec_namedtuple_fields opset_version config"
)
_ARITHMETIC = _words(
    "add sub mul truediv floordiv mod pow neg pos abs and_ or_ xor not_ lshift rshift eq ne lt le gt ge getitem"
)
_CONTROL_FLOW = _words(
    "cond while_loop scan associative_scan map_impl wrap_with_set_grad_enabled wrap_with_autocast invoke_subgraph"
    " tag_activation_checkpoint auto_functionalized auto_functionalized_v2 flex_attention out_dtype"
)
_SYMBOLIC = _words(
    "Mod PythonMod FloorDiv CleanDiv CeilDiv ModularIndexing Where LShift RShift PowByNatural FloatPow FloatTrueDiv"
    " IntTrueDiv CeilToInt FloorToInt TruncToFloat TruncToInt RoundToInt RoundDecimal ToFloat Identity Max Min Abs"
    " IsNonOverlappingAndDenseIndicator floor ceiling And Or Not"
)
_SIZE_NAMES = _SYMBOLIC | _words(
    "Symbol Integer Float Rational Add Mul Pow Equality Unequality StrictLessThan StrictGreaterThan LessThan"
    " GreaterThan Piecewise ExprCondPair ITE true false oo int_oo"
)
_GUARD_NAMES = _SYMBOLIC | _words("Eq Ne Lt Le Gt Ge max min abs int float bool round L math inf")
_GUARD_METHODS = _words("size stride storage_offset numel dim")
_OPERATORS = (ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context, ast.keyword)
_SYNTAX = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Subscript, ast.Tuple, ast.IfExp)


def archive_strangers(reader: torch._C.PyTorchFileReader) -> Iterator[str]:
    """All that a .pt2 archive asks for and no rule allows, but for the pickle of its example inputs."""
    for record in reader.get_all_records():
        holds_tensors = record.startswith(("data/weights/", "data/constants/"))
        if record.startswith("data/aotinductor/"):
            yield f"the compiled code {record}"
        elif holds_tensors and record.endswith(".pt"):
            yield f"the pickle {record}"
        elif record.startswith("models/") or (holds_tensors and record.endswith(".json")):
            # Decoded as torch does: json.loads of bytes would guess at the encoding.
            content = json.loads(reader.get_record(record).decode())
            yield from _strangers(content)
            if holds_tensors:
                yield from _pickled_payloads(content)


def _pickled_payloads(content: Any) -> Iterator[str]:
    for payload in content["config"].values():
        if payload["use_pickle"] or not payload["path_name"].startswith(("weight_", "tensor_")):
            yield f"the pickle {payload['path_name']}"


def _strangers(value: Any, key: str = "", *, in_node: bool = False) -> Iterator[str]:
    """Texts under one value of the program's JSON that are not what its field may hold."""
    match value:
        case str():
            rule = _RULES.get(key, _is_word)
            if not (in_node and key in ("as_string", "as_strings")) and not rule(value):
                yield value if len(value) <= 120 else f"{value[:120]}…"
        case list():
            for item in value:
                yield from _strangers(item, key, in_node=in_node)
        case dict():
            named = key in _NAMED
            yield from (name for name in value if not _is_word(name))
            for field, item in value.items():
                free_text = field == "metadata" and not named and _is_flat(item)
                inside = in_node or (field == "nodes" and not named)
                if not free_text:
                    yield from _strangers(item, "" if named else field, in_node=inside)


def _is_flat(item: Any) -> bool:
    return isinstance(item, dict) and all(isinstance(text, str) for text in item.values())


def _is_word(text: str) -> bool:
    return _WORD.fullmatch(text) is not None


def _is_name(text: str) -> bool:
    return not text or text.isidentifier()


def _is_operator(target: str) -> bool:
    match target.split("."):
        case ["_operator", name]:
            return name in _ARITHMETIC
        case ["math", name]:
            return name in vars(math) and not name.startswith("_")
        case ["torch", name]:
            return name.startswith(("sym_", "_sym_"))
        case ["torch", "ops", "higher_order", name]:
            return name in _CONTROL_FLOW
        case ["torch", "ops", ("aten" | "prims" | "torchvision") as namespace, name, overload]:
            operator = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
            # aten.from_file and aten.save reach the disk.
            return isinstance(operator, torch._ops.OpOverload) and all(
                argument.name != "filename" for argument in operator._schema.arguments
            )
    return False


def _is_expression(text: str, names: frozenset[str], methods: frozenset[str]) -> bool:
    """Whether `text` is arithmetic on these names: no other name, attribute or call, no comment and no second line."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return not set(text) & set('#"\\\n\r\f') and all(_is_arithmetic(node, names, methods) for node in ast.walk(tree))


def _is_arithmetic(node: ast.AST, names: frozenset[str], methods: frozenset[str]) -> bool:
    match node:
        case ast.Constant(value=str(text)):
            return _is_word(text)
        case ast.Constant(value=value):
            return isinstance(value, int | float)
        case ast.Name(id=name):
            return name in names or _SYMBOL.fullmatch(name) is not None
        case ast.Attribute(value=ast.Name(id="math"), attr=name):
            return "math" in names and not name.startswith("_")
        case ast.Attribute(attr=name):
            return name in methods
        case ast.Call(func=ast.Name(id=name)):
            return name in names
        case ast.Call(func=ast.Attribute()):
            return True
    return isinstance(node, _SYNTAX + _OPERATORS)


def _is_tree_spec(text: str) -> bool:
    try:
        _protocol, tree = json.loads(text)
        return _is_tree(tree)
    except (ValueError, KeyError, TypeError):
        return False


def _is_tree(tree: dict[str, Any]) -> bool:
    context = tree["context"]
    with contextlib.suppress(ValueError, TypeError):
        context = json.loads(context)
    return _is_container(tree["type"]) and _is_plain(context) and all(map(_is_tree, tree["children_spec"]))


def _is_container(name: str | None) -> bool:
    """Whether a tree may hold this kind; imports the installed package that defines it, so that torch knows it."""
    if name is None:
        return True
    if is_installed(name.rpartition(".")[0]):
        with contextlib.suppress(Exception, SystemExit):
            importlib.import_module(name.rpartition(".")[0])
    return _is_word(name) and name != "collections.defaultdict"


def _is_plain(context: Any) -> bool:
    match context:
        case str():
            return _TREE_TEXT.fullmatch(context) is not None
        case list():
            return all(map(_is_plain, context))
        case dict():
            return "__enum__" not in context and all(map(_is_plain, (*context, *context.values())))
    return True


_RULES: dict[str, Callable[[str], bool]] = {
    **dict.fromkeys(("target", "as_operator"), _is_operator),
    **dict.fromkeys(("in_spec", "out_spec"), _is_tree_spec),
    **dict.fromkeys(("name", "as_name", "forward_arg_names", "field_names"), _is_name),
    "expr_str": lambda text: _is_expression(text, _SIZE_NAMES, frozenset()),
    "guards_code": lambda text: _is_expression(text, _GUARD_NAMES, _GUARD_METHODS),
    "torch_version": lambda text: True,
}
