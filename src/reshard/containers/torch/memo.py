"""What a pickle may recall, by number.

A pickler numbers nearly every object that it writes, of a DCP checkpoint 25 for each tensor, and
recalls few: names, sizes, the kinds of things. While a table is read whose items are taken apart as
they come (`Compactor`), only those are kept; a pickle that recalls another is read again, with all
of it kept (`RecalledError`).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Set
from itertools import compress
from typing import Protocol

from reshard.containers.torch.records import Global, Opaque, Shared
from reshard.core.dtypes import DType
from reshard.core.tensors import MAX_DIMS

#: Stands for a value that is not kept.
LEFT_OUT = object()
# Arguments, or items of a state, of a record that may be shared, and characters of a text in it.
_MAX_SHARED, _MAX_TEXT = 8, 256
_PLAIN = frozenset({str, int, bool, float, type(None), DType, Global, Shared})
_KEPT = frozenset({str, tuple, DType, Global, Opaque, Shared})
_INT = frozenset({int})


class RecalledError(Exception):
    """The pickle recalls, or changes, a value that was left out."""


class Compactor(Protocol):
    """Takes apart what a pickle sets in its tables, so that a large one is not held as objects."""

    def takes(self, key: object, value: object) -> bool:
        """Whether an item is one of a table that is taken apart."""

    def items(self, table: dict[object, object], flat: list[object]) -> list[object]:
        """What is to be set in the table instead of these keys and values, in turn."""

    def text(self, text: str) -> str:
        """An equal text, which may be held elsewhere already."""


class Memo:
    """The numbered values. Those from number `start` on are in the list `recent`, all of them."""

    __slots__ = ("_calls", "_numbers", "_sizes", "_values", "recent", "start")

    def __init__(self) -> None:
        self.start = 0
        self.recent: list[object] = []
        self._numbers = array("I")
        self._values: list[object] = []
        self._sizes: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._calls: dict[object, Shared] = {}

    def __len__(self) -> int:
        return self.start + len(self.recent)

    def __getitem__(self, number: int) -> object:
        """The value; `LEFT_OUT` if it is not kept. Raises `IndexError` where there is none."""
        place = number - self.start
        if place >= 0:
            return self.recent[place]
        at = bisect_left(self._numbers, number)
        found = at < len(self._numbers) and self._numbers[at] == number
        return self._values[at] if found else LEFT_OUT

    def forget(self, compactor: Compactor, since: int) -> None:
        """Keep of all values only texts, names, sizes and records that many things share.

        Of the records, those from number `since` on: others may still be set.
        """
        at = min(max(since - self.start, 0), len(self.recent))
        self._keep(self.recent[:at], compactor, _KEPT - {Opaque})
        self._keep(self.recent[at:], compactor, _KEPT)
        self.recent = []

    def _keep(self, values: list[object], compactor: Compactor, kinds: Set[type]) -> None:
        """Pass over these values, and keep some of them."""
        # Nearly all others are `LEFT_OUT`, of runs of records.
        wanted = [*map(kinds.__contains__, map(type, values))]
        numbers = compress(range(self.start, self.start + len(values)), wanted)
        found = [*compress(values, wanted)]
        # By id, because to find the equal of a long text takes as long as the text.
        different = {id(value): value for value in found}
        kept = {key: self._kept(value, compactor) for key, value in different.items()}
        for number, value in zip(numbers, map(kept.__getitem__, map(id, found)), strict=True):
            if value is not LEFT_OUT:
                self._numbers.append(number)
                self._values.append(value)
        self.start += len(values)

    def _kept(self, value: object, compactor: Compactor) -> object:
        if type(value) is str:
            return compactor.text(value)
        if type(value) is tuple:
            return self._sizes.setdefault(value, value) if is_size(value) else LEFT_OUT
        return self._shared(value) or LEFT_OUT if type(value) is Opaque else value

    def _shared(self, one: Opaque) -> Shared | None:
        """The record that stands for all equal ones; None of one that holds more than plain values
        and calls with plain arguments."""
        if one.items is not None or not isinstance(one.state, tuple | None):
            return None
        if len(one.args) > _MAX_SHARED or len(one.state or ()) > _MAX_SHARED:
            return None
        state = None if one.state is None else tuple(map(self._shared_call, one.state))
        if not all(map(_is_plain, (*one.args, *(state or ())))):
            return None
        key = (one.name, one.args, state)
        known = self._calls.get(key)
        if known is None:
            known = self._calls[key] = Shared(one.name, one.args, state, None, one.reason)
        return known

    def _shared_call(self, value: object) -> object:
        """A value of a state; of a call that sets nothing, the one that stands for all equal."""
        return self._shared(value) or value if type(value) is Opaque and not value.state else value


def is_size(value: tuple[object, ...]) -> bool:
    """Whether a tuple holds only numbers, as a torch.Size does."""
    return len(value) <= MAX_DIMS and _INT.issuperset(map(type, value))


def _is_plain(value: object) -> bool:
    return type(value) in _PLAIN and not (isinstance(value, str) and len(value) > _MAX_TEXT)
