"""A pickle machine that builds data and calls nothing.

A pickle is a program for a stack machine. Two of its acts are dangerous: resolving a name, and
calling what it got. This machine does neither. A name becomes a `Global`, two strings' worth of
data; a call runs one of a few pure handlers chosen by that name, or leaves an `Opaque` record.
No attribute of anything in the file is looked up, nothing is imported, nothing of it is run.

    opcode table: one small function an opcode, (machine, position) -> position after its argument
    stack, marks: as in the reference implementation (Lib/pickle.py of CPython 3.13): MARK sets
                  the stack aside, so no opcode reaches below its mark
    budgets:      checked every `_SLICE` opcodes

Memory is bounded by the pickle's size: about 30 bytes a byte of it, and 200 MB more. Time is
linear in it: 2 to 4 million opcodes a second.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import TypeAlias

from reshard import dtypes
from reshard.dtypes import DType
from reshard.errors import FormatError, IncompleteError, ReshardError, UnsupportedError
from reshard.torchfile.records import Global, Malformed, Opaque, TensorRef

Handler: TypeAlias = Callable[[tuple[object, ...]], object]
PersistentId: TypeAlias = Callable[[object], object]
_Op: TypeAlias = "Callable[[Machine, int], int]"

# Bytes. The .metadata of a DCP checkpoint takes about 130 bytes a chunk: this is 2 million chunks.
MAX_NBYTES = 256 << 20
# Opcodes. An honest pickle takes 3 to 5 bytes an opcode; this many take about half a minute.
MAX_OPCODES = 96_000_000
# Entries of one stack. Only a tuple needs all its items there; lists come 1000 at a time.
MAX_STACK = 1_000_000
# Objects and memo entries: this many, and one more for every 4 bytes of the pickle. An empty set
# is one byte in the pickle and 216 in memory; an ordinary pickle takes 10 bytes an object.
MAX_OBJECTS = 1_000_000
NBYTES_PER_OBJECT = 4
# Containers within containers. Training files nest fewer than 20; consumers may recurse.
MAX_DEPTH = 128
# Bytes of an integer. The largest in training files are 128-bit states of random generators; the
# limit keeps the decimal form below the 4300 digits that Python prints.
MAX_INT_NBYTES = 256
# Characters of a dotted name.
MAX_NAME = 1024
# Python hashes strings with a secret seed, but numbers and tuples without: a file can choose
# thousands of them that collide, and make a dict take quadratic time. Small integers are too few
# to collide much; of other such keys, one dict may have this many (8 million probes, 30 ms).
MAX_SMALL_KEY = 1 << 24
MAX_OTHER_KEYS = 4096
MAX_KEY_ITEMS = 16

_SLICE = 1 << 16
_STOP = ord(".")
_U16 = struct.Struct("<H").unpack_from
_U32 = struct.Struct("<I").unpack_from
_I32 = struct.Struct("<i").unpack_from
_U64 = struct.Struct("<Q").unpack_from
_F64 = struct.Struct(">d").unpack_from


class Machine:
    """Runs one pickle. `handlers` maps dotted names to pure functions of the call's arguments.

    `persistent` turns a persistent id (a storage) into a value; None refuses them. After `run`,
    `unknown` holds the names that no handler knows.
    """

    __slots__ = (
        "data",
        "globals",
        "handlers",
        "made",
        "marks",
        "memo",
        "other_keys",
        "path",
        "persistent",
        "stack",
        "unknown",
    )

    def __init__(
        self,
        data: bytes,
        *,
        path: str,
        handlers: Mapping[str, Handler],
        persistent: PersistentId | None = None,
    ) -> None:
        self.data = data
        self.path = path
        self.handlers = handlers
        self.persistent = persistent
        self.stack: list[object] = []
        self.marks: list[list[object]] = []
        self.memo: dict[int, object] = {}
        self.globals: dict[tuple[str, str], object] = {}
        self.other_keys: dict[int, int] = {}
        self.made = 0
        self.unknown: set[str] = set()

    def run(self, start: int = 0) -> tuple[object, int]:
        """The value pickled at byte `start`, and the position after its end.

        Raises `FormatError` where the bytes are not a pickle, `UnsupportedError` for opcodes and
        sizes that no ordinary checkpoint has.
        """
        data, table, pos = self.data, _TABLE, start
        try:
            for _ in range(0, MAX_OPCODES, _SLICE):
                for _ in range(_SLICE):
                    code = data[pos]
                    if code == _STOP:
                        return self._result(), pos + 1
                    pos = table[code](self, pos + 1)
                self._check_budgets()
        except (struct.error, IndexError) as problem:
            # An IndexError is the end of the data, or else of the stack.
            if isinstance(problem, struct.error) or pos + 1 >= len(data):
                raise IncompleteError(
                    f"its pickle breaks off at byte {pos} of {len(data)}.",
                    path=self.path,
                    hint="The file was cut off; copy it again or use another checkpoint.",
                ) from None
            raise self.broken(f"an opcode at byte {pos} of its pickle lacks operands.") from None
        except Malformed as problem:
            raise self.broken(f"at byte {pos} of its pickle: {problem}.") from None
        raise self.refused(f"its pickle has more than {MAX_OPCODES} opcodes.")

    def broken(self, message: str) -> ReshardError:
        return FormatError(
            message, path=self.path, hint="The file is damaged or is not what it seems."
        )

    def refused(self, message: str) -> ReshardError:
        return UnsupportedError(
            message, path=self.path, hint="No training framework writes such a file."
        )

    def _result(self) -> object:
        value = self.stack.pop()
        if self.stack or self.marks:
            raise Malformed("values are left over at its end")
        return value

    def _check_budgets(self) -> None:
        if len(self.stack) > MAX_STACK:
            raise self.refused(f"its pickle stacks more than {MAX_STACK} values.")
        limit = MAX_OBJECTS + len(self.data) // NBYTES_PER_OBJECT
        if self.made + len(self.memo) > limit:
            raise self.refused(
                f"its pickle of {len(self.data)} bytes makes more than {limit} objects."
            )

    # What the opcodes share.

    def pop_mark(self) -> list[object]:
        """The values above the last mark; the stack is again what it was below."""
        values = self.stack
        self.stack = self.marks.pop()
        return values

    def take(self, start: int, nbytes: int) -> bytes:
        """Bytes `[start, start + nbytes)`."""
        end = start + nbytes
        if end > len(self.data):
            raise struct.error
        return self.data[start:end]

    def name(self, module: str, name: str) -> object:
        """What stands for the global `module.name`: a `DType`, or a `Global`."""
        known = self.globals.get((module, name))
        if known is None:
            known = self._name(_PYTHON2.get(module, module), name)
            self.globals[module, name] = known
        return known

    def _name(self, module: str, name: str) -> object:
        dotted = f"{module}.{name}"
        if len(dotted) > MAX_NAME or not dotted.isprintable():
            raise Malformed("a global's name is longer than any name, or not text")
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if dotted not in self.handlers and not dotted.endswith("Storage"):
            self.unknown.add(dotted)
        return Global(dotted)

    def call(self, function: object, args: object) -> object:
        """What a call gives: a handler's result, or a record of the call."""
        if not isinstance(args, tuple):
            raise Malformed("the arguments of a call are not a tuple")
        self.made += 1
        if isinstance(function, Global):
            handler = self.handlers.get(function.name)
            return Opaque(function.name, args) if handler is None else handler(args)
        if isinstance(function, Opaque):
            return Opaque(f"{function.name}()", (function, *args))
        raise Malformed(f"it calls a {type(function).__name__}")

    def set_items(self, target: object, flat: list[object]) -> None:
        """`target[flat[0]] = flat[1]`, and so on."""
        if len(flat) % 2:
            raise IndexError
        pairs = zip(flat[::2], flat[1::2], strict=True)
        if type(target) is dict:
            for key, value in pairs:
                if type(key) is not str:
                    self._check_key(target, key)
                target[key] = value
        elif isinstance(target, Opaque):
            self.made += len(flat) // 2
            self.append(target, list(pairs))
        else:
            raise Malformed(f"it sets items of a {type(target).__name__}")

    def _check_key(self, target: dict[object, object], key: object) -> None:
        kind = type(key)
        if kind in _HARMLESS_KEYS or (kind is int and -MAX_SMALL_KEY < key < MAX_SMALL_KEY):  # type: ignore[operator]
            return
        if not _is_short_key(key):
            raise self.refused(f"a dictionary of its pickle has a key of type {kind.__name__}.")
        count = self.other_keys.get(id(target), 0) + 1
        self.other_keys[id(target)] = count
        if count > MAX_OTHER_KEYS:
            raise self.refused(
                f"a dictionary of its pickle has more than {MAX_OTHER_KEYS} keys that are large "
                "numbers or tuples."
            )

    def append(self, target: object, values: list[object]) -> None:
        if type(target) is list:
            target.extend(values)
        elif isinstance(target, Opaque):
            target.items = (target.items or []) + values
        else:
            raise Malformed(f"it appends to a {type(target).__name__}")

    def build(self, target: object, state: object) -> None:
        """Store what would have become attributes.

        An OrderedDict's (`_metadata` of a state dict) and a tensor's are of no use and dropped.
        """
        if isinstance(target, Opaque):
            target.state = state
        elif type(target) is not dict and not isinstance(target, TensorRef):
            raise Malformed(f"it sets attributes of a {type(target).__name__}")


