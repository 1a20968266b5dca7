"""The opcodes: a small function each, from the position after the code to the next opcode.

CPython 3.13's Lib/pickletools.py documents them. The table holds those that ordinary files use,
in protocols 2 to 5; all others are refused by name. Long because each opcode is a function.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from reshard.containers.torch.known import DEVICE, MAX_DEVICE
from reshard.containers.torch.limits import (
    CALL_NBYTES,
    DICT_NBYTES,
    LIST_NBYTES,
    MAX_INT_NBYTES,
    MAX_MARKS,
    MAX_NAME,
    MAX_STRING_NBYTES,
    TUPLE_NBYTES,
)
from reshard.containers.torch.malformed import EndOfPickle, Malformed
from reshard.containers.torch.memo import LEFT_OUT, RecalledError
from reshard.containers.torch.nesting import HOLDING
from reshard.containers.torch.records import Opaque
from reshard.containers.torch.rows import Rows
from reshard.containers.torch.spelling import OPENING

if TYPE_CHECKING:
    from reshard.containers.torch.machine import Machine

Op: TypeAlias = "Callable[[Machine, int], int]"

_U16 = struct.Struct("<H").unpack_from
_U32 = struct.Struct("<I").unpack_from
_I32 = struct.Struct("<i").unpack_from
_U64 = struct.Struct("<Q").unpack_from
_F64 = struct.Struct(">d").unpack_from


def _refuse(m: Machine, pos: int) -> int:
    code = m.data[pos - 1]
    name = _REFUSED.get(chr(code))
    if name is None:
        raise m.broken(f"byte {pos - 1} of its pickle, {code:#04x}, is not an opcode.")
    raise m.refused(f"its pickle uses the opcode {name}, at byte {pos - 1}.")


_REFUSED = {
    "I": "INT", "L": "LONG", "S": "STRING", "V": "UNICODE", "F": "FLOAT", "l": "LIST",
    "d": "DICT", "0": "POP", "1": "POP_MARK", "2": "DUP", "g": "GET", "p": "PUT",
    "i": "INST", "o": "OBJ", "P": "PERSID", "\x82": "EXT1", "\x83": "EXT2", "\x84": "EXT4",
    "\x92": "NEWOBJ_EX", "\x97": "NEXT_BUFFER", "\x98": "READONLY_BUFFER",
}  # fmt: skip
TABLE: list[Op] = [_refuse] * 256


def _opcode(code: str) -> Callable[[Op], Op]:
    def register(function: Op) -> Op:
        TABLE[ord(code)] = function
        return function

    return register


@_opcode("\x80")
def _proto(m: Machine, pos: int) -> int:
    if m.data[pos] > 5:
        raise m.refused(f"its pickle is of protocol {m.data[pos]}; supported are 2 to 5.")
    return pos + 1


@_opcode("\x95")
def _frame(m: Machine, pos: int) -> int:
    (nbytes,) = _U64(m.data, pos)
    m.frame = pos + 8 + nbytes
    if m.frame > m.nbytes:
        raise EndOfPickle
    return pos + 8


# Numbers and constants.


@_opcode("N")
def _none(m: Machine, pos: int) -> int:
    m.stack.append(None)
    return pos


@_opcode("\x88")
def _newtrue(m: Machine, pos: int) -> int:
    m.stack.append(True)
    return pos


@_opcode("\x89")
def _newfalse(m: Machine, pos: int) -> int:
    m.stack.append(False)
    return pos


@_opcode("K")
def _binint1(m: Machine, pos: int) -> int:
    m.stack.append(m.data[pos])
    return pos + 1


@_opcode("M")
def _binint2(m: Machine, pos: int) -> int:
    m.stack.append(_U16(m.data, pos)[0])
    return pos + 2


@_opcode("J")
def _binint(m: Machine, pos: int) -> int:
    m.stack.append(_I32(m.data, pos)[0])
    return pos + 4


def _push_int(m: Machine, pos: int, nbytes: int) -> int:
    if nbytes > MAX_INT_NBYTES:
        raise m.refused(f"an integer of its pickle takes {nbytes} bytes.")
    m.stack.append(int.from_bytes(m.take(pos, nbytes), "little", signed=True))
    return pos + nbytes


@_opcode("\x8a")
def _long1(m: Machine, pos: int) -> int:
    return _push_int(m, pos + 1, m.data[pos])


@_opcode("\x8b")
def _long4(m: Machine, pos: int) -> int:
    return _push_int(m, pos + 4, _U32(m.data, pos)[0])


@_opcode("G")
def _binfloat(m: Machine, pos: int) -> int:
    m.stack.append(_F64(m.data, pos)[0])
    return pos + 8


# Strings.

#: Names of the records of texts and bytes that are too long to be copied.
UNREAD = ("builtins.str", "builtins.bytes")


def _push_unread(m: Machine, pos: int, nbytes: int, kind: str) -> int:
    if pos + nbytes > len(m.data):
        raise EndOfPickle
    m.stack.append(Opaque(kind))
    return pos + nbytes


def _push_text(m: Machine, pos: int, nbytes: int) -> int:
    if nbytes > MAX_STRING_NBYTES:
        return _push_unread(m, pos, nbytes, "builtins.str")
    raw = m.take(pos, nbytes)
    try:
        m.stack.append(raw.decode())
    except UnicodeDecodeError:
        m.stack.append(_spelt_out(raw))
    return pos + nbytes


def _spelt_out(raw: bytes) -> str:
    r"""Text with halves of surrogate pairs, as file names that are not UTF-8 have: as `\udc80`.

    The result can be written and shown.
    """
    try:
        return raw.decode("utf-8", "surrogatepass").encode("utf-8", "backslashreplace").decode()
    except UnicodeDecodeError:
        raise Malformed("a string is not UTF-8") from None


def _push_bytes(m: Machine, pos: int, nbytes: int) -> int:
    if nbytes > MAX_STRING_NBYTES:
        return _push_unread(m, pos, nbytes, "builtins.bytes")
    m.stack.append(m.take(pos, nbytes))
    return pos + nbytes


@_opcode("\x8c")
def _short_binunicode(m: Machine, pos: int) -> int:
    return _push_text(m, pos + 1, m.data[pos])


@_opcode("X")
def _binunicode(m: Machine, pos: int) -> int:
    (nbytes,) = _U32(m.data, pos)
    if m.devices is not None and nbytes <= MAX_DEVICE:
        text = DEVICE.fullmatch(m.data, pos + 4, pos + 4 + nbytes)
        if text is not None:
            m.devices[pos + 4] = text[0]
    return _push_text(m, pos + 4, nbytes)


@_opcode("\x8d")
def _binunicode8(m: Machine, pos: int) -> int:
    return _push_text(m, pos + 8, _U64(m.data, pos)[0])


# SHORT_BINSTRING and BINSTRING are `str` as Python 2 wrote it.
@_opcode("U")
def _short_binstring(m: Machine, pos: int) -> int:
    return _push_text(m, pos + 1, m.data[pos])


@_opcode("T")
def _binstring(m: Machine, pos: int) -> int:
    return _push_text(m, pos + 4, _U32(m.data, pos)[0])


@_opcode("C")
def _short_binbytes(m: Machine, pos: int) -> int:
    return _push_bytes(m, pos + 1, m.data[pos])


@_opcode("B")
def _binbytes(m: Machine, pos: int) -> int:
    return _push_bytes(m, pos + 4, _U32(m.data, pos)[0])


@_opcode("\x8e")
def _binbytes8(m: Machine, pos: int) -> int:
    return _push_bytes(m, pos + 8, _U64(m.data, pos)[0])


# A bytearray is read as bytes.
@_opcode("\x96")
def _bytearray8(m: Machine, pos: int) -> int:
    return _push_bytes(m, pos + 8, _U64(m.data, pos)[0])


# Containers.


@_opcode("(")
def _mark(m: Machine, pos: int) -> int:
    if len(m.marks) >= MAX_MARKS:
        raise m.refused(f"its pickle nests more than {MAX_MARKS} marks.")
    m.marks.append(m.stack)
    m.begun.append(len(m.memo))
    m.stack = []
    return pos


@_opcode(")")
def _empty_tuple(m: Machine, pos: int) -> int:
    if m.repeats is not None and m.stack and m.data.startswith(OPENING, pos):
        end = m.repeats.read(m, pos)
        if end != pos:
            return end
    m.stack.append(())
    return pos


@_opcode("\x85")
def _tuple1(m: Machine, pos: int) -> int:
    m.made_nbytes += TUPLE_NBYTES
    m.stack[-1] = (m.stack[-1],)
    return pos


def _tuple_of(m: Machine, count: int) -> None:
    if len(m.stack) < count:
        raise Malformed("a tuple lacks items")
    m.made_nbytes += TUPLE_NBYTES
    m.stack[-count:] = [tuple(m.stack[-count:])]


@_opcode("\x86")
def _tuple2(m: Machine, pos: int) -> int:
    _tuple_of(m, 2)
    return pos


@_opcode("\x87")
def _tuple3(m: Machine, pos: int) -> int:
    _tuple_of(m, 3)
    return pos


@_opcode("t")
def _tuple(m: Machine, pos: int) -> int:
    m.made_nbytes += TUPLE_NBYTES
    values = m.pop_mark()
    m.stack.append(tuple(values))
    return pos


@_opcode("]")
def _empty_list(m: Machine, pos: int) -> int:
    m.made_nbytes += LIST_NBYTES
    m.stack.append([])
    return pos


@_opcode("}")
def _empty_dict(m: Machine, pos: int) -> int:
    m.made_nbytes += DICT_NBYTES
    m.stack.append({})
    return pos


# A set is read as the list of its items: nothing in a file is hashed without need.
@_opcode("\x8f")
def _empty_set(m: Machine, pos: int) -> int:
    return _empty_list(m, pos)


@_opcode("\x91")
def _frozenset(m: Machine, pos: int) -> int:
    m.made_nbytes += LIST_NBYTES
    values = m.pop_mark()
    m.stack.append(values)
    return pos


@_opcode("a")
def _append(m: Machine, pos: int) -> int:
    value = m.stack.pop()
    m.append(m.stack[-1], [value])
    return pos


@_opcode("e")
def _appends(m: Machine, pos: int) -> int:
    values = m.pop_mark()
    m.append(m.stack[-1], values)
    return pos


@_opcode("\x90")
def _additems(m: Machine, pos: int) -> int:
    return _appends(m, pos)


@_opcode("s")
def _setitem(m: Machine, pos: int) -> int:
    value = m.stack.pop()
    key = m.stack.pop()
    m.set_items(m.stack[-1], [key, value])
    return pos


@_opcode("u")
def _setitems(m: Machine, pos: int) -> int:
    pairs = m.pop_mark()
    if m.compactor is not None:
        pairs = m.compacted(m.stack[-1], pairs)
    m.set_items(m.stack[-1], pairs)
    return pos


# The memo. Picklers number it 0, 1, 2 ...; some begin again at 0.


_NOTED = HOLDING | {Rows}


def _get(m: Machine, index: int) -> None:
    memo = m.memo
    place = index - memo.start
    if place >= len(memo.recent):
        raise Malformed(f"it recalls value {index}, and has stored {len(memo)}")
    value = memo.recent[place] if place >= 0 else memo[index]
    if value is LEFT_OUT:
        raise RecalledError
    if type(value) in _NOTED:
        if type(value) is Rows:
            raise RecalledError
        m.recalled[id(value)] = value
    m.stack.append(value)


def _put(m: Machine, index: int) -> None:
    memo = m.memo
    if index == memo.start + len(memo.recent):
        memo.recent.append(m.stack[-1])
    elif index < m.memo.start:
        raise RecalledError
    elif index < len(m.memo):
        m.memo.recent[index - m.memo.start] = m.stack[-1]
        if m.repeats is not None:
            m.repeats.forget()
    else:
        raise Malformed(f"it stores value {index}, and has stored {len(m.memo)}")


@_opcode("h")
def _binget(m: Machine, pos: int) -> int:
    _get(m, m.data[pos])
    return pos + 1


@_opcode("j")
def _long_binget(m: Machine, pos: int) -> int:
    _get(m, _U32(m.data, pos)[0])
    return pos + 4


@_opcode("q")
def _binput(m: Machine, pos: int) -> int:
    _put(m, m.data[pos])
    return pos + 1


@_opcode("r")
def _long_binput(m: Machine, pos: int) -> int:
    _put(m, _U32(m.data, pos)[0])
    return pos + 4


@_opcode("\x94")
def _memoize(m: Machine, pos: int) -> int:
    m.memo.recent.append(m.stack[-1])
    return pos


# Names and calls.


@_opcode("c")
def _global(m: Machine, pos: int) -> int:
    middle = m.data.find(b"\n", pos, pos + MAX_NAME)
    end = m.data.find(b"\n", middle + 1, middle + 1 + MAX_NAME)
    if middle < 0 or end < 0:
        if pos + 2 * MAX_NAME > len(m.data):
            raise EndOfPickle
        raise Malformed("a global's name is longer than any name")
    try:
        module, name = m.data[pos:middle].decode(), m.data[middle + 1 : end].decode()
    except UnicodeDecodeError:
        raise Malformed("a global's name is not UTF-8") from None
    m.stack.append(m.name(module, name))
    return end + 1


@_opcode("\x93")
def _stack_global(m: Machine, pos: int) -> int:
    name, module = m.stack.pop(), m.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise Malformed("a global's name is not text")
    m.stack.append(m.name(module, name))
    return pos


# NEWOBJ asks for cls.__new__(cls, *args); as nothing is called, it is recorded like a call.
@_opcode("\x81")
@_opcode("R")
def _reduce(m: Machine, pos: int) -> int:
    args = m.stack.pop()
    m.stack[-1] = m.call(m.stack[-1], args, pos)
    return pos


@_opcode("b")
def _build(m: Machine, pos: int) -> int:
    state = m.stack.pop()
    m.build(m.stack[-1], state)
    if pos == m.learning and m.repeats is not None:
        m.repeats.spans.learn(m)
    return pos


@_opcode("Q")
def _binpersid(m: Machine, pos: int) -> int:
    if m.persistent is None:
        raise m.refused("its pickle refers to data outside itself.")
    m.made_nbytes += CALL_NBYTES
    m.stack[-1] = m.persistent(m.stack[-1])
    return pos
