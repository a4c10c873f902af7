"""What an exported program may ask for: the check that reads a ``.pt2`` archive before torch does.

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

import ast
import contextlib
import importlib
import json
import math
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import torch

from normfuse import limits
from normfuse.limits import OverLimit
from normfuse.sources.allowlist import is_installed
from normfuse.sources.constructors import check_extent
from normfuse.sources.pickles import Unreadable

NO_ZIP = (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, struct.error)
"""What `zipfile` answers a damaged file with; ValueError for names that are no text."""

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
_ROUNDING = _words("ceil floor trunc sqrt")
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
            content = _json(reader, record)
            yield from _strangers(content)
            if holds_tensors:
                yield from _pickled_payloads(content)
                _check_payloads(reader, record.rpartition("/")[0], content)


def check_version(reader: torch._C.PyTorchFileReader) -> None:
    """Refuse programs that another generation of torch has written, in a line.

    Raises:
        Unreadable: torch cannot read this version of its format.
    """
    from torch._export.serde.schema import SCHEMA_VERSION
    from torch.export.pt2_archive.constants import ARCHIVE_VERSION_PATH, ARCHIVE_VERSION_VALUE

    hint = "export it again with this torch, or save it again with the one that wrote it"
    known = ARCHIVE_VERSION_PATH in reader.get_all_records()
    archived = reader.get_record(ARCHIVE_VERSION_PATH).decode() if known else "none"
    if archived != ARCHIVE_VERSION_VALUE:
        raise Unreadable(f"its archive has version {archived[:20]}, this torch reads {ARCHIVE_VERSION_VALUE}: {hint}")
    for record in reader.get_all_records():
        if record.startswith("models/"):
            version = _json(reader, record)["schema_version"]
            if version["major"] != SCHEMA_VERSION[0]:
                said = f"{version['major']}.{version['minor']}"[:20]
                raise Unreadable(f"its program has schema {said}, this torch reads {SCHEMA_VERSION[0]}: {hint}")


def _json(reader: torch._C.PyTorchFileReader, record: str) -> Any:
    if reader.get_record_size(record) > limits.PROGRAM_BYTES:
        raise OverLimit(f"a program of {reader.get_record_size(record):,} bytes", "PROGRAM_BYTES")
    # Decoded as torch does: json.loads of bytes would guess at the encoding.
    return json.loads(reader.get_record(record).decode())


def _pickled_payloads(content: Any) -> Iterator[str]:
    for payload in content["config"].values():
        if payload["use_pickle"] or not payload["path_name"].startswith(("weight_", "tensor_")):
            yield f"the pickle {payload['path_name']}"


def _check_payloads(reader: torch._C.PyTorchFileReader, folder: str, content: Any) -> None:
    """Tensors may not reach beyond what is stored of them, nor show it so often that it fills memory."""
    from torch._export.serde.serialize import deserialize_scalar_type

    for payload in content["config"].values():
        meta = payload["tensor_meta"]
        if payload["use_pickle"] or meta is None:
            continue
        stored = reader.get_record_size(f"{folder}/{payload['path_name']}")
        size, stride = (tuple(extent["as_int"] for extent in meta[field]) for field in ("sizes", "strides"))
        itemsize = deserialize_scalar_type(meta["dtype"]).itemsize
        check_extent(size, stride, meta["storage_offset"]["as_int"], itemsize=itemsize, stored=stored)


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
            return name in _ROUNDING
        case ["torch", name]:
            return name.startswith(("sym_", "_sym_"))
        case ["torch", "ops", "higher_order", name]:
            return name in _CONTROL_FLOW
        case ["torch", "ops", ("aten" | "prims" | "torchvision") as namespace, name, overload]:
            operator = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
            return isinstance(operator, torch._ops.OpOverload) and _only_computes(operator._schema)
    return False


def _only_computes(schema: torch._C.FunctionSchema) -> bool:
    """Whether an operator makes tensors, or numbers of tensors, or checks these, and does nothing else.

    The others reach the disk (aten.from_file), the terminal (aten.warn), the state of this process (aten.manual_seed), or
    make texts and lists of any length (aten.ljust).
    """
    if schema.name.partition("::")[2].startswith(("_assert_", "_foreach_", "sym_constrain_range")):
        return True
    of_tensors = any("Tensor" in str(value.type) for value in (*schema.arguments, *schema.returns))
    return of_tensors and bool(schema.returns) and not any(argument.name == "filename" for argument in schema.arguments)


def _is_expression(text: str, names: frozenset[str], methods: frozenset[str]) -> bool:
    """Whether `text` is arithmetic on these names: no other name, attribute or call, no comment and no second line."""
    if len(text) > limits.EXPRESSION_CHARS:
        raise OverLimit(f"a size of {len(text):,} characters", "EXPRESSION_CHARS")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    if set(text) & set('#"\\\n\r\f') or not all(_is_arithmetic(node, names, methods) for node in ast.walk(tree)):
        return False
    if (bits := _bits(tree.body, 0)) > limits.EXPRESSION_BITS:
        many = f"{bits:,}" if math.isfinite(bits) else "endlessly many"
        raise OverLimit(f"a size with numbers of {many} bits", "EXPRESSION_BITS")
    return True


def _bits(node: ast.AST, depth: int) -> float:
    """A bound on the bits of any number that evaluating this could make on the way, when each symbol has 32."""
    if depth > limits.EXPRESSION_DEPTH:
        raise OverLimit("a size is nested too deeply", "EXPRESSION_DEPTH")
    parts = [_bits(child, depth + 1) for child in ast.iter_child_nodes(node) if not isinstance(child, _OPERATORS[:-1])]
    match node:
        case ast.Constant(value=bool() | int() | float() as value):
            return abs(value).bit_length() if isinstance(value, int) else 64
        case ast.BinOp(op=ast.Pow() | ast.LShift()):
            return _power_bits(parts[0], node.left, node.right)
        case ast.Call(func=ast.Name(id="Pow" | "PowByNatural" | "FloatPow" | "LShift"), args=[base, exponent, *_]):
            return _power_bits(parts[1], base, exponent)
        case ast.BinOp(op=ast.Mult()) | ast.Call(func=ast.Name(id="Mul")):
            return sum(parts)
        case ast.Name():
            return 32 if _SYMBOL.fullmatch(node.id) else 0
    return max(parts, default=0) + len(parts)


def _power_bits(bits: float, base: ast.AST, exponent: ast.AST) -> float:
    """Of a power or a shift: a number may only be raised to a small one that is written out."""
    match exponent:
        case (
            ast.Call(func=ast.Name(id="Integer"), args=[inner])
            | ast.Call(func=ast.Name(id="Rational"), args=[inner, _])
            | ast.UnaryOp(op=ast.USub(), operand=inner)
        ):
            return _power_bits(bits, base, inner)
        case ast.Constant(value=int() | float() as value):
            return max(bits, 1) * max(abs(value), 1)
    # A literal base with a size as its exponent, such as 2**s0, is a number of a size's value in bits: without a bound.
    return math.inf


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
