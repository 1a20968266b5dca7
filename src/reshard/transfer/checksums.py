"""Checking a file's own CRC-32s while its bytes pass, in whatever order they are read.

A zip archive states one checksum for each stored tensor; the engine reads a tensor in blocks, from
several threads, and may skip padding. The ledger keeps the checksum of each run of bytes that was
read, joins those that touch, and in the end combines them, reading only what was not read yet.
"""

from __future__ import annotations

import bisect
import threading
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, overload

from msgspec import Struct, field
from zlib_ng import zlib_ng

from reshard.core.fragments import regions
from reshard.core.tensors import Entry, Extent, FileRef, Record
from reshard.errors import FormatError
from reshard.storage.local import Sources

# A record of which less than this share was read is not read to its end just to be checked.
_WORTH_COMPLETING = 0.5
_PIECE = 4 << 20


class _Run(NamedTuple):
    """Bytes `start` to `stop` of a file, and their CRC-32."""

    start: int
    stop: int
    crc: int

    def then(self, following: _Run) -> _Run:
        """This run and the one that begins where it stops, as one."""
        crc = zlib_ng.crc32_combine(self.crc, following.crc, following.stop - following.start)
        return _Run(self.start, following.stop, crc)


class Checked(NamedTuple):
    """How many stretches of the source's files passed, each a record or a tensor's own bytes.

    `compared` had the checksum that their file states. Of `unchecked` it states none, or too little
    was read to compare it.
    """

    compared: int
    unchecked: int


#: Bytes `[start, stop)` of a file that were read, as a part of a record, and their CRC-32.
PassedRun = tuple[FileRef, int, int, int]


class _Passed(Struct):
    """What was read of one record, partly: `runs`, in file order, that neither overlap nor touch.

    Pieces that touch become one run, so their number does not grow with what is read.
    """

    runs: list[_Run] = field(default_factory=list)
    # Whether runs are among them that this run did not read.
    noted: bool = False

    def add(self, run: _Run) -> None:
        """Note a run; one that overlaps what was read before counts if it holds all of it."""
        first = bisect.bisect_right(self.runs, run.start, key=lambda known: known.stop)
        last = bisect.bisect_left(self.runs, run.stop, key=lambda known: known.start)
        overlapped = self.runs[first:last]
        if overlapped and (overlapped[0].start < run.start or run.stop < overlapped[-1].stop):
            return
        if first > 0 and self.runs[first - 1].stop == run.start:
            first -= 1
            run = self.runs[first].then(run)
        if last < len(self.runs) and self.runs[last].start == run.stop:
            run = run.then(self.runs[last])
            last += 1
        self.runs[first:last] = [run]


# What is known of a stretch: nothing; that it was read (what of a record: see `_File.passed`); that
# this run read a record from end to end, and its CRC-32.
_UNREAD, _READ, _WHOLE = range(3)


class _File:
    """The stretches of one file, in its order, as columns: a checkpoint may have 600,000.

    A record has a checksum; a bare stretch, of which the file states none, has not.
    """

    def __init__(self) -> None:
        self.starts = array("Q")
        self.stops = array("Q")
        self.stated = array("I")
        self.found = array("I")
        self.bare = bytearray()
        self.known = bytearray()
        self.passed: dict[int, _Passed] = {}

    def add(self, start: int, stop: int, crc32: int | None) -> None:
        """Append a stretch."""
        self.starts.append(start)
        self.stops.append(stop)
        self.stated.append(crc32 or 0)
        self.found.append(0)
        self.bare.append(crc32 is None)
        self.known.append(_UNREAD)

    def sort(self) -> None:
        """Put the stretches in the file's order, before anything is noted of them."""
        starts = self.starts
        if all(one <= other for one, other in pairwise(starts)):
            return
        order = sorted(range(len(starts)), key=starts.__getitem__)
        self.starts = array("Q", [starts[at] for at in order])
        self.stops = array("Q", [self.stops[at] for at in order])
        self.stated = array("I", [self.stated[at] for at in order])
        self.bare = bytearray([self.bare[at] for at in order])

    def holding(self, start: int, stop: int) -> int | None:
        """The stretch that bytes `[start, stop)` lie in."""
        if start >= stop:
            return None
        at = bisect.bisect_right(self.starts, start) - 1
        inside = at >= 0 and stop <= self.stops[at]
        return at if inside else None

    def note(self, at: int, run: _Run, *, noted: bool = False) -> None:
        """Note a run of a record; with `noted`, one that this run did not read."""
        whole = _Run(self.starts[at], self.stops[at], self.found[at])
        passed = self.passed.get(at)
        if passed is None:
            passed = _Passed([whole] if self.known[at] == _WHOLE else [])
        passed.add(run)
        passed.noted = passed.noted or noted
        first = passed.runs[0]
        if passed.noted or first[:2] != whole[:2]:
            self.passed[at], self.known[at] = passed, _READ
        else:
            self.found[at], self.known[at] = first.crc, _WHOLE
            self.passed.pop(at, None)

    def runs(self, at: int) -> list[_Run]:
        """What was read of a record."""
        if self.known[at] == _WHOLE:
            return [_Run(self.starts[at], self.stops[at], self.found[at])]
        return self.passed[at].runs if at in self.passed else []


