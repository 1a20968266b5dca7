"""Making a segment of a piece: read and cast, examine, compare, write, hash, block by block.

Memory of a maker: `_BLOCK` and `_SCRATCH` bytes, four times as many for blocks once it met a tensor
that is stored in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import xxhash
from msgspec import Struct
from zlib_ng import zlib_ng

from reshard.core.fragments import strided
from reshard.core.plan import Slot
from reshard.storage.local import Sources
from reshard.transfer.changes import differs
from reshard.transfer.checksums import Ledger, PassedRun
from reshard.transfer.fill import Array, Reader, fill, page_aligned
from reshard.transfer.finite import NotFinite, spoilt
from reshard.transfer.pieces import Run

# Bytes of an output block. 4 MiB of source and output stay in a core's cache; twice as much is no
# faster, half as much costs 10% in calls.
_BLOCK = 4 << 20
# A tensor stored in another order is read over and over, once a block: fewer, larger blocks.
_STRIDED_BLOCK = 4 * _BLOCK
_SCRATCH = 2 * _BLOCK
#: What a maker holds, and once it met a tensor that is stored in another order.
MAKER_NBYTES = _BLOCK + _SCRATCH
STRIDED_MAKER_NBYTES = _STRIDED_BLOCK + 4 * _SCRATCH

#: Writes bytes at an offset of the output file that a segment lies in.
Put = Callable[[memoryview, int], None]
#: Fills a buffer with bytes of a file from an offset on. Raises `OSError`.
ReadAt = Callable[[memoryview, int], None]


class SegmentResult(Struct, frozen=True, array_like=True):
    """What making a segment showed; a worker of a cluster sends it as it is.

    `crc` is the CRC-32 of its `nbytes` bytes, 0 where none is asked for; `changed` whether it
    differs from the slot's reference; `special` counts values that cannot be right.
    """

    nbytes: int
    crc: int = 0
    changed: bool = False
    special: NotFinite = NotFinite()


class Maker:
    """Makes segments, one after another; one a thread. `ledger` notes what is read of the
    source."""

    def __init__(self, sources: Sources, ledger: Ledger) -> None:
        scratch = page_aligned(_SCRATCH).data
        self._reader = Reader(sources, ledger, scratch, passed=[])
        # The base model's bytes have no checksums and are not counted.
        self._references = Reader(sources, Ledger(()), scratch)
        self.buffer: Array = page_aligned(_BLOCK)

    @property
    def bytes_read(self) -> int:
        return self._reader.bytes_read

    def make(
        self,
        slot: Slot,
        runs: Sequence[Run],
        hasher: xxhash.xxh3_128,
        put: Put,
        *,
        changed: bool = False,
    ) -> SegmentResult:
        """Make what `runs` are of a slot. `changed`: it is known that the tensor differs."""
        itemsize = slot.spec.dtype.itemsize

        def made(run: Run) -> Array:
            raw = self._fill(slot, run, itemsize)
            put(raw.data, slot.offset + run.start * itemsize)
            return raw

        return self._passed(slot, runs, hasher, made, changed=changed)

    def find(
        self,
        slot: Slot,
        runs: Sequence[Run],
        hasher: xxhash.xxh3_128,
        read: ReadAt,
        *,
        changed: bool = False,
    ) -> SegmentResult:
        """The same for bytes that the output's file already holds. Raises what `read` does."""
        itemsize = slot.spec.dtype.itemsize

        def found(run: Run) -> Array:
            raw = self.buffer[: run.numel * itemsize]
            read(raw.data, slot.offset + run.start * itemsize)
            return raw

        return self._passed(slot, runs, hasher, found, changed=changed)

    def read(self) -> list[PassedRun]:
        """What was read of records since this was last called."""
        passed, self._reader.passed = self._reader.passed, []
        return passed or []

    def _passed(
        self,
        slot: Slot,
        runs: Sequence[Run],
        hasher: xxhash.xxh3_128,
        bytes_of: Callable[[Run], Array],
        *,
        changed: bool,
    ) -> SegmentResult:
        """What the bytes of `runs` show as they pass."""
        if strided(slot.source) and len(self.buffer) < _STRIDED_BLOCK:
            self.buffer = page_aligned(_STRIDED_BLOCK)
        crc = nbytes = 0
        special = NotFinite()
        for run in runs:
            raw = bytes_of(run)
            found = spoilt(raw, slot.spec)
            if found:
                special += found
            if slot.reference is not None and not changed:
                changed = differs(slot, run.start, raw, self._references)
            hasher.update(raw.data)
            if slot.crcs:
                crc = zlib_ng.crc32(raw.data, crc)
            nbytes += len(raw)
        return SegmentResult(nbytes, crc, changed, special)

    def _fill(self, slot: Slot, run: Run, itemsize: int) -> Array:
        """The bytes of a run, in the buffer."""
        whole = self.buffer[: run.box.numel * itemsize]
        fill(slot.source, run.box, whole.view(slot.spec.dtype.numpy), self._reader)
        return whole[run.skip * itemsize : (run.skip + run.numel) * itemsize]


def block_numel(slot: Slot) -> int:
    """Elements of a block of a slot."""
    return (_STRIDED_BLOCK if strided(slot.source) else _BLOCK) // slot.spec.dtype.itemsize
