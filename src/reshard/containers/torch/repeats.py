"""Records that repeat, read a whole run at a time: the metadata of large checkpoints is made of
them.

DCP's `.metadata` holds three records for each chunk, and of 570,000 chunks 42 million opcodes. All
records of one class are spelt alike, but for their numbers and for which string they recall:

    ) NEWOBJ MEMOIZE } MEMOIZE (                     a new object, and a dict
    h+  h! 2560 0 TUPLE2 MEMOIZE TUPLE1 MEMOIZE R MEMOIZE   a field: its name, a torch.Size
    h/  j10000                                       a field: its name, a string or a number
    u b                                              the dict becomes the object's state

`Repeats` makes a regular expression of the first such record that it meets, and matches the next
ones by it: 3 us a record, which opcode by opcode takes 7. Of a long run all that a frame holds are
matched at once, and are columns (`bulk`, `rows`): 1 us a record. What it builds is what the
opcodes would build, but for the class: `Instance`, which takes a third of the memory of an
`Opaque`. Of what the opcodes would put into the memo, intermediate values are left out; a pickle
that recalls such a one (`RecalledError`) is read again opcode by opcode (`memo.py`).
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from reshard.containers.torch import bulk
from reshard.containers.torch.limits import CALL_NBYTES, TUPLE_NBYTES
from reshard.containers.torch.memo import LEFT_OUT
from reshard.containers.torch.records import Global, Instance
from reshard.containers.torch.rows import Ledger, Rows
from reshard.containers.torch.spans import Spans
from reshard.containers.torch.spelling import (
    GET,
    IS_INT,
    IS_SIZE,
    IS_TEXT,
    Spelling,
    get_at,
    learn,
    plan_of,
    recalled,
)

if TYPE_CHECKING:
    from reshard.containers.torch.machine import Machine

# Of a class, spellings, and records that cannot be learnt from.
_MAX_SPELLINGS, _MAX_LESSONS = 8, 4
# Records of a run between two looks at the budgets.
_MAX_RUN = 4096
# Sizes that are kept to be used again; numbers and records, which take more each; texts.
_MAX_KNOWN, _MAX_SPELT, _MAX_TEXTS = 1 << 17, 1 << 14, 1 << 12
# Bytes of a pickle from which on runs are matched in bulk, for which numpy is imported: 0.1 s.
MIN_BULK_NBYTES = 1 << 21
# Records that are matched one by one before, and bytes that are too few to go on.
_MIN_RUN, _FEW_NBYTES = 16, 1 << 15
# Bytes without a run that are looked through, and ways in which records follow each other.
_MAX_WASTED, _MAX_PLANS = 4 << 20, 64


class Repeats:
    """The spellings of one pickle. Forgets all of them where the memo is overwritten."""

    def __init__(self, nbytes: int) -> None:
        self.spans = Spans()
        self.ledger = Ledger()
        self._in_bulk = nbytes >= MIN_BULK_NBYTES
        # Bytes that were looked through for runs, without and with success.
        self._wasted = self._gained = 0
        self._plans: dict[tuple[bytes, ...], bulk.Plan] = {}
        self._known: dict[Global, list[Spelling]] = {}
        self._following: dict[tuple[bytes, ...], re.Pattern[bytes]] = {}
        self._failed: Counter[Global] = Counter()
        self._ints: dict[bytes, int] = {}
        self._sizes: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._texts: dict[bytes, object] = {}
        self._classes: dict[bytes, object] = {}

    def forget(self) -> None:
        """The memo was overwritten: the names that patterns recall may be others now."""
        self.spans.forget()
        self._plans.clear()
        self._known.clear()
        self._texts.clear()
        self._classes.clear()
        self._following.clear()

    def read(self, m: Machine, pos: int) -> int:
        """Read the records from `pos` on, where `OPENING` stands, the class of the first on top of
        the stack. Returns the position after them, or `pos` where they are not of this kind."""
        cls = m.stack[-1]
        if not isinstance(cls, Global) or cls.name in m.handlers:
            return pos
        found = self._match(m, cls, pos)
        if found is None:
            return self.spans.read(m, cls, pos)
        first, match = found
        known = None if first.made is None else first.made.get(match[0])
        if known is None:
            memo: list[object] = []
            made = self._make(m, first, match.groups(), memo)
            if made is None:
                return pos
            known = made, memo
            if first.made is not None and len(first.made) < _MAX_SPELT:
                first.made[match[0]] = known
        m.stack[-1] = known[0]
        m.memo.recent += known[1]
        m.made_nbytes += CALL_NBYTES + TUPLE_NBYTES
        return self._run(m, first, match.end())

    def _run(self, m: Machine, first: Spelling, pos: int) -> int:
        """The records after the first: of its class, or of another class and its own in turn."""
        cycle = self._cycle(m, first, pos)
        if not cycle:
            return pos
        key = tuple(one.source for one in cycle)
        pattern = self._following.get(key)
        if pattern is None:
            source = b"".join(GET + rb"\)" + one.source for one in cycle)
            pattern = self._following[key] = re.compile(source, re.DOTALL)
        alike = first.made if len(cycle) == 1 else None
        count = 0
        in_bulk = self._in_bulk and m.learning < pos
        in_bulk = in_bulk and self._wasted < _MAX_WASTED + 4 * self._gained
        while count < _MAX_RUN and (match := pattern.match(m.data, pos)) is not None:
            known = None if alike is None else alike.get(match[0])
            if known is None:
                memo: list[object] = []
                records = self._made(m, cycle, match.groups(), memo)
                if len(records) < len(cycle):
                    break
                if alike is not None and len(alike) < _MAX_SPELT:
                    alike[match[0]] = records[0], memo
                m.stack.extend(records)
            else:
                m.stack.append(known[0])
                memo = known[1]
            m.memo.recent += memo
            count += len(cycle)
            pos = match.end()
            if in_bulk and count >= _MIN_RUN:
                # Those that a frame cuts off are matched one by one.
                end = self._columns(m, cycle, match.groups(), pos)
                in_bulk = end - pos > _FEW_NBYTES
                pos = end
        m.made_nbytes += count * (CALL_NBYTES + TUPLE_NBYTES)
        m.check_budgets(pos)
        return pos

    def beyond(self, stack: list[object]) -> int:
        """How many more records a stack stands for than it has entries."""
        return self.ledger.extra if stack is self.ledger.stack else 0

    def _columns(
        self, m: Machine, cycle: list[Spelling], groups: tuple[bytes, ...], pos: int
    ) -> int:
        """Read the records from `pos` on as columns; `groups` are those of the ones before. Returns
        the position after them."""
        # The classes are recalled alike: their names were compared in the match before.
        classes = [groups[0]] if len(cycle) == 1 else [groups[0], groups[1 + cycle[0].groups]]
        key = (*classes, *(one.source for one in cycle))
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            plan = self._plans[key] = plan_of(cycle, classes)
        stop = min(m.frame if m.frame > pos else len(m.data), pos + bulk.WINDOW)
        found = bulk.match(m.data, pos, stop, plan, m.memo)
        self._wasted += stop - (pos if found is None else found.end)
        if found is None:
            return pos
        self._gained += found.end - pos
        first = 0
        for one in cycle:
            own = found.columns[first : first + one.groups]
            columns = tuple([one.column(field, own) for field in one.fields])
            alternate = len(cycle) > 1
            m.stack.append(
                Rows(one.cls.name, one.keys, columns, found.count, self.ledger, alternate=alternate)
            )
            first += one.groups
        if self.ledger.stack is not m.stack:
            self.ledger.stack, self.ledger.extra = m.stack, 0
        self.ledger.extra += (found.count - 1) * len(cycle)
        m.memo.skip(found.memoized, found.numbers, found.texts)
        m.made_nbytes += found.count * len(cycle) * (CALL_NBYTES + TUPLE_NBYTES)
        m.check_budgets(found.end)
        return found.end

    def _made(
        self, m: Machine, cycle: list[Spelling], groups: tuple[bytes, ...], memo: list[object]
    ) -> list[Instance]:
        """The records of a match of several, each after its class; fewer where one is not right."""
        records: list[Instance] = []
        start = 0
        for one in cycle:
            cls = self._classes.get(groups[start])
            if cls is None:
                cls = self._classes[groups[start]] = recalled(m, groups[start])
            end = start + 1 + one.groups
            made = self._make(m, one, groups[start + 1 : end], memo) if cls is one.cls else None
            if made is None:
                break
            records.append(made)
            start = end
        return records

    def _cycle(self, m: Machine, first: Spelling, pos: int) -> list[Spelling]:
        """The spellings that follow a record of `first`, up to and with the next of it."""
        raw = get_at(m.data, pos)
        after = pos + len(raw)
        if not raw or m.data[after : after + 1] != b")":
            return []
        cls = recalled(m, raw)
        if cls is first.cls:
            return [first]
        found = self._match(m, cls, after + 1) if isinstance(cls, Global) else None
        return [] if found is None else [found[0], first]

    def _match(self, m: Machine, cls: Global, pos: int) -> tuple[Spelling, re.Match[bytes]] | None:
        """The spelling of the record at `pos`, learnt from it if it is new."""
        known = self._known.setdefault(cls, [])
        for spelling in known:
            match = spelling.pattern.match(m.data, pos)
            if match is not None:
                return spelling, match
        if len(known) >= _MAX_SPELLINGS or self._failed[cls] >= _MAX_LESSONS:
            return None
        learnt = learn(m, cls, pos)
        match = None if learnt is None else learnt.pattern.match(m.data, pos)
        if learnt is None or match is None:
            self._failed[cls] += 1
            return None
        known.append(learnt)
        return learnt, match

    def _make(
        self, m: Machine, one: Spelling, groups: tuple[bytes, ...], memo: list[object]
    ) -> Instance | None:
        """The record that a match spells; `memo` gets what its opcodes put into the memo."""
        values: list[object] = []
        place = len(memo)
        memo += (None, LEFT_OUT)
        for kind, first, last, constant in one.fields:
            if kind == IS_SIZE:
                try:
                    numbers = tuple([self._ints[group] for group in groups[first:last]])
                except KeyError:
                    numbers = tuple([self._int(group) for group in groups[first:last]])
                size = self._sizes.get(numbers)
                if size is None:
                    if numbers and min(numbers) < 0:
                        return None  # the opcodes say what is wrong with it
                    size = numbers
                    if len(self._sizes) < _MAX_KNOWN:
                        self._sizes[size] = size
                if first < last:
                    memo.append(LEFT_OUT)
                memo += (LEFT_OUT, size)
                values.append(size)
            elif kind == IS_INT:
                group = groups[first]
                known = self._ints.get(group)
                values.append(self._int(group) if known is None else known)
            elif kind == IS_TEXT:
                group = groups[first]
                value = _text(group) if group[0] == 0x8C else self._recalled_text(m, group)
                if type(value) is not str:
                    return None
                if group[0] == 0x8C:
                    memo.append(value)
                values.append(value)
            else:
                values.append(constant)
        made = Instance(one.cls.name, one.keys, tuple(values))
        memo[place] = made
        return made

    def _recalled_text(self, m: Machine, raw: bytes) -> object:
        """What an opcode recalls. Files' names are recalled for each of their items."""
        value = self._texts.get(raw)
        if value is None:
            value = recalled(m, raw)
            if type(value) is str:
                if len(self._texts) >= _MAX_TEXTS:
                    self._texts.clear()
                self._texts[raw] = value
        return value

    def _int(self, raw: bytes) -> int:
        """The number that an opcode pushes. Of BININT and LONG1 with a sign."""
        code = raw[0]
        number = int.from_bytes(
            raw[2:] if code == 0x8A else raw[1:], "little", signed=code in (0x4A, 0x8A)
        )
        if len(self._ints) < _MAX_SPELT:
            self._ints[raw] = number
        return number


def _text(raw: bytes) -> str | None:
    """The string that SHORT_BINUNICODE and MEMOIZE spell; None where they do not."""
    if len(raw) != raw[1] + 3:
        return None
    try:
        return raw[2:-1].decode()
    except UnicodeDecodeError:
        return None  # the opcode may still know what to make of it
