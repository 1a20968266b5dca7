"""Checking a file's own CRC-32s while its bytes pass, in whatever order they are read.

A zip archive states one checksum for each stored tensor; the engine reads a tensor in blocks, from
several threads, and may skip padding. The ledger keeps the checksum of each run of bytes that was
read, joins those that touch, and in the end combines them, reading only what was not read yet.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

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


class _Bare(Struct):
    """Bytes `[start, stop)` without a stated checksum."""

    start: int
    stop: int
    read: bool = False


#: Bytes `[start, stop)` of a file that were read, as a part of a record, and their CRC-32.
PassedRun = tuple[FileRef, int, int, int]


class _Passed(Struct):
    """What was read of one record: `runs`, in file order, that neither overlap nor touch.

    Pieces that touch become one run, so their number does not grow with what is read.
    """

    record: Record
    runs: list[_Run] = field(default_factory=list)
    # Whether runs are among them that this run did not read.
    noted: bool = False

    @property
    def start(self) -> int:
        return self.record.extent.offset

    @property
    def stop(self) -> int:
        return self.record.extent.offset + self.record.extent.nbytes

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


class Ledger:
    """The records of a checkpoint and what has been read of them. Safe to use from threads.

    `bare` are stretches outside records; the ledger notes only that they were read.
    """

    def __init__(self, records: Iterable[Record], bare: Iterable[Extent] = ()) -> None:
        self._files: dict[FileRef, list[_Passed | _Bare]] = {}
        for record in records:
            self._files.setdefault(record.extent.file, []).append(_Passed(record))
        for extent in bare:
            stretch = _Bare(extent.offset, extent.offset + extent.nbytes)
            self._files.setdefault(extent.file, []).append(stretch)
        for passed in self._files.values():
            passed.sort(key=lambda item: item.start)
        self._starts = {
            file: [item.start for item in passed] for file, passed in self._files.items()
        }
        self._lock = threading.Lock()

    def add(self, extent: Extent, data: memoryview) -> PassedRun | None:
        """Note that `data` was read from `extent`; returns the part that counts for a record."""
        passed = self._holding(extent)
        if isinstance(passed, _Bare):
            passed.read = True
        if not isinstance(passed, _Passed):
            return None
        run = _Run(extent.offset, extent.offset + extent.nbytes, zlib_ng.crc32(data))
        with self._lock:
            passed.add(run)
        return extent.file, *run

    def add_noted(self, runs: Sequence[PassedRun]) -> bool:
        """Note what an earlier run read; False where a run lies in no record: nothing is noted."""
        found = self._held(runs)
        if found is None:
            return False
        with self._lock:
            for passed, run in found:
                passed.add(run)
                passed.noted = True
        return True

    def add_read(self, runs: Sequence[PassedRun]) -> None:
        """Note what another process read of records, for this run."""
        with self._lock:
            for passed, run in self._held(runs) or ():
                passed.add(run)

    def hold(self, runs: Sequence[PassedRun]) -> bool:
        """Whether each of these lies in a record."""
        return self._held(runs) is not None

    def record_around(self, extent: Extent) -> Extent | None:
        """The record that an extent lies in."""
        passed = self._holding(extent)
        return passed.record.extent if isinstance(passed, _Passed) else None

    def _held(self, runs: Sequence[PassedRun]) -> list[tuple[_Passed, _Run]] | None:
        """The records that these lie in; None where one lies in none."""
        found = []
        for file, start, stop, crc in runs:
            passed = self._holding(Extent(file, start, stop - start))
            if not isinstance(passed, _Passed):
                return None
            found.append((passed, _Run(start, stop, crc)))
        return found

    def add_bare(self, extents: Iterable[Extent]) -> None:
        """Note that an earlier run read these, as far as no checksum is stated of them."""
        for extent in extents:
            passed = self._holding(extent)
            if isinstance(passed, _Bare):
                passed.read = True

    def _holding(self, extent: Extent) -> _Passed | _Bare | None:
        """The stretch that an extent lies in."""
        starts = self._starts.get(extent.file)
        if starts is None or not extent.nbytes:
            return None
        passed = self._files[extent.file][bisect.bisect_right(starts, extent.offset) - 1]
        inside = passed.start <= extent.offset and extent.offset + extent.nbytes <= passed.stop
        return passed if inside else None

    def check(self, sources: Sources) -> Checked:
        """Compare every record of which anything substantial was read.

        Raises `FormatError` for the first that differs.
        """
        compared = unchecked = 0
        for passed in (item for items in self._files.values() for item in items):
            if isinstance(passed, _Bare):
                unchecked += passed.read
                continue
            extent = passed.record.extent
            read = sum(run.stop - run.start for run in passed.runs)
            if not read or read < _WORTH_COMPLETING * extent.nbytes:
                unchecked += bool(read)
                continue
            found = _combined(passed, sources)
            if found != passed.record.crc32 and passed.noted:
                found = _combined(_Passed(passed.record), sources)  # what was noted may be wrong
            if found != passed.record.crc32:
                raise FormatError(
                    f"bytes {extent.offset} to {extent.offset + extent.nbytes} have CRC-32 "
                    f"{found:08x}; the file itself says {passed.record.crc32:08x}.",
                    path=extent.file.path,
                    hint="The file was damaged after it was saved; copy it again.",
                )
            compared += 1
        return Checked(compared, unchecked)


def join(runs: list[PassedRun], run: PassedRun) -> None:
    """Append a run to others, or join it to the last where it begins there."""
    if runs and (runs[-1][0], runs[-1][2]) == run[:2]:
        file, *last = runs.pop()
        run = (file, *_Run(*last).then(_Run(*run[1:])))
    runs.append(run)


def without_checksum(entries: Iterable[Entry], records: Iterable[Record]) -> list[Extent]:
    """The stretches of files that tensors lie in and no record holds, each once; those that overlap
    are one. Of tensors that are cut out of flat ones, the flat ones."""
    files: dict[FileRef, list[tuple[int, int, int]]] = {}
    for record in records:
        where = record.extent
        span = (where.offset, -(where.offset + where.nbytes), 0)
        files.setdefault(where.file, []).append(span)
    for extent in regions(entries):
        if extent.nbytes:
            span = (extent.offset, -(extent.offset + extent.nbytes), 1)
            files.setdefault(extent.file, []).append(span)
    bare: list[Extent] = []
    for file, spans in files.items():
        protected = start = stop = 0
        # Of those that begin together the longest first, a record before what lies in it.
        for begin, end, inside in sorted(spans):
            if not inside:
                protected = max(protected, -end)
            elif -end <= protected or -end <= stop:
                continue
            elif begin < stop:
                stop = -end
                bare[-1] = Extent(file, start, stop - start)
            else:
                start, stop = begin, -end
                bare.append(Extent(file, start, stop - start))
    return bare


def _combined(passed: _Passed, sources: Sources) -> int:
    """The CRC-32 of the whole record, from its runs; the gaps between them are read now."""
    extent = passed.record.extent
    source = sources.open(extent.file)
    end = extent.offset + extent.nbytes
    whole = _Run(extent.offset, extent.offset, 0)
    for run in (*passed.runs, _Run(end, end, 0)):
        while whole.stop < run.start:
            stop = min(run.start, whole.stop + _PIECE)
            gap = source.read(whole.stop, stop - whole.stop)
            whole = whole.then(_Run(whole.stop, stop, zlib_ng.crc32(gap)))
        whole = whole.then(run)
    return whole.crc
