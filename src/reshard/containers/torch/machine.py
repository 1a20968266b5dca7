"""A pickle machine that builds data and calls nothing.

A pickle is a program for a stack machine. Two of its actions are dangerous: to resolve a name, and
to call the result. This machine does neither. A name becomes a `Global`, which is only text; a call
runs one of a few pure handlers chosen by that name, or leaves an `Opaque` record. No attribute of
anything in the file is looked up, nothing is imported, nothing of it is run.

    opcodes.py    the table: one small function an opcode
    machine.py    the loop, the stack, what opcodes share, the budgets (limits.py)
    repeats.py    runs of records that are spelt alike (spelling.py), many opcodes at a time
    bulk.py       many records of a run at a time, as columns (rows.py)
    spans.py      bytes that repeat, read once
    memo.py       what a pickle may recall
    handlers.py   the calls that are carried out

Memory is bounded by the pickle's size: 13 bytes a byte of DCP metadata that is read whole, 2 where
a compactor takes its tables (measured), at worst 128 MB and 50 bytes a byte. Time is linear in it:
3 million opcodes a second.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Mapping
from typing import TypeAlias

from reshard.containers.torch.limits import (
    CALL_NBYTES,
    MAX_KEY_ITEMS,
    MAX_MADE_NBYTES,
    MAX_MADE_PER_BYTE,
    MAX_NAME,
    MAX_OPCODES,
    MAX_PROBES,
    MAX_SMALL_KEY,
    MAX_STACK,
    MAX_STRING_NBYTES,
    TENSOR_NBYTES,
    TUPLE_NBYTES,
)
from reshard.containers.torch.malformed import EndOfPickle, Malformed, show
from reshard.containers.torch.memo import LEFT_OUT, Compactor, Memo, RecalledError, is_size
from reshard.containers.torch.opcodes import TABLE, UNREAD
from reshard.containers.torch.records import Global, Instance, Opaque, Shared, TensorRef
from reshard.containers.torch.repeats import Repeats
from reshard.containers.torch.rows import Rows
from reshard.containers.torch.storages import is_storage_class
from reshard.core import dtypes
from reshard.core.collecting import paused_gc
from reshard.core.dtypes import DType
from reshard.errors import FormatError, IncompleteError, ReshardError, UnsupportedError

Handler: TypeAlias = Callable[[tuple[object, ...]], object]
PersistentId: TypeAlias = Callable[[object], object]

# Opcodes between two looks at the budgets: about 20 ms.
_SLICE = 1 << 16
_STOP = ord(".")


class BreaksOffError(IncompleteError):
    """The bytes end before the pickle does."""


class Machine:
    """Runs one pickle. `handlers` maps dotted names to pure functions of the call's arguments.

    `persistent` turns a persistent id (a storage) into a value; None refuses them. `compactor`
    takes tables apart as they are set; then records that are spelt alike become `Instance`s, and
    `run` may raise `RecalledError`. `devices`, where given, gets the texts that may be a device's
    name, by their places. `data` may be the beginning of `nbytes`. After `run`, `unknown` holds the
    names that neither a handler nor reshard's types know, and `recalled` the containers and records
    that were recalled, by id.
    """

    __slots__ = (
        "begun",
        "compactor",
        "data",
        "devices",
        "frame",
        "handlers",
        "learning",
        "made_nbytes",
        "marks",
        "memo",
        "names",
        "nbytes",
        "other_keys",
        "path",
        "persistent",
        "probes",
        "recalled",
        "repeats",
        "since",
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
        compactor: Compactor | None = None,
        devices: dict[int, bytes] | None = None,
        nbytes: int | None = None,
    ) -> None:
        self.data: bytes = data
        self.nbytes: int = len(data) if nbytes is None else nbytes
        self.path: str = path
        self.handlers: Mapping[str, Handler] = handlers
        self.persistent: PersistentId | None = persistent
        self.repeats: Repeats | None = Repeats(len(data)) if compactor is not None else None
        self.compactor: Compactor | None = compactor
        self.devices: dict[int, bytes] | None = devices
        # Where the last frame ends, and the record whose bytes are to be remembered.
        self.frame: int = 0
        self.learning: int = -1
        self.stack: list[object] = []
        self.marks: list[list[object]] = []
        # The number of the next value in the memo, at each mark and at the last one popped.
        self.begun: list[int] = []
        self.since: int = 0
        self.memo: Memo = Memo()
        self.names: dict[tuple[str, str], object] = {}
        # By id of the dict: how many of its keys are neither text nor small.
        self.other_keys: dict[int, int] = {}
        self.probes: int = 0
        self.made_nbytes: int = 0
        self.unknown: set[str] = set()
        self.recalled: dict[int, object] = {}

    def run(self, start: int = 0) -> tuple[object, int]:
        """The value pickled at byte `start`, and the position after its end.

        Raises `FormatError` where the bytes are not a pickle, `UnsupportedError` for opcodes and
        sizes that no ordinary checkpoint has.
        """
        data, table, pos = self.data, TABLE, start
        try:
            with paused_gc():
                for _ in range(0, MAX_OPCODES, _SLICE):
                    for _ in range(_SLICE):
                        code = data[pos]
                        if code == _STOP:
                            return self._result(), pos + 1
                        pos = table[code](self, pos + 1)
                    self.check_budgets(pos)
        except (EndOfPickle, struct.error):
            raise self._breaks_off(pos) from None
        except IndexError:
            # The end of the data, or else of the stack.
            if pos + 1 >= len(data):
                raise self._breaks_off(pos) from None
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

    def has_lost_rows(self) -> bool:
        """Whether some `Rows` lie where their reader does not look."""
        if self.repeats is None:
            return False
        ledger = self.repeats.ledger
        waiting = sum(type(value) is Rows for some in (self.stack, *self.marks) for value in some)
        return ledger.open - ledger.listed > waiting or any(
            type(value) is list and any(type(one) is Rows for one in value)
            for value in self.recalled.values()
        )

    def holds_rows(self) -> bool:
        """Whether some `Rows` were not taken."""
        return self.repeats is not None and self.repeats.ledger.open > 0

    def _breaks_off(self, pos: int) -> BreaksOffError:
        return BreaksOffError(
            f"its pickle ends early, at byte {pos} of {len(self.data)}.",
            path=self.path,
            hint="The file was truncated; copy it again or use another checkpoint.",
        )

    def _result(self) -> object:
        if len(self.stack) != 1 or self.marks:
            raise Malformed(f"it ends with {len(self.stack)} values and {len(self.marks)} marks")
        return self.stack[0]

    def check_budgets(self, pos: int) -> None:
        """Refuse a pickle that made too much by byte `pos`."""
        beyond = 0 if self.repeats is None else self.repeats.beyond(self.stack)
        if len(self.stack) + beyond > MAX_STACK:
            raise self.refused(f"its pickle stacks more than {MAX_STACK} values.")
        limit = MAX_MADE_NBYTES + MAX_MADE_PER_BYTE * pos
        if self.made_nbytes > limit:
            raise self.refused(
                f"the first {pos} bytes of its pickle make objects of more than {limit}."
            )

    # What the opcodes share.

    def pop_mark(self) -> list[object]:
        """The values above the last mark; the stack is again what it was below."""
        values = self.stack
        self.stack = self.marks.pop()
        self.since = self.begun.pop()
        return values

    def take(self, start: int, nbytes: int) -> bytes:
        """Bytes `[start, start + nbytes)`."""
        end = start + nbytes
        if end > len(self.data):
            raise EndOfPickle
        return self.data[start:end]

    def name(self, module: str, name: str) -> object:
        """What stands for the global `module.name`: a `DType`, or a `Global`."""
        known = self.names.get((module, name))
        if known is None:
            known = self._name(_PYTHON2.get(module, module), name)
            self.names[module, name] = known
        return known

    def _name(self, module: str, name: str) -> object:
        dotted = f"{module}.{name}"
        if len(dotted) > MAX_NAME or not dotted.isprintable():
            raise Malformed("a global's name is longer than any name, or not text")
        # Two short references to strings before make a name of any module and any class.
        self.made_nbytes += CALL_NBYTES + len(dotted)
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if dotted not in self.handlers and not is_storage_class(dotted):
            self.unknown.add(dotted)
        return Global(dotted)

    def call(self, function: object, args: object, pos: int) -> object:
        """What a call at byte `pos` gives: a handler's result, or a record of the call."""
        if not isinstance(args, tuple):
            raise Malformed("the arguments of a call are not a tuple")
        self.made_nbytes += CALL_NBYTES
        if isinstance(function, Global):
            handler = self.handlers.get(function.name)
            value = NotImplemented if handler is None else handler(args)
            if value is NotImplemented:
                return Opaque(function.name, args)
            if isinstance(value, TensorRef):
                self.made_nbytes += TENSOR_NBYTES
            elif isinstance(value, bytes):
                self.made_nbytes += len(value)
                self.check_budgets(pos)
            elif isinstance(value, str | tuple):
                self.made_nbytes += sys.getsizeof(value)
            elif isinstance(value, Global):
                self.made_nbytes += sys.getsizeof(value.name)
            return value
        if isinstance(function, Opaque):
            return Opaque(function.name, (function, args))
        raise _misused(function, "it calls")

    def set_items(self, obj: object, flat: list[object]) -> None:
        """`obj[flat[0]] = flat[1]`, and so on."""
        if len(flat) % 2:
            raise Malformed("a key lacks its value")
        pairs = zip(flat[::2], flat[1::2], strict=True)
        if type(obj) is dict:
            for key, value in pairs:
                if type(key) is not str:
                    self._check_key(obj, key)
                if key in obj:
                    # A pickler writes a dictionary's keys once; the later one would hide this one.
                    raise Malformed(f"it sets the key {show(key)} twice")
                obj[key] = value
        elif type(obj) is Opaque:
            self.made_nbytes += len(flat) // 2 * TUPLE_NBYTES
            self.append(obj, list(pairs))
        else:
            raise _misused(obj, "it sets items of")

    def compacted(self, obj: object, flat: list[object]) -> list[object]:
        """What is to be set of these keys and values, after the compactor took what it takes."""
        if self.compactor is None or type(obj) is not dict or len(flat) % 2 or not flat:
            return flat
        if not self.compactor.takes(flat[-2], flat[-1]):
            return flat
        if any(type(value) is Rows and not value.alternate for value in flat):
            raise RecalledError
        left = self.compactor.items(obj, flat)
        self.memo.forget(self.compactor, self.since)
        if self.repeats is not None:
            self.repeats.spans.retry()
        self.recalled = {
            key: value
            for key, value in self.recalled.items()
            if type(value) is not tuple or not is_size(value)
        }
        return left

    def _check_key(self, obj: dict[object, object], key: object) -> None:
        if isinstance(key, Opaque) and key.name in UNREAD:
            # Whoever looks for tensors by their names would pass over its value.
            raise self.refused(
                f"a dictionary of its pickle has a key of more than {MAX_STRING_NBYTES} bytes."
            )
        if type(key) in _HARMLESS_KEYS:
            return
        if type(key) is Rows:
            raise RecalledError
        if type(key) is int and -MAX_SMALL_KEY < key < MAX_SMALL_KEY:
            return
        if not _is_short_key(key):
            raise self.refused(
                f"a dictionary of its pickle has a key that is a {type(key).__name__}."
            )
        count = self.other_keys.get(id(obj), 0) + 1
        self.other_keys[id(obj)] = count
        self.probes += count
        if self.probes > MAX_PROBES:
            raise self.refused(
                f"a dictionary of its pickle has {count} keys that are large numbers or tuples."
            )

    def append(self, obj: object, values: list[object]) -> None:
        if type(obj) is list:
            if self.repeats is not None and self.repeats.ledger.open:
                for value in values:
                    if type(value) is Rows:
                        value.listed()
            obj.extend(values)
        elif type(obj) is Opaque:
            if obj.items is None:
                obj.items = []
            obj.items.extend(values)
        else:
            raise _misused(obj, "it appends to")

    def build(self, obj: object, state: object) -> None:
        """Store what would have become attributes.

        An OrderedDict's (`_metadata` of a state dict) and a tensor's are of no use and dropped.
        """
        if type(obj) is Opaque:
            obj.state = state
        elif type(obj) is not dict and not isinstance(obj, TensorRef):
            raise _misused(obj, "it sets attributes of")


def _misused(value: object, what: str) -> Exception:
    """The error that an opcode does something to a value that is not for it."""
    if isinstance(value, Instance | Shared | Rows) or value is LEFT_OUT:
        return RecalledError()
    return Malformed(f"{what} a {type(value).__name__}")


_PYTHON2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_DTYPES = {dtype.name: dtype for dtype in dtypes.ALL}
_HARMLESS_KEYS = frozenset({bytes, bool, type(None), DType, Global, Opaque, Shared, Instance})
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
