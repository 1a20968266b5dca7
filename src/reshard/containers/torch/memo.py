"""What a pickle may recall, by number.

A pickler numbers nearly every object that it writes, of a DCP checkpoint 25 for each tensor, and
recalls few: names, sizes, the kinds of things. While a table is read whose items are taken apart as
they come (`Compactor`), only those are kept; a pickle that recalls another is read again, with all
of it kept (`RecalledError`).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence, Set
from itertools import compress
from typing import Protocol

from reshard.containers.torch.records import Global, Opaque, Shared
from reshard.core.dtypes import DType
from reshard.core.tensors import MAX_DIMS

#: Stands for a value that is not kept.
LEFT_OUT = object()
# Arguments, or items of a state, of a record that may be shared, and characters of a text in it.
_MAX_SHARED, _MAX_TEXT = 8, 256
# Values that are found without a search.
_EARLY = 256
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

    __slots__ = ("_calls", "_early", "_numbers", "_pruned", "_sizes", "_values", "recent", "start")

    def __init__(self) -> None:
        self.start = 0
        self.recent: list[object] = []
        # Names of classes and fields, which every record recalls.
        self._early: list[object] = []
        # Those that are kept of the others; `forget` has not yet seen those from `_pruned` on.
        self._numbers = array("I")
        self._values: list[object] = []
        self._pruned = 0
        self._sizes: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._calls: dict[object, Shared] = {}

    def __len__(self) -> int:
        return self.start + len(self.recent)

    def __getitem__(self, number: int) -> object:
        """The value; `LEFT_OUT` if it is not kept. Raises `IndexError` where there is none."""
        place = number - self.start
        if place >= 0:
            return self.recent[place]
        return self._early[number] if number < len(self._early) else self._old(number)

    def _old(self, number: int) -> object:
        """A value that is not among the recent ones."""
        at = bisect_left(self._numbers, number)
        found = at < len(self._numbers) and self._numbers[at] == number
        return self._values[at] if found else LEFT_OUT

    def skip(self, count: int, numbers: Iterable[int], values: Iterable[object]) -> None:
        """Pass over `count` values, and keep these of them, which have these numbers."""
        self._shelve()
        self._numbers.extend(numbers)
        self._values += values
        self.start += count

    def settle(self, first: int) -> list[object] | None:
        """Keep of the values from number `first` on only what nothing changes any more; returns
        them in their order, None where they are not all recent."""
        at = first - self.start
        if at < 0:
            return None
        kept = [
            self._kept(value, None) if type(value) in _KEPT else LEFT_OUT
            for value in self.recent[at:]
        ]
        self.recent[at:] = kept
        return kept

    def forget(self, compactor: Compactor, since: int) -> None:
        """Keep of all values only texts, names, sizes and records that many things share.

        Of the records, those from number `since` on: others may still be set.
        """
        self._shelve()
        first = self._pruned
        at = max(bisect_left(self._numbers, since), first)
        numbers, values = self._numbers[first:], self._values[first:]
        del self._numbers[first:], self._values[first:]
        self._keep(numbers[: at - first], values[: at - first], compactor, _KEPT - {Opaque})
        self._keep(numbers[at - first :], values[at - first :], compactor, _KEPT)
        self._pruned = len(self._values)
        if len(self._early) < _EARLY:
            self._early += [self._old(n) for n in range(len(self._early), min(_EARLY, self.start))]

    def _shelve(self) -> None:
        """Put the recent values that are there with the older ones."""
        recent = self.recent
        if recent:
            there = [value is not LEFT_OUT for value in recent]
            self._numbers.extend(compress(range(self.start, self.start + len(recent)), there))
            self._values += compress(recent, there)
            self.start += len(recent)
            self.recent = []

    def _keep(
        self,
        numbers: Sequence[int],
        values: list[object],
        compactor: Compactor,
        kinds: Set[type],
    ) -> None:
        """Keep some of these values."""
        wanted = [*map(kinds.__contains__, map(type, values))]
        found = [*compress(values, wanted)]
        # By id, because to find the equal of a long text takes as long as the text.
        different = {id(value): value for value in found}
        kept = {key: self._kept(value, compactor) for key, value in different.items()}
        held = [*map(kept.__getitem__, map(id, found))]
        some: Iterable[int] = compress(numbers, wanted)
        if LEFT_OUT in kept.values():
            there = [value is not LEFT_OUT for value in held]
            some, held = compress(some, there), [*compress(held, there)]
        self._numbers.extend(some)
        self._values += held

    def _kept(self, value: object, compactor: Compactor | None) -> object:
        if type(value) is str:
            return value if compactor is None else compactor.text(value)
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