_PYTHON2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_DTYPES = {dtype.name: dtype for dtype in dtypes.ALL}
_HARMLESS_KEYS = frozenset({bytes, bool, type(None), DType, Global, Opaque})
_KEYS = _HARMLESS_KEYS | {str, int, float}


def _is_short_key(key: object) -> bool:
    if type(key) is not tuple:
        return type(key) in _KEYS
    if len(key) > MAX_KEY_ITEMS:
        return False
    for item in key:
        if type(item) in _KEYS:
            continue
        if type(item) is not tuple or len(item) > MAX_KEY_ITEMS:
            return False
        if any(type(inner) not in _KEYS for inner in item):
            return False
    return True


# The opcodes, in the order of pickletools.


def _refuse(m: Machine, pos: int) -> int:
    code = m.data[pos - 1]
    name = _REFUSED.get(chr(code))
    if name is None:
        raise m.broken(f"byte {pos - 1} of its pickle, {code:#04x}, is no opcode.")
    raise m.refused(f"its pickle uses the opcode {name}, at byte {pos - 1}.")


_REFUSED = {
    "I": "INT", "L": "LONG", "S": "STRING", "V": "UNICODE", "F": "FLOAT", "l": "LIST",
    "d": "DICT", "0": "POP", "1": "POP_MARK", "2": "DUP", "g": "GET", "p": "PUT",
    "i": "INST", "o": "OBJ", "P": "PERSID", "\x82": "EXT1", "\x83": "EXT2", "\x84": "EXT4",
    "\x92": "NEWOBJ_EX", "\x97": "NEXT_BUFFER", "\x98": "READONLY_BUFFER",
}  # fmt: skip
_TABLE: list[_Op] = [_refuse] * 256


