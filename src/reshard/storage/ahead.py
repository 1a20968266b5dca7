"""Read objects ahead, so that neighbouring bytes become one request.

Headers are read in small steps, and weights in blocks of 1 to 4 MiB, front to back. A reader that
continues where a request ended gets twice as much with the next request, up to `_MOST`; from then
on, the following bytes are requested before they are needed. Up to `_KEPT` bytes that nobody used
yet are kept.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from reshard.errors import IncompleteError, ReshardError

# Bytes of the first request at a place, and of the largest request of a reader that continues.
_FIRST, _MOST = 128 << 10, 4 << 20
# Requests of `_MOST` bytes that are made before they are needed, for all readers together.
_DEPTH, _AT_ONCE = 2, 8
# Bytes of a stretch that is kept even once all of it was used.
_HEADER = 1 << 20
# Bytes that are kept of what was read ahead, in all files together.
_KEPT = 48 << 20


class Readable(Protocol):
    """An object that is read by ranges."""

    @property
    def path(self) -> Path: ...

    @property
    def nbytes(self) -> int: ...

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes `[start, stop)`, by one request."""


@lru_cache(1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="reshard-ahead")


class _Kept:
    """Stretches of objects that were read ahead, the last used last. Safe to use from threads."""

    def __init__(self, nbytes: int) -> None:
        self._most = nbytes
        self._held = 0
        self._all: OrderedDict[tuple[int, int], tuple[Ahead, memoryview]] = OrderedDict()
        self.lock = threading.Lock()

    @property
    def full(self) -> bool:
        """Whether no more may be requested before it is needed."""
        return self._held > self._most // 2

    def put(self, owner: Ahead, start: int, data: memoryview) -> None:
        """Keep a stretch; call with the lock held."""
        self._all[id(owner), start] = owner, data
        owner.stretches[start] = data
        self._held += len(data)
        while self._held > self._most and len(self._all) > 1:
            (_, first), (other, old) = self._all.popitem(last=False)
            other.stretches.pop(first, None)
            self._held -= len(old)

    def drop(self, owner: Ahead, start: int) -> None:
        """Forget a stretch; call with the lock held."""
        found = self._all.pop((id(owner), start), None)
        if found is not None:
            owner.stretches.pop(start, None)
            self._held -= len(found[1])


_kept = _Kept(_KEPT)


class Ahead:
    """What was read of one object and not yet used, and where its readers are expected next."""

    def __init__(self) -> None:
        self.stretches: dict[int, memoryview] = {}
        self._expected: OrderedDict[int, int] = OrderedDict()
        self._coming: dict[int, int] = {}
        self._triggers: dict[int, int] = {}
        self._arrived = threading.Condition(_kept.lock)

    def read_into(self, opened: Readable, offset: int, buffer: memoryview) -> None:
        """Fill a buffer, by what is kept and by new requests."""
        done = 0
        while done < len(buffer):
            at = offset + done
            with self._arrived:
                there = self._take(at, len(buffer) - done)
                self._ask_for(opened, self._following(at, opened.nbytes))
                if there is None and any(
                    start <= at < stop for start, stop in self._coming.items()
                ):
                    self._arrived.wait()
                    continue
                if there is None:
                    needed, nbytes = len(buffer) - done, opened.nbytes
                    stop = self._reach(at, needed, nbytes, opened.path)
                    self._coming[at] = stop
                    self._ask_for(opened, self._following(at, nbytes))
            if there is None:
                self._fetch(opened, at, stop)
            else:
                buffer[done : done + len(there)] = there
                done += len(there)

    def _take(self, at: int, nbytes: int) -> memoryview | None:
        """What is kept from `at` on, at most `nbytes` bytes."""
        for start, data in self.stretches.items():
            if start <= at < start + len(data):
                there = data[at - start : at - start + nbytes]
                # Weights are read once, headers again and again.
                if at + len(there) == start + len(data) and len(data) > _HEADER:
                    _kept.drop(self, start)
                return there
        return None

    def _reach(self, at: int, needed: int, nbytes: int, path: Path) -> int:
        """Where a request from `at` on ends; a reader that continues gets twice as much each
        time."""
        if at >= nbytes:
            raise IncompleteError(
                f"the object ends at byte {nbytes}; bytes to {at + needed} are needed.",
                path=path,
                hint="The file was truncated; copy it again or use another checkpoint.",
            )
        window = self._expected.pop(at, _FIRST)
        stop = min(at + max(min(needed, 2 * _MOST), window), nbytes)
        # Not beyond what is kept or comes already.
        others = [*self.stretches, *self._coming]
        stop = min([stop, *(start for start in others if start > at)])
        if window == _MOST and stop == at + _MOST:  # it has read on for a while, and will continue
            self._triggers[at] = stop
        self._expected[stop] = min(2 * max(window, needed), _MOST)
        while len(self._expected) > 64:
            self._expected.popitem(last=False)
        return stop

    def _following(self, at: int, nbytes: int) -> list[tuple[int, int]]:
        """What to request before it is needed, for a reader that continues at `at`."""
        start = self._triggers.pop(at, None)
        ranges: list[tuple[int, int]] = []
        while start is not None and start < min(at + (1 + _DEPTH) * _MOST, nbytes):
            stop = min(start + _MOST, nbytes)
            taken = [*self.stretches, *self._coming]
            if _kept.full or any(start <= other < stop for other in taken):
                break
            self._coming[start] = stop
            ranges.append((start, stop))
            start = stop
        if ranges:  # the end of the last one is where to go on
            end = ranges[-1][1]
            self._expected[end] = _MOST
            self._triggers.update((first, end) for first, _ in ranges)
        return ranges

    def _ask_for(self, opened: Readable, stretches: list[tuple[int, int]]) -> None:
        for start, stop in stretches:
            _pool().submit(self._fetch_ahead, opened, start, stop)

    def _fetch_ahead(self, opened: Readable, at: int, stop: int) -> None:
        # The reader that needs these bytes requests them again, and gets the error.
        with suppress(ReshardError):
            self._fetch(opened, at, stop)

    def _fetch(self, opened: Readable, at: int, stop: int) -> None:
        try:
            data = opened.read(at, stop)
        except BaseException:
            with self._arrived:
                del self._coming[at]
                self._arrived.notify_all()
            raise
        with self._arrived:
            del self._coming[at]
            _kept.put(self, at, data)
            self._arrived.notify_all()
