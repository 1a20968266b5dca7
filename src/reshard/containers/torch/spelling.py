"""How the records of a class are spelt in a pickle, learnt from the first of them."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import Struct

from reshard.containers.torch import bulk
from reshard.containers.torch.records import Global, Instance
from reshard.containers.torch.rows import Column, Constant, Size
from reshard.core.regex import regex

if TYPE_CHECKING:
    from reshard.containers.torch.machine import Machine

#: What opens a record after the class and the empty tuple of its arguments.
OPENING = b"\x81\x94}\x94("
_CLOSING = b"ub"
#: An opcode that recalls a value.
GET = rb"(h.|j.{4})"
# Bytes of the two, with their numbers.
_GETS = {b"h": 2, b"j": 5}
# A string: recalled, or spelt with its length, which is compared, and put into the memo.
_TEXT = rb"(h.|j.{4}|\x8c.[^\x94]*\x94)"
_ONE_TEXT = regex(rb"\x8c.[^\x94]*\x94", re.DOTALL)
_INT = rb"(K.|M..|J.{4}|\x8a\x05.{5}|\x8a\x06.{6})"
_ONE_INT = regex(_INT, re.DOTALL)
_TUPLES = {1: b"\x85\x94", 2: b"\x86\x94", 3: b"\x87\x94"}
_CALLED = b"\x85\x94R\x94"
_SIZE = "torch.Size"
_CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False}
# Fields and dimensions of a record.
_MAX_FIELDS, _MAX_DIMS = 8, 8
_U32 = struct.Struct("<I").unpack_from

#: What the value of a field is.
IS_TEXT, IS_INT, IS_SIZE, IS_CONSTANT = range(4)


class Field(NamedTuple):
    """A field's value: a string, a number or a size of groups `first` to `last`, or a constant."""

    kind: int
    first: int = 0
    last: int = 0
    value: object = None


class Spelling(Struct, frozen=True, eq=False):
    """How the records of a class are spelt after the class: a pattern, and what its groups are."""

    cls: Global
    source: bytes
    pattern: re.Pattern[bytes]
    #: Literals, and between them a group of each kind (`bulk`).
    parts: tuple[bytes, ...]
    kinds: tuple[int, ...]
    keys: tuple[str, ...]
    fields: tuple[Field, ...]
    groups: int
    #: Of a spelling without strings, what was made already of the same bytes: chunks repeat in
    #: every layer.
    made: dict[bytes, tuple[Instance, list[object]]] | None

    @staticmethod
    def of(
        cls: Global,
        parts: Sequence[bytes],
        kinds: Sequence[int],
        keys: Sequence[str],
        fields: Sequence[Field],
    ) -> Spelling:
        source = re.escape(parts[0])
        for kind, literal in zip(kinds, parts[1:], strict=True):
            source += (_TEXT if kind == bulk.TEXT else _INT) + re.escape(literal)
        pattern = re.compile(source, re.DOTALL)
        made: dict[bytes, tuple[Instance, list[object]]] | None
        made = None if bulk.TEXT in kinds else {}
        given = (tuple(parts), tuple(kinds), tuple(keys), tuple(fields))
        return Spelling(cls, source, pattern, *given, len(kinds), made)

    def memoized(self) -> list[int]:
        """How many values come into the memo before each group, without texts; at last, in all."""
        counts: list[int] = []
        total = 2
        for field in self.fields:
            counts += [total] * (1 if field.kind in (IS_INT, IS_TEXT) else field.last - field.first)
            if field.kind == IS_SIZE:
                total += 2 + (field.first < field.last)
        return [*counts, total]

    def column(self, field: Field, groups: Sequence[Any]) -> Column:
        """A field's column, of those of the groups."""
        if field.kind == IS_CONSTANT:
            return Constant(field.value)
        if field.kind == IS_SIZE:
            return Size(tuple(groups[field.first : field.last]))
        found: Column = groups[field.first]
        return found


def learn(m: Machine, cls: Global, pos: int) -> Spelling | None:
    """How the record at `pos` is spelt; None where it is not one of simple fields."""
    data = m.data
    pos += len(OPENING)
    parts, kinds = [OPENING], list[int]()
    keys: list[str] = []
    fields: list[Field] = []
    while not data.startswith(_CLOSING, pos):
        raw = get_at(data, pos)
        key = recalled(m, raw) if raw else None
        if type(key) is not str or key in keys or len(keys) >= _MAX_FIELDS:
            return None
        pos += len(raw)
        parts[-1] += raw
        keys.append(key)
        raw = get_at(data, pos)
        value = recalled(m, raw) if raw else None
        groups = len(kinds)
        if isinstance(value, Global) and value.name == _SIZE:
            found = _size(data, pos + len(raw))
            if found is None:
                return None
            opening, count, closing, pos = found
            parts[-1] += raw + opening
            parts += [b""] * count
            parts[-1] += closing
            kinds += [bulk.NATURAL] * count
            fields.append(Field(IS_SIZE, groups, groups + count))
        elif type(value) is str or _ONE_TEXT.match(data, pos) is not None:
            fields.append(Field(IS_TEXT, groups))
            parts.append(b"")
            kinds.append(bulk.TEXT)
            text = _ONE_TEXT.match(data, pos)
            pos = pos + len(raw) if text is None else text.end()
        elif (match := _ONE_INT.match(data, pos)) is not None:
            fields.append(Field(IS_INT, groups))
            parts.append(b"")
            kinds.append(bulk.NUMBER)
            pos = match.end()
        elif data[pos : pos + 1] in _CONSTANTS:
            code = data[pos : pos + 1]
            parts[-1] += code
            fields.append(Field(IS_CONSTANT, value=_CONSTANTS[code]))
            pos += 1
        else:
            return None
    if not keys:
        return None
    parts[-1] += _CLOSING
    return Spelling.of(cls, parts, kinds, keys, fields)


def _size(data: bytes, pos: int) -> tuple[bytes, int, bytes, int] | None:
    """The size at `pos`, after the name of its class: what stands before its dimensions, their
    number, what stands behind them, its end."""
    opening = b"(" if data[pos : pos + 1] == b"(" else b""
    pos += len(opening)
    count = 0
    while count < _MAX_DIMS and (match := _ONE_INT.match(data, pos)) is not None:
        count, pos = count + 1, match.end()
    closing = (b"t\x94" if opening else _TUPLES.get(count, b")")) + _CALLED
    return (opening, count, closing, pos + len(closing)) if data.startswith(closing, pos) else None


def plan_of(cycle: Sequence[Spelling], classes: Sequence[bytes]) -> bulk.Plan:
    """How the records of a cycle follow each other, each after its class."""
    literals, kinds, memo = [b""], list[int](), [0]
    for one, raw in zip(cycle, classes, strict=True):
        literals[-1] += raw + b")" + one.parts[0]
        literals += one.parts[1:]
        kinds += one.kinds
        before = memo.pop()
        memo += [before + count for count in one.memoized()]
    return bulk.plan(literals, kinds, memo)


def get_at(data: bytes, pos: int) -> bytes:
    """The opcode at `pos` that recalls a value, with its number; empty where there is none."""
    nbytes = _GETS.get(data[pos : pos + 1], 0)
    raw = data[pos : pos + nbytes]
    return raw if len(raw) == nbytes else b""


def recalled(m: Machine, raw: bytes) -> object:
    """What an opcode recalls of the memo; None where it is missing."""
    index = raw[1] if len(raw) == 2 else _U32(raw, 1)[0]
    return m.memo[index] if index < len(m.memo) else None
