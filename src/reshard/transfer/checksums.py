"""Checking a file's own CRC-32s while its bytes pass, in whatever order they are read.

A zip archive states one checksum for each stored tensor; the engine reads a tensor in blocks, from
several threads, and may skip padding. The ledger keeps the checksum of each piece that was read and
in the end combines them in file order, reading only what nobody has read.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from zlib_ng import zlib_ng

from reshard.errors import FormatError
from reshard.storage import Sources
from reshard.tensors import Extent, FileRef, Record

# A record of which less than this share was read is not read to its end just to be checked.
_WORTH_COMPLETING = 0.5
_PIECE = 4 << 20


@dataclass(slots=True)
class _Passed:
    """The pieces of one record that were read: start -> (end, CRC-32), offsets in the file."""

    record: Record
    pieces: dict[int, tuple[int, int]] = field(default_factory=dict)


class Ledger:
    """The records of a checkpoint and what has been read of them. Safe to use from threads."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._files: dict[FileRef, list[_Passed]] = {}
        for record in records:
            self._files.setdefault(record.extent.file, []).append(_Passed(record))
        for passed in self._files.values():
            passed.sort(key=lambda item: item.record.extent.offset)
        self._starts = {
            file: [item.record.extent.offset for item in passed]
            for file, passed in self._files.items()
        }
        self._lock = threading.Lock()

    def add(self, extent: Extent, data: memoryview) -> None:
        """Note that `data` was read from `extent`."""
        starts = self._starts.get(extent.file)
        if starts is None or not extent.nbytes:
            return
        passed = self._files[extent.file][bisect.bisect_right(starts, extent.offset) - 1]
        checked = passed.record.extent
        stop = extent.offset + extent.nbytes
        if not checked.offset <= extent.offset < stop <= checked.offset + checked.nbytes:
            return
        crc = zlib_ng.crc32(data)
        with self._lock:
            known = passed.pieces.get(extent.offset)
            if known is None or known[0] < stop:
                passed.pieces[extent.offset] = (stop, crc)

    def check(self, sources: Sources) -> int:
        """Compare every record of which anything substantial was read; returns how many.

        Raises `FormatError` for the first that differs.
        """
        checked = 0
        for passed in (item for items in self._files.values() for item in items):
            extent = passed.record.extent
            read = sum(stop - start for start, (stop, _) in passed.pieces.items())
            if not read or read < _WORTH_COMPLETING * extent.nbytes:
                continue
            found = _combined(passed, sources)
            if found != passed.record.crc32:
                raise FormatError(
                    f"bytes {extent.offset} to {extent.offset + extent.nbytes} have CRC-32 "
                    f"{found:08x}; the file itself says {passed.record.crc32:08x}.",
                    path=extent.file.path,
                    hint="The file was damaged after it was saved; copy it again.",
                )
            checked += 1
        return checked


def _combined(passed: _Passed, sources: Sources) -> int:
    """The CRC-32 of the whole record, from its pieces; the gaps between them are read now."""
    extent = passed.record.extent
    source = sources.open(extent.file)
    position, end, crc = extent.offset, extent.offset + extent.nbytes, 0
    starts = sorted(passed.pieces)
    while position < end:
        piece = passed.pieces.get(position)
        if piece is None:
            following = bisect.bisect_right(starts, position)
            gap_end = starts[following] if following < len(starts) else end
            stop = min(gap_end, position + _PIECE)
            piece = (stop, zlib_ng.crc32(source.read(position, stop - position)))
        stop, piece_crc = piece
        crc = zlib_ng.crc32_combine(crc, piece_crc, stop - position)
        position = stop
    return crc
