"""Many records of a run matched at once, a column at a time.

    j.... ) NEWOBJ .. h. | M.. | K. | TUPLE2 .. h. | h. | ub      record 0
    j.... ) NEWOBJ .. h. | K.  | K. | TUPLE2 .. h. | j....| ub    record 1
    literal                number     literal         text  literal

Records that are spelt alike differ in their numbers and texts, and the widths of these. Each record
begins where the opcode NEWOBJ stands behind its class. From all these places arrays go ahead part
by part: a literal is compared, a number is read and its width added. A record counts if every
part matches and the record before ends where it begins; so what is read is what the opcodes say.
500 records take 0.3 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from msgspec import Struct

if TYPE_CHECKING:
    import numpy as np

    from reshard.containers.torch.memo import Memo

    Array: TypeAlias = np.ndarray[Any, Any]

#: What a part of a record between two literals is.
NUMBER, NATURAL, TEXT = range(3)
# Bytes that they take at most.
_MAX_NBYTES = {NUMBER: 8, NATURAL: 8, TEXT: 258}
#: Bytes that are best matched at once: a frame has 64 KiB.
WINDOW = 1 << 16
_MIN_WINDOW = 1 << 10
# Records that are worth it.
_MIN_COUNT = 4
_NEWOBJ, _LONG1, _GET, _LONG_GET, _SHORT_TEXT, _MEMOIZE = 0x81, 0x8A, 0x68, 0x6A, 0x8C, 0x94
# Bytes of the number behind BININT1, BININT2 and BININT.
_NBYTES = {0x4B: 1, 0x4D: 2, 0x4A: 4}


class Plan(Struct, frozen=True, eq=False):
    """How records follow each other: literals, and what stands between them.

    `memo` has for each part how many values come into the memo up to it, texts not counted, and
    at last those of the whole.
    """

    literals: tuple[bytes, ...]
    kinds: tuple[int, ...]
    memo: tuple[int, ...]
    newobj: int

    @property
    def longest(self) -> int:
        """Bytes of a match, at most."""
        return sum(map(len, self.literals)) + sum(_MAX_NBYTES[kind] for kind in self.kinds)


class Matched(Struct, frozen=True, eq=False):
    """`count` matches that end at byte `end`: a column for each part. They put `memoized` values
    into the memo; the numbered ones of these are texts."""

    count: int
    end: int
    columns: list[Array | list[str]]
    memoized: int
    numbers: list[int]
    texts: list[str]


def match(data: bytes, pos: int, stop: int, plan: Plan, memo: Memo) -> Matched | None:
    """The matches from byte `pos` on that begin before `stop`; None where they are few."""
    if stop - pos < max(_MIN_WINDOW, 16):
        return None
    window = _Window(data, pos, min(len(data), stop + plan.longest + 16))
    starts = window.starts(plan, stop - pos)
    if len(starts) < _MIN_COUNT or starts[0]:
        return None
    at, good, columns = starts + len(plan.literals[0]), starts >= 0, list[Any]()
    for kind, literal in zip(plan.kinds, plan.literals[1:], strict=True):
        values, widths = window.texts(at) if kind == TEXT else window.numbers(at)
        good &= widths > 0
        if kind == NATURAL:
            good &= values >= 0
        columns.append(at if kind == TEXT else values)
        at = at + widths
        good &= window.equal(at, literal)
        at += len(literal)
    good[1:] &= starts[1:] == at[:-1]
    count = len(good) if good.all() else int(good.argmin())
    texts = _Texts(window, plan, memo, [column[:count] for column in columns])
    count = texts.read()
    if count < _MIN_COUNT:
        return None
    held = [one[:count] for one in texts.columns]
    memoized = texts.begins(count) - len(memo)
    return Matched(count, pos + int(at[count - 1]), held, memoized, *texts.before(count))


class _Window:
    """Bytes `[start, stop)`, which must be longer than 8, as arrays: each one, and eight from each
    on as a number."""

    def __init__(self, data: bytes, start: int, stop: int) -> None:
        import numpy as np

        self.np = np
        self.data = data
        self.start = start
        self.bytes = np.frombuffer(data, np.uint8, stop - start, start)
        self.words: Array = np.ndarray((stop - start - 7,), "<u8", data, start, (1,))
        self._nbytes = np.zeros(256, np.int64)
        for code, nbytes in _NBYTES.items():
            self._nbytes[code] = nbytes

    def starts(self, plan: Plan, stop: int) -> Array:
        """Where the first literal stands, of those places where a whole match has room."""
        found = self.np.flatnonzero(self.bytes[:stop] == _NEWOBJ) - plan.newobj
        found = found[(found >= 0) & (found < len(self.words) - plan.longest - 8)]
        right: Array = found[self.equal(found, plan.literals[0])]
        return right

    def equal(self, at: Array, literal: bytes) -> Array:
        """Whether the literal stands at each place."""
        nbytes = len(literal)
        if nbytes < 8:
            mask = (1 << 8 * nbytes) - 1
            word = int.from_bytes(literal, "little")
            few: Array = (self.words[at] & self.np.uint64(mask)) == self.np.uint64(word)
            return few
        found: Array | None = None
        for skip in (*range(0, nbytes - 8, 8), nbytes - 8):
            word = int.from_bytes(literal[skip : skip + 8], "little")
            same = self.words[at + skip] == self.np.uint64(word)
            found = same if found is None else found & same
        return self.np.ones(len(at), bool) if found is None else found

    def numbers(self, at: Array) -> tuple[Array, Array]:
        """The number that the opcode at each place pushes, and the bytes of both; 0 where it is
        another opcode."""
        np = self.np
        codes = self.bytes[at]
        nbytes, heads = self._nbytes[codes], 1
        long = codes == _LONG1
        if long.any():
            length = self.bytes[at + 1].astype(np.int64)
            nbytes = np.where(long & ((length == 5) | (length == 6)), length, nbytes)
            heads = np.where(long, 2, 1)
        words = self.words[at + heads]
        shift = (64 - 8 * nbytes) & 63
        signed = (words.view(np.int64) << shift) >> shift
        natural = (words << shift.view(np.uint64)) >> shift.view(np.uint64)
        values = np.where(nbytes <= 2, natural.view(np.int64), signed)
        return values, np.where(nbytes > 0, nbytes + heads, 0)

    def texts(self, at: Array) -> tuple[Array, Array]:
        """The bytes of the opcode at each place that recalls a text, or spells and stores it."""
        np = self.np
        codes = self.bytes[at]
        length = self.bytes[at + 1].astype(np.int64)
        spelt = (codes == _SHORT_TEXT) & (self.bytes[at + 2 + length] == _MEMOIZE)
        recalled = np.where(codes == _GET, 2, np.where(codes == _LONG_GET, 5, 0))
        return at, np.where(spelt, length + 3, recalled)


class _Texts:
    """The texts of matches, in `columns` in place of where they stand."""

    def __init__(self, window: _Window, plan: Plan, memo: Memo, columns: list[Array]) -> None:
        np = window.np
        self.columns: list[Any] = columns
        self._window, self._memo = window, memo
        self._groups = [n for n, kind in enumerate(plan.kinds) if kind == TEXT]
        count = len(columns[0]) if columns else 0
        spelt = {n: window.bytes[columns[n]] == _SHORT_TEXT for n in self._groups}
        per_match = np.full(count, plan.memo[-1], np.int64)
        for one in spelt.values():
            per_match += one
        #: The number of the first value that each match stores, and of the one after the last.
        self._begins = len(memo) + np.concatenate([[0], np.cumsum(per_match)])
        #: Of each group of texts: which are spelt, and what number each has then.
        self._spelt: dict[int, tuple[Array, Array]] = {}
        before = np.zeros(count, np.int64)
        for group, one in spelt.items():
            self._spelt[group] = (one, self._begins[:-1] + plan.memo[group] + before)
            before = before + one
        self._stored: dict[int, str] = {}

    def begins(self, number: int) -> int:
        """The number of the first value that a match stores."""
        return int(self._begins[number])

    def before(self, count: int) -> tuple[list[int], list[str]]:
        """The texts that the first matches store, by number."""
        end = self.begins(count)
        numbers = sorted(number for number in self._stored if number < end)
        return numbers, [self._stored[number] for number in numbers]

    def read(self) -> int:
        """Read the texts. Returns how many matches are right."""
        count = len(self._begins) - 1
        for group in self._groups:
            count = min(count, self._spell(group, count))
        for group in self._groups:
            self.columns[group], right = self._recall(group, count)
            count = min(count, right)
        return count

    def _spell(self, group: int, count: int) -> int:
        spelt, numbers = self._spelt[group]
        data, start = self._window.data, self._window.start
        rows = spelt[:count].nonzero()[0]
        for row, number, at in zip(
            rows.tolist(),
            numbers[rows].tolist(),
            (self.columns[group][rows] + start).tolist(),
            strict=True,
        ):
            try:
                self._stored[number] = data[at + 2 : at + 2 + data[at + 1]].decode()
            except UnicodeDecodeError:
                return int(row)
        return count

    def _recall(self, group: int, count: int) -> tuple[list[str], int]:
        """The texts of a group, each spelt there or recalled, up to the first that is not right."""
        window = self._window
        spelt, own = self._spelt[group]
        at = self.columns[group][:count]
        codes = window.bytes[at]
        index = window.words[at + 1].view(window.np.int64)
        index = window.np.where(codes == _GET, index & 0xFF, index & 0xFFFFFFFF)
        index = window.np.where(spelt[:count], own[:count], index)
        # A text that this match, or one after it, stores cannot be recalled by it.
        late = (index >= self._begins[:count]) & ~spelt[:count]
        if late.any():
            count = int(late.argmax())
        known: dict[int, object] = dict(self._stored)
        found: list[str] = []
        for number in index[:count].tolist():
            text = known.get(number)
            if text is None:
                text = known[number] = self._recalled(number)
            if type(text) is not str:
                break
            found.append(text)
        return found, len(found)

    def _recalled(self, number: int) -> object:
        """The memo's value; None for one that this run stored, of which only texts may be
        recalled."""
        return self._memo[number] if number < len(self._memo) else None


def plan(literals: Sequence[bytes], kinds: Sequence[int], memo: Sequence[int]) -> Plan:
    """The plan of records of these parts; the first literal has the class and the opening."""
    return Plan(tuple(literals), tuple(kinds), tuple(memo), literals[0].index(b")\x81") + 1)