class Ledger:
    """The records of a checkpoint and what has been read of them. Safe to use from threads.

    `bare` are stretches outside records; the ledger notes only that they were read.
    """

    def __init__(self, records: Iterable[Record], bare: Iterable[Extent] = ()) -> None:
        self._files: dict[FileRef, _File] = {}
        for record in records:
            self._add(record.extent, record.crc32)
        for extent in bare:
            self._add(extent, None)
        for file in self._files.values():
            file.sort()
        self._lock = threading.Lock()

    def _add(self, extent: Extent, crc32: int | None) -> None:
        file = self._files.get(extent.file)
        if file is None:
            file = self._files[extent.file] = _File()
        file.add(extent.offset, extent.offset + extent.nbytes, crc32)

    def add(self, extent: Extent, data: memoryview) -> PassedRun | None:
        """Note that `data` was read from `extent`; returns the part that counts for a record."""
        file, at = self._holding(extent)
        if file is None:
            return None
        if file.bare[at]:
            file.known[at] = _READ
            return None
        run = _Run(extent.offset, extent.offset + extent.nbytes, zlib_ng.crc32(data))
        with self._lock:
            file.note(at, run)
        return extent.file, *run

    def add_noted(self, runs: Sequence[PassedRun]) -> bool:
        """Note what an earlier run read; False where a run lies in no record: nothing is noted."""
        found = self._held(runs)
        if found is None:
            return False
        with self._lock:
            for file, at, run in found:
                file.note(at, run, noted=True)
        return True

    def add_read(self, runs: Sequence[PassedRun]) -> None:
        """Note what another process read of records, for this run."""
        with self._lock:
            for file, at, run in self._held(runs) or ():
                file.note(at, run)

    def hold(self, runs: Sequence[PassedRun]) -> bool:
        """Whether each of these lies in a record."""
        return self._held(runs) is not None

    def record_around(self, extent: Extent) -> Extent | None:
        """The record that an extent lies in."""
        file, at = self._holding(extent)
        if file is None or file.bare[at]:
            return None
        return Extent(extent.file, file.starts[at], file.stops[at] - file.starts[at])

    def _held(self, runs: Sequence[PassedRun]) -> list[tuple[_File, int, _Run]] | None:
        """The records that these lie in; None where one lies in none."""
        found = []
        for ref, start, stop, crc in runs:
            file, at = self._holding(Extent(ref, start, stop - start))
            if file is None or file.bare[at]:
                return None
            found.append((file, at, _Run(start, stop, crc)))
        return found

    def add_bare(self, extents: Iterable[Extent]) -> None:
        """Note that an earlier run read these, as far as no checksum is stated of them."""
        for extent in extents:
            file, at = self._holding(extent)
            if file is not None and file.bare[at]:
                file.known[at] = _READ

    def _holding(self, extent: Extent) -> tuple[_File, int] | tuple[None, int]:
        """The stretch that an extent lies in, by its file and its place there."""
        file = self._files.get(extent.file)
        at = None if file is None else file.holding(extent.offset, extent.offset + extent.nbytes)
        return (None, 0) if file is None or at is None else (file, at)

    def check(self, sources: Sources) -> Checked:
        """Compare every record of which anything substantial was read.

        Raises `FormatError` for the first that differs.
        """
        compared = unchecked = 0
        for ref, file in self._files.items():
            for at, known in enumerate(file.known):
                if known == _UNREAD:
                    continue
                if file.bare[at] or not _checked(ref, file, at, sources):
                    unchecked += 1
                else:
                    compared += 1
        return Checked(compared, unchecked)


