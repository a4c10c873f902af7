"""Read a pickle as a picture: what it names, calls and fills, none of it done.

A pickle is a program for a stack machine. `picture` runs the machine on descriptions: a name is a `Name`, a call is a `Made`
that nobody has made, and the only real things are plain containers, strings and numbers. Nothing is imported, no method of
anything is called, and what comes out is data that can be judged before any of it is built (`normfuse.sources.building`).
"""

from __future__ import annotations

import _compat_pickle
import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from normfuse import limits
from normfuse.limits import OverLimit

PLAIN_KEYS = (str, int, float, bool, bytes, type(None))


class Unreadable(Exception):
    """These bytes are no pickle that a model or inputs are written as."""


@dataclass(frozen=True)
class Name:
    """A dotted name: a class, a function or a constant, not imported; ``stored`` is its module and the rest, as in the file."""

    text: str
    stored: tuple[str, str] = field(default=("", ""), compare=False)


@dataclass(eq=False)
class Made:
    """An object: the class to make an instance of, or (``called``) the function to call, its arguments, and what fills it."""

    by: Any
    arguments: tuple[Any, ...]
    called: bool
    keywords: dict[Any, Any] = field(default_factory=dict)
    states: list[Any] = field(default_factory=list)
    entries: list[Any] = field(default_factory=list)
    pairs: list[tuple[Any, Any]] = field(default_factory=list)


@dataclass(eq=False)
class Outside:
    """What the pickle keeps outside of itself: a tensor's storage. Its reference is read by `storages`, and never built."""

    reference: Any


def picture(data: bytes) -> Any:
    """The object that the pickle describes.

    Raises:
        Unreadable: the bytes are damaged, or use what no file of `torch.save` does.
        OverLimit: there are too many of them.
    """
    if len(data) > limits.PICKLE_BYTES:
        raise OverLimit(f"a pickle of {len(data):,} bytes", "PICKLE_BYTES")
    machine = _Machine()
    try:
        for opcode, argument, _position in pickletools.genops(data):
            machine.step(opcode.name, argument)
    except Unreadable:
        raise
    except Exception as error:  # pickletools and an empty stack have their own ways to fail
        raise Unreadable(f"its pickle is damaged ({type(error).__name__})") from error
    return machine.result


def children(value: Any) -> Iterator[Any]:
    """What one value of a picture directly holds."""
    match value:
        case list() | tuple() | set() | frozenset():
            yield from value
        case dict():
            for key, item in value.items():
                yield key
                yield item
        case Made():
            yield from (value.by, value.arguments, value.keywords, *value.states, *value.entries)
            for pair in value.pairs:
                yield from pair


def everything(root: Any) -> Iterator[Any]:
    """All values of a picture, each object once."""
    seen: dict[int, Any] = {}
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if id(value) not in seen:
            seen[id(value)] = value
            yield value
            waiting += children(value)


