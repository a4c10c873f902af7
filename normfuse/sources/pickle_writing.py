"""Write a picture of a pickle as a pickle again: what `pickles.picture` reads, with every name and call as it stood.

A checkpoint keeps more than weights: an optimizer's state, settings of classes that are not installed here. None of it is built
to change a weight. It is read as a picture, and the picture is written.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Any

from normfuse.sources.pickles import Made, Name, Outside, Unreadable


def pickled(value: Any, protocol: int = 2) -> bytes:
    """The pickle of a picture; what is one object in the picture is one in the pickle.

    Raises:
        Unreadable: a name in it is no name.
    """
    writer = _Writer()
    writer.put(value)
    return b"\x80" + bytes([protocol]) + bytes(writer.out) + b"."


class _Writer:
    def __init__(self) -> None:
        self.out = bytearray()
        self.memo: dict[Any, int] = {}

    def put(self, value: Any) -> None:
        if value is None or value is True or value is False:
            self.out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
            return
        key = (type(value), value) if isinstance(value, str) else id(value)
        if key in self.memo:
            self.out += b"j" + struct.pack("<I", self.memo[key])
            return
        _ACTS[type(value)](self, value)

    def remember(self, value: Any) -> None:
        key = (type(value), value) if isinstance(value, str) else id(value)
        self.out += b"r" + struct.pack("<I", len(self.memo))
        self.memo[key] = len(self.memo)

    def all_of(self, values: Iterable[Any], opcode: bytes) -> None:
        """What is put on the stack between a mark and an opcode that takes all of it."""
        self.out += b"("
        for each in values:
            self.put(each)
        self.out += opcode

    def whole(self, value: int) -> None:
        if -(1 << 31) <= value < 1 << 31:
            self.out += b"J" + struct.pack("<i", value)
            return
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        self.out += (b"\x8a" + bytes([len(data)]) if len(data) < 256 else b"\x8b" + struct.pack("<I", len(data))) + data

    def number(self, value: float) -> None:
        self.out += b"G" + struct.pack(">d", value)

    def text(self, value: str) -> None:
        data = value.encode("utf-8", "surrogatepass")
        self.out += b"X" + struct.pack("<I", len(data)) + data
        self.remember(value)

    def octets(self, value: bytes) -> None:
        self.out += b"B" + struct.pack("<I", len(value)) + value
        self.remember(value)

    def array(self, value: bytearray) -> None:
        self.out += b"\x96" + struct.pack("<Q", len(value)) + value
        self.remember(value)

    def name(self, value: Name) -> None:
        if any(not part or "\n" in part for part in value.stored):
            raise Unreadable("its pickle has a name that is none")
        self.out += b"c" + "".join(f"{part}\n" for part in value.stored).encode("utf-8", "surrogatepass")
        self.remember(value)

    def tupled(self, value: tuple[Any, ...]) -> None:
        if 0 < len(value) < 4:
            for each in value:
                self.put(each)
            self.out += (b"\x85", b"\x86", b"\x87")[len(value) - 1]
        elif value:
            self.all_of(value, b"t")
        else:
            self.out += b")"
            return
        self.remember(value)

    def listed(self, value: list[Any]) -> None:
        self.out += b"]"
        self.remember(value)
        self.all_of(value, b"e")

    def mapped(self, value: dict[Any, Any]) -> None:
        self.out += b"}"
        self.remember(value)
        self.all_of((each for pair in value.items() for each in pair), b"u")

    def members(self, value: set[Any]) -> None:
        self.out += b"\x8f"
        self.remember(value)
        self.all_of(value, b"\x90")

    def frozen(self, value: frozenset[Any]) -> None:
        self.all_of(value, b"\x91")
        self.remember(value)

    def outside(self, value: Outside) -> None:
        self.put(value.reference)
        self.out += b"Q"

    def made(self, value: Made) -> None:
        self.put(value.by)
        self.put(value.arguments)
        if value.keywords:
            self.put(value.keywords)
            self.out += b"\x92"
        else:
            self.out += b"R" if value.called else b"\x81"
        self.remember(value)
        if value.entries:
            self.all_of(value.entries, b"e")
        if value.pairs:
            self.all_of((each for pair in value.pairs for each in pair), b"u")
        for state in value.states:
            self.put(state)
            self.out += b"b"


_ACTS: dict[type, Callable[[_Writer, Any], None]] = {
    int: _Writer.whole,
    float: _Writer.number,
    str: _Writer.text,
    bytes: _Writer.octets,
    bytearray: _Writer.array,
    Name: _Writer.name,
    tuple: _Writer.tupled,
    list: _Writer.listed,
    dict: _Writer.mapped,
    set: _Writer.members,
    frozenset: _Writer.frozen,
    Outside: _Writer.outside,
    Made: _Writer.made,
}
