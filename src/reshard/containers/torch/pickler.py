"""Write pickles of protocol 2 without the classes that they name.

A pickle names classes and states their fields; only the program that loads it needs the classes.
`Name`, `Call`, `Instance` and `Persistent` stand for what a program would have as objects.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from itertools import islice

from msgspec import Struct


class Name(Struct, frozen=True):
    """A class or function, by module and name."""

    module: str
    name: str


class Call(Struct, frozen=True):
    """What `function(*args)` gives."""

    function: Name
    args: tuple[object, ...]


class Again(Struct, frozen=True):
    """A string that is written in full although it may occur before: a reader compares the two."""

    text: str


class Persistent(Struct, frozen=True):
    """What the reader looks up by `key`, as torch does its storages."""

    key: tuple[object, ...]


# By identity: instances are keys of a dict, and their fields are not hashable.
class Instance(Struct, frozen=True, eq=False):
    """An instance of `kind` whose `__setstate__` is given, or whose fields are, `state`."""

    kind: Name
    state: object


class Pairs(Struct, frozen=True):
    """A dict, whose items are made as they are written."""

    items: Iterable[tuple[object, object]]


class Pickler:
    """Writes None, bool, int, float, str, tuples, lists, dicts and the records above.

    With `memo`, names and strings that recur are written once. `batch` items of a list or dict are
    pushed at a time, as Python's own pickler does, so that a reader's stack stays small; None: all.
    `sink` gets the bytes as they are made, and `finish` gives those that are left.
    """

    def __init__(
        self,
        *,
        memo: bool = False,
        batch: int | None = None,
        sink: Callable[[bytearray], None] | None = None,
    ) -> None:
        self._out = bytearray(b"\x80\x02")
        self._sink = sink
        self._memo: dict[Name | str, int] | None = {} if memo else None
        self._batch = batch

    def finish(self) -> bytes:
        """The pickle of the value that was put."""
        self._out += b"."
        return bytes(self._out)

    def put(self, value: object) -> None:
        """Write a value. Raises `TypeError` for what is none of the above."""
        if value is None:
            self._out += b"N"
        elif isinstance(value, bool):
            self._out += b"\x88" if value else b"\x89"
        elif isinstance(value, int):
            self._put_integer(value)
        elif isinstance(value, float):
            self._out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str | Name):
            self._put_once(value)
        elif isinstance(value, Again):
            self._put_text(value.text)
        elif isinstance(value, tuple):
            self._put_tuple(value)
        elif isinstance(value, list):
            self._out += b"]"
            self._put_items(((item,) for item in value), b"e")
        elif isinstance(value, dict | Pairs):
            self._out += b"}"
            self._put_items(value.items() if isinstance(value, dict) else value.items, b"u")
        else:
            self._put_object(value)

    def _put_object(self, value: object) -> None:
        if isinstance(value, Call):
            self.put(value.function)
            if value.args:
                self._put_tuple(value.args)
            else:
                self._out += b")"
            self._out += b"R"
        elif isinstance(value, Instance):
            self.put(value.kind)
            self._out += b")\x81"
            self.put(value.state)
            self._out += b"b"
        elif isinstance(value, Persistent):
            self._put_tuple(value.key)
            self._out += b"Q"
        else:
            raise TypeError(f"{type(value).__name__} is not plain data")

    def _put_tuple(self, value: tuple[object, ...]) -> None:
        self._out += b"("
        for item in value:
            self.put(item)
        self._out += b"t"

    def _put_integer(self, value: int) -> None:
        if -(1 << 31) <= value < 1 << 31:
            self._out += b"J" + struct.pack("<l", value)
        else:
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self._out += b"\x8a" + bytes([len(raw)]) + raw

    def _put_once(self, value: Name | str) -> None:
        known = None if self._memo is None else self._memo.get(value)
        if known is not None:
            self._out += b"j" + struct.pack("<L", known)
            return
        if isinstance(value, Name):
            self._out += f"c{value.module}\n{value.name}\n".encode()
        else:
            self._put_text(value)
        if self._memo is not None:
            self._out += b"r" + struct.pack("<L", len(self._memo))
            self._memo[value] = len(self._memo)

    def _put_text(self, text: str) -> None:
        raw = text.encode()
        self._out += b"X" + struct.pack("<L", len(raw)) + raw

    def _put_items(self, items: Iterable[tuple[object, ...]], end: bytes) -> None:
        left = iter(items)
        # Without batches an empty one is written too.
        while (batch := [*islice(left, self._batch)]) or not self._batch:
            self._out += b"("
            for item in batch:
                for value in item:
                    self.put(value)
            self._out += end
            if not self._batch:
                break
            if self._sink is not None:
                self._sink(self._out)
                self._out = bytearray()