class _Machine:
    """The pickle machine, on descriptions."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.protocol = 0
        self.result: Any = None

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _VALUES:
            self.stack.append(argument)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode]())
        elif (act := _ACTS.get(opcode)) is not None:
            act(self, argument)
        else:
            raise Unreadable(f"its pickle has {opcode}, which no file of torch.save has")

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def mark(self, _argument: Any) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def pop(self, _argument: Any) -> None:
        self.stack.pop() if self.stack else self.since_mark()

    def drop_marked(self, _argument: Any) -> None:
        self.since_mark()

    def begin(self, protocol: Any) -> None:
        self.protocol = protocol

    def frame(self, _argument: Any) -> None:
        """A frame only says how the bytes that follow may be read."""

    def stop(self, _argument: Any) -> None:
        self.result = self.stack.pop()

    def put(self, index: Any) -> None:
        self.memo[int(index)] = self.stack[-1]

    def memoize(self, _argument: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, index: Any) -> None:
        self.stack.append(self.memo[int(index)])

    def name(self, module: str, attribute: str) -> None:
        stored = module, attribute
        if self.protocol < 3:
            module, attribute = _compat_pickle.NAME_MAPPING.get((module, attribute), (module, attribute))
            module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        self.stack.append(Name(f"{module}.{attribute}", stored))

    def global_(self, argument: Any) -> None:
        module, _, attribute = argument.partition(" ")
        self.name(module, attribute)

    def stack_global(self, _argument: Any) -> None:
        attribute, module = self.stack.pop(), self.stack.pop()
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise Unreadable("its pickle has a name that is no text")
        self.name(module, attribute)

    def outside(self, _argument: Any) -> None:
        reference = self.stack.pop()
        match reference:
            case ("module" | b"module", Name() as name, *_source):  # torch before 1.6 kept the source of classes beside them
                self.stack.append(name)
            case _:
                self.stack.append(Outside(reference))

    def make(self, called: bool, keywords: Any) -> None:
        arguments, by = self.stack.pop(), self.stack.pop()
        if not isinstance(arguments, tuple) or not isinstance(keywords, dict):
            raise Unreadable("its pickle has arguments that are no tuple")
        self.stack.append(Made(by, arguments, called, keywords))

    def reduce(self, _argument: Any) -> None:
        self.make(True, {})

    def newobj(self, _argument: Any) -> None:
        self.make(False, {})

    def newobj_ex(self, _argument: Any) -> None:
        keywords = self.stack.pop()
        self.make(False, keywords)

    def build(self, _argument: Any) -> None:
        state = self.stack.pop()
        self.filled(Made).states.append(state)

    def filled(self, *kinds: type) -> Any:
        if not isinstance(self.stack[-1], kinds):
            raise Unreadable(f"its pickle fills a {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def extend(self, items: list[Any]) -> None:
        target = self.filled(list, Made)
        (target if isinstance(target, list) else target.entries).extend(items)

    def append(self, _argument: Any) -> None:
        self.extend([self.stack.pop()])

    def appends(self, _argument: Any) -> None:
        self.extend(self.since_mark())

    def update(self, items: list[Any]) -> None:
        target = self.filled(dict, Made)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(target, dict):
                target[_as_key(key)] = value
            else:
                target.pairs.append((_as_key(key), value))

    def setitem(self, _argument: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.update([key, value])

    def setitems(self, _argument: Any) -> None:
        self.update(self.since_mark())

    def additems(self, _argument: Any) -> None:
        items = self.since_mark()
        self.filled(set).update(map(_as_key, items))

    def frozen(self, _argument: Any) -> None:
        items = self.since_mark()  # which changes the stack
        self.stack.append(frozenset(map(_as_key, items)))

    def tupled(self, _argument: Any) -> None:
        items = self.since_mark()
        self.stack.append(tuple(items))

    def listed(self, _argument: Any) -> None:
        items = self.since_mark()
        self.stack.append(items)

    def mapped(self, _argument: Any) -> None:
        items = self.since_mark()
        self.stack.append({})
        self.update(items)

    def small_tuple(self, size: int) -> None:
        items = self.stack[len(self.stack) - size :]
        if len(items) != size:
            raise Unreadable("its pickle is damaged")
        self.stack[len(self.stack) - size :] = [tuple(items)]


def _as_key(key: Any) -> Any:
    """A key of a dict or a member of a set: hashing it must call nothing, and not walk far."""
    plain = isinstance(key, tuple) and all(isinstance(part, PLAIN_KEYS) for part in key)
    if not plain and not isinstance(key, (*PLAIN_KEYS, Name, Made)):
        raise Unreadable(f"its pickle has a {type(key).__name__} for a key")
    return key


_VALUES = frozenset(
    {
        *("INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "FLOAT", "BINFLOAT"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    }
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_ACTS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.begin,
    "FRAME": _Machine.frame,
    "STOP": _Machine.stop,
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.drop_marked,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "MEMOIZE": _Machine.memoize,
    "BYTEARRAY8": lambda machine, content: machine.stack.append(bytearray(content)),
    "GLOBAL": _Machine.global_,
    "STACK_GLOBAL": _Machine.stack_global,
    "BINPERSID": _Machine.outside,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.newobj,
    "NEWOBJ_EX": _Machine.newobj_ex,
    "BUILD": _Machine.build,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.setitem,
    "SETITEMS": _Machine.setitems,
    "ADDITEMS": _Machine.additems,
    "FROZENSET": _Machine.frozen,
    "LIST": _Machine.listed,
    "DICT": _Machine.mapped,
    "TUPLE": _Machine.tupled,
    "TUPLE1": lambda machine, _argument: machine.small_tuple(1),
    "TUPLE2": lambda machine, _argument: machine.small_tuple(2),
    "TUPLE3": lambda machine, _argument: machine.small_tuple(3),
}