def _opcode(code: str) -> Callable[[_Op], _Op]:
    def register(function: _Op) -> _Op:
        _TABLE[ord(code)] = function
        return function

    return register


@_opcode("\x80")
def _proto(m: Machine, pos: int) -> int:
    if m.data[pos] > 5:
        raise m.refused(f"its pickle is of protocol {m.data[pos]}; known are 2 to 5.")
    return pos + 1


@_opcode("\x95")
def _frame(m: Machine, pos: int) -> int:
    (nbytes,) = _U64(m.data, pos)
    if pos + 8 + nbytes > len(m.data):
        raise struct.error
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


def _push_text(m: Machine, pos: int, nbytes: int) -> int:
    try:
        m.stack.append(m.take(pos, nbytes).decode("utf-8", "surrogatepass"))
    except UnicodeDecodeError:
        raise Malformed("a string is not UTF-8") from None
    return pos + nbytes


def _push_bytes(m: Machine, pos: int, nbytes: int) -> int:
    m.stack.append(m.take(pos, nbytes))
    return pos + nbytes


@_opcode("\x8c")
def _short_binunicode(m: Machine, pos: int) -> int:
    return _push_text(m, pos + 1, m.data[pos])


@_opcode("X")
def _binunicode(m: Machine, pos: int) -> int:
    return _push_text(m, pos + 4, _U32(m.data, pos)[0])


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
    if len(m.marks) >= 2 * MAX_DEPTH:
        raise m.refused(f"its pickle nests deeper than {MAX_DEPTH} levels.")
    m.marks.append(m.stack)
    m.stack = []
    return pos


