"""Values that a pickle spells with the same bytes over and over, made once.

Layers repeat: of 70,000 tensors that DCP's `.metadata` describes, with their chunks, a hundred
differ, and what differs between the others is the key alone:

    j.... ) | NEWOBJ } MEMOIZE ( properties .. size .. chunks [ .. ] ub
    class     the same bytes: the same record, if what they recall is the same

Bytes are remembered only where their opcodes need nothing of the stack but the class, and recall
nothing but texts, names, sizes and `Shared` records that were there before: these never change.
Then whoever reads the same bytes gets the same record. Nothing can be set in it: it is a `Shared`
one, and the memo keeps nothing of what it holds (`RecalledError`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from reshard.containers.torch.memo import LEFT_OUT, is_size
from reshard.containers.torch.records import Global, Opaque, Shared
from reshard.containers.torch.spelling import get_at, recalled
from reshard.core.dtypes import DType

if TYPE_CHECKING:
    from reshard.containers.torch.machine import Machine

# Bytes by which spans are looked up, of a span at least and at most (400 chunks), and of all.
_PREFIX, _MAX_NBYTES, _MAX_ALL_NBYTES = 64, 1 << 15, 1 << 20
# Bytes that are looked through for a span, in all: 0.5 s.
_MAX_WALKED = 4 << 20
# Spans that begin alike, and attempts without success until more of the memo is `Shared`.
_MAX_ALIKE, _MAX_FAILED = 8, 4
_FIXED = frozenset({str, Global, DType, Shared})
# Opcodes that push one value, with their bytes.
_PUSHING = {
    ord("N"): 1, 0x88: 1, 0x89: 1, ord(")"): 1, ord("}"): 1, ord("]"): 1,
    ord("K"): 2, ord("M"): 3, ord("J"): 5,
}  # fmt: skip
# Opcodes that take values and leave one: how many they take.
_TAKING = {
    0x94: 1, 0x85: 1, 0x86: 2, 0x87: 3, 0x81: 2, ord("R"): 2, ord("a"): 2, ord("s"): 3, ord("b"): 2,
}  # fmt: skip
_SHORT_TEXT, _LONG1 = 0x8C, 0x8A
_MARK, _TUPLE, _BUILD = ord("("), ord("t"), ord("b")
_SETTING = frozenset(b"ue")


class _Span(Struct, frozen=True, eq=False):
    """Bytes, and what they do: the value, and `memoized` values in the memo, of which some are
    kept, with their numbers from the first on."""

    data: bytes
    value: Shared
    memoized: int
    numbers: tuple[int, ...]
    kept: tuple[object, ...]
    made_nbytes: int


class _Begun(Struct, frozen=True):
    """A span that is being read by its opcodes: its class and bytes, and the state before."""

    cls: Global
    data: bytes
    stack: list[object]
    depth: int
    memo: int
    made_nbytes: int


class Spans:
    """The spans of one pickle."""

    def __init__(self) -> None:
        self._known: dict[tuple[Global, bytes], list[_Span]] = {}
        self._begun: _Begun | None = None
        self._nbytes = self._walked = self._failed = 0

    def forget(self) -> None:
        """The memo was overwritten: what is recalled may be something else now."""
        self._known.clear()
        self._begun = None

    def retry(self) -> None:
        """More of the memo is `Shared` now."""
        self._failed = 0

    def read(self, m: Machine, cls: Global, pos: int) -> int:
        """Read the record at `pos`, after its class, if its bytes are known; returns the position
        after it. Else `pos`: its opcodes make it, and `learn` is to be called after them."""
        key = (cls, m.data[pos : pos + _PREFIX])
        known = self._known.get(key, ())
        for span in known:
            if m.data.startswith(span.data, pos):
                m.stack[-1] = span.value
                first = len(m.memo)
                m.memo.skip(span.memoized, [first + n for n in span.numbers], span.kept)
                m.made_nbytes += span.made_nbytes
                return pos + len(span.data)
        if self._failed >= _MAX_FAILED or len(known) >= _MAX_ALIKE:
            return pos
        if self._nbytes >= _MAX_ALL_NBYTES or self._walked >= _MAX_WALKED:
            return pos
        end, right = _end(m, pos)
        self._walked += end - pos
        if right and end - pos >= _PREFIX:
            data = m.data[pos:end]
            self._begun = _Begun(cls, data, m.stack, len(m.stack), len(m.memo), m.made_nbytes)
            m.learning = end
        else:
            self._failed += 1
        return pos

    def learn(self, m: Machine) -> None:
        """Remember the record that is on top of the stack now."""
        begun, self._begun, m.learning = self._begun, None, -1
        value = m.stack[-1]
        if begun is None or m.stack is not begun.stack or len(m.stack) != begun.depth:
            return
        if type(value) is not Opaque or value.items is not None:
            return
        kept = m.memo.settle(begun.memo)
        if kept is None:
            return
        shared = Shared(value.name, value.args, value.state, None, value.reason)
        m.stack[-1] = shared
        some = [n for n, one in enumerate(kept) if one is not LEFT_OUT and type(one) is not tuple]
        span = _Span(
            begun.data,
            shared,
            len(kept),
            tuple(some),
            tuple([kept[n] for n in some]),
            m.made_nbytes - begun.made_nbytes,
        )
        self._known.setdefault((begun.cls, begun.data[:_PREFIX]), []).append(span)
        self._nbytes += len(begun.data)


def _end(m: Machine, pos: int) -> tuple[int, bool]:
    """Where the record at `pos` ends, and whether it may be remembered; else how far it was looked
    through. Follows only the depth of the stack, on which lie its class and an empty tuple."""
    data = m.data
    # Whatever stands at the last place, its operands are there as well.
    limit = min(pos + _MAX_NBYTES, len(data) - 260)
    depth, marks = 2, list[int]()
    while pos < limit:
        code = data[pos]
        pushed = _PUSHING.get(code)
        taken = _TAKING.get(code, 0)
        if pushed is not None:
            depth, pos = depth + 1, pos + pushed
        elif raw := get_at(data, pos):
            if not _is_fixed(recalled(m, raw)):
                return pos, False
            depth, pos = depth + 1, pos + len(raw)
        elif taken:
            if depth < taken:
                return pos, False
            depth, pos = depth - taken + 1, pos + 1
            if code == _BUILD and depth == 1 and not marks:
                return pos, True
        elif code in (_SHORT_TEXT, _LONG1):
            depth, pos = depth + 1, pos + 2 + data[pos + 1]
        elif code == _MARK:
            marks.append(depth)
            depth, pos = 0, pos + 1
        elif code == _TUPLE and marks:
            depth, pos = marks.pop() + 1, pos + 1
        elif code in _SETTING and marks and marks[-1]:
            depth, pos = marks.pop(), pos + 1
        else:
            return pos, False
    return pos, False


def _is_fixed(value: object) -> bool:
    """Whether a value of the memo never changes."""
    return type(value) in _FIXED or (type(value) is tuple and is_size(value))