def _checked(ref: FileRef, file: _File, at: int, sources: Sources) -> bool:
    """Compare a record, unless too little of it was read. Raises `FormatError`."""
    extent = Extent(ref, file.starts[at], file.stops[at] - file.starts[at])
    runs, stated = file.runs(at), file.stated[at]
    if sum(run.stop - run.start for run in runs) < _WORTH_COMPLETING * extent.nbytes:
        return False
    found = _combined(extent, runs, sources)
    if found != stated and at in file.passed and file.passed[at].noted:
        found = _combined(extent, [], sources)  # what was noted may be wrong
    if found != stated:
        raise FormatError(
            f"bytes {extent.offset} to {extent.offset + extent.nbytes} have CRC-32 "
            f"{found:08x}; the file itself says {stated:08x}.",
            path=extent.file.path,
            hint="The file was damaged after it was saved; copy it again.",
        )
    return True


def join(runs: list[PassedRun], run: PassedRun) -> None:
    """Append a run to others, or join it to the last where it begins there."""
    if runs and (runs[-1][0], runs[-1][2]) == run[:2]:
        file, *last = runs.pop()
        run = (file, *_Run(*last).then(_Run(*run[1:])))
    runs.append(run)


class Stretches(Sequence[Extent]):
    """Stretches of files, as columns of numbers: a checkpoint may have 600,000."""

    def __init__(self) -> None:
        self._files: dict[FileRef, tuple[array[int], array[int]]] = {}

    def add(self, file: FileRef, start: int, stop: int) -> None:
        """Append bytes `[start, stop)` of a file."""
        starts, stops = self._files.setdefault(file, (array("Q"), array("Q")))
        starts.append(start)
        stops.append(stop)

    def lengthen(self, file: FileRef, stop: int) -> None:
        """Let the last stretch of a file end at `stop`."""
        self._files[file][1][-1] = stop

    @property
    def files(self) -> int:
        """How many files they are in."""
        return len({file.path for file in self._files})

    def __len__(self) -> int:
        return sum(len(starts) for starts, _ in self._files.values())

    def __iter__(self) -> Iterator[Extent]:
        for file, (starts, stops) in self._files.items():
            for start, stop in zip(starts, stops, strict=True):
                yield Extent(file, start, stop - start)

    @overload
    def __getitem__(self, index: int) -> Extent: ...

    @overload
    def __getitem__(self, index: slice) -> list[Extent]: ...

    def __getitem__(self, index: int | slice) -> Extent | list[Extent]:
        return [*self][index]


def without_checksum(entries: Iterable[Entry], records: Iterable[Record]) -> Stretches:
    """The stretches of files that tensors lie in and no record holds, each once; those that overlap
    are one. Of tensors that are cut out of flat ones, the flat ones."""
    files: defaultdict[FileRef, _Spans] = defaultdict(_Spans)
    for record in records:
        files[record.extent.file].add(record.extent, bare=False)
    for extent in regions(entries):
        if extent.nbytes:
            files[extent.file].add(extent, bare=True)
    bare = Stretches()
    for file, spans in files.items():
        protected = stop = 0
        for begin, end, inside in spans.sorted():
            if not inside:
                protected = max(protected, end)
            elif end <= protected or end <= stop:
                continue
            elif begin < stop:
                stop = end
                bare.lengthen(file, stop)
            else:
                stop = end
                bare.add(file, begin, stop)
    return bare


class _Spans:
    """Stretches of a file, as columns."""

    def __init__(self) -> None:
        self._begins, self._ends, self._bare = array("Q"), array("Q"), bytearray()

    def add(self, extent: Extent, *, bare: bool) -> None:
        self._begins.append(extent.offset)
        self._ends.append(extent.offset + extent.nbytes)
        self._bare.append(bare)

    def sorted(self) -> Iterator[tuple[int, int, int]]:
        """Where each begins and ends. Of those that begin together the longest first, a record
        (which was added first) before what lies in it."""
        order = sorted(range(len(self._bare)), key=self._ends.__getitem__, reverse=True)
        order.sort(key=self._begins.__getitem__)
        return ((self._begins[at], self._ends[at], self._bare[at]) for at in order)


def _combined(extent: Extent, runs: Sequence[_Run], sources: Sources) -> int:
    """The CRC-32 of a whole record, from its runs; the gaps between them are read now."""
    end = extent.offset + extent.nbytes
    if len(runs) == 1 and runs[0][:2] == (extent.offset, end):
        return runs[0].crc
    source = sources.open(extent.file)
    whole = _Run(extent.offset, extent.offset, 0)
    for run in (*runs, _Run(end, end, 0)):
        while whole.stop < run.start:
            stop = min(run.start, whole.stop + _PIECE)
            gap = source.read(whole.stop, stop - whole.stop)
            whole = whole.then(_Run(whole.stop, stop, zlib_ng.crc32(gap)))
        whole = whole.then(run)
    return whole.crc