@_opcode(")")
def _empty_tuple(m: Machine, pos: int) -> int:
    m.stack.append(())
    return pos


@_opcode("\x85")
def _tuple1(m: Machine, pos: int) -> int:
    m.made += 1
    m.stack[-1] = (m.stack[-1],)
    return pos


def _tuple_of(m: Machine, count: int) -> None:
    if len(m.stack) < count:
        raise IndexError
    m.made += 1
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
    m.made += 1
    values = m.pop_mark()
    m.stack.append(tuple(values))
    return pos


@_opcode("]")
def _empty_list(m: Machine, pos: int) -> int:
    m.made += 1
    m.stack.append([])
    return pos


@_opcode("}")
def _empty_dict(m: Machine, pos: int) -> int:
    m.made += 1
    m.stack.append({})
    return pos


# A set is read as the list of its items: nothing in a file is hashed without need.
@_opcode("\x8f")
def _empty_set(m: Machine, pos: int) -> int:
    return _empty_list(m, pos)


@_opcode("\x91")
def _frozenset(m: Machine, pos: int) -> int:
    m.made += 1
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
    m.set_items(m.stack[-1], pairs)
    return pos


# The memo.


def _get(m: Machine, index: int) -> None:
    try:
        m.stack.append(m.memo[index])
    except KeyError:
        raise Malformed(f"it recalls value {index}, which it has not stored") from None


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
    m.memo[m.data[pos]] = m.stack[-1]
    return pos + 1


@_opcode("r")
def _long_binput(m: Machine, pos: int) -> int:
    m.memo[_U32(m.data, pos)[0]] = m.stack[-1]
    return pos + 4


@_opcode("\x94")
def _memoize(m: Machine, pos: int) -> int:
    m.memo[len(m.memo)] = m.stack[-1]
    return pos


# Names and calls.


@_opcode("c")
def _global(m: Machine, pos: int) -> int:
    middle = m.data.find(b"\n", pos, pos + MAX_NAME)
    end = m.data.find(b"\n", middle + 1, middle + 1 + MAX_NAME)
    if middle < 0 or end < 0:
        if pos + 2 * MAX_NAME > len(m.data):
            raise struct.error
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
    m.stack[-1] = m.call(m.stack[-1], args)
    return pos


@_opcode("b")
def _build(m: Machine, pos: int) -> int:
    state = m.stack.pop()
    m.build(m.stack[-1], state)
    return pos


@_opcode("Q")
def _binpersid(m: Machine, pos: int) -> int:
    if m.persistent is None:
        raise m.refused("its pickle refers to data outside itself.")
    m.made += 1
    m.stack[-1] = m.persistent(m.stack[-1])
    return pos


def check_depth(value: object, *, path: str) -> None:
    """Raise `UnsupportedError` where containers nest deeper than `MAX_DEPTH`, or in a circle.

    Looks into dicts, lists and tuples, not into records.
    """
    # Depth first, without recursion: a container is open (0) until all in it have been seen,
    # then its height is known.
    heights: dict[int, int] = {}
    todo: list[object] = [value]
    while todo:
        container = todo[-1]
        inner = _containers_in(container)
        state = heights.get(id(container))
        if state is None:
            heights[id(container)] = 0
            if any(heights.get(id(item)) == 0 for item in inner):
                raise UnsupportedError("its pickle holds a container that holds itself.", path=path)
            todo.extend(item for item in inner if id(item) not in heights)
            continue
        todo.pop()
        if state == 0:
            height = 1 + max((heights[id(item)] for item in inner), default=0)
            if height > MAX_DEPTH:
                raise UnsupportedError(
                    f"its pickle nests deeper than {MAX_DEPTH} levels.", path=path
                )
            heights[id(container)] = height


def _containers_in(value: object) -> list[object]:
    if type(value) is dict:
        return [item for item in value.values() if type(item) in (dict, list, tuple)]
    if type(value) is list or type(value) is tuple:
        return [item for item in value if type(item) in (dict, list, tuple)]
    return []
